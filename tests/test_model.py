"""The routed model against Hugging Face, against its masked reference, and against itself in other arrangements."""
import itertools

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_forecaster, make_router, tokens

from config import Config, quota
from files import FTPError
from model_ftp import FTPModel, KVCache
from router import Forecaster, Router, Schedule

MODES = [dict(router="static"), dict(router="static", decode="rule"), dict(router="random"), dict(router="attention"),
         dict(router="learned", decode="threshold"), dict(router="learned"), dict(router="learned", prefill="argmax", decode="threshold"),
         dict(router="learned", one_pass=True, decode="threshold"), dict(router="learned", score="mean", decode="threshold"),
         dict(router="hidden", decode="threshold"), dict(router="local", decode="threshold"),
         dict(router="recurrent", decode="threshold"), dict(router="grouped", decode="threshold"), dict(router="static", forecaster=True),
         dict(router="learned", decode="threshold", forecaster=True), dict(router="foreseeing", decode="threshold", forecaster=True),
         dict(router="learned", decode="threshold", forecaster="kv")]


def use(model, schedule, router, **kw):
    if kw.get("forecaster"):
        kw["forecaster"] = make_forecaster(model, None if kw["forecaster"] == "kv" and kw["kv"] == "keep" else 4)  # K/V alone need K/V that are kept
    if router in ("learned", "foreseeing", "hidden", "local", "recurrent", "grouped"):
        made = {"learned": {}, "foreseeing": dict(inputs=("position", "forecast")), "hidden": dict(inputs=("position", "score", "rank", "sparsity", "hidden")),
                "local": dict(kind="local"), "recurrent": dict(kind="recurrent"), "grouped": dict(group=3)}[router]
        router = make_router(model, schedule, forecaster=kw.get("forecaster"), **made)
    return model.use(schedule, router, **kw)


