"""Which tokens of a prompt skip which blocks.

    python analysis/skips.py --schedule out/schedule_ft.json --router out/router.safetensors
    python analysis/skips.py --prompt "Why is the sky blue?" --router static

In: a model, its schedule and router, and a prompt. Out: skips.png, the prompt's text shaded by how
many blocks each token skips and the map of tokens and blocks, and the decisions in skips.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch

from analysis.style import plt, save
from lib.data import load_samples, load_tokenizer, render
from lib.files import check, save_json
from lib.skips import prefill_with_map
from lib.stage import Parser, run, start, whole

LINE = 96            # characters of a line of the text
SHADES = "Blues_r"   # dark: all blocks computed; light: many skipped


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("prompt").add_argument
    add("--prompt", default=None, help="an instruction; default: the longest held-out one")
    add("--longest", default=160, type=whole("[1, inf)"),
        help="longest held-out prompt shown, tokens")

    add = p.add_argument_group("routing").add_argument
    add("--schedule", default=None,
        help="schedule of stage 1 or 3; default: an exported --model's own, else "
             "out/schedule_ft.json")
    add("--router", default=None,
        help="router of stage 2, or static, random, attention; default: an exported --model's own, "
             "else out/router.safetensors")
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or the router's own decision")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was trained with")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the figure")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of a random selection")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def set_routing(args, model):
    """Route by the flags, or as an exported folder says where it brings its own; tell which."""
    own = model.routing.schedule is not None and args.schedule is None and args.router is None
    if own:
        settings = ("prefill", "kv", "one_pass", "forecaster", "mismatch")
        given = [k for k in settings if k in args.typed]
        check(not given, f"--{', --'.join(given)}: {args.model} brings its own routing, which this "
                         "does not change; give --schedule and --router too")
    else:
        model.use(args.schedule or "out/schedule_ft.json", args.router or "out/router.safetensors",
                  prefill=args.prefill, kv=args.kv, one_pass=args.one_pass,
                  forecaster=args.forecaster, mismatch=args.mismatch, seed=args.seed)
    r = model.routing
    router = f"router {r.router.id}" if r.learned else f"{r.router} router"
    print(f"{'the folder brings' if own else 'in use:'} schedule {r.schedule.id} of mean sparsity "
          f"{r.schedule.mean:.3f}, {router}")


def pick_prompt(args, model, tokenizer):
    """The prompt's ids: the one asked for, else the longest held-out one that fits."""
    if args.prompt is not None:
        return render(tokenizer, args.prompt)
    routing = model.routing
    model.use()      # where no answers are stored yet, the dense model writes them
    samples = load_samples("self", model, tokenizer, "heldout", max_prompt=args.longest)
    check(samples, f"--longest {args.longest}: no held-out prompt is that short; give a larger one")
    model.routing = routing
    return max((prompt for prompt, _ in samples), key=len)


def wrapped(words):
    """Places of words in lines of LINE characters: [(column, line)], and the number of lines."""
    places, column, line = [], 0, 0
    for word in words:
        if column and column + len(word) > LINE:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(word)
        if word.endswith("\\n"):
            column, line = 0, line + 1
    return places, line + 1


def draw_text(axis, words, skipped):
    """The prompt as text, each token on a shade of how many blocks it skips, (T,) in [0, 1]."""
    places, lines = wrapped(words)
    shades, most = plt.get_cmap(SHADES), max(float(skipped.max()), 1e-9)
    for word, (column, line), share in zip(words, places, skipped.tolist()):
        ground = shades(share / most)
        bright = 0.3 * ground[0] + 0.6 * ground[1] + 0.1 * ground[2]
        axis.add_patch(plt.Rectangle((column, line - 0.5), len(word), 1, color=ground, lw=0))
        for i, letter in enumerate(word):      # one by one: whatever the font, they stay in place
            axis.text(column + i + 0.5, line, letter, ha="center", va="center", family="monospace",
                      fontsize=7, color="black" if bright > 0.5 else "white", parse_math=False)
    axis.set(xlim=(0, LINE), ylim=(lines - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_title("Which tokens skip most? (dark: computes every block)")
    axis.spines[:].set_visible(False)
    axis.grid(False)


def draw(path, kept, words):
    """kept (n_layer, T) bool; words: the prompt's tokens as text."""
    _, lines = wrapped(words)
    figure, (top, below) = plt.subplots(2, 1, figsize=(10, 4.2 + 0.24 * lines),
                                        height_ratios=(0.24 * lines, 3.4), layout="constrained")
    draw_text(top, words, 1 - kept.float().mean(0))
    ink = matplotlib.colors.ListedColormap(["#dbe7f3", "#1f5a94"])
    below.imshow(kept, aspect="auto", origin="lower", cmap=ink, vmin=0, vmax=1,
                 interpolation="nearest")
    skipped = 100 * (1 - kept.float().mean())
    below.set(xlabel="token of the prompt", ylabel="block",
              title=f"Which blocks do they skip? (dark: computed; {skipped:.1f} % are skipped)")
    below.grid(False)
    return save(figure, path)


def main():
    args = get_args()
    check(args.prompt is None or args.prompt.strip(), "--prompt: it is empty; give an instruction")
    model, config = start(args)
    set_routing(args, model)   # before any work: it refuses unfit artefacts
    tokenizer = load_tokenizer(args.model)
    ids = pick_prompt(args, model, tokenizer)

    _, kept = prefill_with_map(model, ids)      # as the prefill that ran decided
    words = [tokenizer.decode([t]).replace("\n", "\\n") for t in ids]
    path = draw(f"{args.out_dir}/skips.png", kept, words)
    save_json(f"{args.out_dir}/skips.json", {
        "format": "ftp-figure-1",
        "config": config,
        "tokens": words,
        "kept": kept.int().tolist(),
    })
    print(f"{len(ids)} tokens, {100 * (1 - kept.float().mean()):.1f} % of tokens and blocks skip")
    print(f"-> {path}")


if __name__ == "__main__":
    run(main)
