"""The search for a schedule, shared by stages 1 and 3: fitness, moves and the genetic algorithm.

    fitness = Fitness(model, samples)                  # KL to the dense model, lower is better
    best, history = evolve(fitness, watch, population, total, top, args, state_path, settings)

A candidate is `units`, a list of whole numbers: the sparsity of each block but the last in
thousandths (see with_last(); or what flops_converter() says). So its mean stays exact: every
candidate has the same sum `total`, no block more than `top`, and block 0 none, as no attention
score exists before it.
"""
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from lib.artefacts import Schedule
from lib.data import load_samples
from lib.files import check, digest
from lib.flops import prefill_flops
from lib.processes import gather, rank, shard, unshard, world
from lib.scoring import (
    batches,
    begin_pair,
    by_sample,
    check_states,
    make_pair,
    predicting,
    response_kl,
    response_states,
    step_pair,
)
from lib.stage import bar, load_progress, save_progress

THOUSAND = 1000                         # units of a sparsity of 1
STEEP = (0, 0.3, 1, 2, 4, 8, 99)        # shapes to start from: uniform ... the last blocks alone
STARTS = (0.15, 0.3, 0.4, 0.5)          # and uniform ones behind this share of blocks, left dense
MOVES = (1, 1, 2, 3)                    # pairs of blocks that a mutation changes, drawn evenly
SMALLEST = 20                           # a mutation's smallest step is the largest one over this
DRAWS = 100                             # for a child that differs from all before
REPAIR = 50                             # units that a repair moves in a block at once, at most
STATE = "ftp-search-state-2"            # format of the file that --resume reads


# ------------------------------------------------------------------------------------------------
# fitness

def as_sparsity(units):
    """Units that are the blocks' sparsities. The other meaning is flops_converter()'s."""
    return [u / THOUSAND for u in units]


def with_last(last, units):
    """Units of all blocks but the last, whose sparsity every candidate shares, in thousandths.

    Little is computed in the last block that a skip could save (lib/last_block.py): a search for
    the least harm at equal sparsity would hide its skips there, and save less than it says.
    """
    return as_sparsity([*units, last])


