"""Stage 1: search the sparsity of each block with a genetic algorithm, the static router in place.

    python search_scheduler.py --sparsity 0.30                                  # -> out/schedule.json
    python search_scheduler.py --model meta-llama/Llama-2-7b-hf --data tatsu-lab/alpaca --nsamples 64 --evaluations 1000
    python search_scheduler.py --method uniform --out_dir out/uniform           # or bi, or late: no search
    python search_scheduler.py --flops_saved 0.30 --kv keep --forecaster out/forecaster.safetensors
    python search_scheduler.py --sparsity 0.30 --resume                         # go on after an interruption
    torchrun --nproc_per_node 8 search_scheduler.py --sparsity 0.30             # the same schedule, a generation spread over 8 GPUs

Fitness is KL(dense || routed) of the next token on the responses of calibration samples: the prompt is routed, the
response decoded dense. Candidates run with real skipping; blocks that two candidates have in common at their start
run once. A part of the data that no candidate is chosen by is watched, and decides which generation's best is kept, or the uniform schedule
where that is better than all of them.
"""
import random
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import Parser, bar, check, digest, gather, load_progress, rank, routing_of, run, save_progress, shard, share_stats, start, unshard, world
from data import load_samples, load_tokenizer
from files import FTPError
from model_ftp import batches, by_sample, kl_divergence, response_rows
from router import Schedule

GRAIN = 1000  # a schedule is searched as whole thousandths, so that its mean stays exact


class Fitness:
    """KL to the dense model on samples, for schedules in thousandths. Equal schedules and equal beginnings run once.

    convert: what a block's thousandths mean -> its sparsity; by default they are its sparsity. spread: the samples are spread over the
    ranks, for a schedule that all of them ask for at once; by default each rank has all, and candidates() spreads schedules.
    """
    def __init__(self, model, samples, router="static", max_entries=2000, convert=lambda u: u / GRAIN, spread=False, **routing):
        self.model, self.router, self.routing, self.convert, self.spread = model, router, {"decode": "dense", **routing}, convert, spread
        groups = [g for _, g in batches(samples, 2048)]
        self.groups = shard(groups) if spread else groups
        self.known, self.states, self.max_entries, self.blocks_run = {}, OrderedDict(), max_entries, 0
        self.tokens, self.seconds = sum(len(a) + len(b) for a, b in samples), 0.0
        model.use()
        self.teacher = [model.response_states(g) for g in self.groups]

    def schedule(self, units):
        return Schedule([self.convert(u) for u in units], self.model.fingerprint)

    def run_as(self, units):
        """The sparsities that the model runs for it, (n_layer,): those of blocks that share a decision are averaged."""
        return tuple(self.schedule(units).grouped(getattr(self.router, "group", 1)).sparsity)

    @torch.inference_mode()
    def items(self, units):
        """KL of each sample, (nsamples,) in nats per response token."""
        units, m, L = tuple(units), self.model, self.model.config.n_layer
        if units not in self.known:
            m.use(self.schedule(units), self.router, **self.routing)
            s, first = self.run_as(units), self.blocks_known(units)
            passes = self.states[s[:first]] if first else [m.begin_samples(g) for g in self.groups]
            for l in range(first, L):
                passes = [m.step(l, p) for p in passes]
                self.states[s[:l + 1]] = passes
                if len(self.states) > self.max_entries:
                    self.states.popitem(last=False)  # the oldest
            self.blocks_run += L - first
            kl = [by_sample(kl_divergence(m.logits(x), m.logits(p.x[response_rows(g)[0]])), owner)
                  for g, p, (x, owner) in zip(self.groups, passes, self.teacher)]
            if not all(v.isfinite().all() for v in kl):  # a candidate of KL NaN would win or lose at random
                for g in self.groups:
                    m.through(m.begin_samples(g))
                raise FTPError("the KL of a candidate is NaN or infinite; use --dtype float32")
            self.known[units] = torch.cat(unshard(kl) if self.spread else kl)
        return self.known[units]

    def blocks_known(self, units):
        """How many first blocks of a schedule have run before."""
        s = self.run_as(units)
        return max((l for l in range(1, len(s) + 1) if s[:l] in self.states), default=0)

    def candidates(self, some, tick):
        """Run schedules, spread over the ranks: each goes where, with the blocks known there, it will be done first."""
        t, load, mine = time.time(), [0] * world(), []
        for units, known in zip(some, zip(*gather([self.blocks_known(u) for u in some]))):
            done = [have + len(units) - k for have, k in zip(load, known)]
            r = done.index(min(done))
            load[r] = done[r]
            mine += [units] * (r == rank())
        for units in mine:
            self.items(units)
            tick()
        for part in gather({u: self.known[u] for u in mine}):
            self.known.update(part)
        self.seconds += time.time() - t

    def __call__(self, units):
        return float(self.items(units).mean())


