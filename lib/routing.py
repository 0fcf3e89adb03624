"""How a model is routed: one frozen object, made and checked in one place."""
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lib.artefacts import SELECTIONS, Schedule
from lib.checkpoint import check_fingerprint
from lib.files import check
from lib.last_block import is_lean, prefill_last
from lib.skipped import Forecaster, Skipped, is_kv_only

CHOICES = {"prefill": ("topk", "argmax"), "decode": ("dense", "threshold", "rule"),
           "kv": ("drop", "keep")}
WINDOW = 16     # last prompt queries whose attention makes the scores, where no router says else


@dataclass(frozen=True)
class Routing:
    """A schedule and a router, and the settings that they run under.

    sparsity, leader (n_layer,): of each block the share of tokens that skip it, and the block
    whose decision it takes, itself or one before. router: "static", "random", "attention", a Router
    or a function. thresholds (n_layer,): margins from which new tokens compute, under decode
    "threshold". skipped: None where a skipped token leaves nothing (the paper), else
    lib/skipped.Skipped. window: the last so many queries make the scores, or "mean". seed: of
    random selection. first: so many first tokens of a prompt always compute, as the schedule says.
    """
    sparsity: tuple
    leader: tuple
    schedule: Schedule | None = None
    router: object = "static"
    prefill: str = "topk"
    decode: str = "dense"
    thresholds: tuple | None = None
    skipped: Skipped | None = None
    one_pass: bool = False
    window: int | str = WINDOW
    seed: int = 0
    first: int = 1

    @classmethod
    def dense(cls, n_layer):
        return cls((0.0,) * n_layer, tuple(range(n_layer)))

    @property
    def learned(self):
        """Whether the router is a trained one."""
        return isinstance(self.router, torch.nn.Module)

    @property
    def kv(self):
        return "keep" if self.skipped is not None and self.skipped.keep else "drop"

    @property
    def forecaster(self):
        return None if self.skipped is None else self.skipped.forecaster

    def prefill_of(self, block, batch):
        """What runs a block on prompts: Block.prefill, or what stands in for it."""
        if is_lean(batch, block.l, len(self.sparsity)):
            return partial(prefill_last, block, self.skipped)
        return block.prefill if self.skipped is None else partial(self.skipped.prefill, block)

    def extend_of(self, block):
        """What runs a block on new tokens."""
        return block.extend if self.skipped is None else partial(self.skipped.extend, block)

    def absent(self, l):
        """Whether block l leaves tokens that skip it as they are, and holds nothing of them."""
        return self.sparsity[l] >= 1 or self.skipped is None

    def draw(self, l, batch):
        """Random margins (N,), by the prompts alone: what ran before changes nothing."""
        seed = hash((self.seed, l, *map(tuple, batch.seqs)))
        rng = torch.Generator().manual_seed(seed)
        return torch.rand(len(batch.every), generator=rng).to(batch.every.device)


def make_routing(model, schedule=None, router="static", *, prefill="topk", decode="dense",
                 kv="drop", one_pass=False, score=None, group=None, forecaster=None, seed=0,
                 mismatch=False):
    """Routing of `model` from artefacts, checked against it and each other.

    schedule: Schedule or path. router: see Routing, not a path. prefill: "topk" (each block keeps
    its quota) or "argmax" (the router's own decision, as in the paper). decode: "dense",
    "threshold" (calibrated), or "rule" (the paper's: skip blocks with s > 0.5). kv: "drop" or
    "keep" keys and values of skipped tokens. one_pass: all blocks decide by the scores that the
    first one to decide has. score: window W or "mean" (default: the router's). group: so many
    neighbouring blocks share the decision of the first (default: the router's, or 1). forecaster:
    Forecaster or path.
    mismatch: run a router under other settings than it was trained with.
    """
    if isinstance(schedule, (str, Path)):
        schedule = Schedule.load(schedule)
    if isinstance(forecaster, (str, Path)):
        forecaster = Forecaster.load(forecaster)
    check_choices(prefill=prefill, decode=decode, kv=kv)
    check_kinds(schedule, router, forecaster, score, group)
    if schedule is None:
        check(router == "static", "--router: without a schedule it decides nothing; give one")
        return Routing.dense(model.config.n_layer)

    # what belongs together: first the schedule, then what is made for it
    learned = isinstance(router, torch.nn.Module)
    check(prefill != "argmax" or learned,
          "--prefill argmax: only a trained router decides by argmax; give --router, or topk")
    model_print = model.fingerprint                     # once: it reads a sample of every weight
    check_schedule(schedule, model, model_print)
    forecaster = fit_to(forecaster, model, model_print, schedule, kv)
    thresholds = None
    if learned:
        check_router(router, model, model_print, forecaster)
        if not mismatch:
            check_settings(router, kv, one_pass, forecaster)
        router = router.to(model.device)
        thresholds = thresholds_of(schedule, router)
    check(decode != "threshold" or thresholds is not None,
          "--decode threshold: no thresholds are stored for this schedule and router; calibrate "
          "them (lib/calibration.py), or give --decode dense")

    # what the caller leaves open, a trained router says
    group = group or (router.group if learned else 1)
    n_layer = model.config.n_layer
    check(group <= n_layer, f"--group {group}: more than the model's {n_layer} blocks; lower it")
    grouped = schedule.grouped(group)
    leader = grouped.leaders(group, decides_alike(router, one_pass))
    return Routing(
        sparsity=tuple(grouped.sparsity), leader=tuple(leader), schedule=grouped,
        router=router, prefill=prefill, decode=decode, thresholds=thresholds, one_pass=one_pass,
        skipped=Skipped(kv == "keep", forecaster) if kv == "keep" or forecaster else None,
        window=score or (router.score if learned else WINDOW), seed=seed, first=schedule.first)


