"""Properties that hold for any schedule, lengths, batch, router, decode mode and K/V policy, on examples that hypothesis draws."""
from dataclasses import replace

import pytest
import torch
from conftest import TALLY, TORTURE, make_forecaster, make_router, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib import reference, scoring
from lib.artefacts import Schedule
from lib.batch import always
from lib.config import quota
from lib.flops import Meter
from model_ftp import FTPModel

L, D, V = 6, 32, 97
bounded = settings(max_examples=500 if TORTURE else 80, deadline=None, derandomize=not TORTURE, database=None, print_blob=True,
                   suppress_health_check=list(HealthCheck))

shares = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))
schedules = st.builds(lambda first, rest: [first, *rest], st.sampled_from([0.0] * 9 + [1.0]), st.lists(shares, min_size=L - 1, max_size=L - 1))
batches = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=4)  # (prompt tokens, new ones)
inputs = st.lists(st.sampled_from(["position", "place", "score", "rank", "sparsity", "forecast", "hidden"]), min_size=1, max_size=5, unique=True)
routers = st.one_of(st.sampled_from(["static", "attention"]), st.fixed_dictionaries(dict(
    kind=st.sampled_from(["global", "local", "recurrent"]), inputs=inputs, width=st.integers(1, 16), score=st.sampled_from([1, 4, 16, "mean"]),
    group=st.sampled_from([1, 1, 2, 3]), span=st.sampled_from([1, 1, 3]), seed=st.integers(0, 99))))
modes = st.fixed_dictionaries(dict(router=routers, prefill=st.sampled_from(["topk", "argmax"]), decode=st.sampled_from(["dense", "threshold", "rule"]),
                                   kv=st.sampled_from(["drop", "keep"]), one_pass=st.booleans(), forecaster=st.sampled_from([None, "kv", "all"]),
                                   first=st.sampled_from([1, 2, 8])))
examples = st.tuples(schedules, batches, modes, st.integers(0, 2 ** 20))


@pytest.fixture(scope="module")
def model(folder):
    m = FTPModel.from_pretrained(folder("gqa")[0])
    yield m
    m.use()


def setup(model, sparsity, mode):
    """Put an example's routing in place."""
    mode, router = dict(mode), mode["router"]
    s = Schedule(sparsity, model.fingerprint, first=mode.pop("first"))
    g = torch.Generator().manual_seed(5)
    if isinstance(router, dict):
        mode["router"] = make_router(model, **router)
        mode["router"].meta = {"decode_threshold": torch.randn(L, generator=g).tolist(), "schedule_id": s.id}
        mode["forecaster"] = "all" if "forecast" in router["inputs"] else mode["forecaster"]
    else:  # these know neither argmax nor thresholds
        mode |= {"prefill": "topk", "decode": "rule" if mode["decode"] == "rule" else "dense"}
    if mode["forecaster"]:
        mode["forecaster"] = make_forecaster(model, 3 if mode["forecaster"] == "all" or mode["kv"] == "drop" else None)
    return model.use(s, **mode)


def samples_of(batch, seed):
    """[(prompt ids, ids of new tokens)] of an example."""
    return [(tokens(n, seed + i), tokens(m, seed + 40 + i)) for i, (n, m) in enumerate(batch)]


def gathered(model, samples, meter=None):
    """Logits of prompts' and new tokens on the path that inference runs, but for the last block, which is run whole."""
    pair = replace(scoring.make_pair(model, samples), prompts=model.batch([prompt for prompt, _ in samples]))
    with torch.no_grad():
        return torch.cat([model.logits(s.x) for s in scoring.run_pair(model, pair, meter)])


def masked(model, samples):
    """The same by the masked reference."""
    pair = scoring.make_pair(model, samples)
    with torch.no_grad():
        states = scoring.begin_pair(model, pair)
        for l in range(L):
            states, _ = reference.step_pair(model, l, pair, states)
        return torch.cat([model.logits(s.x) for s in states])


class Close(Exception):
    """Two runs decided a token differently, by margins that float rounding can swap."""


