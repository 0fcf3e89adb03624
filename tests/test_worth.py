"""What spans are worth, the oracle that knows it, and routers that decide by spans."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import make_router, tokens
from test_stages import call, common

from analysis import depth
from lib import data, scoring
from lib.artefacts import Schedule
from lib.batch import by_mask, of_spans
from lib.files import FTPError
from lib.worth import Oracle, read_worth, span_worth, spans_of
from model_ftp import Router

PROMPT, RESPONSE = tokens(43, 1), tokens(9, 2)


def test_spans_cover_all_but_the_ends():
    for n in (1, 2, 3, 8, 9, 17, 43):
        covered = [i for a, b in spans_of(n, 8) for i in range(a, b)]
        assert covered == list(range(1, n - 1))


@pytest.mark.parametrize("first", [1, 3])
@torch.inference_mode()
def test_worth_is_the_kl_without_the_span(tiny, first):
    """Against the plain way: all tokens but the span's run each block from the first one on."""
    got = span_worth(tiny, PROMPT, RESPONSE, 8, first)
    assert len(got) == len(spans_of(43, 8)) and (got > 0).all()
    pair = scoring.make_pair(tiny, [(PROMPT, RESPONSE)])
    dense = scoring.predicting(pair, scoring.run_pair(tiny, pair))
    for (a, b), worth in zip(spans_of(43, 8), got.tolist()):
        states, mask = scoring.begin_pair(tiny, pair), torch.ones(43, dtype=torch.bool)
        mask[a:b] = False
        for l, block in enumerate(tiny.blocks):
            cache = tiny.new_cache(1)
            kept = by_mask(mask, pair.prompts, None) if l >= first else pair.prompts.all
            x, *_ = block.prefill(states[0].x, kept, pair.prompts, cache)
            y, _ = block.extend(states[1].x, pair.responses.all, pair.responses, cache)
            states = replace(states[0], x=x), replace(states[1], x=y)
        kl = scoring.response_kl(tiny, dense, scoring.predicting(pair, states)).mean()
        assert worth == pytest.approx(float(kl), rel=1e-3)


def test_worth_does_not_depend_on_what_runs_together(tiny, monkeypatch):
    whole = span_worth(tiny, PROMPT, RESPONSE, 8)
    monkeypatch.setattr("lib.worth.MOST_TOKENS", 40)
    torch.testing.assert_close(span_worth(tiny, PROMPT, RESPONSE, 8), whole, rtol=1e-3, atol=1e-6)


def test_the_oracle_keeps_what_is_worth_most(tiny, tmp_path):
    """And is no worse than the position rule; what it knows is read again from its file."""
    samples = [(tokens(40 + i, i), tokens(9, 50 + i)) for i in range(4)]
    oracle = Oracle.of_samples(tiny, samples, 4, tmp_path / "worth.jsonl")
    assert len(read_worth(tmp_path / "worth.jsonl")) == 4
    lines = (tmp_path / "worth.jsonl").read_text().splitlines()
    (tmp_path / "worth.jsonl").write_text("\n".join(lines[:2]))     # a run that was killed half way
    again = Oracle.of_samples(tiny, samples, 4, tmp_path / "worth.jsonl")
    for prompt, _ in samples:
        assert again.labels[tuple(prompt)] == pytest.approx(oracle.labels[tuple(prompt)], abs=1e-5)
    s = Schedule([0.0] + [0.4] * 5, tiny.fingerprint)
    teacher, _ = scoring.response_states(tiny.use(), samples)
    kl = {}
    for router in ("static", oracle):
        states, _ = scoring.response_states(tiny.use(s, router), samples)
        kl[router] = float(scoring.response_kl(tiny, teacher, states).mean())
    assert kl[oracle] < kl["static"]
    batch = tiny.batch([samples[0][0]])
    with torch.no_grad():
        kept, _ = tiny.use(s, oracle).route(1, batch, tiny.begin(batch))
    worth = torch.tensor(oracle.labels[tuple(samples[0][0])])
    skipped = [w for w, (a, b) in zip(worth, spans_of(40, 4)) if not kept.mask[a:b].any()]
    assert skipped and max(skipped) < worth.median()
    (tmp_path / "worth.jsonl").write_text('{"sample": 3}\n')
    with pytest.raises(FTPError, match="worth.jsonl"):
        Oracle.of_samples(tiny, samples, 4, tmp_path / "worth.jsonl")
    tiny.use()


def test_tokens_of_a_span_share_the_mean_of_their_margins(tiny):
    batch = tiny.batch([tokens(11, 1), tokens(3, 2)])
    values = torch.arange(14.0)
    got = of_spans(values, batch, 4).round(decimals=3)
    assert got.tolist() == [1.5] * 4 + [5.5] * 4 + [9.0] * 3 + [12.0] * 3
    assert torch.equal(of_spans(values, batch, 1), values)
    # of a span that the quota cuts in two, the later tokens stay
    r = make_router(tiny, span=4)
    with torch.no_grad():
        r.w2.zero_()                        # all margins equal
    kept, _ = tiny.use(Schedule([0.0] + [0.5] * 5, tiny.fingerprint), r).route(1, batch, tiny.begin(batch))
    assert kept.counts.tolist() == [6, 2]
    tiny.use()


