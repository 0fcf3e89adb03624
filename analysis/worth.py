"""What each span of a prompt is worth to the answer, and how near a router comes to knowing it.

    python analysis/worth.py --schedule out/schedule.json --router out/router.safetensors
    python analysis/worth.py --schedule out/schedule.json --data text --size 16
    python analysis/worth.py --schedule out/schedule.json --from_blocks 4,8,16,24

In: a schedule, and a router if any. Out: worth.png, prompts whose spans are shaded by their worth
over the router's decisions; worth.json, and a table of the KL of these keeping orders on held-out
samples:

    static   the first token, then newest to oldest
    oracle   spans by their measured worth: it has seen the answer, and bounds what a router reaches
    router   the one given

Worth is that of a span that skips from block 1 on. --from_blocks tells, and draws in
worth_blocks.png, what is left of it where the span computes the blocks before.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from analysis.style import plt, save
from lib.artefacts import Schedule
from lib.data import load_samples, load_tokenizer
from lib.files import check, save_json
from lib.flops import Meter
from lib.numbers import standard_error
from lib.scoring import by_sample, response_kl, response_states
from lib.skips import prefill_with_map
from lib.stage import Parser, progress, run, start, whole, wholes
from lib.worth import LEAST, Oracle, span_worth, spans_of
from model_ftp import Router

SHOWN = 6      # prompts in the figure


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("what is measured").add_argument
    add("--schedule", default="out/schedule.json", help="schedule of stage 1 or 3")
    add("--router", default=None, help="router of stage 2, beside static and oracle")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--size", type=whole("[1, inf)"), default=8, help="tokens of a span")
    add("--from_blocks", type=wholes("[2, inf)"), default=[],
        help="blocks, commas between: what spans are worth that skip from each of them on")
    add("--data", default="bare",
        help='"self" (own answers), "bare" (without a system prompt), "text", "cloze", '
             ".json/.jsonl, .txt or datasets ids, commas between")
    add("--nsamples", type=whole("[1, inf)"), default=24, help="held-out samples")
    add("--max_prompt", type=whole("[1, inf)"), default=256, help="longest prompt taken, tokens")
    add("--max_response", type=whole("[1, inf)"), default=32, help="response tokens used")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def measure(model, samples, schedule, routers):
    """A row each of {name: (router, settings of use())}: KL of each sample, FLOPs saved."""
    teacher, owner = response_states(model.use(), samples)
    rows = []
    for name, (router, how) in routers.items():
        meter = Meter(model.use(schedule, router, **how))
        states, _ = response_states(model, samples, meter=meter)
        with torch.inference_mode():
            kl = by_sample(response_kl(model, teacher, states), owner).tolist()
        rows.append({"name": name, "kl": sum(kl) / len(kl), "kl_stderr": standard_error(kl),
                     "kl_items": kl, "flops_saved": meter.saved("prefill")})
        print(f"{name:8s} KL {rows[-1]['kl']:.4f} +- {rows[-1]['kl_stderr']:.4f}, "
              f"{100 * rows[-1]['flops_saved']:.1f} % of the prompts' FLOPs saved", flush=True)
    return rows


def print_gains(rows):
    """Paired differences to the static order, and the share of the oracle's gain that is had."""
    static = rows[0]["kl_items"]
    for row in rows[1:]:
        gain = [a - b for a, b in zip(static, row["kl_items"])]
        print(f"static minus {row['name']}: {sum(gain) / len(gain):.4f} +- "
              f"{standard_error(gain):.4f} (paired, {len(gain)} samples)")


def strips(n):
    """A figure, and n axes one below the other."""
    figure, axes = plt.subplots(n, 1, figsize=(9, 1.1 * n + 0.6), squeeze=False,
                                layout="constrained")
    return figure, axes[:, 0]


def draw(path, model, samples, oracle, schedule, how):
    """A strip a prompt: log worth of its spans, and below it the share of blocks computed."""
    shown = samples[:SHOWN]
    figure, axes = strips(len(shown))
    for (prompt, _), ax in zip(shown, axes):
        worth = np.full(len(prompt), np.nan)
        spans = spans_of(len(prompt), oracle.size)
        for (a, b), w in zip(spans, oracle.labels[tuple(prompt)]):
            worth[a:b] = w
        router, settings = how
        model.use(schedule, router, **settings)
        _, computed = prefill_with_map(model, prompt)
        ax.fill_between(range(len(prompt)), worth, step="mid", color="#009e73", alpha=0.6)
        ax.set(yscale="log", xlim=(0, len(prompt)), ylabel="worth, nats")
        ax.grid(False)
        beside = ax.twinx()
        beside.step(range(len(prompt)), computed.float().mean(0), where="mid", color="#d55e00",
                    lw=1)
        beside.set(ylim=(0, 1.05), ylabel="computed")
    axes[0].set_title("Is what the answer needs computed? (green: worth of each span; "
                      "orange: share of blocks that compute it)")
    axes[-1].set_xlabel("token of the prompt")
    return save(figure, path)


