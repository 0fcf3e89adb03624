"""Stage 1: search the sparsity of each block with a genetic algorithm, the static router in place.

    python search_scheduler.py --sparsity 0.30              # -> out/schedule.json
    python search_scheduler.py --model meta-llama/Llama-2-7b-hf --data tatsu-lab/alpaca
    python search_scheduler.py --method uniform --out_dir out/uniform    # or bi, or late: no search
    python search_scheduler.py --flops_saved 0.30 --kv keep --forecaster out/forecaster.safetensors
    python search_scheduler.py --sparsity 0.30 --resume     # go on after an interruption
    torchrun --nproc_per_node 8 search_scheduler.py         # a generation spread over 8 GPUs

Fitness is KL(dense || routed) of the next token on the responses of calibration samples: the
prompt is routed, the response decoded dense. Candidates run with real skipping; blocks that two
candidates have in common at their start run once. A part of the data that no candidate is chosen by
is watched. It decides which generation's best is kept, or the uniform schedule where that is better
than all of them.
"""
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib.artefacts import FIRST
from lib.data import load_tokenizer
from lib.files import check
from lib.flops import Meter
from lib.numbers import error_of
from lib.processes import gather, rank, share_meter
from lib.search import (
    THOUSAND,
    Fitness,
    allocate,
    as_sparsity,
    block_influence,
    data_pair,
    evolve,
    flops_converter,
    from_block,
    late,
    repair,
    resume_key,
    shapes,
    starts,
    with_last,
    work,
)
from lib.skipped import Forecaster
from lib.stage import Parser, number, run, start, whole

SPARSITY = 0.30             # the target where no flag gives one
NOISE = (0.1, 0.3, 0.7)     # how far the first generation strays from the known schedules


def get_args():
    p = Parser(__doc__)

    # one of the two; they are stored as given, so that only one target is
    add = p.add_argument_group("schedule").add_argument
    add("--sparsity", type=number("(0, 1)"), default=None,
        help=f"target: mean share of tokens that skip a block; {SPARSITY} where none is given")
    add("--flops_saved", type=number("(0, 1)"), default=None,
        help="target as the share of the prompts' block FLOPs saved, instead of --sparsity")
    add("--method", default="ga", choices=["ga", "uniform", "bi", "from", "late"],
        help="genetic search, or a plain allocation: equal, by block influence, equal from "
             "--from_block on, or the last blocks alone")
    add("--from_block", type=whole("[1, inf)"), default=8, help="first to skip, --method from")
    add("--max_sparsity", type=number("(0, 1)"), default=0.99, help="largest sparsity of a block")
    add("--first", type=whole("[1, inf)"), default=FIRST,
        help="first tokens of a prompt that always compute, as attention sinks lie there; paper: 1")

    add = p.add_argument_group("data").add_argument
    add("--data", default="self", help='"self" (own answers), "text" (own texts), .json/.jsonl, '
                                       ".txt or datasets ids, commas between")
    add("--nsamples", type=whole("[1, inf)"), default=20, help="samples that judge candidates")
    add("--nwatch", type=whole("[1, inf)"), default=24, help="samples of the watched part")
    add("--max_prompt", type=whole("[1, inf)"), default=512, help="longest prompt taken, tokens")
    add("--max_response", type=whole("[1, inf)"), default=48, help="response tokens used")

    add = p.add_argument_group("genetic search").add_argument
    add("--evaluations", type=whole("[1, inf)"), default=150, help="candidates to evaluate")
    add("--population", type=whole("[2, inf)"), default=12, help="candidates a generation")
    add("--elite", type=whole("[1, inf)"), default=3, help="best candidates that live on")
    add("--tournament", type=whole("[1, inf)"), default=3,
        help="candidates drawn for each parent, of which the best is one")
    add("--crossover", type=number("[0, 1]"), default=0.3,
        help="share of children with two parents")
    add("--move", type=number("(0, 1]"), default=0.3,
        help="largest sparsity that a mutation moves between two blocks")
    add("--patience", type=whole("[1, inf)"), default=5,
        help="generations without a better watched KL before stopping")
    add("--max_states", type=whole("[0, inf)"), default=2000,
        help="beginnings of schedules whose states are kept to go on from; fewer need less memory")

    # how skipped tokens are treated while candidates run
    add = p.add_argument_group("routing").add_argument
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--resume", action="store_true", help="go on from the last saved generation")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")

    args = p.parse_args()
    check(args.population > args.elite,
          f"--population {args.population} must be larger than --elite {args.elite}")
    check(args.sparsity is None or args.flops_saved is None,
          "--sparsity and --flops_saved: both are a target; give one")
    check(args.method == "from" or "from_block" not in args.typed,
          f"--from_block: it changes nothing beside --method {args.method}; give --method from")
    if args.sparsity is None and args.flops_saved is None:
        args.sparsity = SPARSITY
    return args


