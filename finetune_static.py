"""Stage 3: search the schedule again with the trained router in place, by small moves.

    python finetune_static.py --schedule out/schedule.json --router out/router.safetensors
                                                            # -> out/schedule_ft.json
    python finetune_static.py --evaluations 400 --nsamples 64 --resume      # go on
    torchrun --nproc_per_node 8 finetune_static.py --evaluations 400        # spread over 8 GPUs

The same search as stage 1 (search_scheduler.py), from the schedule that it found and from some that
leave more of the first blocks dense. A move changes each block's quota and the router's fourth
factor. The thresholds by which decoded tokens skip are
calibrated anew for the result, and stored with it.
"""
import random
from functools import partial
from pathlib import Path

import torch

from lib.artefacts import Schedule
from lib.calibration import calibrate_decode
from lib.data import load_samples, load_tokenizer
from lib.files import check
from lib.numbers import error_of
from lib.processes import rank
from lib.search import (
    THOUSAND,
    Fitness,
    data_pair,
    evolve,
    mutate,
    repair,
    resume_key,
    starts,
    with_last,
    work,
)
from lib.skipped import Forecaster
from lib.stage import Parser, number, run, start, whole
from model_ftp import Router


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("artefacts").add_argument
    add("--schedule", default="out/schedule.json", help="schedule of stage 1")
    add("--router", default="out/router.safetensors",
        help="router of stage 2, trained on that schedule")
    add("--max_sparsity", type=number("(0, 1)"), default=0.99, help="largest sparsity of a block")

    add = p.add_argument_group("data").add_argument
    add("--data", default="self", help='"self" (own answers), "text" (own texts), .json/.jsonl, '
                                       ".txt or datasets ids, commas between")
    add("--nsamples", type=whole("[1, inf)"), default=20, help="samples that judge candidates")
    add("--nwatch", type=whole("[1, inf)"), default=24, help="samples of the watched part")
    add("--max_prompt", type=whole("[1, inf)"), default=512, help="longest prompt taken, tokens")
    add("--max_response", type=whole("[1, inf)"), default=48, help="response tokens used")

    # the same as stage 1's, with fewer evaluations and smaller moves: its result is near
    add = p.add_argument_group("genetic search").add_argument
    add("--evaluations", type=whole("[1, inf)"), default=40, help="candidates to evaluate")
    add("--population", type=whole("[2, inf)"), default=12, help="candidates a generation")
    add("--elite", type=whole("[1, inf)"), default=3, help="best candidates that live on")
    add("--tournament", type=whole("[1, inf)"), default=3,
        help="candidates drawn for each parent, of which the best is one")
    add("--crossover", type=number("[0, 1]"), default=0.3,
        help="share of children with two parents")
    add("--move", type=number("(0, 1]"), default=0.1,
        help="largest sparsity that a mutation moves between two blocks")
    add("--patience", type=whole("[1, inf)"), default=5,
        help="generations without a better watched KL before stopping")
    add("--max_states", type=whole("[0, inf)"), default=2000,
        help="beginnings of schedules whose states are kept to go on from; fewer need less memory")

    # under which the router was trained
    add = p.add_argument_group("routing").add_argument
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or the router's own decision")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was trained with")

    # after the search
    add = p.add_argument_group("decode").add_argument
    add("--calibration_samples", type=whole("[1, inf)"), default=64,
        help="samples that the thresholds for decoded tokens are calibrated on")

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
    return args


def routing_of(args):
    """How the router is applied, keywords of FTPModel.use()."""
    forecaster = Forecaster.load(args.forecaster) if args.forecaster else None
    return {"prefill": args.prefill, "kv": args.kv, "one_pass": args.one_pass,
            "forecaster": forecaster, "mismatch": args.mismatch}


def thresholds(args, model, tokenizer):
    """Decode thresholds (n_layer,) of the schedule and router in use."""
    # the same samples whatever the seed, with responses as long as load_samples() cuts them
    samples = load_samples(args.data, model, tokenizer, "train", args.calibration_samples,
                           max_prompt=args.max_prompt)
    return calibrate_decode(model, samples)


def report(cost, before, after):
    """Print what was gained over the schedule of stage 1, and what it cost."""
    diff = before - after           # (nwatch,); paired, as samples differ more than schedules
    print(f"watched KL: {before.mean():.4f} -> {after.mean():.4f}, difference {diff.mean():.4f} "
          f"+- {error_of(diff)} (standard error over {len(diff)} samples)")
    print(f"{cost['evaluations']} evaluations in {cost['seconds']} s: "
          f"{cost['candidates_per_minute']} candidates/min, "
          f"{100 * cost['block_evaluations_saved']:.0f} % of block evaluations shared")


def main():
    args = get_args()
    # small files first: what is wrong with them should not wait for the model
    schedule, router = Schedule.load(args.schedule), Router.load(args.router)
    model, info = start(args)
    routing = routing_of(args)
    model.use(schedule, router, **routing)      # refuses artefacts of another model

    # samples that candidates are judged by, and others that have the last word
    tokenizer = load_tokenizer(args.model)
    fit, watched = data_pair(args, model, tokenizer)

    # the schedule of stage 1 in thousandths, and moves away from it
    rng, top = random.Random(args.seed), round(args.max_sparsity * THOUSAND)
    check(max(schedule.sparsity) * THOUSAND <= top + 1e-6,
          f"--max_sparsity {args.max_sparsity}: the schedule has a block above it; raise it")
    # files from before thousandths, or made by hand, are brought to them
    *units, last = [s * THOUSAND for s in schedule.sparsity]
    last, total = round(last), round(sum(units))
    given = repair(units, total, top, rng)
    # neighbours, as the router was trained for shares like these; and with a router that reads the
    # attention it can pay to let more blocks give it before the first skip
    others = starts(len(units), total, top, rng)
    others += [mutate(given, total, top, rng, args.move * THOUSAND)
               for _ in range(args.population)]

    # search; another schedule or router makes another search
    convert = partial(with_last, last)
    how = {"router": router, "convert": convert, "first": schedule.first, **routing}
    fitness = Fitness(model, fit, max_states=args.max_states, **how)
    watch = Fitness(model, watched, max_states=0, spread=True, **how)
    settings = resume_key(args, model, routing, fit, watched)
    settings |= {"schedule_id": schedule.id, "router_id": router.id}
    state_path = Path(args.out_dir) / "finetune_state.json"
    population = [given, *others][:args.population]
    best, history = evolve(fitness, watch, population, total, top, args, state_path, settings)

    # a search that overfits its samples must do no harm
    units = best["units"]
    before, after = watch.items(given), watch.items(units)
    if after.mean() > before.mean():
        units, after = given, before

    # thresholds for decoded tokens go with the schedule that they were found for
    found = fitness.schedule(units)
    model.use(found, router, **routing)
    found.decode_threshold, found.router_id = thresholds(args, model, tokenizer), router.id

    # the artefact
    cost = work(fitness)
    found.meta = {
        **info,
        "method": "ga + router",
        "sparsity": schedule.mean,
        "from": schedule.id,
        "history": history,
        "work": cost,
        "kl_watch": float(after.mean()),
        "kl_watch_before": float(before.mean()),
    }
    if rank() == 0:
        found.save(f"{args.out_dir}/schedule_ft.json")
    report(cost, before, after)
    print("  ".join(f"{l}:{s:.2f}" for l, s in enumerate(found.sparsity)))
    print(f"mean {found.mean:.4f} -> {args.out_dir}/schedule_ft.json")


if __name__ == "__main__":
    run(main)