def worth_from(model, samples, oracle, blocks):
    """{block: [worth of the spans of each sample]}, spans that skip from that block on; 1: what
    the oracle knows."""
    found = {1: [oracle.labels[tuple(prompt)] for prompt, _ in samples]}
    for block in progress(blocks, desc="worth by block", unit="block"):
        found[block] = [span_worth(model, *sample, oracle.size, block).tolist()
                        for sample in samples]
    return found


def print_blocks(found):
    """What a sample's spans are worth in sum, by the block from which they skip; the share of it
    that the dearest third has; how alike spans rank to those that skip from block 1 on."""
    first = np.concatenate(found[1])
    for block, of_samples in found.items():
        spans = np.concatenate(of_samples)
        dearest = np.sort(spans)[::-1][:-(-len(spans) // 3)]
        alike = np.corrcoef(ranks(first), ranks(spans))[0, 1]
        print(f"skipped from block {block:2d} on: {spans.sum() / len(of_samples):.3f} nats a "
              f"sample, {100 * dearest.sum() / spans.sum():.0f} % of them in a third of the spans, "
              f"rank correlation with block 1 {alike:.2f}")


def ranks(values):
    return values.argsort().argsort()


def draw_blocks(path, found, size):
    """A map a prompt: spans across, the block from which they skip upwards, ink the log worth."""
    shown = [i for i, spans in enumerate(found[1]) if spans][:SHOWN]
    figure, axes = strips(len(shown))
    for i, ax in zip(shown, axes):
        ink = np.log10(np.maximum([of_samples[i] for of_samples in found.values()], LEAST))
        image = ax.imshow(ink, aspect="auto", origin="lower", cmap="Greens", vmin=-4, vmax=0)
        ax.set_yticks(range(len(found)), [str(block) for block in found])
        ax.set_ylabel("from block")
        ax.locator_params(axis="x", integer=True)
        ax.grid(False)
    figure.colorbar(image, ax=axes, label="worth, nats (power of ten)")
    axes[0].set_title("What is a span worth that skips from a later block on?")
    axes[-1].set_xlabel(f"span of {size} tokens")
    return save(figure, path)


def main():
    args = get_args()
    schedule = Schedule.load(args.schedule)
    given = Router.load(args.router) if args.router else None
    model, config = start(args)
    model.use(schedule, given or "static", one_pass=args.one_pass)     # refused before any work
    last = model.config.n_layer - 1
    check(max(args.from_blocks, default=0) <= last,
          f"--from_blocks {args.from_blocks}: the last block is {last}; give none beyond it")

    # worth is measured on the very samples that the table is about: the oracle has seen them
    samples = load_samples(args.data, model, load_tokenizer(args.model), "heldout", args.nsamples,
                           args.max_prompt, args.max_response, seed=args.seed)
    oracle = Oracle.of_samples(model, samples, args.size, Path(args.out_dir) / "worth.jsonl")
    check(not args.from_blocks or any(oracle.labels.values()),
          f"--max_prompt {args.max_prompt}: no prompt has a span between its ends; raise it")
    routers = {"static": ("static", {}), "oracle": (oracle, {})}
    if given is not None:
        routers["router"] = (given, {"one_pass": args.one_pass})

    rows = measure(model, samples, schedule, routers)
    print_gains(rows)
    paths = [draw(f"{args.out_dir}/worth.png", model, samples, oracle, schedule,
                  list(routers.values())[-1])]
    found = {}
    if args.from_blocks:
        found = worth_from(model, samples, oracle, args.from_blocks)
        print_blocks(found)
        paths.append(draw_blocks(f"{args.out_dir}/worth_blocks.png", found, args.size))
    save_json(f"{args.out_dir}/worth.json", {
        "format": "ftp-worth-1", "config": config, "rows": rows,
        "worth": [oracle.labels[tuple(prompt)] for prompt, _ in samples],
        "worth_from_block": found})
    print(f"-> {', '.join(map(str, paths))}, {args.out_dir}/worth.json")


if __name__ == "__main__":
    run(main)