# ------------------------------------------------------------------------------------------------
# how much is to be skipped

class Budget(NamedTuple):
    """What the blocks of a candidate share, in thousandths; see lib/search.py."""
    total: int          # of all blocks together
    top: int            # of a block, at most
    blocks: int         # that share it
    convert: Callable   # thousandths of each of them -> sparsity of all blocks


def sparsity_budget(args, n_layer):
    """The thousandths are a block's sparsity. FTPError where too few blocks can skip."""
    total, top = round(args.sparsity * n_layer * THOUSAND), round(args.max_sparsity * THOUSAND)
    check(total <= top * (n_layer - 1),
          f"--sparsity {args.sparsity}: out of reach with --max_sparsity {args.max_sparsity} and "
          "block 0 dense; lower it")
    if args.method == "late":
        return Budget(total, top, n_layer, as_sparsity)
    last = round(total / (n_layer - 1))         # the uniform schedule's
    return Budget(total - last, top, n_layer - 1, partial(with_last, last))


def flops_budget(args, config, samples, routing):
    """The thousandths are FLOPs saved, on a prompt of the samples' mean length."""
    n_tokens = round(sum(len(prompt) for prompt, _ in samples) / len(samples))
    convert, top, full = flops_converter(config, n_tokens, routing, args.max_sparsity)
    blocks = config.n_layer - 1         # the last takes the sparsity of the one before it
    total, most = round(args.flops_saved * full), top * (blocks - 1)
    check(0 < total <= most,
          f"--flops_saved {args.flops_saved}: out of reach, at most {most / full:.2f} here")
    return Budget(total, top, blocks, convert)


# ------------------------------------------------------------------------------------------------
# the search

def plain_allocations(args, influence, budget, rng):
    """{--method: units}, what needs no search. influence (n_layer,): see block_influence()."""
    total, top, blocks, _ = budget
    plain = {
        "uniform": allocate([1.0] * blocks, total, top, rng),
        "bi": allocate([1 / v for v in influence[:blocks]], total, top, rng),
        "late": late(blocks, total, top),
    }
    if args.method == "from":
        check(total <= top * (blocks - args.from_block),
              f"--from_block {args.from_block}: the blocks from there on cannot save that much; "
              "lower it")
        plain["from"] = from_block(args.from_block, blocks, total, top, rng)
    return plain


def first_generation(plain, n, budget, rng):
    """n candidates: the plain allocations, dense first blocks, ever steeper shapes, then noise
    around these."""
    total, top, _, _ = budget
    uniform, by_influence = plain["uniform"], plain["bi"]
    middle = [(a + b) / 2 for a, b in zip(uniform, by_influence)]
    steeper = shapes(len(uniform), total, top, rng)
    # where few fit into a generation, the likeliest come first
    known = [uniform, by_influence, *starts(len(uniform), total, top, rng),
             repair(middle, total, top, rng), *steeper[1:]]
    noisy = []
    for far in NOISE:
        for _ in range(n):
            base = rng.choice(known)
            units = [u * rng.uniform(1 - far, 1 + far) for u in base]
            noisy.append(repair(units, total, top, rng))
    rng.shuffle(noisy)
    return (known + noisy)[:n]


