"""An exported folder: one call loads it routed, transformers loads it dense, and its card says what the artefacts say."""
import json
import os

import pytest
import torch
from conftest import make_router, tokens
from test_families import FAMILIES, make
from test_model import gathered_rows
from test_stages import inside

from lib.artefacts import Schedule
from lib.files import FTPError, load_json
from lib.flops import Meter
from lib.forecast import fit
from model_ftp import FTPModel, Router

PROMPTS = [[3 + i % 90 for i in range(40)], tokens(25, 1)]
SAMPLES = [(p[:n], p[n:]) for p, n in zip(PROMPTS, (30, 20))]


def rows_of(model, meter=None):
    """Logits of prompts and of what follows them."""
    return torch.cat(gathered_rows(model, SAMPLES, meter))


@pytest.fixture(scope="module")
def made(workshop, tmp_path_factory):
    """A model with a schedule, a router (with thresholds for decode) and a forecaster: their folder."""
    out = tmp_path_factory.mktemp("made")
    m = FTPModel.from_pretrained(workshop[0])
    s = Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], m.fingerprint, meta={"commit": "abc123", "settings": {"data": "/secret/place/alpaca.json", "seed": 7}})
    s.save(out / "schedule.json")
    r = make_router(m, s)
    r.meta |= {"kl_watch": 0.1234, "kl_watch_static": 0.5678, "realised_sparsity": 0.3456, "settings": {"data": "self", "seed": 3}, "work": {"steps": 60}}
    r.save(out / "router.safetensors")
    samples = [(tokens(40, i), tokens(20, 100 + i)) for i in range(12)]
    fit(m, samples[:8], samples[8:], 4, s).save(out / "forecaster.safetensors")
    return out


@pytest.fixture
def call(capsys):
    def call(*words):
        code, out, err = inside(*words, "--dtype", "float32", "--threads", 1, capsys=capsys)
        assert code == 0, err
        return out
    return call


def these(workshop, made):
    return "--model", workshop[0], "--schedule", made / "schedule.json", "--router", made / "router.safetensors"


