"""Damaged artefacts and data files, in this process: each is refused in one clear line (FTPError) or loads and runs; nothing else."""
import json
import random
import resource
import shutil
import signal
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import TALLY, TORTURE, make_forecaster, make_router, tokens

import train_router
from lib import data, evaluation, scoring, search, tasks
from lib.artefacts import Schedule
from lib.files import FTPError
from lib.guide import Order
from lib.skipped import Forecaster
from lib.stage import complain, load_progress, save_progress
from model_ftp import FTPModel, Router

EACH = 200 if TORTURE else 25  # damaged copies of each file
SECONDS, MEGABYTES = 20, 1000  # a load that takes longer hangs, one that takes more memory blows up
ODD = [None, True, False, -1, 0, 1, 0.5, 2 ** 31, 2 ** 63, 10 ** 400, 1e308, -1e308, float("nan"), float("inf"), "", "x", "\x00", "\ud800", "é" * 50,
       [], {}, [[]], [None], {"a": 1}, "9" * 5000, ["x"] * 1000]


def damage_bytes(b, rng):
    """One to three plain accidents: bits and bytes changed, spans lost, doubled, moved, zeroed, the end missing."""
    b = bytearray(b)
    for _ in range(rng.randint(1, 3)):
        i, n = rng.randrange(len(b) + 1), rng.choice((1, 1, 2, 8, 64, 512))
        how = rng.randrange(8)
        if how == 0 and i < len(b):
            b[i] ^= 1 << rng.randrange(8)
        elif how == 1:
            b[i:i + n] = rng.randbytes(len(b[i:i + n]))
        elif how == 2:
            del b[i:i + n]
        elif how == 3:
            b[i:i] = b[i:i + n]
        elif how == 4:
            b[i:i + n] = bytes(len(b[i:i + n]))
        elif how == 5:
            del b[i:]
        elif how == 6:
            b[i:i] = rng.choice([b"[" * 100_000, b"{\"a\":" * 50_000, b"\n", b"NaN", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\"", b"-1", b"1e999", b"\0"])
        else:
            j = rng.randrange(len(b) + 1)
            b[i:i], b[j:j + n] = b[j:j + n], b""
    return bytes(b)


def damage_json(o, rng):
    """A JSON value with one of its values replaced by an odd one, lost, renamed, doubled or exchanged with another."""
    o = json.loads(json.dumps(o))
    places = []

    def walk(v):
        for k in (v if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ()):
            places.append((v, k))
            walk(v[k])
    walk(o)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent, k = rng.choice(places)
        try:
            how = rng.randrange(6)
            if how <= 2:
                parent[k] = rng.choice(ODD)
            elif how == 3:
                del parent[k]
            elif how == 4 and isinstance(parent, list):
                parent.insert(k, parent[k])
            elif how == 4:
                parent[k + "x"] = parent.pop(k)
            else:
                other, j = rng.choice(places)
                parent[k] = json.loads(json.dumps(other[j]))
        except (KeyError, IndexError):  # an earlier accident took it away
            continue
    return o


def damage_safetensors(b, rng):
    """A safetensors file with an accident in its header's JSON, or a number of its data made NaN, infinite or huge."""
    n = struct.unpack("<Q", b[:8])[0]
    head, body = json.loads(b[8:8 + n]), bytearray(b[8 + n:])
    if rng.random() < 0.7:
        head = damage_json(head, rng)
        for v in head.values() if isinstance(head, dict) else ():
            if isinstance(v, dict) and "dtype" in v and rng.random() < 0.3:
                v["dtype"] = rng.choice(["F32", "I32", "BF16", "F16", "F64", "U8", "BOOL", "F8_E4M3", "XXX"])
    else:
        i = rng.randrange(len(body) // 4) * 4
        body[i:i + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1.0]))
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text) if rng.random() < 0.9 else rng.choice([0, 1, 2 ** 40, 2 ** 63])) + text + bytes(body)


def damaged(path, rng):
    b = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        return damage_safetensors(b, rng)
    if path.suffix == ".json" and rng.random() < 0.7:
        return json.dumps(damage_json(json.loads(b), rng)).encode()
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        rows = [json.loads(line) for line in b.decode().splitlines()]
        i = rng.randrange(len(rows))
        return "\n".join(json.dumps(damage_json(r, rng) if k == i else r) for k, r in enumerate(rows)).encode()
    return damage_bytes(b, rng)


