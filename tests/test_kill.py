"""Stages ended at random moments and resumed: nothing is lost, and the artefact is that of the straight run, byte for byte.

The stages run in children of a process that has torch and transformers loaded already (multiprocessing's forkserver), so that a signal
meets their work and not their imports.
"""
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import sys
import time

import pytest
from conftest import TALLY, TORTURE
from test_stages import call, without_time

from model_ftp import Router

KILLS = 20 if TORTURE else 1  # of each stage at least
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["evaluate", "search_scheduler", "finetune_static", "train_router", "prepare", "fit_late_kv",
                             "transformers.models.auto.tokenization_auto"])


def run_stage(script, words, log, die_at=None, most_bytes=None, home=None, untraced=False):
    """In a child: run a stage, its output to `log`. die_at (function of os, its n-th call): SIGKILL just before it. untraced: coverage looks
    away, as a signal that meets it within its own lock hangs the process (seen once, in its tracer)."""
    if untraced:
        sys.settrace(None)
    with open(log, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = [script, *words]
    module = __import__(script.removesuffix(".py"))
    from lib import data, stage
    if home:
        data.HOME, data.PROMPTS = home, home.parent / "prompts.jsonl"
    if most_bytes:  # what a full disk does to a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if die_at:
        name, nth, real = *die_at, getattr(os, die_at[0])
        count = iter(range(1, 10 ** 6))

        def deadly(*a):
            if next(count) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a)
        setattr(os, name, deadly)
    stage.run(module.main)


class Runner:
    """A stage in its folder: run it, kill it, read what it left."""
    def __init__(self, script, words, out, artefacts, home=None):
        self.script, self.words, self.out, self.artefacts, self.home = script, [str(w) for w in words], out, artefacts, home
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.seconds = out / "log.txt", 0.0

    def start(self, *more, **kw):
        self.log.write_text("")
        child = FORK.Process(target=run_stage, args=(self.script, [*self.words, "--out_dir", str(self.out), *more], str(self.log)),
                             kwargs={**kw, "home": self.home})
        child.start()
        return child

    def finish(self, *more, **kw):
        t, child = time.time(), self.start(*more, **kw)
        child.join(300)
        self.seconds = time.time() - t
        return child.exitcode

    def result(self):
        """Bytes of the weights, and JSON less dates, seconds and folders."""
        return {name: (self.out / name).read_bytes() if name.endswith(".safetensors") else without_time(self.out / name)
                for name in self.artefacts if (self.out / name).exists()}

    def wait_for(self, pattern, seconds=300):
        """Until the log has it."""
        end = time.time() + seconds
        while not re.search(pattern, self.log.read_text()):
            assert time.time() < end, self.log.read_text()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def runner(workshop, tmp_path_factory):
    """runner(stage, folder) -> Runner; the stages build on one straight run of those before them, whose results are in runner.straight."""
    path, d = workshop
    base = tmp_path_factory.mktemp("straight")
    common = ["--model", path, "--dtype", "float32", "--threads", 1, "--data", d / "alpaca.json"]
    search = ["--nsamples", 4, "--nwatch", 4, "--population", 5, "--elite", 2, "--patience", 99]
    artefacts = ["--schedule", base / "search" / "schedule.json", "--router", base / "train" / "router.safetensors"]
    stages = {
        "search": ("search_scheduler.py", [*common, *search, "--sparsity", 0.3, "--evaluations", 60], ["schedule.json"]),
        "train": ("train_router.py", [*common, *artefacts[:2], "--nsamples", 8, "--nwatch", 4, "--guide_evals", 16, "--guide_samples", 2, "--warmup", 30,
                                      "--eval_every", 2, "--steps", 24, "--gumbel", 0.5, "--decode_share", 0.5], ["router.safetensors", "router.json"]),
        "finetune": ("finetune_static.py", [*common, *search, *artefacts, "--evaluations", 40], ["schedule_ft.json"]),
        "evaluate": ("evaluate.py", [*common, *artefacts, "--text", d / "book.txt", "--context", 48, "--scored", 16, "--tasks", f"mine={d}/task.jsonl",
                                     "--rows", "uniform,static,random,attention,ftp,ftp_decode,rule"], ["eval.json"]),
    }

    def get(name, out):
        script, words, made = stages[name]
        return Runner(script, words, out, made)

    get.straight = {}

    def straight(name):
        for before in {"train": ["search"], "finetune": ["search", "train"], "evaluate": ["search", "train"]}.get(name, []):
            straight(before)
        if name not in get.straight:
            r = get(name, base / name)
            assert r.finish() == 0, r.log.read_text()
            get.straight[name] = r
        return get.straight[name]

    get.make = straight
    return get


@pytest.mark.parametrize("name", ["search", "train", "finetune", "evaluate"])
def test_killed_at_random_moments(runner, tmp_path, name):
    whole, rng, kills = runner.make(name), random.Random(name), 0
    r, fresh, most = runner(name, tmp_path / name), True, whole.seconds
    while kills < KILLS:  # each kill meets a run that goes on from the one before; one that got through is taken away and begins anew
        t, child = time.time(), r.start("--resume")
        child.join(rng.uniform(0, most))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            fresh = False
            assert r.result().items() <= whole.result().items()  # no artefact yet, or the whole one
        else:
            assert child.exitcode == 0 and r.result() == whole.result(), r.log.read_text()
            for f in r.out.iterdir():
                f.unlink()
            fresh, most = True, min(most, time.time() - t) if fresh else most  # the straight run may have met a busier machine
    assert r.finish("--resume") == 0, r.log.read_text()
    assert r.result() == whole.result()
    TALLY["kills survived"] += kills


