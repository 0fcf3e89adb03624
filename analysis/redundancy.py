"""How little a block changes a token: cosine of its input and output, per block and token.

    python analysis/redundancy.py                            # -> redundancy.png, redundancy.json
    python analysis/redundancy.py --text book.txt --nsamples 500 --seqlen 1024

In: a model, and a text or its own answers. Out: the paper's redundancy figures, their numbers, and
the test of what the paper takes for granted: that a token which a block hardly changes can skip it.
At equal FLOPs, the tokens of high cosine skip, or those of low, or at random, or by position; the
KL of what follows the prompt says which harms. The cosines are those of the block at hand on the
routed states, so that this is the best that such a choice could do: no router knows them before.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from analysis.rivals.removal import PartModel
from analysis.style import label_lines, plt, save, settle
from analysis.worth import measure, print_gains
from lib.artefacts import FIRST, Schedule
from lib.data import load_samples, load_text, load_tokenizer, windows
from lib.files import check, save_json
from lib.stage import Parser, number, numbers, progress, run, start, whole

SCORED = 64     # tokens at most that follow a prompt, of a sequence of --text


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("data").add_argument
    add("--text", default=None, help="text to run through; default: the calibration samples")
    add("--nsamples", default=64, type=whole("[1, inf)"), help="sequences")
    add("--seqlen", default=256, type=whole("[2, inf)"), help="tokens a sequence, with --text")

    add = p.add_argument_group("test").add_argument
    add("--ntest", default=24, type=whole("[0, inf)"),
        help="sequences whose tokens skip by cosine, 0: no test")
    add("--sparsity", default=0.30, type=number("(0, 1)"), help="of the test, in each block")

    add = p.add_argument_group("figure").add_argument
    add("--thresholds", default="0.7,0.8,0.9", type=numbers("(-1, 1)"),
        help="cosines above which a block counts as redundant for a token, comma list")
    add("--shown", default=96, type=whole("[1, inf)"),
        help="tokens of the first sequence drawn in the heat map")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the figure")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def sequences(args, model, tokenizer):
    """What runs through the model: [(prompt ids, ids that follow)]."""
    if args.text:
        ids = tokenizer(load_text(args.text), add_special_tokens=False)["input_ids"]
        scored = min(SCORED, args.seqlen // 2)
        return windows(ids, args.seqlen - scored, scored, args.nsamples)
    return load_samples("self", model, tokenizer, "train", args.nsamples)


@torch.inference_mode()
def cosines(model, ids):
    """Cosine of each block's input and output for one sequence, (n_layer, T) on the CPU."""
    batch = model.batch([ids])
    state, found = model.begin(batch), []
    for l in range(model.config.n_layer):
        after = model.prefill_step(l, batch, state)
        before = state.x.to(after.x.device)        # the model may lie on several devices
        found.append(F.cosine_similarity(before.float(), after.x.float(), dim=-1).cpu())
        state = after
    return torch.stack(found)


class ByCosine(PartModel):
    """The model with a choice by what each block would do to each token: ByCosine.of(model).

    keep "changed": the tokens of high cosine skip, the paper's argument; "unchanged": those of low.
    It saves nothing, as it runs all of what it then skips.
    """
    keep = "changed"

    def margins(self, l, batch, state):
        """Cosine of input and output, (N,) float32, below zero where the changed are kept."""
        after, *_ = self.blocks[l].prefill(state.x, batch.all, batch, None)
        cosine = F.cosine_similarity(state.x.float(), after.float(), dim=-1)
        return (-cosine if self.keep == "changed" else cosine), state


def test(model, samples, sparsity):
    """A row each way of choosing: KL of what follows the prompts, FLOPs saved."""
    schedule = Schedule.uniform(model, sparsity, FIRST)
    rows = measure(model, samples, schedule, {"static": ("static", {}), "random": ("random", {})})
    chosen = ByCosine.of(model)
    for keep, name in (("changed", "high cosine skips"), ("unchanged", "low cosine skips")):
        chosen.keep = keep
        rows += measure(chosen, samples, schedule, {name: ("random", {})})
    print_gains(rows)
    return rows


def draw(path, heat, share, thresholds, said):
    """heat (n_layer, shown tokens); share (thresholds, n_layer) of the tokens above each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=(1.4, 1),
                                         layout="constrained")
    image = left.imshow(heat, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    left.set(xlabel="token of one sequence", ylabel="block",
             title="Which blocks leave which tokens as they are?")
    left.grid(False)
    figure.colorbar(image, ax=left, label="cosine of input and output")

    for line in share:
        right.plot(100 * line, marker=".")
    right.set(xlabel=f"block ({said})", ylabel="tokens, %", ylim=(0, 103),
              title="How many tokens does a block hardly change?")
    n_layer = share.shape[1]
    right.set_xlim(-0.03 * n_layer, 1.5 * n_layer)      # room for the labels beside the lines
    right.set_xticks(range(0, n_layer, max(1, n_layer // 6)))
    settle(figure)
    colours = [line.get_color() for line in right.get_lines()]
    names = [f"cosine > {t:g}, mean {100 * line.mean():.1f} %"
             for t, line in zip(thresholds, share)]
    ends = [(name, n_layer - 1, float(100 * line[-1])) for name, line in zip(names, share)]
    label_lines(right, ends, colours=dict(zip(names, colours)))
    return save(figure, path)


def main():
    args = get_args()
    check(not (args.device_map and args.ntest),
          "--device_map: the test by cosine runs on one device; add --ntest 0, or leave it out")
    model, config = start(args)
    model.use()   # dense, also where the folder brings a routing
    seqs = sequences(args, model, load_tokenizer(args.model))

    # of every block and threshold, the tokens above it
    above, total, heat = torch.zeros(len(args.thresholds), model.config.n_layer), 0, None
    for prompt, after in progress(seqs, desc="redundancy", unit="sequence"):
        ids = [*prompt, *after]
        found = cosines(model, ids)
        for i, threshold in enumerate(args.thresholds):
            above[i] += (found > threshold).sum(1)
        heat = found[:, :args.shown] if heat is None else heat
        total += len(ids)
    share = above / total

    said = f"{len(seqs)} sequences, {total} tokens"
    path = draw(f"{args.out_dir}/redundancy.png", heat, share, args.thresholds, said)
    keys = [str(t) for t in args.thresholds]
    rows = test(model, seqs[:args.ntest], args.sparsity) if args.ntest else []
    save_json(f"{args.out_dir}/redundancy.json", {
        "format": "ftp-redundancy-1",
        "config": config,
        "tokens": total,
        "sequences": len(seqs),
        "share_above": {k: line.tolist() for k, line in zip(keys, share)},
        "mean": {k: float(line.mean()) for k, line in zip(keys, share)},
        "test": rows,
    })
    for k, line in zip(keys, 100 * share):
        first, middle, last = line[:3], line[3:-3], line[-3:]
        between = f"middle {middle.mean():.1f} %, " if len(middle) else ""
        print(f"cosine > {k}: {line.mean():.2f} % of tokens over all blocks; first three "
              f"{first.mean():.1f} %, {between}last three {last.mean():.1f} %")
    print(f"-> {path}")


if __name__ == "__main__":
    run(main)
