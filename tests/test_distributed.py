"""Several processes give what one gives: torchrun with two gloo ranks on a tiny model."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_stages import inside, without_time

from lib.artefacts import Schedule
from model_ftp import FTPModel, Router

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def two(*words):
    """A stage under torchrun with two ranks: what the user sees on stdout."""
    got = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)],
                         cwd=ROOT, capture_output=True, text=True, env=ENV)
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("ranks 2") == got.stdout.count("settings: ") == 1  # one voice
    return got.stdout


@pytest.fixture(scope="module")
def rows(workshop, tmp_path_factory):
    """Alpaca-form data whose samples fill several groups of 2048 tokens, so that both ranks have some."""
    path = tmp_path_factory.mktemp("rows") / "data.json"
    path.write_text(json.dumps([r | {"input": 8 * r["input"]} for r in json.loads((workshop[1] / "alpaca.json").read_text())]))
    return path


def flags(workshop, rows, out):
    return ["--model", workshop[0], "--out_dir", out, "--dtype", "float32", "--threads", 1, "--device", "cpu", "--data", rows]


SEARCH = ["--nsamples", 4, "--nwatch", 12, "--population", 5, "--elite", 2, "--patience", 99]


def same(a, b):
    """Two artefacts are equal but for times and the number of ranks."""
    a, b = (without_time(p) for p in (a, b))
    assert (a["meta"].pop("ranks"), b["meta"].pop("ranks")) == (1, 2)
    assert a == b
    return a


def test_search(workshop, rows, tmp_path, capsys):
    """The same schedule and history to the last digit; two ranks go on where one process was stopped."""
    words = lambda out, n: ["search_scheduler.py", *flags(workshop, rows, tmp_path / out), *SEARCH, "--sparsity", 0.3, "--evaluations", n]
    assert inside(*words("1", 20), capsys=capsys)[0] == inside(*words("2", 8), capsys=capsys)[0] == 0
    assert "resuming at generation" in two(*words("2", 20), "--resume")
    assert len(same(tmp_path / "1/schedule.json", tmp_path / "2/schedule.json")["meta"]["history"]) > 3


@pytest.fixture(scope="module")
def artefacts(workshop, tmp_path_factory):
    """A schedule with a choice in every block, and a router that decides something."""
    from conftest import make_router
    out, model = tmp_path_factory.mktemp("artefacts"), FTPModel.from_pretrained(workshop[0])
    s = Schedule([0.0, 0.3, 0.5, 0.4, 0.2, 0.4], model.fingerprint)
    s.save(out / "schedule.json")
    make_router(model, s).save(out / "router.safetensors")
    return ["--schedule", out / "schedule.json", "--router", out / "router.safetensors"]


def test_finetuning(workshop, rows, artefacts, tmp_path, capsys):
    words = lambda out: ["finetune_static.py", *flags(workshop, rows, tmp_path / out), *artefacts, *SEARCH, "--evaluations", 10]
    assert inside(*words("1"), capsys=capsys)[0] == 0
    two(*words("2"))
    same(tmp_path / "1/schedule_ft.json", tmp_path / "2/schedule_ft.json")


def test_training(workshop, rows, artefacts, tmp_path, capsys):
    """The same losses, step by step, and the same router within rounding: a batch of 3, so that one rank has two samples, with noise."""
    words = lambda out: ["train_router.py", *flags(workshop, rows, tmp_path / out), *artefacts[:2], "--nsamples", 10, "--nwatch", 12, "--guide_evals", 16,
                         "--guide_samples", 8, "--warmup", 30, "--eval_every", 1, "--steps", 8, "--batch_size", 3, "--gumbel", 0.5]
    assert inside(*words("1"), capsys=capsys)[0] == 0
    two(*words("2"))
    a, b = (Router.load(tmp_path / p / "router.safetensors") for p in "12")
    assert len(a.meta["history"]) == 9
    for x, y in zip(a.meta["history"], b.meta["history"]):
        assert x == pytest.approx(y, rel=1e-4)
    assert a.meta["work"]["tokens"] == b.meta["work"]["tokens"]
    for x, y in zip(a.parameters(), b.parameters()):
        assert torch.allclose(x, y, atol=1e-4)


def test_evaluation(workshop, rows, artefacts, tmp_path, capsys):
    d = workshop[1]
    words = lambda out: ["evaluate.py", *flags(workshop, rows, tmp_path / out), *artefacts, "--text", d / "book.txt", "--context", 48, "--scored", 16,
                         "--tasks", f"mine={d}/task.jsonl,winogrande={d}/partial.jsonl,lambada={d}/lambada.jsonl",
                         "--rows", "uniform,ftp,ftp_decode,random"]
    assert inside(*words("1"), capsys=capsys)[0] == 0
    two(*words("2"))
    a, b = (without_time(tmp_path / p / "eval.json")["rows"] for p in "12")
    assert a == b and len(a) == 5


MISTAKE = """
import sys
sys.path.insert(0, {root!r})
import search_scheduler
from lib.artefacts import Schedule
from lib.files import FTPError
from lib.processes import rank
from lib.search import Fitness
from lib.stage import run

def fail(*_):
    raise FTPError(f"--data: a file is bad on rank {{rank()}}")

def main():
    if rank() == {rank}:
        {where} = fail
    search_scheduler.main()

run(main)
"""


@pytest.mark.parametrize("rank, where", [(1, "Fitness.items"), (0, "Schedule.save")])
def test_mistake_on_one_rank_ends_all(workshop, rows, tmp_path, rank, where):
    """Amid the search, and at the very end: exit code 2 on both ranks, one line in all, no rank left waiting."""
    (tmp_path / "main.py").write_text(MISTAKE.format(root=str(ROOT), rank=rank, where=where))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    words = [sys.executable, tmp_path / "main.py", *flags(workshop, rows, tmp_path), *SEARCH, "--evaluations", 5]
    ranks = [subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={
        **ENV, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for r in range(2)]
    try:
        err = [p.communicate(timeout=60)[1] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [2, 2], err
    assert err[rank].startswith("main.py: error: --data: a file is bad on rank") and err[1 - rank] == ""
    assert len(err[rank].splitlines()) == 1 and not (tmp_path / "schedule.json").exists()