def block_influence(model, samples):
    """1 - mean cosine of each block's input and output over the samples' tokens (ShortGPT's measure), list of n_layer."""
    model.use()
    total, n = torch.zeros(model.config.n_layer, dtype=torch.float64), 0
    with torch.inference_mode():
        for _, group in batches(samples, 2048):
            p = model.begin_samples(group)
            for l in range(model.config.n_layer):
                q = model.step(l, p)
                total[l] += F.cosine_similarity(p.x.to(q.x.device).float(), q.x.float(), dim=-1).double().sum().cpu()
                p = q
            n += len(p.x)
    return (1 - total / n).tolist()


def repair(units, total, top, rng, blocks=None):
    """Clip to [0, top] with block 0 at 0, then move random blocks (of `blocks`) until the sum is exactly `total`."""
    u = [0] + [min(max(round(v), 0), top) for v in units[1:]]
    blocks = list(blocks or range(1, len(u)))
    while (gap := total - sum(u)) != 0:
        free = [l for l in blocks if (u[l] < top if gap > 0 else u[l] > 0)]
        if not free:  # nothing left to move there: take them all
            blocks = list(range(1, len(u)))
            continue
        l = rng.choice(free)
        step = min(abs(gap), rng.randint(1, 50), top - u[l] if gap > 0 else u[l])
        u[l] += step if gap > 0 else -step
    return u


def allocate(weights, total, top, rng):
    """Thousandths proportional to `weights` (block 0 gets none), capped at `top`, the excess going to the others."""
    u, free, left = [0.0] * len(weights), set(range(1, len(weights))), float(total)
    while free:
        scale = left / sum(weights[l] for l in free)
        over = {l for l in free if weights[l] * scale > top}
        for l in over or free:
            u[l] = top if over else weights[l] * scale
        left -= top * len(over)
        free = free - over if over else set()
    return repair(u, total, top, rng)


def shapes(L, total, top, rng):
    """Schedules from uniform to ever steeper ones, up to the last blocks alone (good where skipped tokens keep their K/V)."""
    return [allocate([(l / L) ** steep for l in range(L)], total, top, rng) for steep in (0, 0.3, 1, 2, 4, 8, 99)]


def late(L, total, top):
    """The budget in the last blocks alone."""
    return [min(top, max(0, total - top * (L - 1 - l))) for l in range(L)]


def mutate(u, total, top, rng, largest):
    """Move budget between two blocks, one to three times."""
    u = list(u)
    for _ in range(rng.choice((1, 1, 2, 3))):
        a, b = rng.sample(range(1, len(u)), 2)
        d = min(round(largest * 20 ** -rng.random()), u[a], top - u[b])
        u[a], u[b] = u[a] - d, u[b] + d
    return repair(u, total, top, rng)


def crossover(a, b, total, top, rng):
    """The first blocks of a, the last of b; only the latter are repaired, so that a's beginning is not run again."""
    cut = rng.randint(1, len(a) - 1)
    return repair(a[:cut] + b[cut:], total, top, rng, range(cut, len(a)))