@pytest.mark.parametrize("how", [[], ["--kv", "keep", "--decode", "threshold"], ["--prefill", "argmax", "--one_pass"], ["--kv", "keep", "forecast"]])
def test_export_is_routed_at_once(workshop, made, tmp_path, how, call):
    """from_pretrained(folder) alone gives what the model with its artefacts by hand gives; use() makes it dense; transformers reads it, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    forecaster = made / "forecaster.safetensors" if "forecast" in how else None
    flags = [f for f in how if f != "forecast"] + (["--forecaster", forecaster] if forecaster else [])
    call("extras/export.py", *these(workshop, made), "--out_dir", tmp_path / "e", *flags)
    kw = {"kv": "keep" if "keep" in how else "drop", "decode": "threshold" if "threshold" in how else "dense", "one_pass": "--one_pass" in how,
          "prefill": "argmax" if "argmax" in how else "topk", "forecaster": forecaster}
    by_hand, m = FTPModel.from_pretrained(workshop[0]), FTPModel.from_pretrained(tmp_path / "e")
    dense, one, two = rows_of(by_hand), Meter(m), Meter(m)
    want = rows_of(by_hand.use(made / "schedule.json", made / "router.safetensors", **kw), one)
    assert torch.equal(rows_of(m, two), want) and one.mean("prefill") == two.mean("prefill") > 0.2
    assert m.generate(PROMPTS, max_new_tokens=8) == by_hand.generate(PROMPTS, max_new_tokens=8)
    assert torch.equal(rows_of(m.use()), dense) and not torch.allclose(dense, want, atol=1e-3)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    with torch.no_grad():
        assert torch.allclose(hf(torch.tensor(PROMPTS[:1])).logits, m(torch.tensor(PROMPTS[:1])), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "e")("ab")["input_ids"] == AutoTokenizer.from_pretrained(workshop[0])("ab")["input_ids"]
    assert Router.load(tmp_path / "e" / "ftp" / "router.safetensors").id == Router.load(made / "router.safetensors").id


@pytest.mark.parametrize("family", ["LLaMA 3.1", "Mistral", "Qwen2.5", "Qwen3", "SmolLM3"])
@pytest.mark.parametrize("forecast", [False, True], ids=["ftp", "late"])
def test_auto_model_with_remote_code_generates_what_we_do(family, forecast, tmp_path, capsys):
    """Greedy text of unequal left-padded prompts is FTPModel's, token for token; without the flag the folder is the dense model."""
    from transformers import AutoModelForCausalLM
    hf = make(tmp_path / "m", **FAMILIES[family])
    m = FTPModel.from_pretrained(tmp_path / "m")
    s = Schedule([0.0, 0.3, 0.5, 0.7, 0.5, 0.6], m.fingerprint)
    s.save(tmp_path / "schedule.json")
    make_router(m, s).save(tmp_path / "router.safetensors")
    how = ["--router", tmp_path / "router.safetensors"]
    if forecast:
        fit(m, [(tokens(40, i), tokens(20, 100 + i)) for i in range(8)], [(tokens(40, 9), tokens(20, 9))], 4, s).save(tmp_path / "f.safetensors")
        how = ["--router", "static", "--kv", "keep", "--forecaster", tmp_path / "f.safetensors"]
    code, _, err = inside("extras/export.py", "--model", tmp_path / "m", "--schedule", tmp_path / "schedule.json", *how, "--out_dir", tmp_path / "e",
                          "--dtype", "float32", "--threads", 1, capsys=capsys)
    assert code == 0, err
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "e", trust_remote_code=True)
    want = FTPModel.from_pretrained(tmp_path / "e").generate(PROMPTS, max_new_tokens=12)
    ids = torch.tensor([PROMPTS[0], [0] * 15 + PROMPTS[1]])
    got = auto.generate(input_ids=ids, attention_mask=torch.tensor([[1] * 40, [0] * 15 + [1] * 25]), max_new_tokens=12, pad_token_id=96)
    assert torch.equal(got[:, :40], ids)
    for row, w in zip(got[:, 40:].tolist(), want):
        assert row == w + [96] * (len(row) - len(w))
    assert want != FTPModel.from_pretrained(tmp_path / "m").generate(PROMPTS, max_new_tokens=12)    # something was pruned
    with pytest.raises(ValueError, match="num_beams"):
        auto.generate(ids, num_beams=2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert type(plain) is type(hf)
    with torch.no_grad():
        assert torch.allclose(plain(ids[:1]).logits, hf(ids[:1]).logits, atol=1e-4)
        assert torch.allclose(auto.ftp.use()(ids[:1]), hf(ids[:1]).logits, atol=1e-4)


def test_static_export_of_a_sharded_model(workshop, made, tmp_path, call):
    """Without a trained router, from shards; weights are linked, not copied."""
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(workshop[0]).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    call("extras/export.py", "--model", tmp_path / "m", "--schedule", made / "schedule.json", "--router", "static", "--out_dir", tmp_path / "e")
    m, by_hand = FTPModel.from_pretrained(tmp_path / "e"), FTPModel.from_pretrained(workshop[0]).use(made / "schedule.json")
    assert torch.equal(rows_of(m), rows_of(by_hand))
    assert all(os.path.samefile(f, tmp_path / "e" / f.name) for f in (tmp_path / "m").glob("*.safetensors"))


def test_card_says_what_the_artefacts_say(workshop, made, tmp_path, call):
    from huggingface_hub import metadata_load
    d = workshop[1]
    args = these(workshop, made)
    call("evaluate.py", *args, "--out_dir", tmp_path, "--data", d / "alpaca.json", "--text", d / "book.txt", "--context", 20, "--scored", 8, "--nwindows", 2,
         "--nsamples", 3, "--tasks", f"mine={d}/task.jsonl", "--rows", "static,ftp")
    call("benchmark.py", *args, "--out_dir", tmp_path, "--lengths", 32, "--rounds", 1, "--n_decode", 2, "--no_hf")
    call("extras/export.py", *args, "--out_dir", tmp_path / "e", "--eval", tmp_path / "eval.json", "--bench", tmp_path / "bench.json", "--base_model", "owner/name",
         "--license", "mit")
    card, front = (tmp_path / "e" / "README.md").read_text(), metadata_load(tmp_path / "e" / "README.md")
    assert front["base_model"] == "owner/name" and front["license"] == "mit" and "ftp" in front["tags"] and front["pipeline_tag"] == "text-generation"
    for said in ("35.00 %", "0.00, 0.30, 0.50, 0.70, 0.20, 0.40", "0.1234", "0.5678", "0.3456", "alpaca.json", "seed 7", "steps 60", "abc123", "578 parameters",
                 "owner/name are unchanged"):
        assert said in card, said
    assert "/secret" not in card and "{" not in card
    for r in load_json(tmp_path / "eval.json", "ftp-eval-1", "")["rows"]:
        assert f"| {r['name']} | {100 * r['sparsity_prefill']:.1f} % |" in card and f"{r['kl']:.4f} +- {r['kl_stderr']:.4f}" in card
    for r in load_json(tmp_path / "bench.json", "ftp-bench-1", "")["rows"]:
        assert f"| {r['phase']} | {r['name']} | {r['median_ms']:.1f} (" in card
    said = call("extras/export.py", *args, "--out_dir", tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "## Quality" not in text and "## Speed" not in text and "base_model" not in text and "hf upload" in said


def test_export_refusals(workshop, made, tmp_path, capsys):
    """What does not belong together is not exported, and leaves nothing behind."""
    m = FTPModel.from_pretrained(workshop[0])
    other = Schedule.uniform(m, 0.2)
    other.save(tmp_path / "other.json")
    wrong = {"format": "ftp-eval-1", "config": {"fingerprint": m.fingerprint, "settings": {"kv": "drop", "prefill": "topk", "one_pass": False}},
             "rows": [{"name": "ftp", "artefacts": [other.id, None]}]}
    (tmp_path / "eval.json").write_text(json.dumps(wrong))
    (tmp_path / "eval2.json").write_text(json.dumps(wrong | {"rows": [{"artefacts": [Schedule.load(made / "schedule.json").id,
                                                                                    Router.load(made / "router.safetensors").id]}]}))
    (tmp_path / "there").mkdir()
    for said, out, more in (("another --kv", "e", ["--eval", tmp_path / "eval2.json", "--kv", "keep"]), ("exists already", "there", []),
                            ("--decode threshold", "e", ["--schedule", tmp_path / "other.json", "--decode", "threshold"]),
                            ("--eval: no row", "e", ["--eval", tmp_path / "eval.json"]), ("--bench", "e", ["--bench", tmp_path / "none.json"])):
        code, _, err = inside("extras/export.py", *these(workshop, made), "--out_dir", tmp_path / out, *more, capsys=capsys)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
        assert not (tmp_path / "e").exists() and not list(tmp_path.glob("*.part"))


def test_damaged_export_is_refused(workshop, made, tmp_path, call):
    call("extras/export.py", *these(workshop, made), "--out_dir", tmp_path / "e")
    (tmp_path / "e" / "ftp" / "router.safetensors").unlink()
    with pytest.raises(FTPError, match="--router"):
        FTPModel.from_pretrained(tmp_path / "e")
    (tmp_path / "e" / "ftp" / "ftp.json").write_text("{}")
    with pytest.raises(FTPError, match="ftp-export-1"):
        FTPModel.from_pretrained(tmp_path / "e")