def watched(model, run):
    """run(), and of each decision in it, about prompts or new tokens, the margins (NaN where none were asked for) and the mask."""
    seen, real = [], {name: getattr(model, name) for name in ("route", "route_new", "margins")}

    def keep_margins(l, batch, state):
        out = real["margins"](l, batch, state)
        seen[-1][0] = out[0].detach().cpu().clone()
        return out

    def keep_masks(name):
        def route(l, batch, state, noise=0.0):
            seen.append([torch.full((len(batch.every),), torch.nan), None])
            here = len(seen) - 1
            kept, state = real[name](l, batch, state, noise)
            seen[here][1] = kept.mask.cpu().clone()
            return kept, state
        return route

    model.route, model.route_new, model.margins = keep_masks("route"), keep_masks("route_new"), keep_margins
    try:
        return run(), seen
    finally:
        del model.route, model.route_new, model.margins


def same(model, a, seen_a, b, seen_b):
    """Decisions and logits of two runs are equal. Where a token's decision differs, its margins must agree and lie within rounding of
    another's, or of a threshold; what follows from there is not compared."""
    for (m, keep), (n, kept) in zip(seen_a, seen_b, strict=True):
        if not torch.equal(keep, kept):
            wrong = keep != kept
            assert torch.allclose(m[wrong], n[wrong], atol=1e-4, rtol=1e-4), "decisions differ, with unlike margins"
            others = torch.cat((m.expand(len(m), -1).masked_fill(torch.eye(len(m), dtype=torch.bool), torch.inf)[wrong],
                                torch.tensor([0.0, *(model.routing.thresholds or [])]).expand(int(wrong.sum()), -1)), 1)
            gap = (m[wrong][:, None] - others).abs().nan_to_num(torch.inf).min(1).values
            assert (gap < 1e-4 * (1 + m[wrong].abs())).all(), "decisions differ, and not by rounding"
            raise Close
    assert torch.allclose(a, b, atol=2e-3, rtol=2e-3), f"logits differ by {(a - b).abs().max()}"


def tallied(check):
    """Run a property's check, counting examples and those ended by a tie."""
    TALLY["property checks"] += 1
    try:
        check()
    except Close:
        TALLY["property checks that a rounding tie ended"] += 1


@bounded
@given(examples)
def test_gathered_equals_masked(model, example):
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    samples = samples_of(batch, seed)
    tallied(lambda: same(model, *watched(model, lambda: gathered(model, samples)), *watched(model, lambda: masked(model, samples))))


@bounded
@given(examples)
def test_batch_equals_single(model, example):
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    samples = samples_of(batch, seed)
    logits, seen = watched(model, lambda: gathered(model, samples))
    firsts, size = [0, 0], [sum(n for n, _ in batch), sum(m for _, m in batch)]
    for sample, sizes in zip(samples, batch):
        rows = [slice(f, f + n) for f, n in zip(firsts, sizes)]              # of the prompts, of the new tokens
        mine = [(margin[rows[i % 2]], mask[rows[i % 2]]) for i, (margin, mask) in enumerate(seen)]
        both = torch.cat((logits[:size[0]][rows[0]], logits[size[0]:][rows[1]]))
        tallied(lambda: same(model, both, mine, *watched(model, lambda: gathered(model, [sample]))))
        firsts = [f + n for f, n in zip(firsts, sizes)]