def evolve(fitness, watch, population, total, top, args, state_path, settings):
    """Genetic search with elitism and tournaments; returns the best schedule in thousandths and the history.

    Every generation is saved to state_path; with args.resume the search goes on from there, to the same result.
    """
    rng = random.Random(args.seed)
    generation, stale, tried, history, best = 0, 0, {}, [], None  # tried: all candidates so far; fitness knows fewer after --resume
    if args.resume and state_path.exists():
        s = load_progress(state_path, "ftp-search-state-2")
        check(s["settings"] == settings, f"--resume: {state_path} belongs to a run with other settings, data or artefacts; give them again, or "
                                         "drop --resume")
        population, generation, stale, history, best = (s[k] for k in ("population", "generation", "stale", "history", "best"))
        tried = dict.fromkeys(map(tuple, s["tried"]))
        a, b, c = s["rng"]
        rng.setstate((a, tuple(b), c))
        fitness.candidates(list(map(tuple, population)), lambda: None)  # their results are not stored
        print(f"resuming at generation {generation}, {len(tried)} evaluations done")
    progress, t = bar(total=args.evaluations, initial=len(tried), desc="search", unit="eval"), time.time()
    first = not history
    while len(tried) < args.evaluations and stale < args.patience:
        if not first:
            scored = sorted(population, key=fitness)
            children = [list(u) for u in scored[:args.elite]]
            def parent():
                return min(rng.sample(scored, min(3, len(scored))), key=fitness)
            seen = {tuple(u) for u in scored}
            while len(children) < args.population:
                child = crossover(parent(), parent(), total, top, rng) if rng.random() < args.crossover else list(parent())
                child = mutate(child, total, top, rng, args.move * GRAIN)
                if tuple(child) not in seen:
                    seen.add(tuple(child))
                    children.append(child)
            population = children
        first = False
        some = dict.fromkeys(map(tuple, population))
        fitness.candidates([u for u in some if u not in fitness.known], progress.update)
        tried |= some
        progress.update(len(tried) - progress.n)
        population.sort(key=fitness)
        lead = population[0]
        assert all(sum(u) == total and u[0] == 0 and max(u) <= top for u in population)
        held = watch(lead)
        stale = 0 if best is None or held < best["watch"] else stale + 1
        if stale == 0:
            best = {"units": lead, "fit": fitness(lead), "watch": held}
        generation += 1
        history.append({"generation": generation, "evaluations": len(tried), "fit": fitness(lead), "watch": held, "seconds": round(time.time() - t, 1)})
        print(f"generation {generation:3d}  evaluations {len(tried):4d}  KL {fitness(lead):.4f}  watched {held:.4f}  best watched {best['watch']:.4f}"
              f"  {60 * len(fitness.known) / max(fitness.seconds, 1e-9):.0f} candidates/min", flush=True)
        a, b, c = rng.getstate()
        save_progress(state_path, "ftp-search-state-2", {
            "settings": settings, "population": population, "generation": generation, "stale": stale, "tried": list(tried), "history": history,
            "best": best, "rng": [a, list(b), c]}, f"generation {generation}, {len(tried)} evaluations")
    progress.close()
    return best, history


def work(fitness):
    """What the search cost, for the artefact; all ranks call it."""
    return {"evaluations": len(fitness.known), "seconds": round(fitness.seconds, 1),
            "candidates_per_minute": round(60 * len(fitness.known) / max(fitness.seconds, 1e-9), 1),
            "tokens_per_second": round(fitness.tokens * len(fitness.known) / max(fitness.seconds, 1e-9)),
            "block_evaluations_saved": round(1 - sum(gather(fitness.blocks_run)) / max(sum(map(len, fitness.known)), 1), 3)}