class Fitness:
    """KL(dense || routed) of the next token on samples, for candidates.

    Equal candidates run once. So do equal first blocks: the states behind them are kept, up to
    max_states beginnings, and a candidate goes on from the longest one that it shares.

    router, routing: as of FTPModel.use(). convert: function of the units -> sparsity of each
    block. spread: the samples are spread over the ranks, for a candidate that all of them ask
    for at once; by default each rank has all samples, and candidates() spreads candidates.
    """
    def __init__(self, model, samples, router="static", max_states=2000, convert=as_sparsity,
                 spread=False, first=1, **routing):
        self.model, self.router, self.routing = model, router, {"decode": "dense", **routing}
        self.convert, self.spread, self.max_states = convert, spread, max_states
        self.first = first              # tokens that always compute, see Schedule
        groups = [group for _, group in batches(samples)]
        self.groups = shard(groups) if spread else groups
        # once, as it reads a sample of every weight
        self.fingerprint = model.fingerprint
        model.use()                     # dense
        self.pairs = [make_pair(model, group) for group in self.groups]
        # states (R, d) that predict the responses, and the sample (R,) of each
        self.teacher = [response_states(model, group) for group in self.groups]
        self.results = {}               # candidate: KL of each sample (nsamples,)
        self.states = OrderedDict()     # see beginning(): states of all pairs after these blocks
        self.blocks_run, self.seconds = 0, 0.0
        self.tokens = sum(len(prompt) + len(response) for prompt, response in samples)

    def __call__(self, units):
        """KL in nats per response token, the mean over samples."""
        return float(self.items(units).mean())

    def items(self, units):
        """KL of each sample, (nsamples,) float32, in nats per response token."""
        units = tuple(units)
        if units not in self.results:
            self.results[units] = self.run(units)
        return self.results[units]

    @torch.inference_mode()
    def run(self, units, meter=None):
        """The same from a run; with a meter all blocks run, and are counted.

        FTPError where it is not finite: such a candidate would win or lose at random.
        """
        self.model.use(self.schedule(units), self.router, **self.routing)
        kl = self.divergence(self.last_states(units, meter))
        check(all(part.isfinite().all() for part in kl),
              "the KL of a candidate is NaN or infinite; use --dtype float32")
        return torch.cat(unshard(kl) if self.spread else kl)

    def last_states(self, units, meter):
        """Run the blocks of a candidate that have not run before -> its states after the last."""
        s, n = self.sparsity(units), self.model.config.n_layer
        first = 0 if meter else self.blocks_known(units)
        if first:
            states = self.states[beginning(s, first)]
        else:
            states = [begin_pair(self.model, pair) for pair in self.pairs]
        for l in range(first, n):
            states = [step_pair(self.model, l, pair, state, meter)
                      for pair, state in zip(self.pairs, states)]
            self.states[beginning(s, l + 1)] = states
            if len(self.states) > self.max_states:
                self.states.popitem(last=False)         # the oldest
        self.blocks_run += n - first
        return states

    def divergence(self, states):
        """KL of each sample, a list of a tensor for each pair."""
        kl = []
        for i, pair in enumerate(self.pairs):
            dense, owner = self.teacher[i]
            routed = predicting(pair, states[i])
            check_states(self.model, self.groups[i], routed)
            kl.append(by_sample(response_kl(self.model, dense, routed), owner))
        return kl

    def schedule(self, units):
        """The Schedule that a candidate stands for."""
        return Schedule(self.convert(units), self.fingerprint, first=self.first)

    def sparsity(self, units):
        """What the model runs, (n_layer,): blocks that share a decision run at their mean."""
        group = getattr(self.router, "group", 1)
        return tuple(self.schedule(units).grouped(group).sparsity)

    def blocks_known(self, units):
        """How many first blocks of a candidate have run before."""
        s = self.sparsity(units)
        for n in range(len(s), 0, -1):
            if beginning(s, n) in self.states:
                return n
        return 0

    def candidates(self, some, tick):
        """Run candidates, spread over the ranks; tick() after each."""
        began, mine = time.time(), self.share_of(some)
        for units in mine:
            self.items(units)
            tick()
        for part in gather({units: self.results[units] for units in mine}):
            self.results.update(part)
        self.seconds += time.time() - began

    def share_of(self, some):
        """Those of some candidates that this rank runs.

        Each goes to the rank where, with the blocks known there, it will be done first.
        """
        known = gather([self.blocks_known(units) for units in some])    # a list a rank
        load, mine = [0] * world(), []                                  # load: blocks to run
        for i, units in enumerate(some):
            done = [load[r] + self.model.config.n_layer - known[r][i] for r in range(world())]
            first = done.index(min(done))
            load[first] = done[first]
            if first == rank():
                mine.append(units)
        return mine


def beginning(s, n):
    """What the states after the first n blocks depend on: a key.

    Where no block skips any more, the last scores are not looked at, and are not in the states.
    """
    return s[:n], any(s[n:])


def block_influence(model, samples):
    """How much each block changes its input (ShortGPT's measure), a list of n_layer.

    1 - mean cosine of the block's input and output over the tokens of prompts and responses.
    """
    model.use()                         # dense
    n_layer = model.config.n_layer
    total, tokens = torch.zeros(n_layer, dtype=torch.float64), 0
    with torch.inference_mode():
        for _, group in batches(samples):
            # dense, a prompt and its response are one sequence
            batch = model.batch([prompt + response for prompt, response in group])
            state = model.begin(batch)
            for l in range(n_layer):
                after = model.prefill_step(l, batch, state)
                x, y = state.x.to(after.x.device).float(), after.x.float()
                total[l] += F.cosine_similarity(x, y, dim=-1).double().sum().cpu()
                state = after
            tokens += len(state.x)
    return (1 - total / tokens).tolist()


# ------------------------------------------------------------------------------------------------
# candidates, and moves from one to another