@pytest.fixture(params=list(itertools.product(MODES, ["drop", "keep"])), ids=lambda m: "-".join(map(str, [*m[0].values(), m[1]])))
def routed(request, tiny, schedule):
    mode, kv = request.param
    yield lambda: use(tiny, schedule, kv=kv, **mode)
    tiny.use()


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_equals_hugging_face(folder, shape):
    path, hf = folder(shape)
    m = FTPModel.from_pretrained(path)
    ids = torch.tensor([tokens(40, 1), tokens(40, 2)])
    with torch.no_grad():
        assert torch.allclose(m(ids), hf(ids).logits, atol=1e-4, rtol=0)
    ours = m.generate([tokens(9)], max_new_tokens=40, eos=())[0]
    theirs = hf.generate(torch.tensor([tokens(9)]), max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert ours == theirs[0, 9:].tolist()


def test_zero_sparsity_is_dense(tiny):
    ids = torch.tensor([tokens(30)])
    dense = tiny(ids)
    tiny.use(Schedule([0.0] * 6, tiny.fingerprint), make_router(tiny))
    assert torch.equal(tiny(ids), dense)
    tiny.use()


def test_gathered_equals_masked(tiny, routed):
    seqs, n = [tokens(96, 1), tokens(17, 2), tokens(17, 3), tokens(1, 4), tokens(12, 5)], [85, 17, 9, 1, 3]
    model = routed()
    a = model.score_rows(seqs, n)
    model = routed()
    b = model.score_rows(seqs, n, masked=True)
    assert torch.allclose(a, b, atol=2e-5)
    model.use()
    assert not torch.allclose(a, model.score_rows(seqs, n), atol=1e-2)  # and something was skipped


@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("shape", ["tied", "qwen2"])  # one without biases, one without a head of its own
def test_packed_equals_plain(folder, schedule, shape, mode, kv):
    path, n = folder(shape)[0], [70, 9, 5]
    seqs, got = [tokens(90, 1), tokens(30, 2), tokens(5, 3)], []
    for m in (FTPModel.from_pretrained(path), FTPModel.from_pretrained(path).pack()):
        s = Schedule(schedule.sparsity, m.fingerprint)
        got += [use(m, s, kv=kv, **mode).score_rows(seqs, n), use(m, s, kv=kv, **mode).generate([s[:m] for s, m in zip(seqs, n)], 8)]
    assert torch.allclose(got[0], got[2], atol=1e-4) and got[1] == got[3]


def test_packed_weights_are_held_once_and_give_no_gradients(folder):
    plain = FTPModel.from_pretrained(folder("tied")[0])
    packed = FTPModel.from_pretrained(folder("tied")[0]).pack()
    assert packed.pack() is packed and packed.first_values() == plain.first_values() and packed.fingerprint == plain.fingerprint
    assert all(b.down.weight.numel() == b.qkv.weight.numel() == 0 for b in packed.blocks)
    assert packed.head.weight is packed.embed.weight and packed.embed.weight.shape == (97, 32)
    x = torch.randn(3, 32, requires_grad=True)
    plain.logits(x).sum().backward()
    with pytest.raises(FTPError, match="no gradients"):
        packed.logits(x)
    with pytest.raises(FTPError, match="--compile"):
        packed.compile()
    with pytest.raises(FTPError, match="no gradients"):
        packed.step(0, packed.begin([tokens(5)], [5]).next(x=torch.randn(5, 32, requires_grad=True)), masked=True)
    half = FTPModel.from_pretrained(folder("tied")[0], dtype=torch.float16).pack()  # no such kernels: left as it is
    assert half.blocks[0].down.packed is None


def test_rows_scattered_in_place_change_no_pass_that_is_kept(tiny, schedule):
    """The state before block 0, to which a search goes back, is the same after a pass as before."""
    p = use(tiny, schedule, "learned").begin([tokens(90)], [90])
    before = p.x.clone()
    after = tiny.through(p).x
    assert torch.equal(p.x, before) and torch.equal(tiny.through(p).x, after)
    tiny.use()


def test_cached_decode_equals_one_pass(tiny, routed):
    """prefill + decode token by token == prefill + a chunk == one pass without a cache, and the batch == each alone."""
    model = routed()
    if model.router == "random":
        pytest.skip("random selection draws anew in each pass")
    prompts, more = [tokens(20, 1), tokens(9, 2), tokens(15, 3)], [tokens(7, 4), tokens(7, 5), tokens(7, 6)]
    whole = model.score_rows([a + b for a, b in zip(prompts, more)], [len(a) for a in prompts])
    want = [w[len(a) - 1:] for w, a in zip(whole.split([len(a) + 7 for a in prompts]), prompts)]

    def cached(rows, chunk):
        cache = model.new_cache(len(rows))
        out = [[t] for t in model.extend([prompts[r] for r in rows], cache, prompt=True, last_only=True)]
        mark = cache.mark()
        model.extend([[5]] * len(rows), cache)  # a wrong turn, forgotten again
        cache.rewind(mark)
        for i in range(0, 7, chunk):
            new = model.extend([more[r][i:i + chunk] for r in rows], cache)
            for o, t in zip(out, new.split(min(chunk, 7 - i))):
                o.extend(t)
        return [torch.stack(o) for o in out], cache

    for chunk in (1, 3, 7):
        got, cache = cached([0, 1, 2], chunk)
        assert all(torch.allclose(g, w, atol=2e-5) for g, w in zip(got, want))
        for r in range(3):
            alone, one = cached([r], chunk)
            assert torch.allclose(alone[0], got[r], atol=2e-5)
            assert (one.len[:, 0] == cache.len[:, r]).all()
    if model.kv == "drop" and model.decode == "threshold":
        assert int(cache.len.sum()) < 6 * (20 + 9 + 15 + 21) * 0.8
    if model.kv == "keep":
        assert (cache.len == [27, 16, 22]).all()


def test_batch_equals_one_by_one(tiny, routed):
    model = routed()
    if model.router == "random":
        pytest.skip("random selection draws anew in each pass")
    prompts = [tokens(23, 1), tokens(2, 2), tokens(11, 3), tokens(11, 4)]
    both = model.generate(prompts, max_new_tokens=12)
    assert both == [model.generate([p], max_new_tokens=12)[0] for p in prompts]


def test_future_changes_nothing(tiny, routed):
    """Causal protocol: other tokens later leave earlier logits and decisions alone."""
    model = routed()
    a, b = tokens(20, 1) + tokens(10, 2), tokens(20, 1) + tokens(4, 2) + tokens(6, 9)
    kept = []
    for seq in (a, b):
        if model.router == "random":
            model._random.manual_seed(0)
        p = model.begin([seq], [20])
        masks = []
        for l in range(6):
            masks.append(model.route(l, p)[0].mask if model.router != "random" else None)
            p = model.step(l, p)
        kept.append((model.logits(p.x)[:24], [m if m is None else m[:24] for m in masks]))
    assert torch.allclose(kept[0][0], kept[1][0], atol=2e-5)
    assert all(x is None or torch.equal(x, y) for x, y in zip(kept[0][1], kept[1][1]))


def test_joint_protocol_is_not_causal(tiny, schedule):
    """The leak that the causal protocol closes: routed together, the continuation changes the prompt's own pass."""
    tiny.use(schedule)
    a, b = (torch.tensor([tokens(20, 1) + tokens(n, 2)]) for n in (4, 10))
    assert not torch.allclose(tiny(a)[:, :20], tiny(b)[:, :20], atol=1e-3)
    tiny.use()


def test_quota_is_met_and_counted(tiny, routed, schedule):
    model = routed()
    if model.prefill == "argmax":
        pytest.skip("argmax decides its own number")
    model.score_rows([tokens(50, 1), tokens(33, 2)], [50, 33])
    schedule = model.schedule
    want = [1 - (quota(50, s) + quota(33, s)) / 83 for s in schedule.sparsity]
    assert model.stats.sparsity("prefill") == pytest.approx(want)
    assert abs(model.stats.mean("prefill") - schedule.mean) < 0.02
    one = model.use(model.schedule, model.router, kv=model.kv, forecaster=model.forecaster)
    one.score_rows([tokens(50, 1)], [50])
    if model.router == "static" or (isinstance(model.router, Router) and model.kv == "drop"):  # else the pairs depend on who is kept
        cost = [model.config.prefill_flops(50, s, model.kv, model.router if isinstance(model.router, Router) else None, head=0,
                                           forecaster=model.forecaster)
                if s is not None else model.config.prefill_flops(50, [0] * 6, head=0) for s in (schedule.sparsity, None)]
        assert one.stats.used("prefill") == pytest.approx(cost[0])
        assert one.stats.saved("prefill") == pytest.approx(1 - cost[0] / cost[1])


def test_ends_are_always_kept(tiny, routed):
    model = routed()
    p = model.begin([tokens(40)], [40])
    for l in range(6):
        keep, _ = model.route(l, p)
        assert keep.mask is None or bool(keep.mask[0] and keep.mask[-1])
        p = model.step(l, p)


def test_blocks_share_a_decision(tiny, schedule):
    """In a group of blocks the first decides, by the mean of their sparsities; scores are only made where a decision comes next."""
    tiny.use(schedule, router := make_router(tiny, group=3))
    assert tiny.lead == [0, 1, 1, 1, 4, 4] and tiny.schedule.sparsity == pytest.approx([0, 0.5, 0.5, 0.5, 0.3, 0.3])
    assert [tiny.reads_scores(l) for l in range(6)] == [True, False, False, True, False, False]
    p, kept, calls, forward = tiny.begin([tokens(40)], [40]), [], [], router.forward
    router.forward = lambda l, *a: calls.append(l) or forward(l, *a)
    for l in range(6):
        keep, p = tiny.route(l, p)
        kept.append(keep)
        p = tiny.blocks[l](p, keep, "drop", 16 if tiny.reads_scores(l) else None)
    assert calls == [1, 4] and kept[1] is kept[2] is kept[3] and kept[4] is kept[5] and kept[3] is not kept[4]
    tiny.use(Schedule([0.0, 0.3, 0.0, 0.3, 1.0, 0.3], tiny.fingerprint), router)  # only blocks that skip some tokens, and lie side by side
    assert tiny.lead == list(range(6))
    tiny.use()


def test_static_order(tiny, schedule):
    tiny.use(schedule)
    keep, _ = tiny.route(3, tiny.begin([tokens(10)], [10]))  # s = 0.7: keeps 3 of 10
    assert keep.rows.tolist() == [0, 8, 9]
    tiny.use()


def test_removed_block_is_absent(tiny, folder):
    """s = 1 removes a block in prefill and decode: equal to the Hugging Face model without it."""
    hf = folder("gqa")[1]
    tiny.use(Schedule([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], tiny.fingerprint))
    gone = hf.model.layers
    try:
        hf.model.layers = torch.nn.ModuleList(b for i, b in enumerate(gone) if i != 3)
        hf.config.num_hidden_layers = 5
        for i, b in enumerate(hf.model.layers):
            b.self_attn.layer_idx = i
        with torch.no_grad():
            ids = torch.tensor([tokens(15)])
            assert torch.allclose(tiny(ids), hf(ids).logits, atol=1e-4)
    finally:
        hf.model.layers, hf.config.num_hidden_layers = gone, 6
        for i, b in enumerate(gone):
            b.self_attn.layer_idx = i
    cache = tiny.new_cache(1)
    tiny.extend([tokens(15)], cache, prompt=True)
    assert cache.len[3].item() == 0 and cache.bytes()[0] == tiny.config.kv_bytes(5 * 15, 4)
    tiny.use()


def test_decode_meets_its_threshold(tiny, schedule):
    r = make_router(tiny, schedule)
    tiny.use(schedule, r)
    g = [(tokens(20, 100 + i), tokens(40, 200 + i)) for i in range(12)]
    tiny.calibrate_decode(g)
    tiny.score_rows([a + b for a, b in g], [20] * 12)
    got = tiny.stats.sparsity("decode")
    assert got == pytest.approx(schedule.sparsity, abs=0.01)
    tiny.calibrate_decode(g, sparsity=0.2)
    tiny.score_rows([a + b for a, b in g], [20] * 12)
    assert tiny.stats.mean("decode") == pytest.approx(0.2, abs=0.01)
    tiny.use()


def test_gates_carry_gradients(tiny, schedule):
    r = make_router(tiny)
    tiny.use(schedule, r, decode="dense")
    p = tiny.begin([tokens(24)], [16])
    for l in range(6):
        p = tiny.step(l, p, masked=True, noise=0.0)
    tiny.logits(p.x[16:]).square().mean().backward()
    assert r.w1.grad.abs().sum() > 0 and all(q.grad is None for q in tiny.parameters())
    tiny.use()


def test_flops_of_the_paper():
    """Share of prefill FLOPs saved on LLaMA2-7B at 1000 tokens, all positions through the head (method section 7)."""
    c = Config(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, None, False, False, 4096)
    for kv, want in (("drop", (21.9, 24.9, 29.8, 39.7)), ("keep", (18.1, 20.5, 24.6, 32.8))):
        dense = c.prefill_flops(1000, [0] * 32, head=1000)
        got = [100 * (1 - c.prefill_flops(1000, [S] * 32, kv, head=1000) / dense) for S in (0.22, 0.25, 0.30, 0.40)]
        assert got == pytest.approx(want, abs=0.5)


def test_cache_grows(tiny):
    c = KVCache(tiny.config, 2, torch.float32)
    want = [[], []]
    for n in (3, 50, 1, 1):
        k = torch.randn(2 * n, 2, 8)
        c.append(0, np.array([1, 0]), np.array([n, n]), k, -k)
        want[1].append(k[:n])
        want[0].append(k[n:])
    for b in range(2):
        k = torch.cat(want[b])
        assert torch.equal(c.k[0][b, :, :55].transpose(0, 1), k) and torch.equal(c.v[0][b, :, :55].transpose(0, 1), -k)


def test_sampling_is_seeded(tiny):
    a, b, c = (tiny.generate([tokens(8)], max_new_tokens=16, temperature=1.0, top_p=0.9, seed=s, eos=())[0] for s in (1, 1, 2))
    assert a == b != c
    assert [t for (t,) in tiny.stream([tokens(8)], 16, temperature=1.0, top_p=0.9, seed=1, eos=())] == a


def test_generation_stops_at_eos(tiny):
    free = tiny.generate([tokens(8), tokens(9)], max_new_tokens=20, eos=())
    stop = free[0][4]
    got = tiny.generate([tokens(8), tokens(9)], max_new_tokens=20, eos=(stop,))
    for f, g in zip(free, got):
        assert g == (f[:f.index(stop) + 1] if stop in f else f)


def test_artifacts_round_trip(tiny, schedule, tmp_path):
    r = make_router(tiny, schedule)
    r.save(tmp_path / "router.safetensors")
    schedule.save(tmp_path / "schedule.json")
    s2, r2 = Schedule.load(tmp_path / "schedule.json"), Router.load(tmp_path / "router.safetensors")
    assert s2 == schedule and r2.id == r.id and r2.meta == r.meta and r2.inputs == r.inputs
    tiny.use(tmp_path / "schedule.json", tmp_path / "router.safetensors", decode="threshold")
    assert tiny.thresholds == r.meta["decode_threshold"]
    tiny.use()


def test_forecaster_is_the_least_squares_fit(tiny, tmp_path):
    """The closed form from moments against torch's lstsq on the raw rows, error for error; lower ranks only lose; rank 0 is the mean."""
    from fit_forecaster import moments, solve
    passes = [tiny.use().begin([tokens(50, i)], [50]) for i in range(40)]
    after = [tiny.step(2, p) for p in passes]
    noise = [p.next(x=p.x + 0.1 * torch.randn(p.x.shape, generator=torch.Generator().manual_seed(i))) for i, p in enumerate(passes)]
    m = moments(tiny, 2, noise, passes, after)
    block, kv = tiny.blocks[2], lambda x: block.qkv(block.norm1(x))[:, -2 * 2 * 8:]
    with torch.no_grad():
        x = torch.cat([torch.nn.functional.rms_norm(p.x, (32,))[1:] for p in noise]).double()
        y = torch.cat([torch.cat((t.x - n.x, kv(p.x) - kv(n.x)), 1)[1:] for n, p, t in zip(noise, passes, after)]).double()
    weight = torch.cat([(1 / t.square().sum()).expand(t.shape[1]) for t in y.split([32, 16, 16], 1)]) / 3
    wrong = lambda got: float(((got - y).square().sum(0) * weight).sum() / (y.square().sum(0) * weight).sum())
    one = torch.cat((x, torch.ones(len(x), 1)), 1)
    best = wrong(one @ torch.linalg.lstsq(one, y).solution)
    got = {r: solve(*m, m, r) for r in (0, 4, 16, 32)}
    for a, b, c, _, e in got.values():
        assert wrong(x @ a @ b + c) == pytest.approx(e, rel=1e-4)
    assert got[32][-1] == pytest.approx(best, rel=1e-3) and got[0][-1] == pytest.approx(wrong(y.mean(0).expand_as(y)), rel=1e-4)
    assert best <= got[16][-1] < got[4][-1] < got[0][-1]


def test_fitted_forecaster_comes_closer_to_dense(tiny, schedule, tmp_path):
    """On new text, the model that forecasts its skipped tokens is closer to the dense one than the one that leaves them; files round-trip."""
    from fit_forecaster import fit
    samples = [(tokens(40, i), tokens(20, 100 + i)) for i in range(60)]
    f = fit(tiny, samples[:40], samples[40:], 32, schedule)
    f.save(tmp_path / "f.safetensors")
    g = Forecaster.load(tmp_path / "f.safetensors")
    assert torch.equal(f.a, g.a) and torch.equal(f.b, g.b) and len(f.meta["held_out_error"]) == 5 and f.first == 1
    new = [(tokens(40, 1000 + i), tokens(20, 2000 + i)) for i in range(10)]
    want = tiny.use().response_states(new)[0]
    away = {name: float((tiny.use(schedule, kv="keep", forecaster=h).response_states(new)[0] - want).square().mean())
            for name, h in (("stay", None), ("forecast", g))}
    assert 0 < away["forecast"] < 0.8 * away["stay"]
    tiny.use()


@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_map_of_own_projections_changes_nothing(folder, shape):
    """Keys and values by the maps that equal the blocks' projections, biases and all, are those that K/V kept without a forecaster are."""
    from fit_forecaster import own_map
    model = FTPModel.from_pretrained(folder(shape)[0])
    with torch.no_grad():
        a, c = (torch.stack(t).float() for t in zip(*(own_map(b, model.config.kv_bytes(1, 1)) for b in model.blocks[2:])))
    f, s = Forecaster(a, None, c, 6, model.fingerprint), Schedule([0.0, 0.0, 0.3, 0.5, 0.9, 0.9], model.fingerprint)
    seqs = [tokens(40, 1), tokens(23, 2)]
    want, got = (model.use(s, kv="keep", forecaster=h).score_rows(seqs, [30, 20]) for h in (None, f))
    assert torch.allclose(want, got, atol=1e-3) and not torch.allclose(want, model.use(s).score_rows(seqs, [30, 20]), atol=1e-2)


def test_late_keys_and_values(tiny, tmp_path):
    """Where skips run to the last block: fitted keys and values are closer to dense than stale ones, tuned ones closer still on what they were
    tuned on; they cost what the block's own projections do; and they take nothing but the dense states before the first skip."""
    from fit_forecaster import fit, tune
    late = Schedule([0.0, 0.0, 0.0, 0.5, 0.9, 0.9], tiny.fingerprint)
    samples = [(tokens(40, i), tokens(20, 100 + i)) for i in range(60)]
    f = fit(tiny, samples[:40], samples[40:], None, late)
    assert f.first == 3 and f.a.shape == (3, 32, 32) and f.rank == "full"
    want = tiny.use().response_states(samples)[0]
    away = lambda h: float((tiny.use(late, kv="keep", forecaster=h).response_states(samples)[0] - want).square().mean())
    stale, fitted = away(None), away(f)
    flops = tiny.stats.flops["prefill"]
    away(None)
    assert flops - tiny.stats.flops["prefill"] == 60 * (20 + 4 + 4) * 2 * 32 * 32   # the kept tokens' forecasts, which nothing reads
    history = tune(tiny, f, samples[:40], samples[40:50], late, 30, 2e-3, every=10)
    assert 0 < away(f) < fitted < 0.8 * stale and min(k for _, k in history) < history[0][1]
    f.save(tmp_path / "f.safetensors")
    assert Forecaster.load(tmp_path / "f.safetensors").id == f.id
    with torch.no_grad():  # by hand: block 4's cache holds the maps of the state before block 3 for the tokens that skip both
        cache = tiny.use(late, kv="keep", forecaster=f).new_cache(1)
        prompt = tokens(40, 7)
        tiny.extend([prompt], cache, prompt=True)
        p = tiny.use().begin([prompt], [40])
        for l in range(3):
            p = tiny.step(l, p)
        v = (torch.nn.functional.rms_norm(p.x, (32,)) @ f.a[1] + f.c[1])[:, 16:].view(40, 2, 8)
        assert torch.allclose(cache.v[4][0, :, 1:20].transpose(0, 1), v[1:20], atol=1e-5)
    tiny.use()


def test_refusals(tiny, folder, schedule, tmp_path):
    other = FTPModel.from_pretrained(folder("mha")[0])
    twin = FTPModel.from_pretrained(folder("gqa")[0])
    twin.norm.weight.data += 0.5
    r = make_router(tiny, schedule)
    for model in (other, twin):
        with pytest.raises(FTPError, match="another model"):
            model.use(schedule)
        with pytest.raises(FTPError, match="another model"):
            model.use(Schedule(schedule.sparsity, model.fingerprint), r)
    for bad in ([], [0.0, 2.0], [0.5, 0.1], [0.0, float("nan")], [0.0, "x"]):
        with pytest.raises(FTPError):
            Schedule(bad, {})
    for kw in (dict(prefill="argmax"), dict(decode="threshold"), dict(kv="lose"), dict(router=str(tmp_path / "none"))):
        with pytest.raises(FTPError):
            tiny.use(schedule, **kw)
    for ids in ([[]], [], [[97]], [[1] * 300]):
        with pytest.raises(FTPError):
            tiny.generate(ids)
    tiny.use()


def test_bad_checkpoints(folder, tmp_path):
    import json
    import shutil
    path = folder("gqa")[0]
    for name, damage in {
        "no such": lambda d: shutil.rmtree(d),
        "config": lambda d: (d / "config.json").write_text("{"),
        "no .safetensors": lambda d: (d / "model.safetensors").unlink(),
        "damaged": lambda d: (d / "model.safetensors").write_bytes(b"x" * 100),
        "shape": lambda d: (d / "config.json").write_text((path / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 64')),
        "lacks": lambda d: (d / "config.json").write_text((path / "config.json").read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 7')),
        "model_type": lambda d: (d / "config.json").write_text(json.dumps({"model_type": "gpt2"})),
    }.items():
        d = tmp_path / "m"
        shutil.rmtree(d, ignore_errors=True)
        shutil.copytree(path, d)
        damage(d)
        with pytest.raises(FTPError, match=name):
            FTPModel.from_pretrained(d)


def test_sharded_checkpoint(folder, tmp_path):
    _, hf = folder("qwen2")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.tensor([tokens(20)])
    assert torch.allclose(FTPModel.from_pretrained(tmp_path)(ids), hf(ids).logits, atol=1e-4)