def test_span_is_stored_with_the_router(tiny, tmp_path):
    make_router(tiny, span=7).save(tmp_path / "router.safetensors")
    assert Router.load(tmp_path / "router.safetensors").span == 7
    twin = json.loads((tmp_path / "router.json").read_text())
    assert twin["span"] == 7


def test_a_router_is_taught_worth(workshop, tmp_path):
    """--teach worth end to end, and --resume to the same router without measuring anything again."""
    a, b = common(workshop, tmp_path)
    call("search_scheduler.py", *a, *b, "--method", "uniform", "--nsamples", 4, "--nwatch", 3)
    words = ["train_router.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--teach", "worth", "--worth_span", 4, "--span", 4, "--nsamples", 8,
             "--nwatch", 4, "--warmup", 60, "--guide_samples", 4]
    got = call(*words, "--steps", 2, "--eval_every", 2)
    assert "worth of spans of 4 tokens" in got.stdout and "by an oracle" in got.stdout
    router = Router.load(tmp_path / "router.safetensors")
    assert router.span == 4 and router.meta["guide"] == {"worth_of_spans": 4, "prompts": 8}
    before = (tmp_path / "worth.jsonl").read_text()
    call(*words, "--steps", 2, "--eval_every", 2, "--resume")
    assert Router.load(tmp_path / "router.safetensors").id == router.id
    assert (tmp_path / "worth.jsonl").read_text() == before
    got = call("analysis/worth.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--router", tmp_path / "router.safetensors", "--size", 4,
               "--nsamples", 3, "--from_blocks", "3,5")
    told = json.loads((tmp_path / "worth.json").read_text())
    rows, by_block = {r["name"]: r for r in told["rows"]}, told["worth_from_block"]
    assert by_block["1"] == told["worth"] and [len(spans) for spans in by_block["5"]] == [len(spans) for spans in told["worth"]]
    assert "skipped from block  3 on" in got.stdout and (tmp_path / "worth_blocks.png").stat().st_size > 1000
    assert call("analysis/worth.py", *a, *b, "--schedule", tmp_path / "schedule.json", "--from_blocks", 6, ok=False).returncode == 2
    assert list(rows) == ["static", "oracle", "router"] and "static minus oracle" in got.stdout and (tmp_path / "worth.png").stat().st_size > 1000
    assert rows["oracle"]["flops_saved"] == pytest.approx(rows["static"]["flops_saved"], abs=0.1)  # scores are counted, too
    # what the attention of ever more blocks tells of the worth
    got = call("analysis/depth.py", *a, *b, "--size", 4, "--ntrain", 4, "--nsamples", 3)
    told = json.loads((tmp_path / "depth.json").read_text())
    assert [r["blocks"] for r in told["explained"]][:2] == [0, 1] and "1 blocks seen" in got.stdout
    assert [r["name"] for r in told["rows"]] == ["static", "position", "1 block", "all blocks", "oracle"]


def test_depth_finds_what_attention_tells_and_nothing_in_noise(tiny):
    """A worth that is the attention of block 2: seen from two blocks on, hidden before; noise is not explained."""
    samples = [(tokens(60, i), tokens(4, i)) for i in range(24)]
    seen = depth.seen_of(tiny, samples, 4)
    target = torch.cat([attention[:, 1, 0] for _, attention in seen])
    target = (target - target.mean()) / target.std()
    parts = seen[:18], seen[18:]
    n = sum(len(p) for p, _ in parts[0])

    def share(y, blocks):
        told = depth.predictions(depth.inputs_of(parts[0], blocks), y[:n], depth.inputs_of(parts[1], blocks), 0)
        return depth.explained(told.mean(0), y[n:])
    assert share(target, 2) > 0.8 > share(target, 0) + 0.1
    assert share(torch.randn(len(target), generator=torch.Generator().manual_seed(0)), 2) < 0.1


class Words:
    """A tokenizer of one id a word."""
    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


def test_a_cloze_asks_for_a_word_that_was_there(tiny, tmp_path):
    names = ["Anna", "river", "ferry", "Lenn", "morning", "wheat"]
    text = " ".join(f"The {names[i % 6]} saw the {names[i * i % 5]} again." for i in range(80))
    made = data.cloze(text, Words(), 140)
    assert len(made) == 4 and made == data.cloze(text, Words(), 140)
    for prompt, word in made:
        assert 40 <= len(prompt) <= 140 and prompt[0] == "The"       # from a sentence's beginning
        assert any(word[0].lower() == w.strip(".").lower() for w in prompt)
    # and so out of a file's texts, parted as ever
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}."}) + "\n" for i in range(12)))
    parts = [data.load_samples(f"cloze:{tmp_path}/texts.jsonl", tiny, Words(), split, max_prompt=140) for split in data.SPLITS]
    assert sum(map(len, parts)) == 4 * 12 and all(40 <= len(prompt) <= 140 for part in parts for prompt, _ in part)
    windows = data.load_samples(f"{tmp_path}/texts.jsonl", tiny, Words(), "train", max_prompt=140)
    assert len(windows[0][1]) > len(parts[0][0][1])
    with pytest.raises(FTPError, match="--data"):
        data.load_samples(f"cloze:{tmp_path}/missing.txt", tiny, Words(), "train")