def repair(units, total, top, rng, blocks=None):
    """Any numbers -> a candidate near them: clipped to [0, top], block 0 at 0, the sum `total`.

    What the sum lacks or exceeds goes to random blocks (of `blocks`), a little at a time.
    """
    units = [0] + [min(max(round(u), 0), top) for u in units[1:]]
    blocks = list(blocks or range(1, len(units)))
    gap = total - sum(units)
    while gap != 0:
        # how much each block can still take or give
        room = {l: top - units[l] if gap > 0 else units[l] for l in blocks}
        free = [l for l in blocks if room[l] > 0]
        if not free:                    # nothing left to move there: take them all
            blocks = list(range(1, len(units)))
            continue
        l = rng.choice(free)
        step = min(abs(gap), rng.randint(1, REPAIR), room[l])
        units[l] += step if gap > 0 else -step
        gap = total - sum(units)
    return units


def allocate(weights, total, top, rng):
    """A candidate proportional to `weights` (n_layer,); block 0 gets none.

    Blocks that would get more than `top` get that, and the others share the excess.
    """
    units, left = [0.0] * len(weights), float(total)
    free = set(range(1, len(weights)))
    while free:
        scale = left / sum(weights[l] for l in free)
        over = {l for l in free if weights[l] * scale > top}
        if not over:
            for l in free:
                units[l] = weights[l] * scale
            break
        for l in over:
            units[l] = top
        left -= top * len(over)
        free = free - over
    return repair(units, total, top, rng)


def shapes(n_layer, total, top, rng):
    """Candidates from the uniform one to ever steeper ones, up to the last blocks alone.

    Steep ones are good where skipped tokens leave keys and values.
    """
    depth = [l / n_layer for l in range(n_layer)]
    return [allocate([d ** steep for d in depth], total, top, rng) for steep in STEEP]


def from_block(first, n_layer, total, top, rng):
    """The candidate that is dense before block `first` and uniform from there on.

    It must be able to bear the budget: total <= top * (n_layer - first).
    """
    share = total / (n_layer - first)
    units = [0.0] * first + [share] * (n_layer - first)
    return repair(units, total, top, rng, range(first, n_layer))


def starts(n_layer, total, top, rng):
    """Candidates that leave ever more of the first blocks dense, as far as the budget allows.

    What large models lose by skips is lost in their first blocks for the most part.
    """
    firsts = [round(share * n_layer) for share in STARTS]
    return [from_block(first, n_layer, total, top, rng) for first in firsts
            if first > 1 and total <= top * (n_layer - first)]


def late(n_layer, total, top):
    """The candidate with the whole budget in the last blocks."""
    behind = [n_layer - 1 - l for l in range(n_layer)]      # blocks after each, filled first
    return [min(top, max(0, total - top * n)) for n in behind]


def mutate(units, total, top, rng, largest):
    """Move budget from one block to another, one to three times; at most `largest` units each."""
    units = list(units)
    for _ in range(rng.choice(MOVES)):
        giver, taker = rng.sample(range(1, len(units)), 2)
        # small moves are as likely as large ones: even on a logarithmic scale
        wanted = round(largest * SMALLEST ** -rng.random())
        step = min(wanted, units[giver], top - units[taker])
        units[giver] -= step
        units[taker] += step
    return repair(units, total, top, rng)


def crossover(a, b, total, top, rng):
    """The first blocks of a, the last of b.

    Only the latter are repaired, so that the beginning of a need not run again.
    """
    cut = rng.randint(1, len(a) - 1)
    return repair(a[:cut] + b[cut:], total, top, rng, range(cut, len(a)))


# ------------------------------------------------------------------------------------------------
# the genetic algorithm

@dataclass
class Search:
    """Where a search stands after a generation."""
    population: list
    generation: int = 0
    stale: int = 0                      # generations since the watched KL was at its best
    best: dict | None = None            # "units" of the candidate, its "fit" and "watch" KL
    history: list = field(default_factory=list)
    # all candidates so far, as keys: after --resume, Fitness knows fewer
    tried: dict = field(default_factory=dict)