def decides_alike(router, one_pass):
    """Whether a router would decide the same for neighbouring blocks of equal sparsity."""
    if router == "static":
        return True
    learned = isinstance(router, torch.nn.Module)
    if learned and (router.kind != "global" or {"hidden", "forecast"} & set(router.inputs)):
        return False                                    # what it reads differs between blocks
    return one_pass and router != "random"


def check_choices(**given):
    """FTPError where a setting is none of its CHOICES."""
    for flag, value in given.items():
        check(value in CHOICES[flag],
              f"--{flag} {value}: unknown; choose from {', '.join(CHOICES[flag])}")


def check_kinds(schedule, router, forecaster, score, group):
    """FTPError where an argument is of no kind that make_routing() takes."""
    known = isinstance(router, torch.nn.Module) or callable(router) or router in SELECTIONS
    check(known,
          f"--router {router}: no such router; give a file, or one of {', '.join(SELECTIONS)}")
    check(forecaster is None or isinstance(forecaster, Forecaster),
          "--forecaster: give a Forecaster or the path of its file")
    check(schedule is None or isinstance(schedule, Schedule),
          "--schedule: give a Schedule or the path of its file")
    # bool is an int to Python, but no number of blocks or queries
    check(group is None or type(group) is int and group > 0,
          f"--group {group}: must be a whole number of at least 1")
    check(score in (None, "mean") or type(score) is int and score > 0,
          f"--score {score}: give a number of queries, or mean")


def check_schedule(schedule, model, model_print):
    n = model.config.n_layer
    check_fingerprint(schedule.fingerprint, model_print, "--schedule: it")
    check(len(schedule.sparsity) == n,
          f"--schedule: it has {len(schedule.sparsity)} blocks, the model {n}")
    check(not schedule.parts or all(part == "both" for part in schedule.parts),
          "--schedule: it removes sub-blocks, a rival's way; run it by analysis/rivals/")


def check_router(router, model, model_print, forecaster):
    check_fingerprint(router.fingerprint, model_print, "--router: it")
    c = model.config
    check((router.n_layer, router.hidden_size) == (c.n_layer, c.hidden_size),
          f"--router: it is for {router.n_layer} blocks of width {router.hidden_size}, the model "
          f"has {c.n_layer} of {c.hidden_size}")
    check("forecast" not in router.inputs or forecaster is not None,
          "--router: it reads forecasts; give --forecaster, the one it was trained with")


def check_settings(router, kv, one_pass, forecaster):
    """A router decides for what it was trained in: refuse another K/V policy, and so on."""
    now = {"kv": kv, "one_pass": one_pass, "forecaster": forecaster is not None}
    trained = router.meta.get("settings") or {}
    was = {k: trained[k] for k in now if k in trained}
    if "forecaster" in was:
        was["forecaster"] = bool(was["forecaster"])
    differ = [k for k in was if was[k] != now[k]]
    then, here = (", ".join(f"--{k} {o[k]}" for k in differ) for o in (was, now))
    check(not differ, f"--router: it was trained with {then}, this is {here}; give what it was "
                      "trained with, or --mismatch to run it all the same")


def thresholds_of(schedule, router):
    """Decode thresholds that belong to this schedule and router, or None."""
    found = None
    if schedule.router_id == router.id:
        found = schedule.decode_threshold
    elif router.meta.get("schedule_id") == schedule.id:
        found = router.meta.get("decode_threshold")
    return None if found is None else tuple(found)


def fit_to(forecaster, model, model_print, schedule, kv):
    """The Forecaster on the model's device and in its dtype; FTPError where it does not fit."""
    if forecaster is None:
        return None
    f, c = forecaster, model.config
    check_fingerprint(f.fingerprint, model_print, "--forecaster: it")
    width = c.kv_bytes(1, 1) + (0 if is_kv_only(f) else c.hidden_size)
    fits = (f.n_layer, f.d, f.c.shape[1]) == (c.n_layer, c.hidden_size, width)
    check(fits and len(f.a) <= f.n_layer,
          "--forecaster: its shape does not fit the model; fit it again with fit_late_kv.py")
    check(kv == "keep" or not is_kv_only(f),
          f"--kv {kv}: this forecaster gives keys and values alone; give --kv keep")
    check(not any(0 < s < 1 for s in schedule.sparsity[:f.first]),
          f"--forecaster: it serves blocks from {f.first} on, the schedule skips in earlier ones; "
          "fit it for this schedule")
    moved = f.c.device != model.device or f.c.dtype != model.dtype
    return f.to(model.device, model.dtype) if moved else f


def with_thresholds(routing, thresholds):
    """The same Routing, new tokens deciding by `thresholds` (n_layer,)."""
    return replace(routing, decode="threshold", thresholds=tuple(thresholds))


def routing_span():
    """Marks routing for the profiler; nothing when none runs, as a mark costs ten operators."""
    running = torch.autograd._profiler_enabled()
    return torch.profiler.record_function("ftp_routing") if running else nullcontext()