WRITES = [("search", "replace", 3), ("train", "replace", 15), ("train", "replace", 2), ("search", "fsync", 2), ("evaluate", "fsync", 4)]


@pytest.mark.parametrize("name, function, nth", WRITES if TORTURE else WRITES[:2])
def test_killed_in_the_middle_of_a_write(runner, tmp_path, name, function, nth):
    """SIGKILL just before a file is flushed or renamed; the router's 15th rename follows 13 states and its weights: its twin is not there yet."""
    whole, r = runner.make(name), runner(name, tmp_path / name)
    assert r.finish(die_at=(function, nth)) == -signal.SIGKILL
    if nth == 15:
        assert (r.out / "router.safetensors").exists() and not (r.out / "router.json").exists()
        assert Router.load(r.out / "router.safetensors").meta["best_step"] == Router.load(whole.out / "router.safetensors").meta["best_step"]
    assert r.finish("--resume") == 0 and r.result() == whole.result()
    TALLY["kills survived"] += 1


@pytest.mark.parametrize("name, number", [("search", signal.SIGINT), ("search", signal.SIGTERM), ("train", signal.SIGTERM), ("evaluate", signal.SIGINT)]
                         [:None if TORTURE else 2])
def test_stopped_by_a_signal(runner, tmp_path, name, number):
    """One line says what was kept and how to go on; doing so gives the straight run's artefact."""
    whole, r = runner.make(name), runner(name, tmp_path / name)
    child = r.start(untraced=True)
    r.wait_for({"search": "generation +3", "train": "step +6", "evaluate": "static: "}[name])
    os.kill(child.pid, number)
    child.join(300)
    text = r.log.read_text()
    last = text.splitlines()[-1]
    assert child.exitcode == 128 + number and "Traceback" not in text and "Kept: " in last and str(r.out) in last, text
    assert {"search": "generation", "train": "step", "evaluate": "rows"}[name] in last
    again = shlex.split(last.split("To go on: ")[1])
    assert again[:2] == ["python", r.script] and again[-1] == "--resume"
    r.words = again[2:-1]
    assert r.finish("--resume") == 0 and r.result() == whole.result()
    TALLY["kills survived"] += 1


def test_stopped_before_anything_was_saved(runner, tmp_path):
    r = runner("search", tmp_path)
    runner.make("search")
    child = r.start(untraced=True)
    r.wait_for("torch ")  # the banner
    os.kill(child.pid, signal.SIGINT)
    child.join(300)
    last = r.log.read_text().splitlines()[-1]
    assert child.exitcode == 130 and "Traceback" not in r.log.read_text() and ("nothing" in last or "generation" in last)


@pytest.mark.parametrize("name, limit", [("search", 9000), ("train", 14_000), ("evaluate", 6000)][:None if TORTURE else 1])
def test_full_disk(runner, tmp_path, name, limit):
    """A write that the disk refuses ends in one line and code 2; what was there stays, and the run goes on when there is room."""
    whole, r = runner.make(name), runner(name, tmp_path / name)
    assert r.finish() == 0
    before = r.result()
    assert r.finish(most_bytes=limit) == 2
    lines = r.log.read_text().splitlines()
    assert "error: --out_dir" in lines[-1] and "can't be written" in lines[-1] and not any("Traceback" in s for s in lines), lines[-3:]
    assert r.result() == before and not list(r.out.glob("*.tmp"))
    assert r.finish("--resume") == 0 and r.result() == whole.result()
    TALLY["full disks survived"] += 1


def test_answers_of_the_model_are_resumed(workshop, tmp_path):
    """prepare.py's second half: killed in writes after a batch, the answers are those of the straight run."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"instruction": f"say {i}", "input": ""}) for i in range(80)))
    made = []
    for folder, kills in (("straight", []), ("killed", [("replace", 2), ("fsync", 1)])):
        r = Runner("prepare.py", ["--model", workshop[0], "--dtype", "float32", "--threads", 1], tmp_path / f"{folder}_out", [], tmp_path / folder)
        for where in kills:
            assert r.finish(die_at=where) == -signal.SIGKILL
            TALLY["kills survived"] += 1
        assert r.finish() == 0, r.log.read_text()
        (file,) = (tmp_path / folder / "self").iterdir()
        made.append((file.name, file.read_bytes()))
    assert made[0] == made[1] and len(made[0][1].splitlines()) == 80


def test_same_seed_same_artefact(runner, tmp_path):
    """Another process with another hash seed: the same schedule and router, byte for byte. Another seed: another schedule."""
    for name in ("search", "train"):
        whole = runner.make(name)
        call(whole.script, *whole.words, "--out_dir", tmp_path / name)
        assert runner(name, tmp_path / name).result() == whole.result()
    other = runner("search", tmp_path / "other")
    assert other.finish("--seed", "1") == 0 and other.result() != runner.make("search").result()