def evolve(fitness, watch, population, total, top, args, state_path, settings):
    """Genetic search with elitism and tournaments -> the best candidate, the history.

    fitness: a Fitness that candidates are chosen by; watch: one on other samples, which tells the
    generation whose best is kept. args: evaluations, patience, population, elite, tournament,
    crossover, move, seed, resume. Each generation is saved to state_path; with args.resume the
    search goes on from there, to the same result. settings: what must be equal for that.
    FTPError if they are not.
    """
    rng, search = random.Random(args.seed), Search(population)
    if args.resume and state_path.exists():
        search = resume(state_path, settings, rng)
        # results are not stored: those of the parents are found again
        fitness.candidates([tuple(units) for units in search.population], no_tick)
        print(f"resuming at generation {search.generation}, {len(search.tried)} evaluations done")
    progress = bar(total=args.evaluations, initial=len(search.tried), desc="search", unit="eval")
    began = time.time()
    while len(search.tried) < args.evaluations and search.stale < args.patience:
        if search.history:              # the first generation is the population as given
            search.population = children(search.population, fitness, total, top, args, rng)
        evaluate(search, fitness, progress)
        check_budget(search.population, total, top)
        select(search, fitness, watch, time.time() - began)
        print(status(search, fitness), flush=True)
        save(search, state_path, settings, rng)
    progress.close()
    if len(search.tried) < args.evaluations:
        print(f"--patience {args.patience}: the search ends after {len(search.tried)} of "
              f"{args.evaluations} evaluations, as the watched KL got no better in so many "
              "generations")
    return search.best, search.history


def children(population, fitness, total, top, args, rng):
    """The next generation: the best live on, the others are new and differ from all before.

    Fewer where a small budget leaves few candidates: then it is drawn in vain, and not for ever.
    """
    ranked = sorted(population, key=fitness)
    new = [list(units) for units in ranked[:args.elite]]
    seen = {tuple(units) for units in ranked}
    for _ in range(DRAWS * args.population):
        if len(new) == args.population:
            break
        if rng.random() < args.crossover:
            a = parent(ranked, fitness, args.tournament, rng)
            b = parent(ranked, fitness, args.tournament, rng)
            child = crossover(a, b, total, top, rng)
        else:
            child = parent(ranked, fitness, args.tournament, rng)
        child = mutate(child, total, top, rng, args.move * THOUSAND)
        if tuple(child) not in seen:
            seen.add(tuple(child))
            new.append(child)
    return new


def parent(ranked, fitness, size, rng):
    """The best of `size` candidates drawn at random: a tournament."""
    return min(rng.sample(ranked, min(size, len(ranked))), key=fitness)


def evaluate(search, fitness, progress):
    """Run what is new in the population, and rank it."""
    candidates = dict.fromkeys(map(tuple, search.population))       # each once, in order
    new = [units for units in candidates if units not in fitness.results]
    fitness.candidates(new, progress.update)
    search.tried |= candidates
    progress.update(len(search.tried) - progress.n)     # the other ranks' candidates, too
    search.population.sort(key=fitness)


def check_budget(population, total, top):
    """No move may lose or win budget: a mistake of ours, not of a user."""
    for units in population:
        assert sum(units) == total and units[0] == 0 and max(units) <= top, units


def select(search, fitness, watch, seconds):
    """Keep the generation's best candidate if it is the best so far on the watched samples."""
    leader = search.population[0]
    fit, watched = fitness(leader), watch(leader)
    search.stale += 1
    if search.best is None or watched < search.best["watch"]:
        search.stale, search.best = 0, {"units": leader, "fit": fit, "watch": watched}
    search.generation += 1
    search.history.append({"generation": search.generation, "evaluations": len(search.tried),
                           "fit": fit, "watch": watched, "seconds": round(seconds, 1)})


def status(search, fitness):
    """A generation in one line."""
    now = search.history[-1]
    return (f"generation {now['generation']:3d}  evaluations {now['evaluations']:4d}  "
            f"KL {now['fit']:.4f}  watched {now['watch']:.4f}  "
            f"best watched {search.best['watch']:.4f}  "
            f"{per_second(len(fitness.results), fitness) * 60:.0f} candidates/min")