def saved_flops(watch, units):
    """Share of the watched prompts' block FLOPs that a candidate saves, and its KL a sample."""
    meter = Meter(watch.model)
    kl = watch.run(units, meter)
    return share_meter(meter).saved("prefill"), kl


def report(args, cost, uniform_kl, kl):
    """Print what was gained over the uniform schedule, and what it cost."""
    diff = uniform_kl - kl          # (nwatch,)
    print(f"watched KL: uniform {uniform_kl.mean():.4f}, {args.method} {kl.mean():.4f}, "
          f"difference {diff.mean():.4f} +- {error_of(diff)} "
          f"(standard error over {len(diff)} samples)")
    print(f"{cost['evaluations']} evaluations in {cost['seconds']} s: "
          f"{cost['candidates_per_minute']} candidates/min, "
          f"{cost['tokens_per_second']} calibration tokens/s, "
          f"{100 * cost['block_evaluations_saved']:.0f} % of block evaluations shared")


def main():
    args = get_args()
    model, info = start(args)
    rng = random.Random(args.seed)
    if args.sparsity is not None:       # before any work, as it may be out of reach
        budget = sparsity_budget(args, model.config.n_layer)

    # samples that candidates are judged by, and others that have the last word
    fit, watched = data_pair(args, model, load_tokenizer(args.model))

    # how candidates run, and what a thousandth of a block means
    forecaster = Forecaster.load(args.forecaster) if args.forecaster else None
    routing = {"kv": args.kv, "forecaster": forecaster, "first": args.first}
    if args.flops_saved is not None:
        budget = flops_budget(args, model.config, fit, routing)
    total, top, _, convert = budget

    # what needs no search; the ranks must not part ways over a rounding
    influence = gather(block_influence(model, fit))[0]
    plain = plain_allocations(args, influence, budget, rng)

    # the dense model's answers, by which all are measured
    fitness = Fitness(model, fit, max_states=args.max_states, convert=convert, **routing)
    watch = Fitness(model, watched, max_states=0, convert=convert, spread=True, **routing)

    # search, or take a plain allocation
    history = []
    if args.method == "ga":
        population = first_generation(plain, args.population, budget, rng)
        settings = resume_key(args, model, routing, fit, watched)
        state_path = Path(args.out_dir) / "search_state.json"
        best, history = evolve(fitness, watch, population, total, top, args, state_path, settings)
        units = best["units"]
    else:
        units = plain[args.method]

    # a search that overfits its samples must do no harm
    uniform_kl, found_kl = watch.items(plain["uniform"]), watch.items(units)
    if args.method == "ga" and found_kl.mean() > uniform_kl.mean():
        print(f"watched KL of the schedule found {found_kl.mean():.4f}, of the uniform one "
              f"{uniform_kl.mean():.4f}: the uniform one is kept")
        units = plain["uniform"]
    flops, kl = saved_flops(watch, units)
    cost = work(fitness)
    report(args, cost, uniform_kl, kl)

    # the artefact
    schedule = fitness.schedule(units)
    schedule.meta = {
        **info,
        "method": args.method,
        **({} if args.sparsity is None else {"sparsity": args.sparsity}),
        "block_influence": influence,
        "history": history,
        "work": cost,
        "kv": args.kv,
        "flops_saved": flops,
        "kl_fit": fitness(units),
        "kl_watch": float(kl.mean()),
        "kl_watch_found": float(found_kl.mean()),
        "kl_watch_uniform": float(uniform_kl.mean()),
    }
    if rank() == 0:
        schedule.save(f"{args.out_dir}/schedule.json")
    print("  ".join(f"{l}:{s:.2f}" for l, s in enumerate(schedule.sparsity)))
    print(f"mean {schedule.mean:.4f}, {flops:.1%} of the watched prompts' block FLOPs saved "
          f"-> {args.out_dir}/schedule.json")


if __name__ == "__main__":
    run(main)
