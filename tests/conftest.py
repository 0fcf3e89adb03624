"""Tiny random models, saved as Hugging Face folders: no test but the marked one downloads anything."""
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lib.artefacts import Schedule  # noqa: E402
from lib.calibration import calibrate_decode  # noqa: E402
from lib.skipped import Forecaster  # noqa: E402
from model_ftp import FTPModel, Router  # noqa: E402

TORTURE = bool(os.environ.get("FTP_TORTURE"))  # make torture: the long forms
TALLY: Counter = Counter()                     # what the bounded tests went through, told at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "embedded" not in item.keywords)  # the longest one first, so that the other process has work until it ends


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of pytest -n: hand it to the process that prints
        session.config.workeroutput["tally"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TALLY.update(node.workeroutput["tally"])


def pytest_terminal_summary(terminalreporter):
    for what, n in sorted(TALLY.items()):
        terminalreporter.write_line(f"{what}: {n}")


SHAPES = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "llama3": dict(num_key_value_heads=2, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "qwen2": dict(num_key_value_heads=4),
}


def make_hf(shape, seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    config, model = (Qwen2Config, Qwen2ForCausalLM) if shape == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    c = config(**{**dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
                         max_position_embeddings=256, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False),
                  **SHAPES[shape], **more})
    m = model(c).eval()
    for p in m.parameters():  # default init is so small that every block is close to the identity
        p.data.normal_(0, 0.25) if p.dim() > 1 else p.data.normal_(1.0 if p.shape[0] == 32 else 0.0, 0.2)
    return m


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(shape) -> (path of a saved tiny model, the Hugging Face model)."""
    made = {}

    def get(shape):
        if shape not in made:
            hf = make_hf(shape)
            path = tmp_path_factory.mktemp(shape)
            hf.save_pretrained(path)
            made[shape] = path, hf
        return made[shape]
    return get


@pytest.fixture(scope="session")
def tiny(folder):
    return FTPModel.from_pretrained(folder("gqa")[0])


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A tiny model with a tokenizer and a chat template, Alpaca-form data, a choice task and a text: (model dir, data dir)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    root = tmp_path_factory.mktemp("workshop")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")
    tok.chat_template = ("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}")
    hf = make_hf("gqa", vocab_size=258, max_position_embeddings=512, eos_token_id=1, bos_token_id=0)
    hf.save_pretrained(root / "model")
    tok.save_pretrained(root / "model")
    d = root / "data"
    d.mkdir()
    words = "the cat sat on a mat and saw nine red birds over an old grey house by the sea while it rained all day".split()
    rng = random.Random(0)
    say = lambda n: " ".join(rng.choice(words) for _ in range(n))
    (d / "alpaca.json").write_text(json.dumps([{"instruction": say(4), "input": say(6), "output": say(6)} for _ in range(48)]))
    (d / "task.jsonl").write_text("\n".join(json.dumps({"context": say(5), "choices": [" " + say(2), " " + say(3), " mat"], "answer": i % 3})
                                            for i in range(9)))
    (d / "partial.jsonl").write_text("\n".join(json.dumps({"contexts": [say(5), say(5)], "continuation": " " + say(2), "answer": i % 2})
                                               for i in range(6)))
    (d / "lambada.jsonl").write_text("\n".join(json.dumps({"context": say(8), "word": " mat"}) for i in range(5)))
    (d / "book.txt").write_text(say(400))
    return root / "model", d


@pytest.fixture
def schedule(tiny):
    return Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], tiny.fingerprint)


def make_forecaster(model, rank=4, seed=3):
    """A forecaster of random weights for all blocks of a tiny model; rank None: one of keys and values alone."""
    g, n, d, kv = torch.Generator().manual_seed(seed), model.config.n_layer, model.config.hidden_size, model.config.kv_bytes(1, 1)
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=g)
    a, b, c = (draw(n, d, kv), None, draw(n, kv)) if rank is None else (draw(n, d, rank), draw(n, rank, d + kv), draw(n, d + kv))
    return Forecaster(a, b, c, n, model.fingerprint)


def make_router(model, schedule=None, seed=0, forecaster=None, **kw):
    torch.manual_seed(seed)
    r = Router(model.config, model.fingerprint, **kw)
    with torch.no_grad():
        r.b2.zero_()  # about half compute, so that argmax decides something
    if schedule is not None:
        g = torch.Generator().manual_seed(seed)
        draw = lambda n: torch.randint(3, 97, (n,), generator=g).tolist()
        samples = [(draw(20), draw(30)) for _ in range(6)]
        model.use(schedule, r, kv="keep" if forecaster else "drop", forecaster=forecaster)
        thresholds = calibrate_decode(model, samples)
        r.meta = {"decode_threshold": list(thresholds), "schedule_id": schedule.id}
        model.use()
    return r


def tokens(n, seed=0):
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
