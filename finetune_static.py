"""Stage 3: search the schedule again with the trained router in place, by small moves from the found one.

    python finetune_static.py --schedule out/schedule.json --router out/router.safetensors      # -> out/schedule_ft.json
    python finetune_static.py --evaluations 400 --nsamples 64 --resume                          # go on after an interruption
    torchrun --nproc_per_node 8 finetune_static.py --evaluations 400                            # a generation spread over 8 GPUs

The same search as stage 1 (search_scheduler.py). It changes each block's quota and the router's fourth factor. The decode
thresholds are calibrated anew for the result and stored with it.
"""
import random
from pathlib import Path

from common import Parser, check, rank, routing_of, run, start
from data import load_samples, load_tokenizer
from router import Router, Schedule
from search_scheduler import GRAIN, Fitness, check_flags, data_pair, evolve, mutate, repair, resume_key, search_flags, work


def main():
    p = search_flags(Parser(__doc__).common().routing(), evaluations=40, move=0.1)
    p.add_argument("--schedule", default="out/schedule.json", help="schedule of stage 1")
    p.add_argument("--router", default="out/router.safetensors", help="router of stage 2, trained on that schedule")
    args = p.parse_args()
    check_flags(args)
    schedule, router = Schedule.load(args.schedule), Router.load(args.router)
    model, config = start(args)
    routing = routing_of(args)
    model.use(schedule, router, **routing)  # refuses artefacts of another model
    tokenizer = load_tokenizer(args.model)
    fit, held = data_pair(args, model, tokenizer)
    rng, top = random.Random(args.seed), round(args.max_sparsity * GRAIN)
    total = round(schedule.mean * len(schedule.sparsity) * GRAIN)
    check(max(schedule.sparsity) * GRAIN <= top + 1e-6, f"--max_sparsity {args.max_sparsity}: the schedule has a block above it; raise it")
    found = repair([s * GRAIN for s in schedule.sparsity], total, top, rng)
    fitness, watch = Fitness(model, fit, router, **routing), Fitness(model, held, router, max_entries=0, spread=True, **routing)
    others = [mutate(found, total, top, rng, args.move * GRAIN) for _ in range(args.population - 1)]
    settings = resume_key(args, model, routing, fit, held)
    best, history = evolve(fitness, watch, [found, *others], total, top, args, Path(args.out_dir) / "finetune_state.json",
                           settings | {"schedule_id": schedule.id, "router_id": router.id})
    before, after = watch.items(found), watch.items(best["units"])
    diff = before - after
    if diff.mean() < 0:  # the watched samples have the last word
        best, after, diff = {"units": found}, before, diff * 0
    s = Schedule([u / GRAIN for u in best["units"]], model.fingerprint)
    model.use(s, router, **routing)
    s.decode_threshold, s.router_id = model.calibrate_decode(load_samples(args.data, model, tokenizer, "train", 64, max_prompt=args.max_prompt)), router.id
    cost = work(fitness)
    s.meta = {**config, "method": "ga + router", "sparsity": schedule.mean, "from": schedule.id, "history": history, "work": cost,
              "kl_watch": float(after.mean()), "kl_watch_before": float(before.mean())}
    if rank() == 0:
        s.save(f"{args.out_dir}/schedule_ft.json")
    print(f"watched KL: {before.mean():.4f} -> {after.mean():.4f}, difference {diff.mean():.4f} +- {diff.std() / len(diff) ** 0.5:.4f} "
          f"(standard error over {len(diff)} samples)")
    print(f"{cost['evaluations']} evaluations in {cost['seconds']} s: {cost['candidates_per_minute']} candidates/min, "
          f"{100 * cost['block_evaluations_saved']:.0f} % of block evaluations shared")
    print("  ".join(f"{l}:{v:.2f}" for l, v in enumerate(s.sparsity)))
    print(f"mean {s.mean:.4f} -> {args.out_dir}/schedule_ft.json")


if __name__ == "__main__":
    run(main)
