"""The evaluation against other people's code: lm-evaluation-harness and transformers; and what is made of many evaluations."""
import argparse
import json
import math
import random

import pytest
import torch
from test_stages import ROOT, call, common, inside

from analysis import ablations
from lib import data, evaluation, tasks
from lib.artefacts import Schedule
from model_ftp import FTPModel

WORDS = "the cat sat on a mat and saw nine red birds over an old grey house by the sea".split()


def say(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def harness(workshop, tmp_path_factory):
    """A folder of the harness's tasks over local files: choice (some contexts empty or ending in blanks), rolling text, generation."""
    pytest.importorskip("lm_eval")
    d, rng = tmp_path_factory.mktemp("tasks"), random.Random(3)
    items = [{"context": say(rng, 3 + i % 9) + ("", " ", ":\n")[i % 3], "choices": [say(rng, n) for n in (2, 3, 1)], "answer": i % 3} for i in range(12)]
    items[4]["context"] = ""
    write = lambda name, rows: (d / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    write("choice.jsonl", items)
    write("rolling.jsonl", [{"text": say(rng, n)} for n in (3, 40, 90)])
    write("generate.jsonl", [{"context": say(rng, 2 + 3 * i), "want": "x"} for i in range(5)])
    head = "task: {0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}/{0}.jsonl\ntest_split: test\noutput_type: {2}\n"
    task = lambda name, kind, more: (d / f"{name}.yaml").write_text(head.format(name, d, kind) + more)
    task("choice", "multiple_choice", 'doc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
         "metric_list:\n  - metric: acc\n  - metric: acc_norm\n")
    task("rolling", "loglikelihood_rolling", 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n')
    task("generate", "generate_until", 'doc_to_text: "{{context}}"\ndoc_to_target: "{{want}}"\nmetric_list:\n  - metric: exact_match\n'
         'generation_kwargs:\n  until: ["ca"]\n  max_gen_toks: 12\n  do_sample: false\n')
    return d


def harness_run(folder, lm, *tasks):
    """{task: [responses of an item, in order]}, and the results."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    got = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                                  bootstrap_iters=0, log_samples=True)
    return {t: [s["resps"] for s in sorted(got["samples"][t], key=lambda s: s["doc_id"])] for t in tasks}, got


def flat(x):
    return [v for e in x for v in flat(e)] if isinstance(x, (list, tuple)) else [float(x) if not isinstance(x, str) else x]


def test_harness_equals_hugging_face(workshop, harness):
    """Sparsity 0: the adapter's log-likelihoods, rolling log-likelihoods and texts are those of the harness's own --model hf, item by item."""
    from lm_eval.models.huggingface import HFLM

    from extras.lm_eval_ftp import FTPLM
    tasks = ("choice", "rolling", "generate")
    hf, got_hf = harness_run(harness, HFLM(str(workshop[0]), device="cpu", dtype="float32", batch_size=3, max_length=40), *tasks)
    for more in ({}, {"max_tokens": 64}):
        ours, got = harness_run(harness, FTPLM(str(workshop[0]), dtype="float32", device="cpu", max_length=40, **more), *tasks)
        assert flat(ours["choice"]) == pytest.approx(flat(hf["choice"]), abs=1e-3)
        assert flat(ours["rolling"]) == pytest.approx(flat(hf["rolling"]), abs=1e-2)
        assert ours["generate"] == hf["generate"] and any(flat(ours["generate"]))
        for t in tasks:
            for k, v in got_hf["results"][t].items():
                assert got["results"][t][k] == (pytest.approx(v, rel=1e-4) if isinstance(v, float) else v)


def test_harness_equals_evaluate(workshop, harness):
    """Routed: evaluate.py's scorer and the harness agree item by item, batch mates change nothing, and no piece of a rolling text sees the future."""
    from extras.lm_eval_ftp import FTPLM
    path = str(workshop[0])
    model, tok = FTPModel.from_pretrained(path), data.load_tokenizer(path)
    s = Schedule([0.0, 0.5, 0.5, 0.4, 0.3, 0.5], model.fingerprint)
    lm = FTPLM(path, dtype="float32", device="cpu", schedule=s, max_length=120, scored=16)
    got, results = harness_run(harness, lm, "choice", "rolling", "generate")
    _, items = tasks.load_task(f"choice={harness}/choice.jsonl")
    items = [it | {"continuations": [" " + c for c in it["continuations"]]} for it in items]  # the harness's delimiter
    model.use(s)
    mine = evaluation.evaluate_task(model, tok, items, "causal")
    pairs = [tasks.encode_pair(tok, a, b) for it in items for a, b in zip(it["contexts"], it["continuations"])]
    assert flat(got["choice"])[::2] == pytest.approx([v for v, _ in evaluation.score_pairs(model, pairs, "causal")], abs=1e-3)
    samples = sorted(results["samples"]["choice"], key=lambda e: e["doc_id"])
    assert [e["acc"] for e in samples] == mine["items"] and [e["acc_norm"] for e in samples] == mine["items_norm"]
    dense, _ = harness_run(harness, FTPLM(path, dtype="float32", device="cpu", max_length=120), "choice", "rolling")
    for t in dense:  # something was skipped
        assert max(abs(a - b) for a, b in zip(flat(got[t]), flat(dense[t]))) > 0.05
    st = results["config"]["ftp"]
    assert 0.25 < st["sparsity_prefill"] < 0.4 and st["sparsity_decode"] == 0
    assert flat(harness_run(harness, FTPLM(path, dtype="float32", device="cpu", schedule=s, max_length=120, scored=16, max_tokens=1), "rolling")[0]["rolling"]) == (
        pytest.approx(flat(got["rolling"]), abs=1e-3))
    texts = [json.loads(line)["context"] for line in (harness / "generate.jsonl").read_text().splitlines()]
    new = model.generate([data.encode(tok, t) for t in texts], max_new_tokens=12)
    assert flat(got["generate"]) == [tok.decode(n, skip_special_tokens=True).split("ca")[0] for n in new]


def test_harness_command_line(workshop, harness, tmp_path):
    """As a user runs it: the harness's own command line, and mistakes in one line."""
    model = workshop[0]
    args = lambda more: ["extras/lm_eval_ftp.py", "--model", "ftp", "--model_args", f"pretrained={model}{more}", "--tasks", "choice",
                         "--include_path", harness, "--output_path", tmp_path]
    got = call(*args(""))
    assert "acc_norm" in got.stdout and "ftp" in got.stdout
    saved = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert saved["config"]["ftp"]["sparsity_prefill"] == 0 and 0 <= saved["results"]["choice"]["acc,none"] <= 1
    bad = call(*args(f",schedule={tmp_path}/none.json"), ok=False)
    assert bad.returncode == 2 and "--schedule" in bad.stderr and "Traceback" not in bad.stderr


def test_harness_is_optional(tmp_path):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('not here')\n")
    import os
    import subprocess
    import sys
    got = subprocess.run([sys.executable, ROOT / "extras" / "lm_eval_ftp.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert got.returncode == 2 and "pip install lm_eval==0.4.13" in got.stderr and len(got.stderr.strip().splitlines()) == 1


def evaluated(workshop, out, *more):
    """Rows of an evaluate.py run on the tiny model, {name: row}, and what it printed."""
    s = Schedule.uniform(FTPModel.from_pretrained(workshop[0]), 0.4)
    s.save(out / "schedule.json")
    a, b = common(workshop, out)
    got = call("evaluate.py", *a, *b, "--schedule", out / "schedule.json", "--rows", "static", "--nsamples", 4, *more)
    return {r["name"]: r for r in json.loads((out / "eval.json").read_text())["rows"]}, got.stdout


def test_perplexity_is_the_usual_one(workshop, tmp_path):
    """The dense row equals transformers on the same windows (rows joined by blank lines, no overlap); with one prompt token it is the whole
    window's loss, and then nothing can be skipped."""
    from transformers import AutoModelForCausalLM
    rng, rows = random.Random(1), []
    for i in range(40):
        rows += [f" = {say(rng, 2)} = " if i % 8 == 0 else f" {say(rng, 12)} ", " "]
    (tmp_path / "wiki.valid.raw.txt").write_text("\n".join(rows) + "\n")
    hf, tok = AutoModelForCausalLM.from_pretrained(workshop[0]), data.load_tokenizer(workshop[0])
    text = "\n\n".join("" if r == " " else r + "\n" for r in rows)
    ids = torch.tensor(tok(text, add_special_tokens=False)["input_ids"])
    for context, scored, n in ((48, 16, 20), (1, 63, 0)):
        got, _ = evaluated(workshop, tmp_path, "--text", tmp_path / "wiki.valid.raw.txt", "--context", context, "--scored", scored, "--nwindows", n)
        wins = ids[:len(ids) // 64 * 64].view(-1, 64)[:n or None]
        labels = wins.clone()
        labels[:, :context] = -100
        with torch.no_grad():
            want = math.exp(hf(wins, labels=labels).loss)
        ppl = {k: r["ppl"]["wiki.valid.raw.txt"] for k, r in got.items()}
        assert ppl["dense"] == pytest.approx(want, rel=1e-4)
        assert (ppl["static"] == pytest.approx(want, rel=1e-4)) == (context == 1)


def test_floor_and_tasks_that_need_their_context(workshop, tmp_path):
    d, rng = workshop[1], random.Random(2)
    asks = [{"kind": "qa", "prompt": say(rng, 30), "answers": ["red birds", "zebra"]} for _ in range(3)]
    asks += [{"kind": "yes", "prompt": say(rng, 30), "answers": [("yes", "No")[i % 2]]} for i in range(6)] + [{"kind": "none", "prompt": "a", "answers": []}]
    (tmp_path / "asks.jsonl").write_text("\n".join(map(json.dumps, asks)))
    own = [json.loads(line) | {"needs_context": True} for line in (d / "task.jsonl").read_text().splitlines()]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    got, out = evaluated(workshop, tmp_path, "--text", "", "--floor", "--tasks", f"hellaswag={d}/task.jsonl,part={d}/partial.jsonl,word={d}/lambada.jsonl,"
                         f"qa={tmp_path}/asks.jsonl,yes={tmp_path}/asks.jsonl,own={tmp_path}/own.jsonl")
    dense, static = got["dense"], got["static"]
    assert {t: v["needs_context"] for t, v in dense["tasks"].items()} == {"hellaswag": False, "part": False, "word": True, "qa": True, "yes": True, "own": True}
    # the floor: the same items from the start token alone
    model, tok = FTPModel.from_pretrained(workshop[0]), data.load_tokenizer(workshop[0])
    hits = []
    for it in own:
        score = [v / (len(c) - 1) for c in it["choices"] for v, _ in evaluation.score_pairs(model, [([tok.bos_token_id], tok(c)["input_ids"])], "causal")]
        hits.append(score.index(max(score)) == it["answer"])
    for row in (dense, static):
        t = row["tasks"]
        assert t["hellaswag"]["floor"] == pytest.approx(sum(hits) / len(hits)) and t["part"]["floor"] == 0.5
        assert t["word"]["floor"] is None and t["qa"]["floor"] is None and 0 <= t["yes"]["floor"] <= 1
    s = Schedule.load(tmp_path / "schedule.json")
    mine = dict([tasks.load_task(f"hellaswag={d}/task.jsonl"), tasks.load_task(f"own={tmp_path}/own.jsonl")])
    args = lambda f: argparse.Namespace(protocol="causal", floor=f, truncate=False)
    saved = [evaluation.evaluate_row(model.use(s), tok, "x", args(f), mine, {}, [([5] * 20, [6] * 8)], None)[0]
             ["flops_saved_total"] for f in (False, True)]
    assert saved[0] == saved[1]  # the floor is not counted as work of the row
    for key, names in (("retention", ("hellaswag", "part")), ("retention_context", ("word", "qa", "yes", "own"))):
        pairs = [(evaluation.figure(t, static["tasks"][t]), evaluation.figure(t, dense["tasks"][t]), dense["tasks"][t]["chance"]) for t in names]
        for k, values in ((key, [a / b for a, b, _ in pairs if b > 0]), (f"{key}_chance_corrected", [(a - c) / (b - c) for a, b, c in pairs if b > c])):
            assert static[k] == (pytest.approx(sum(values) / len(values)) if values else None)
    assert dense["tasks"]["hellaswag"]["chance"] == pytest.approx(1 / 3) and dense["tasks"]["part"]["chance"] == dense["tasks"]["yes"]["chance"] == 0.5
    assert dense["tasks"]["qa"]["acc_norm"] is None and dense["tasks"]["qa"]["n"] == 3 and dense["tasks"]["yes"]["n"] == 6
    assert "floor" in out and "with context" in out and "without any question" in out
    for spec, say_so in ((f"long={tmp_path}/asks.jsonl", "none, qa, yes"), (f"none={tmp_path}/asks.jsonl", "no answer")):
        with pytest.raises(data.FTPError, match=say_so):
            tasks.load_task(spec)


def test_generated_answers(tiny):
    """An answer counts when the first line of the greedy text holds it, whatever its case, punctuation and articles."""
    class Words:
        bos_token = None

        def __call__(self, text, **kw):
            return {"input_ids": [3, 4, 5]}

        def decode(self, ids, **kw):
            return " The Red-Billed  hornbill!\nOr a parrot."
    items = [{"contexts": ["x"], "continuations": [a]} for a in ("a red-billed hornbill", "parrot", "the", "Hornbill.")]
    assert evaluation.generated_hits(tiny, Words(), items, max_new_tokens=2, max_tokens=6) == [1.0, 0.0, 0.0, 1.0]


def test_retention():
    dense = {"a": {"acc": 0.5, "acc_norm": None, "chance": 0.25}, "piqa": {"acc": 0.1, "acc_norm": 0.9, "chance": 0.5},
             "b": {"acc": 0.2, "acc_norm": 0.2, "chance": 0.25}}
    mine = {"a": {"acc": 0.25, "acc_norm": None}, "piqa": {"acc": 0.9, "acc_norm": 0.7}, "b": {"acc": 0.2, "acc_norm": 0.0}}
    plain, fixed, pooled = evaluation.retention(mine, dense)
    assert plain == pytest.approx((0.5 + 7 / 9 + 1) / 3) and fixed == pytest.approx((0 + 0.5) / 2)
    assert pooled == pytest.approx((0 + 0.2 - 0.05) / (0.25 + 0.4 - 0.05))
    assert evaluation.retention({}, {}) == [None, None, None]


def eval_file(path, rows, **settings):
    """An eval.json with rows {name: (FLOPs saved, perplexity, KL, retention)}, as evaluate.py writes it."""
    make = lambda name, saved, ppl, kl, kept: {
        "name": name, "sparsity_prefill": saved, "sparsity_decode": 0.0, "flops_saved_prefill": saved, "flops_saved_total": saved / 2, "kl": kl,
        "kl_items": [kl, kl], "ppl": {"responses": 3.0, "wiki": ppl}, "retention_pooled": kept, "retention_context_pooled": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": "ftp-eval-1", "config": {"settings": {"protocol": "causal", **settings}, "fingerprint": {"config": "x"}},
                                "rows": [make("dense", 0.0, 20.0, 0.0, 1.0), *(make(k, *v) for k, v in rows.items())]}))
    return path


def test_pareto(tmp_path, capsys):
    """Seeds of one level become one point with its spread, levels stay apart, speed-ups find their point, unlike files are refused."""
    files = [eval_file(tmp_path / f"{i}.json", {"ftp": (0.30 + 0.001 * i, 22.0 + i, 0.1 * (i + 1), 0.9), "static": (0.22, 30.0, 0.5, None)}) for i in range(3)]
    files.append(eval_file(tmp_path / "hard.json", {"ftp": (0.40, 40.0, 0.9, 0.5), "width": (0.31, 60.0, 0.9, 0.1)}))
    o = json.loads(files[-1].read_text())
    o["rows"][-1]["sparsity_prefill"] = 0.0  # a narrower model skips nothing
    files[-1].write_text(json.dumps(o))
    bench = lambda name, T, s, x: {"name": name, "phase": "prefill", "batch_size": 1, "prompt_len": T, "sparsity_prefill": s, "speedup_vs_dense": x,
                                   "median_ms": 10 / x, "flops_bound": 1.5}
    (tmp_path / "bench.json").write_text(json.dumps({"format": "ftp-bench-1", "rows": [
        bench("dense", 64, 0.0, 1.0), bench("ftp", 64, 0.3, 1.3), bench("ftp", 32, 0.3, 9.0), bench("ftp", 64, 0.41, 1.6), bench("static 0.22", 64, 0.22, 1.2),
        bench("transformers", 64, None, 1.0), bench("width", 64, 0.0, 1.1) | {"flops_saved_prefill": 0.28}]}))
    inside("analysis/pareto.py", *files, f"new={files[0]}", "--bench", tmp_path / "bench.json", "--out_dir", tmp_path, capsys=capsys)
    points = json.loads((tmp_path / "pareto.json").read_text())["points"]
    assert [(q["name"], q["saved"]["n"]) for q in points] == [("ftp", 3), ("ftp", 1), ("new ftp", 1), ("new static", 1), ("static", 3), ("width", 1)]
    a, hard, static = points[0], points[1], points[4]
    assert points[5]["speed"]["mean"] == 1.1
    assert a["saved"]["mean"] == pytest.approx(0.301) and a["ppl"] == {"mean": pytest.approx(1.15), "std": pytest.approx(0.05), "n": 3}
    assert a["kl"]["mean"] == pytest.approx(0.2) and a["kl"]["std"] == pytest.approx(0.1) and hard["kl"] == {"mean": 0.9, "std": None, "n": 1}
    assert [q["speed"]["mean"] for q in (a, hard, static, points[2])] == [1.3, 1.6, 1.2, None]
    assert static["retention_pooled"]["mean"] is None and (tmp_path / "pareto.png").stat().st_size > 10000
    assert inside("analysis/pareto.py", *files, "--cost", "total", "--out_dir", tmp_path, capsys=capsys)[0] == 0
    assert json.loads((tmp_path / "pareto.json").read_text())["points"][0]["saved"]["mean"] == pytest.approx(0.1505)
    other = eval_file(tmp_path / "joint.json", {"ftp": (0.3, 22.0, 0.1, 0.9)}, protocol="joint")
    for more, say_so in (([other], "protocol"), (["--bench", tmp_path / "bench.json", "--length", 7], "--length"), (["--text", "none"], "--text")):
        code, _, err = inside("analysis/pareto.py", *files, *more, "--out_dir", tmp_path, capsys=capsys)
        assert code == 2 and say_so in err and len(err.strip().splitlines()) == 1


def test_ablations(workshop, tmp_path, capsys):
    """Cells run as subprocesses and share their stages; what has run is not run again, what was interrupted is; other flags are refused."""
    a, b = common(workshop, tmp_path)
    few = "--nsamples 2 --nwatch 2 --max_response 8 "
    words = ["analysis/ablations.py", *a, *b, f"--search={few}--population 2 --elite 1 --evaluations 2", "--axes", "protocol",
             f"--train={few}--steps 1 --warmup 2 --guide_evals 2 --guide_samples 1",
             f"--evaluate=--nsamples 2 --text {workshop[1]}/book.txt --nwindows 2 --scored 8"]
    code, out, err = inside(*words, capsys=capsys)
    assert code == 0, err
    assert "4 of them to run" in out and out.count("ETA") == 4  # search, training and evaluation of the base; evaluation of joint
    base, joint = (tmp_path / f"{cell}/seed0" for cell in ("base", "protocol-joint"))
    before = (base / "eval.json").read_bytes()
    (joint / "stages.json").unlink()
    (joint / "eval.json").unlink()
    code, out, err = inside(*words, capsys=capsys)
    assert code == 0 and "1 of them to run" in out and out.count("ETA") == 1 and (base / "eval.json").read_bytes() == before
    rows = {(r["axis"], r["variant"]): r for r in json.loads((tmp_path / "ablations.json").read_text())["rows"]}
    assert set(rows) == {("base", ""), ("protocol", "joint")}
    assert rows["base", ""]["over_seeds"]["training tokens"]["mean"] > 10
    assert rows["base", ""]["over_seeds"]["KL"]["mean"] != rows["protocol", "joint"]["over_seeds"]["KL"]["mean"] > 0
    used = [json.loads((folder / "eval.json").read_text())["config"]["settings"] for folder in (base, joint)]
    assert used[0]["router"] == used[1]["router"] == str(base / "router.safetensors") and [u["protocol"] for u in used] == ["causal", "joint"]
    for more, say_so in ((["--sparsity", "0.2"], "other flags"), (["--axes", "colour"], "--axes"), (["--seeds", "x"], "--seeds")):
        code, _, err = inside(*words, *more, capsys=capsys)
        assert code == 2 and say_so in err and len(err.strip().splitlines()) == 1
    (joint / "stages.json").unlink()
    (base / "schedule.json").write_text("{")  # a stage that fails names itself, and the run ends in one line
    code, out, err = inside(*words, capsys=capsys)
    assert code == 2 and "1 stages failed" in err and "--schedule" in err and "base" in out


def test_ablation_spread(tmp_path, monkeypatch):
    """The KL over the base's: of one seed with the error over samples, of several with the deviation over seeds, each against its own base."""
    monkeypatch.setattr(ablations, "figures", lambda kl: {"KL": sum(kl) / len(kl), "KL items": kl})
    done = {("base", ""): {0: [1.0, 2.0], 1: [3.0, 5.0]}, ("a", "x"): {0: [2.0, 3.0], 1: [3.0, 6.0]}, ("a", "y"): {1: [4.0, 5.0]}, ("a", "z"): {2: [1.0]}}
    lines = ablations.write(tmp_path, done, {})
    assert [s.split("|")[-3].strip() for s in lines[2:]] == ["+0.0000 ± 0.0000", "+0.7500 ± 0.3536", "+0.5000 ± 0.5000", "-"]
    rows = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    assert rows[1]["KL over the base's"]["each"]["1"] == {"mean": 0.5, "se": 0.5}


def test_ablation_table(tmp_path):
    table = ablations.cells([8], [5])
    args = type("args", (), dict(out_dir=tmp_path, model="m", data="d", device="cpu", dtype="float32", sparsity=0.3, search="", train="--steps 5", finetune="",
                                 forecast="", evaluate=""))
    todo = ablations.plan(table, [0, 1, 2], args)
    assert len(todo) == 3 * len(table) and len({steps[-1][2] for steps in todo.values()}) == len(todo)  # a folder a cell and seed
    stages = {(script, folder) for steps in todo.values() for script, _, folder in steps}
    per_seed = {s: sum(script == s for script, _ in stages) / 3 for s in ablations.STAGES.values()}
    retrained = [c for c in table if c[0] != "protocol" and "finetune" not in c[2]]
    assert per_seed == {"fit_late_kv.py": 1, "search_scheduler.py": 5, "train_router.py": len(retrained), "finetune_static.py": 1, "evaluate.py": len(table)}
    for script, words, _ in (s for steps in todo.values() for s in steps):  # every flag is one that the stage knows
        known = (ROOT / script).read_text()
        assert all(f'"{w}"' in known for w in words if w.startswith("--"))
    done = {("base", ""): {}, ("router", "local"): {}}
    for cell, kl in zip(done, (0.1, 0.4)):
        for seed in range(3):
            rows = {"static": (0.3, 25.0, 0.5, 0.8), "ftp": (0.3, 22.0, kl + 0.1 * seed, 0.9)}
            done[cell][seed] = eval_file(tmp_path / cell[0] / str(seed) / "eval.json", rows).parent
    lines = ablations.write(tmp_path, done, {})
    rows = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    assert rows[0]["over_seeds"]["KL"]["mean"] == pytest.approx(0.2)
    assert rows[1]["over_seeds"]["KL"] == {"mean": pytest.approx(0.5), "std": pytest.approx(0.1), "n": 3}
    assert len(lines) == 4 and "0.5000 ± 0.1000" in lines[3] and "+0.3000 ± 0.0000" in lines[3]
    assert lines == (tmp_path / "ablations.md").read_text().splitlines()
