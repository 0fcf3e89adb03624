"""What was once silently wrong, crashed, or stayed unclear: each with the test that holds it; and a seeded sweep of command lines and calls."""
import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TALLY, TORTURE, make_forecaster, make_router, tokens
from test_stages import call, common, inside

from lib import data
from lib.artefacts import Schedule
from lib.calibration import calibrate_decode
from lib.data import load_tokenizer
from lib.files import FTPError
from lib.flops import Meter
from lib.packing import pack
from lib.stage import Parser, complain
from model_ftp import FTPModel


@pytest.fixture(scope="module")
def artefacts(workshop, tmp_path_factory):
    """A schedule, a router that fits it, and an export of both: their folder."""
    out = tmp_path_factory.mktemp("trust")
    model = FTPModel.from_pretrained(workshop[0])
    s = Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], model.fingerprint)
    s.save(out / "schedule.json")
    make_router(model, s).save(out / "router.safetensors")
    return out


@pytest.fixture(scope="module")
def export(workshop, artefacts):
    model = workshop[0]
    old, sys.argv = sys.argv, ["x"]
    try:
        spec = importlib.util.spec_from_file_location("export", ROOT / "extras" / "export.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.argv = ["export.py", "--model", str(model), "--schedule", str(artefacts / "schedule.json"), "--router", str(artefacts / "router.safetensors"),
                    "--out_dir", str(artefacts / "export"), "--dtype", "float32", "--threads", "1"]
        module.main()
    finally:
        sys.argv = old
    return artefacts / "export"


# -- silently wrong