@pytest.fixture(scope="module")
def bench(workshop, tmp_path_factory):
    """A folder with one good file of each kind, and what loads and uses each: {name: (file, function of it)}."""
    path, texts = workshop
    d, model, tok = tmp_path_factory.mktemp("fuzz"), FTPModel.from_pretrained(path), data.load_tokenizer(path)
    L, ids = model.config.n_layer, [tokens(12), tokens(5, 1)]
    schedule = Schedule([0.0, 0.3, 0.5, 1.0, 0.2, 0.4], model.fingerprint, meta={"history": [1, 2]})
    router = make_router(model, schedule)
    router.meta |= {"settings": {"kv": "drop", "one_pass": False, "forecaster": None}, "history": [{"step": 0, "watch_kl": 0.5}]}
    schedule.decode_threshold, schedule.router_id = [0.0] * L, router.id
    forecaster = make_forecaster(model)
    schedule.save(d / "schedule.json")
    router.save(d / "router.safetensors")
    forecaster.save(d / "forecaster.safetensors")

    def go(*args, **kw):
        model.use(*args, **kw)
        model.generate(ids, 3, eos=())
        model.use()

    # state of the search
    fitness = lambda u: sum(v * v for v in u) / 1e6
    fitness.results, fitness.seconds = {}, 0.0
    fitness.candidates = lambda some, tick: fitness.results.update({u: fitness(u) for u in some})
    args = SimpleNamespace(seed=0, resume=False, evaluations=12, patience=9, population=5, elite=2, crossover=0.3, move=0.3, tournament=3)
    start = [search.mutate([0, *[300] * 5], 1500, 990, random.Random(i), 200) for i in range(5)]
    evolve = lambda file: search.evolve(fitness, fitness, start, 1500, 990, args, file, {"sparsity": 0.3})
    evolve(d / "search_state.json")
    args.resume = True

    # state of the training
    learner = dict(router.named_parameters())
    optimizer = torch.optim.Adam(router.parameters(), 1e-3)
    sum(p.square().sum() for p in router.parameters()).backward()
    optimizer.step()
    best = {"step": 0, "watch_kl": 0.1, "state": {k: v.detach().clone() for k, v in learner.items()}}
    training = train_router.Training(Order.static(), 1, best, [{"step": 0}])
    train_router.save_state(d / "train_state.safetensors", learner, optimizer, {"lr": 0.1}, training)
    save_progress(d / "eval_state.json", "ftp-eval-state-1", {"settings": {"a": 1}, "rows": [{"name": "dense", "kl": 0.0, "tasks": {}}]}, "1 row")

    for name in ("alpaca.json", "task.jsonl", "partial.jsonl", "lambada.jsonl", "book.txt"):
        shutil.copy(texts / name, d / name)
    rows = json.loads((d / "alpaca.json").read_text())
    (d / "alpaca.json").write_text(json.dumps(rows[:16]))
    (d / "alpaca.jsonl").write_text("\n".join(json.dumps(r | {"id": i, "response_ids": tokens(9, i)} if i % 2 else {"text": r["output"] * 9})
                                              for i, r in enumerate(rows[:16])))

    def samples(file):
        s = data.load_samples(str(file), model, tok, max_prompt=100, max_response=8, min_response=2)
        scoring.response_states(model, s[:2])

    def text(file):
        ids = tok(data.load_text(str(file)), add_special_tokens=False)["input_ids"]
        scoring.response_states(model, data.windows(ids, 8, 4, 2))

    def task(file):
        name, items = tasks.load_task(f"a={file}", 4)
        evaluation.check_length(model, tok, name, items, True)
        evaluation.evaluate_task(model, tok, items, "causal", True)

    # the model's folder, in shards
    FTPModel.from_pretrained(path)
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(d / "model", max_shard_size="40KB")
    shards = sorted((d / "model").glob("*.safetensors"))

    def load_model(file):
        m = FTPModel.from_pretrained(d / "model")
        m.generate([t[:4] for t in ids], 2)

    rk = dict(decode="threshold")
    pair = lambda file: go(d / "schedule.json", Router.load(d / "router.safetensors"), **rk)
    fore = lambda file: go(d / "schedule.json", forecaster=Forecaster.load(d / "forecaster.safetensors"), kv="keep")
    return {"schedule.json": (d / "schedule.json", lambda file: go(Schedule.load(file), router, **rk)),
            "router.json": (d / "router.json", pair), "router.safetensors": (d / "router.safetensors", pair),
            "forecaster.json": (d / "forecaster.json", fore), "forecaster.safetensors": (d / "forecaster.safetensors", fore),
            "search_state.json": (d / "search_state.json", evolve),
            "train_state.safetensors": (d / "train_state.safetensors", lambda file: train_router.load_state(file, learner, optimizer, {"lr": 0.1})),
            "eval_state.json": (d / "eval_state.json", lambda file: load_progress(file, "ftp-eval-state-1")),
            "alpaca.json": (d / "alpaca.json", samples), "alpaca.jsonl": (d / "alpaca.jsonl", samples), "book.txt": (d / "book.txt", text),
            "texts.jsonl": (d / "alpaca.jsonl", text), "samples.txt": (d / "book.txt", samples),
            "task.jsonl": (d / "task.jsonl", task), "partial.jsonl": (d / "partial.jsonl", task), "lambada.jsonl": (d / "lambada.jsonl", task),
            "config.json": (d / "model" / "config.json", load_model), "model.safetensors": (shards[0], load_model),
            "model.safetensors.index.json": (d / "model" / "model.safetensors.index.json", load_model)}


FILES = ["schedule.json", "router.json", "router.safetensors", "forecaster.json", "forecaster.safetensors", "search_state.json", "train_state.safetensors",
         "eval_state.json", "alpaca.json", "alpaca.jsonl", "book.txt", "texts.jsonl", "samples.txt", "task.jsonl", "partial.jsonl", "lambada.jsonl",
         "config.json", "model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FILES)
def test_damaged(bench, name, capsys):
    file, use = bench[name]
    good = file.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name != "texts.jsonl":
        use(file)  # as it is, it loads

    def hang(number, frame):
        raise TimeoutError(f"no end after {SECONDS} s of computing")

    old, outcomes = signal.signal(signal.SIGPROF, hang), []
    try:
        for i in range(EACH):
            bad = damaged(file, random.Random(f"{name}-{i}"))
            file.write_bytes(bad)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                use(file)
                outcomes.append("loaded")
            except FTPError as e:
                assert complain(e) == 2 and 30 < len(capsys.readouterr().err) < 800
                outcomes.append("refused")
            except Exception as e:
                raise AssertionError(f"{name}, damage {i}: {type(e).__name__}: {e}") from e
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                file.write_bytes(good)
    finally:
        signal.signal(signal.SIGPROF, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB"
    for what in outcomes:
        TALLY[f"damaged files {what}"] += 1
    assert "refused" in outcomes or "index" in name or file.suffix == ".txt"