def flops_converter(config, T, routing, largest):
    """Function: thousandths of a block's FLOPs to save on a prompt of T tokens -> the sparsity that saves them under the static order
    (skips that keep K/V or are forecast cost what they cost), and the most thousandths, those of sparsity `largest`."""
    dense = config.prefill_flops(T, [0.0], head=0)
    grid = [i / GRAIN for i in range(1, round(largest * GRAIN) + 1)]
    gain = [GRAIN * (1 - config.prefill_flops(T, [s], routing["kv"], head=0, forecaster=routing["forecaster"]) / dense) for s in grid]
    points = [(0.0, 0.0)] + [(g, s) for g, s in zip(gain, grid) if g > 0]
    x, y = zip(*points)
    return lambda u: round(float(np.interp(u, x, y)), 6), int(x[-1])


def resume_key(args, model, routing, *data):
    """What must be equal for a run to go on from another's state: flags, model, forecaster and data."""
    flags = {k: v for k, v in vars(args).items() if k not in ("resume", "evaluations", "threads", "out_dir")}
    return flags | {"fingerprint": model.fingerprint, "forecaster_id": routing["forecaster"] and routing["forecaster"].id, "data_digest": digest(data)}


def search_flags(p, evaluations, move):
    """Flags that stages 1 and 3 share."""
    p.add_argument("--data", default="self", help='calibration: "self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, commas between')
    p.add_argument("--nsamples", type=int, default=20, help="samples that candidates are judged by")
    p.add_argument("--nwatch", type=int, default=24, help="samples of the watched part")
    p.add_argument("--max_prompt", type=int, default=512, help="longest prompt taken, tokens")
    p.add_argument("--max_response", type=int, default=48, help="response tokens used")
    p.add_argument("--max_sparsity", type=float, default=0.99, help="largest sparsity of a block")
    p.add_argument("--evaluations", type=int, default=evaluations, help="candidates to evaluate")
    p.add_argument("--population", type=int, default=12, help="candidates a generation")
    p.add_argument("--elite", type=int, default=3, help="best candidates that live on")
    p.add_argument("--crossover", type=float, default=0.3, help="share of children with two parents")
    p.add_argument("--move", type=float, default=move, help="largest sparsity that a mutation moves between two blocks")
    p.add_argument("--patience", type=int, default=5, help="generations without a better watched KL before stopping")
    p.add_argument("--resume", action="store_true", help="go on from the last saved generation")
    return p


def check_flags(args):
    for flag in ("nsamples", "nwatch", "evaluations", "patience", "max_response"):
        check(getattr(args, flag) > 0, f"--{flag} {getattr(args, flag)}: must be at least 1")
    check(args.population > args.elite > 0, f"--population {args.population} must be larger than --elite {args.elite}, and that at least 1")
    check(0 < args.max_sparsity < 1, f"--max_sparsity {args.max_sparsity}: must lie between 0 and 1")
    check(0 < args.move <= 1, f"--move {args.move}: must lie in (0, 1]")


def data_pair(args, model, tokenizer):
    """Samples to fit and samples to watch."""
    kw = dict(max_prompt=args.max_prompt, max_response=args.max_response, seed=args.seed)
    return (load_samples(args.data, model, tokenizer, "train", args.nsamples, **kw),
            load_samples(args.data, model, tokenizer, "watch", args.nwatch, **kw))


