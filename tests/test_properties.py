"""Properties that hold for any schedule, lengths, batch, router, decode mode and K/V policy, on examples that hypothesis draws."""
import pytest
import torch
from conftest import TALLY, TORTURE, make_forecaster, make_router, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import quota
from router import Schedule

L, D, V = 6, 32, 97
bounded = settings(max_examples=500 if TORTURE else 80, deadline=None, derandomize=not TORTURE, database=None, print_blob=True,
                   suppress_health_check=list(HealthCheck))

shares = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))
schedules = st.builds(lambda first, rest: [first, *rest], st.sampled_from([0.0] * 9 + [1.0]), st.lists(shares, min_size=L - 1, max_size=L - 1))
batches = st.lists(st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=4)  # (tokens, of these prompt)
inputs = st.lists(st.sampled_from(["position", "place", "score", "rank", "sparsity", "forecast", "hidden"]), min_size=1, max_size=5, unique=True)
routers = st.one_of(st.sampled_from(["static", "attention"]), st.fixed_dictionaries(dict(
    kind=st.sampled_from(["global", "local", "recurrent"]), inputs=inputs, width=st.integers(1, 16), score=st.sampled_from([1, 4, 16, "mean"]),
    group=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 99))))
modes = st.fixed_dictionaries(dict(router=routers, prefill=st.sampled_from(["topk", "argmax"]), decode=st.sampled_from(["dense", "threshold", "rule"]),
                                   kv=st.sampled_from(["drop", "keep"]), one_pass=st.booleans(), forecaster=st.sampled_from([None, "kv", "all"])))
examples = st.tuples(schedules, batches, modes, st.integers(0, 2 ** 20))


@pytest.fixture(scope="module")
def model(folder):
    from model_ftp import FTPModel
    m = FTPModel.from_pretrained(folder("gqa")[0])
    yield m
    m.use()


def setup(model, sparsity, mode):
    """Put an example's routing in place."""
    s, mode, router = Schedule(sparsity, model.fingerprint), dict(mode), mode["router"]
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


def texts(batch, seed):
    return [tokens(n, seed + i) for i, (n, _) in enumerate(batch)], [m for _, m in batch]


class Close(Exception):
    """Two runs decided a token differently, by margins that float rounding can swap."""


def watched(model, run):
    """run(), and of each route() in it the margins (NaN where none were asked for) and the mask."""
    seen, route, margins = [], model.route, model.margins

    def keep_margins(l, p, s):
        out = margins(l, p, s)
        seen[-1][0] = out[0].detach().clone()
        return out

    def keep_masks(l, p, noise=None):
        seen.append([torch.full((len(p.x),), torch.nan), torch.ones(len(p.x), dtype=torch.bool)])
        keep, q = route(l, p, noise)
        if keep.rows is not None:
            seen[-1][1] = keep.mask.clone()
        return keep, q

    model.route, model.margins = keep_masks, keep_margins
    try:
        return run(), seen
    finally:
        del model.route, model.margins


def same(model, a, seen_a, b, seen_b):
    """Decisions and logits of two runs are equal. Where a token's decision differs, its margins must agree and lie within rounding of
    another's, or of a threshold; what follows from there is not compared."""
    for (m, keep), (n, kept) in zip(seen_a, seen_b, strict=True):
        if not torch.equal(keep, kept):
            wrong = keep != kept
            assert torch.allclose(m[wrong], n[wrong], atol=1e-4, rtol=1e-4), "decisions differ, with unlike margins"
            others = torch.cat((m.expand(len(m), -1).masked_fill(torch.eye(len(m), dtype=torch.bool), torch.inf)[wrong],
                                torch.tensor([0.0, *(model.thresholds or [])]).expand(int(wrong.sum()), -1)), 1)
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
    seqs, n = texts(batch, seed)
    tallied(lambda: same(model, *watched(model, lambda: model.score_rows(seqs, n)), *watched(model, lambda: model.score_rows(seqs, n, masked=True))))