def save(search, path, settings, rng):
    """Write what resume() reads."""
    version, internal, gauss = rng.getstate()
    state = {
        "settings": settings,
        "population": search.population,
        "generation": search.generation,
        "stale": search.stale,
        "tried": list(search.tried),
        "history": search.history,
        "best": search.best,
        "rng": [version, list(internal), gauss],
    }
    save_progress(path, STATE, state,
                  f"generation {search.generation}, {len(search.tried)} evaluations")


def resume(path, settings, rng):
    """The Search that save() wrote, and rng as it was; FTPError if it was another run's."""
    state = load_progress(path, STATE)
    check(state["settings"] == settings,
          f"--resume: {path} belongs to a run with other settings, data or artefacts; "
          "give them again, or drop --resume")
    version, internal, gauss = state["rng"]
    rng.setstate((version, tuple(internal), gauss))
    tried = dict.fromkeys(map(tuple, state["tried"]))
    names = ("population", "generation", "stale", "best", "history")
    return Search(**{name: state[name] for name in names}, tried=tried)


def no_tick(n=1):
    """In place of a progress bar's update(), where nothing shows progress."""


# ------------------------------------------------------------------------------------------------
# what stages start from, store and print

def data_pair(args, model, tokenizer):
    """Samples that candidates are judged by, and the watched ones, of another part of the data."""
    form = {"max_prompt": args.max_prompt, "max_response": args.max_response, "seed": args.seed}
    fit = load_samples(args.data, model, tokenizer, "train", args.nsamples, **form)
    watched = load_samples(args.data, model, tokenizer, "watch", args.nwatch, **form)
    return fit, watched


def per_second(n, fitness):
    """n of a search's things in each second that its candidates ran."""
    return n / max(fitness.seconds, 1e-9)


def work(fitness):
    """What a search cost, for the artefact; all ranks must call it."""
    candidates = len(fitness.results)
    run = sum(gather(fitness.blocks_run))
    blocks = candidates * fitness.model.config.n_layer
    return {
        "evaluations": candidates,
        "seconds": round(fitness.seconds, 1),
        "candidates_per_minute": round(60 * per_second(candidates, fitness), 1),
        "tokens_per_second": round(per_second(candidates * fitness.tokens, fitness)),
        "block_evaluations_saved": round(1 - run / max(blocks, 1), 3),
    }


def flops_converter(config, n_tokens, routing, largest):
    """For a search whose thousandths are a block's FLOPs saved: convert of Fitness, `top`, `full`.

    The units are those of the blocks 0 to n_layer - 2. The last block takes the sparsity of the one
    before it: little is computed there that could be saved (lib/last_block.py).
    convert: units -> sparsities that save them on a prompt of n_tokens, under the static order;
    skips that keep K/V or are forecast cost what they cost. top: the thousandths that sparsity
    `largest` saves. full: thousandths that the whole dense model costs. routing: its "kv" and
    "forecaster".
    """
    kv, forecaster = routing["kv"], routing["forecaster"]

    def block(s):
        return prefill_flops(config, n_tokens, [s], kv, head=0, forecaster=forecaster,
                             last_only=False)

    dense, saved, sparsity = block(0.0), [0.0], [0.0]       # the latter: points of a curve
    for i in range(1, round(largest * THOUSAND) + 1):
        gain = THOUSAND * (1 - block(i / THOUSAND) / dense)
        if gain > 0:                    # at first, a forecast may cost more than it saves
            saved.append(gain)
            sparsity.append(i / THOUSAND)

    def convert(units):
        found = [round(float(np.interp(u, saved, sparsity)), 6) for u in units]
        return [*found, found[-1]]

    full = prefill_flops(config, n_tokens, [0.0] * config.n_layer, head=0) / dense
    return convert, int(saved[-1]), THOUSAND * full


def resume_key(args, model, routing, *data):
    """What must be equal for a run to go on from another's state: flags, model, data."""
    free = ("resume", "evaluations", "threads", "out_dir")      # these may differ
    forecaster = routing["forecaster"]
    return {
        **{flag: value for flag, value in vars(args).items() if flag not in free},
        "fingerprint": model.fingerprint,
        "forecaster_id": forecaster.id if forecaster is not None else None,
        "data_digest": digest(data),
    }