@bounded
@given(examples)
def test_budget_is_met_exactly(model, example):
    """Each prompt of a batch keeps its quota in each block, its ends among it; what was counted is what ran."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, {**mode, "prefill": "topk"})
    n = [size for size, _ in batch]
    packed, meter = model.batch([tokens(size, seed + i) for i, size in enumerate(n)]), Meter(model)
    TALLY["property checks"] += 1
    state, sparsity = model.begin(packed), model.routing.sparsity
    for l, s in enumerate(sparsity):
        state = model.prefill_step(l, packed, state, meter=meter)
        kept = state.kept
        assert kept.counts.tolist() == [quota(m, s) for m in n]
        if kept.rows is not None:
            by_sequence = torch.zeros(len(n), dtype=torch.int64).index_add(0, packed.seq.cpu(), kept.mask.long().cpu())
            assert by_sequence.tolist() == kept.counts.tolist() and kept.rows.tolist() == kept.mask.nonzero()[:, 0].tolist()
            assert s >= 1 or kept.mask[always(packed, s, model.routing.first)].all()
    total = sum(n)
    assert meter.total["prefill"] == total and meter.kept["prefill"] == [sum(quota(m, s) for m in n) for s in sparsity]
    want = [1 - sum(quota(m, s) for m in n) / total for s in sparsity]
    assert meter.sparsity("prefill") == pytest.approx(want, abs=1e-9)


@bounded
@given(examples, st.integers(1, 12))
def test_the_future_changes_nothing(model, example, later):
    """Tokens decoded after some moment leave the logits up to it alone, bit for bit in what is decided, and close in value."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    (prompt, new), = samples_of(batch[:1], seed)
    n, m = len(prompt), len(new)
    run = lambda k: lambda: gathered(model, [(prompt, new + tokens(later, seed + k))])[:n + m]

    def check():
        (x, seen_x), (y, seen_y) = watched(model, run(1)), watched(model, run(2))
        # decisions about the prompt, and about the new tokens up to that moment
        assert all(torch.equal(k[:(n, m)[i % 2]], q[:(n, m)[i % 2]]) for i, ((_, k), (_, q)) in enumerate(zip(seen_x, seen_y)))
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)
    tallied(check)


@bounded
@given(examples, st.integers(1, 6))
def test_cache_equals_one_pass_and_has_the_bytes_it_says(model, example, steps):
    """Prefill and decode, token by token and ragged, equal one pass; the cache holds what the decisions kept, and its bytes are computed right."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    prompts = [tokens(n, seed + i) for i, (n, _) in enumerate(batch)]
    more = [tokens(1 + (seed + i) % steps, seed + 50 + i) for i in range(len(prompts))]
    cache = model.new_cache(len(prompts))

    def run():
        out = [[x] for x in model.prefill(prompts, cache)]
        for t in range(max(map(len, more))):
            rows = [b for b, m in enumerate(more) if t < len(m)]
            for b, x in zip(rows, model.extend([[more[b][t]] for b in rows], cache, rows)):
                out[b].append(x)
        return out

    out, seen = watched(model, run)
    c, item = model.config, 4 * 2 * 2 * 8  # bytes of a float, key and value, 2 K/V heads of 8
    assert c.kv_bytes(1, 4) == item and cache.bytes()[0] == item * int(cache.len.sum()) <= cache.bytes()[1]
    sizes = torch.tensor([len(a) + len(b) for a, b in zip(prompts, more)])
    per_block = [seen[l::L] for l in range(L)]                    # [block][turn]
    kept = [sum(int(mask.sum()) for _, mask in turns) for turns in per_block]
    assert cache.seen.tolist() == sizes.tolist()
    assert cache.len.sum(1).tolist() == [0 if s >= 1 else int(sizes.sum()) if mode["kv"] == "keep" else k for s, k in zip(sparsity, kept)]
    first = [0, *torch.tensor([len(a) for a in prompts]).cumsum(0).tolist()]
    for b, (a, m) in enumerate(zip(prompts, more)):
        places = [slice(first[b], first[b + 1])]                  # of sequence b in each turn it takes part in
        for t in range(len(m)):
            at = sum(t < len(other) for other in more[:b])
            places.append(slice(at, at + 1))
        mine = []
        for turns in per_block:
            cut = [[turn[i][at] for turn, at in zip(turns, places)] for i in (0, 1)]
            mine += [(cut[0][0], cut[1][0]), (torch.cat(cut[0][1:]), torch.cat(cut[1][1:]))]
        alone = watched(model, lambda: gathered(model, [(a, m)]))
        tallied(lambda: same(model, torch.stack(out[b]), mine, alone[0][len(a) - 1:], alone[1]))