@bounded
@given(examples)
def test_batch_equals_single(model, example):
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    seqs, n = texts(batch, seed)
    logits, seen = watched(model, lambda: model.score_rows(seqs, n))
    first = 0
    for s, m in zip(seqs, n):
        rows = slice(first, first + len(s))
        mine = [(margin[rows], mask[rows]) for margin, mask in seen]
        tallied(lambda: same(model, logits[rows], mine, *watched(model, lambda: model.score_rows([s], [m]))))
        first += len(s)


@bounded
@given(examples)
def test_budget_is_met_exactly(model, example):
    """Each prompt of a batch keeps its quota in each block, its ends among it; what was counted is what ran."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, {**mode, "prefill": "topk"})
    seqs, n = texts(batch, seed)
    p, TALLY["property checks"] = model.begin(seqs, n), TALLY["property checks"] + 1
    sparsity = model.schedule.sparsity
    for l, s in enumerate(sparsity):
        keep, _ = model.route(l, p)
        assert keep.set_counts.tolist() == [quota(m, s) for m in n]
        if keep.rows is not None:
            by_sequence = torch.zeros(len(n), dtype=torch.int64).index_add(0, p.seq, (keep.mask & p.in_set).long())
            assert by_sequence.tolist() == keep.set_counts.tolist() and keep.rows.tolist() == keep.mask.nonzero()[:, 0].tolist()
            assert s >= 1 or keep.mask[p.ends].all()
        p = model.step(l, p)
    total = sum(n)
    assert model.stats.total["prefill"] == total and model.stats.kept["prefill"] == [sum(quota(m, s) for m in n) for s in sparsity]
    want = [1 - sum(quota(m, s) for m in n) / total for s in sparsity]
    assert model.stats.sparsity("prefill") == pytest.approx(want, abs=1e-9)


@bounded
@given(examples, st.integers(1, 12))
def test_the_future_changes_nothing(model, example, later):
    """Tokens decoded after some moment leave the logits up to it alone, bit for bit in what is decided, and close in value."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    (n, m), a = batch[0], tokens(batch[0][0], seed)
    one, two = a + tokens(later, seed + 1), a + tokens(later, seed + 2)
    run = lambda s: lambda: model.score_rows([s], [m])[:n]
    cut = lambda s: lambda: model.score_rows([s], [m], rows=slice(0, n))

    def check():
        (x, seen_x), (y, seen_y) = watched(model, run(one)), watched(model, cut(two))
        assert all(torch.equal(k[:n], q[:n]) for (_, k), (_, q) in zip(seen_x, seen_y))
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)
    tallied(check)


@bounded
@given(examples, st.integers(1, 6))
def test_cache_equals_one_pass_and_has_the_bytes_it_says(model, example, steps):
    """Prefill and decode, token by token and ragged, equal one pass; the cache holds what the decisions kept, and its bytes are computed right."""
    sparsity, batch, mode, seed = example
    setup(model, sparsity, mode)
    prompts = [tokens(m, seed + i) for i, (_, m) in enumerate(batch)]
    more = [tokens(1 + (seed + i) % steps, seed + 50 + i) for i in range(len(prompts))]
    cache = model.new_cache(len(prompts))

    def run():
        out = [[x] for x in model.extend(prompts, cache, prompt=True, last_only=True)]
        for t in range(max(map(len, more))):
            rows = [b for b, m in enumerate(more) if t < len(m)]
            for b, x in zip(rows, model.extend([[more[b][t]] for b in rows], cache, torch.tensor(rows))):
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
        mine = [[torch.cat([turn[i][at] for turn, at in zip(turns, places)]) for i in (0, 1)] for turns in per_block]
        alone = watched(model, lambda: model.score_rows([a + m], [len(a)], rows=slice(len(a) - 1, None)))
        tallied(lambda: same(model, torch.stack(out[b]), mine, *alone))