def main():
    p = search_flags(Parser(__doc__).common().routing(), evaluations=150, move=0.3)
    p.add_argument("--sparsity", type=float, default=0.30, help="target: mean share of tokens that skip a block")
    p.add_argument("--flops_saved", type=float, default=None, help="target as the share of the prompts' block FLOPs saved, instead of --sparsity")
    p.add_argument("--method", default="ga", choices=["ga", "uniform", "bi", "late"],
                   help="genetic search, or a plain allocation: equal, by block influence, or the last blocks alone")
    args = p.parse_args()
    check_flags(args)
    check(0 < args.sparsity < 1, f"--sparsity {args.sparsity}: must lie between 0 and 1")
    model, config = start(args)
    L, rng, out = model.config.n_layer, random.Random(args.seed), args.out_dir
    top = round(args.max_sparsity * GRAIN)

    total, convert = round(args.sparsity * L * GRAIN), {}
    check(args.flops_saved is not None or total <= top * (L - 1),
          f"--sparsity {args.sparsity}: out of reach with --max_sparsity {args.max_sparsity} and block 0 dense; lower it")
    tokenizer, routing = load_tokenizer(args.model), routing_of(args, learned=False)
    fit, held = data_pair(args, model, tokenizer)
    if args.flops_saved is not None:  # the search then moves shares of FLOPs between the blocks
        convert["convert"], top = flops_converter(model.config, round(sum(len(a) for a, _ in fit) / len(fit)), routing, args.max_sparsity)
        total = round(args.flops_saved * L * GRAIN)
        check(0 < total <= top * (L - 1), f"--flops_saved {args.flops_saved}: out of reach, at most {top * (L - 1) / L / GRAIN:.2f} here")
    bi = gather(block_influence(model, fit))[0]  # the ranks must not part ways over a rounding
    uniform, by_bi = allocate([1.0] * L, total, top, rng), allocate([1 / b for b in bi], total, top, rng)
    fitness, watch = Fitness(model, fit, **convert, **routing), Fitness(model, held, max_entries=0, spread=True, **convert, **routing)
    history = []
    if args.method == "ga":
        known = [by_bi, repair([(a + b) / 2 for a, b in zip(uniform, by_bi)], total, top, rng), *shapes(L, total, top, rng)]
        noise = [repair([v * rng.uniform(1 - a, 1 + a) for v in rng.choice(known)], total, top, rng)
                 for a in (0.1, 0.3, 0.7) for _ in range(args.population)]
        rng.shuffle(noise)
        settings = resume_key(args, model, routing, fit, held)
        best, history = evolve(fitness, watch, (known + noise)[:args.population], total, top, args,
                               Path(out) / "search_state.json", settings)
        units = best["units"]
    else:
        units = {"uniform": uniform, "bi": by_bi, "late": late(L, total, top)}[args.method]
    base, found = watch.items(uniform), watch.items(units)
    if args.method == "ga" and found.mean() > base.mean():
        print(f"watched KL of the schedule found {found.mean():.4f}, of the uniform one {base.mean():.4f}: the uniform one is kept")
        units = uniform
    watch.known.pop(tuple(units), None)  # run it once more, so that model.stats are its own
    kl = watch.items(units)
    share_stats(model)
    diff = base - kl
    print(f"watched KL: uniform {base.mean():.4f}, {args.method} {kl.mean():.4f}, difference {diff.mean():.4f} "
          f"+- {diff.std() / len(diff) ** 0.5:.4f} (standard error over {len(diff)} samples)")
    cost = work(fitness)
    print(f"{cost['evaluations']} evaluations in {cost['seconds']} s: {cost['candidates_per_minute']} candidates/min, {cost['tokens_per_second']} "
          f"calibration tokens/s, {100 * cost['block_evaluations_saved']:.0f} % of block evaluations shared")
    s = fitness.schedule(units)
    s.meta = {**config, "method": args.method, "sparsity": args.sparsity, "block_influence": bi, "history": history, "work": cost,
              "kv": args.kv, "flops_saved": model.stats.saved("prefill"), "kl_fit": fitness(units),
              "kl_watch": float(kl.mean()), "kl_watch_found": float(found.mean()), "kl_watch_uniform": float(base.mean())}
    if rank() == 0:
        s.save(f"{out}/schedule.json")
    print("  ".join(f"{l}:{v:.2f}" for l, v in enumerate(s.sparsity)))
    print(f"mean {s.mean:.4f}, {s.meta['flops_saved']:.1%} of the watched prompts' block FLOPs saved -> {out}/schedule.json")


if __name__ == "__main__":
    run(main)