def test_a_routed_folder_is_routed_everywhere(workshop, export, tmp_path, capsys):
    a, b = common(workshop, tmp_path)
    a[1] = export
    code, out, err = inside("evaluate.py", *a, *b, "--rows", "static,ftp", "--nsamples", 3, "--text", "", capsys=capsys)
    assert code == 0, err
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert rows["ftp"]["sparsity_prefill"] > 0.2 and rows["ftp"]["sparsity_target"] == pytest.approx(0.35)
    code, out, err = inside("benchmark.py", *a, "--lengths", 32, "--rounds", 1, "--n_decode", 0, "--no_hf", capsys=capsys)
    assert code == 0, err
    bench = {r["name"]: r for r in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert bench["ftp"]["sparsity_prefill"] > 0.2 and "static 0.3" not in bench
    pytest.importorskip("lm_eval")
    from extras.lm_eval_ftp import FTPLM
    lm = FTPLM(str(export), device="cpu")
    assert lm.model.routing.schedule.mean == pytest.approx(0.35) and lm.model.routing.learned


def test_other_weights_of_one_shape_are_told_apart(folder, tiny, schedule, tmp_path):
    """Not by the last norm alone; the same weights in another dtype or layout are the same; files of before are taken with a warning."""
    twin = FTPModel.from_pretrained(folder("gqa")[0])
    twin.blocks[3].up.weight.data += 0.01
    assert twin.fingerprint != tiny.fingerprint and twin.fingerprint["norm"] == tiny.fingerprint["norm"]
    for made in (schedule, Schedule(schedule.sparsity, {k: v for k, v in tiny.fingerprint.items() if k != "weights"})):
        if "weights" in made.fingerprint:
            with pytest.raises(FTPError, match="other weights"):
                twin.use(made)
        else:
            twin.use(made)
    assert pack(FTPModel.from_pretrained(folder("gqa")[0])).fingerprint == tiny.fingerprint
    tiny.use(schedule).use()


def test_resume_sees_other_weights_at_the_same_path(workshop, artefacts, tmp_path, capsys):
    shutil.copytree(workshop[0], tmp_path / "m")
    a, b = common((tmp_path / "m", workshop[1]), tmp_path / "out")
    words = ["evaluate.py", *a, *b, "--rows", "", "--nsamples", 3, "--text", ""]
    assert inside(*words, capsys=capsys)[0] == 0
    before = json.loads((tmp_path / "out" / "eval.json").read_text())["rows"][0]["ppl"]
    from safetensors.torch import load_file, save_file
    t = load_file(tmp_path / "m" / "model.safetensors")
    t["model.layers.2.mlp.up_proj.weight"] *= -1
    save_file(t, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert inside(*words, "--resume", capsys=capsys)[0] == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["rows"][0]["ppl"] != before


def test_editing_an_export_leaves_the_source_alone(workshop, export):
    for name in ("config.json", "tokenizer.json"):
        assert not os.path.samefile(export / name, Path(workshop[0]) / name)
    assert os.path.samefile(export / "model.safetensors", Path(workshop[0]) / "model.safetensors")


def test_logits_inside_a_routed_prompt_are_refused(tiny, schedule):
    tiny.use(schedule)
    with pytest.raises(FTPError, match="not causal"):
        tiny(torch.tensor([tokens(9)]))
    tiny.use()


def test_a_router_without_a_schedule_is_refused(tiny):
    with pytest.raises(FTPError, match="--schedule|give one"):
        tiny.use(router=make_router(tiny))


def test_the_split_is_no_stride(workshop, tmp_path):
    """A file that cycles through four subjects has each of them in each part; the parts are disjoint, whole, and the same for every seed of a stage."""
    model, tok = FTPModel.from_pretrained(workshop[0]), load_tokenizer(workshop[0])
    rows = [{"instruction": f"subject {i % 4} number {i}", "output": "o" * 20} for i in range(200)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    parts = {}
    for split in data.SPLITS:
        for seed in (0, 1):
            texts = {tok.decode(p) for p, _ in data.load_samples(str(tmp_path / "d.json"), model, tok, split, seed=seed)}
            assert parts.setdefault(split, texts) == texts
        for subject in range(4):
            assert sum(f"subject {subject} " in t for t in parts[split]) >= 5
    assert sum(map(len, parts.values())) == 200 and len(set.union(*parts.values())) == 200
    assert len(parts["train"]) == 100 and len(parts["watch"]) == len(parts["heldout"]) == 50


# -- a sweep of command lines: flags at, below and above their ranges, wrong types, nan, inf, empty, unicode, missing and swapped files

SCRIPTS = ["search_scheduler.py", "train_router.py", "finetune_static.py", "fit_late_kv.py", "evaluate.py", "benchmark.py", "sample.py", "prepare.py",
           "extras/export.py", "analysis/redundancy.py", "analysis/skips.py", "analysis/sweep.py", "analysis/ablations.py", "analysis/rivals/make.py",
           "analysis/rivals/evaluate.py", "analysis/rivals/benchmark.py"]
ODD = ["nan", "inf", "-inf", "-1", "0", "1", "2", "1e400", "1e-400", "-0.5", "0.5", "7.5", "", " ", "x", "é漢\u202e", "99999999999999999999", "1,2", ",", "a,,b",
       "--", "../..", "/nonexistent/file.json", "/dev/null", "/", "None", "true", "\x7f", "0x10", "1_000", "'", "cuda", "mps", "meta", "cpu=0-1"]


class Reached(Exception):
    """The flags were taken: the stage would load its model now."""


def test_each_odd_value_is_named_with_its_mend(workshop, artefacts, tmp_path, capsys):
    """What ran silently, crashed, or was blamed on something else at aaf23a3: code 2, one line, the flag and what to do."""
    path, d = workshop
    m = ["--model", path, "--out_dir", tmp_path / "out", "--dtype", "float32", "--threads", "1"]
    few = ["--data", d / "alpaca.json", "--nsamples", "3", "--nwatch", "2"]
    schedule, router = ["--schedule", artefacts / "schedule.json"], ["--router", artefacts / "router.safetensors"]
    (tmp_path / "two.json").write_text(json.dumps([{"instruction": "a b", "output": "c d e f g h i j"}] * 2))
    longest = json.loads((path / "config.json").read_text())["max_position_embeddings"]    # no room is left to decode
    train, evaluate = ["train_router.py", *schedule], ["evaluate.py", *schedule, *router, "--rows", "ftp"]
    cases = [
        (["search_scheduler.py", "--flops_saved", "nan"], "--flops_saved nan: must lie in"),
        (["search_scheduler.py", "--flops_saved", "0.3", "--sparsity", "0.2"], "--sparsity and --flops_saved: both are a target"),
        (["search_scheduler.py", "--crossover", "7"], "--crossover 7: must lie in"),
        (["search_scheduler.py", "--nsamples", "0"], "--nsamples 0: must lie in"),
        (["search_scheduler.py", "--nsamples", "1e9"], "--nsamples 1e9: must be a whole number"),
        (["search_scheduler.py", *m, "--data", ""], "--data"),
        (["search_scheduler.py", *m, "--data", tmp_path / "two.json"], "2 items; give at least 4"),
        (["benchmark.py", *schedule, "--sparsity", "0.3"], "--sparsity: beside --schedule it would change nothing"),
        (["benchmark.py", "--threads", "-1"], "--threads -1: must lie in"),
        (["benchmark.py", "--threads", "100000"], "--threads 100000: must lie in"),
        (["benchmark.py", *m, "--lengths", longest], "lower --lengths or --n_decode"),
        (["benchmark.py", *m, "--device", "meta"], "--device meta"),
        (["benchmark.py", *m, "--device", "mps"], "--device mps"),
        (["benchmark.py", *m, "--out_dir", "/dev/null/x"], "--out_dir /dev/null/x"),
        ([*train, "--seed", "-1"], "--seed -1: must lie in"),
        ([*train, "--guide_evals", "0"], "--guide_evals 0: must lie in"),
        ([*train, "--max_response", "0"], "--max_response 0: must lie in"),
        ([*train, "--lambda_d", "nan"], "--lambda_d nan: must lie in"),
        ([*train, "--warmup", "-1"], "--warmup -1: must lie in"),
        ([*train, "--guide_until", "-1"], "--guide_until -1: must lie in"),
        ([*train, "--decode_share", "5"], "--decode_share 5: must lie in"),
        ([*train, *m, *few, "--group", "99"], "--group 99: more than the model's"),
        ([*evaluate, "--decode_sparsity", "2"], "--decode_sparsity 2: must lie in"),
        ([*evaluate, "--decode_sparsity", "nan"], "--decode_sparsity nan: must lie in"),
        ([*evaluate, *m, *few[:2], "--text", "no.txt"], "--text"),
        (["fit_late_kv.py", "--keys", "nan"], "--keys nan: must lie in"),
        (["analysis/skips.py", *m, *schedule, *router, "--prompt", ""], "--prompt"),
    ]
    for words, said in cases:
        code, _, err = inside(*words, capsys=capsys)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, (words, err)
    # blanks after commas are no part of a name, and one watched sample has no spread to warn of
    code, out, err = inside("search_scheduler.py", *m, "--data", f"{d}/alpaca.json, {d}/alpaca.json", "--nsamples", "2", "--nwatch", "1", "--method",
                            "uniform", capsys=capsys)
    assert code == 0 and "Warning" not in out + err and "nan" not in out.lower(), out + err


def test_flags_with_an_open_quote_are_refused():
    """Found by the long sweep."""
    for text in ("'", '--seed "1', "\\"):
        got = call("analysis/ablations.py", "--forecast", text, ok=False)
        assert got.returncode == 2 and "--forecast" in got.stderr and "close its quotes" in got.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_sweep_of_command_lines(script, workshop, artefacts, tmp_path, monkeypatch, capsys):
    """Each command line ends in one line and code 2, or is taken; no traceback, no hang, nothing written but the folder. The stages run up to the
    loading of the model."""
    spec = importlib.util.spec_from_file_location("swept", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", [script])
    spec.loader.exec_module(module)
    parsers, real = [], Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *a, **kw: (real(self, *a, **kw), parsers.append(self))[0])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.get_args()
    capsys.readouterr()
    flags = [a for a in parsers[0]._actions if a.option_strings and a.dest != "help"]

    def stop(*a, **kw):
        raise Reached
    if hasattr(module, "start"):
        monkeypatch.setattr(module, "start", stop)
    for heavy in ("execute", "fetch", "load_tokenizer", "run_step"):
        if hasattr(module, heavy):
            monkeypatch.setattr(module, heavy, stop)
    good = {"model": workshop[0], "schedule": artefacts / "schedule.json", "router": artefacts / "router.safetensors", "out_dir": tmp_path / "out",
            "data": workshop[1] / "alpaca.json"}
    base = [str(w) for k, v in good.items() if any(f.dest == k for f in flags) for w in (f"--{k}", v)]
    rng, taken, n = random.Random(script), 0, 400 if TORTURE else 65
    files = [str(p) for p in (*artefacts.glob("*.*"), *workshop[1].iterdir(), workshop[0])]
    monkeypatch.chdir(tmp_path)
    for _i in range(n):
        words = list(base)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            flag = rng.choice(flags)
            if isinstance(flag, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
                words += [flag.option_strings[0], *(["x"] if rng.random() < 0.2 else [])]
            else:
                words += [flag.option_strings[0], rng.choice(ODD if rng.random() < 0.8 else files)]
        monkeypatch.setattr(sys, "argv", [script, *words])
        try:
            module.main()
            taken += 1
        except Reached:
            taken += 1
        except FTPError as e:
            assert complain(e) == 2
            err = capsys.readouterr().err.strip()
            assert len(err.splitlines()) == 1 and 15 < len(err) < 800, (words, err)
        except (KeyboardInterrupt, SystemExit) as e:
            assert isinstance(e, SystemExit) and e.code in (0, None), words        # --help may be drawn as a value
        except Exception as e:
            raise AssertionError(f"{script} {words}: {type(e).__name__}: {e}") from e
        TALLY["command lines swept"] += 1
    assert taken < n


SMALL = {      # of each stage a run of a second
    "search_scheduler.py": ["--nsamples", 2, "--nwatch", 2, "--population", 4, "--elite", 1, "--evaluations", 5],
    "train_router.py": ["--nsamples", 3, "--nwatch", 2, "--guide_evals", 15, "--guide_samples", 1, "--warmup", 5, "--steps", 2, "--eval_every", 1,
                        "--calibration_samples", 2],
    "finetune_static.py": ["--nsamples", 2, "--nwatch", 2, "--population", 4, "--elite", 1, "--evaluations", 5, "--calibration_samples", 2],
    "fit_late_kv.py": ["--nsamples", 4, "--nheld", 2, "--rank", 4],
    "evaluate.py": ["--nsamples", 2, "--text", ""],
    "benchmark.py": ["--lengths", 16, "--rounds", 1, "--n_decode", 1, "--no_hf"],
    "analysis/worth.py": ["--nsamples", 2],
}
FEW = ["0", "1", "2", "3", "0.5", "0.9", "1e-3", "1e-30", "mean", "static", "random"]
FIXED = {"model", "device", "device_map", "dtype", "threads", "out_dir", "help", "save", "memory", "synthetic", "text", "json", "compile"}


@pytest.mark.parametrize("script", SMALL)
def test_sweep_to_the_end(script, workshop, artefacts, tmp_path, monkeypatch, capsys):
    """Small odd numbers for one or two flags: the stage runs to its end, or says in one line why not; what it writes holds no NaN."""
    a, b = common(workshop, tmp_path / "out")
    spec = importlib.util.spec_from_file_location("swept", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parsers, real = [], Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *a, **kw: (real(self, *a, **kw), parsers.append(self))[0])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.get_args()
    flags = [f for f in parsers[0]._actions if f.option_strings and f.dest not in FIXED]
    has = {f.dest for f in flags}
    given = [*a, *(b if "data" in has else [])]
    given += ["--schedule", artefacts / "schedule.json"] if "schedule" in has else []
    given += ["--router", artefacts / "router.safetensors"] if "router" in has and script != "fit_late_kv.py" else []
    rng, ended = random.Random(script), 0
    for i in range(40):
        if ended and i >= 6 and not TORTURE:  # where many flags name files, the first six may all be refused
            break
        words = [*given, *SMALL[script]]
        for flag in rng.sample(flags, rng.choice((1, 2))):
            if isinstance(flag, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
                words.append(flag.option_strings[0])
            else:
                words += [flag.option_strings[0], rng.choice(flag.choices or FEW)]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, _, err = inside(script, *words, capsys=capsys)
        said = [line for line in err.strip().splitlines() if line.startswith("error")]
        assert "Traceback" not in err and (code == 0 or code == 2 and len(said) <= 1), (words, code, err)
        ended += code == 0
        for file in (tmp_path / "out").rglob("*.json"):
            json.loads(file.read_text(), parse_constant=lambda word, file=file, words=words: pytest.fail(f"{file.name} holds {word} after {words}"))
        TALLY["stages swept to their end"] += 1
    assert ended


# -- the Python face

def test_sweep_of_calls(tiny, folder, schedule, tmp_path):
    """Odd arguments of the public functions: a result, or one line that names the mend."""
    rng, calls, refused = random.Random(7), 0, 0
    router, forecaster = make_router(tiny, schedule), make_forecaster(tiny)
    schedule.save(tmp_path / "s.json")
    odd = [None, "text", b"x", 5, -1, 0, 1.5, float("nan"), float("inf"), [], [[]], [5], [[5], []], [[5, -1]], [[97]], [["a"]], [[1.5]], [[None]], {}, {"a": 1},
           [tokens(300)], torch.tensor([3, 4]), torch.tensor([[3, 4]]), torch.tensor(3), torch.tensor([[0.5]]), "é", "/nonexistent", Path("/nonexistent"),
           True, [[True]], object(), [tokens(5)], ["ab"]]
    numbers = [None, "x", -1, 0, 1, 2, 0.5, 1.5, float("nan"), float("inf"), -float("inf"), 10 ** 9, True]
    pick = lambda some: rng.choice(some)
    doors = [
        lambda: tiny.generate(pick(odd), 2),
        lambda: tiny.generate([tokens(5)], pick(numbers), temperature=pick(numbers), top_p=pick(numbers), seed=pick([0, 1, 2 ** 31])),
        lambda: tiny.prefill(pick(odd)),
        lambda: tiny(pick(odd)),
        lambda: tiny.use(pick([schedule, tmp_path / "s.json", pick(odd)]), pick(["static", router, pick(odd)]), prefill=pick(["topk", "argmax", "x", None]),
                         decode=pick(["dense", "rule", "threshold", "x", 3]), kv=pick(["drop", "keep", "", None]), score=pick([None, 4, "mean", *numbers]),
                         group=pick([None, 1, 3, *numbers]), forecaster=pick([None, forecaster, pick(odd)])),
        lambda: FTPModel.from_pretrained(pick([folder("gqa")[0], *odd]), pick([torch.float32, "bfloat16", "x", None, 3]), pick(["cpu", "cuda", "meta", "x", None])),
        lambda: Schedule(pick(odd), tiny.fingerprint),
        lambda: Schedule.uniform(tiny, pick(numbers)),
        lambda: Schedule.load(pick([tmp_path / "s.json", "/nonexistent", ROOT / "README.md", tmp_path])),
        lambda: calibrate_decode(tiny, pick([[(tokens(5), tokens(9))], pick(odd)]), pick(numbers)),
    ]
    meter = Meter(tiny)
    assert meter.mean("prefill") is None
    for i in range(1000 if TORTURE else 300):
        try:
            doors[i % len(doors)]()
        except FTPError as e:
            text = str(e)
            assert text and "\n" not in text.strip()
            refused += 1
        except Exception as e:
            raise AssertionError(f"call {i} of door {i % len(doors)}: {type(e).__name__}: {e}") from e
        finally:
            tiny.use()
        calls += 1
    TALLY["Python calls swept"] += calls
    assert refused > 50
