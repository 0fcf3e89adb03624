"""The routed model against Hugging Face, against its masked reference, and against itself in other arrangements."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPES, make_forecaster, make_router, tokens

from lib import reference, scoring
from lib.artefacts import Schedule
from lib.cache import KVCache
from lib.calibration import calibrate_decode
from lib.compiling import compile_model
from lib.config import Config, quota
from lib.files import FTPError
from lib.flops import Meter, prefill_flops
from lib.packing import pack
from model_ftp import FTPModel, Router

MODES = [dict(router="static"), dict(router="static", decode="rule"), dict(router="random"), dict(router="attention"),
         dict(router="learned", decode="threshold"), dict(router="learned"), dict(router="learned", prefill="argmax", decode="threshold"),
         dict(router="learned", one_pass=True, decode="threshold"), dict(router="learned", score="mean", decode="threshold"),
         dict(router="hidden", decode="threshold"), dict(router="local", decode="threshold"),
         dict(router="recurrent", decode="threshold"), dict(router="grouped", decode="threshold"),
         dict(router="spanned", decode="threshold"), dict(router="static", forecaster=True),
         dict(router="learned", decode="threshold", forecaster=True), dict(router="foreseeing", decode="threshold", forecaster=True),
         dict(router="learned", decode="threshold", forecaster="kv")]


def use(model, schedule, router, **kw):
    if kw.get("forecaster"):
        kw["forecaster"] = make_forecaster(model, None if kw["forecaster"] == "kv" and kw["kv"] == "keep" else 4)  # K/V alone need K/V that are kept
    if router in ("learned", "foreseeing", "hidden", "local", "recurrent", "grouped", "spanned"):
        made = {"learned": {}, "foreseeing": dict(inputs=("position", "forecast")), "hidden": dict(inputs=("position", "score", "rank", "sparsity", "hidden")),
                "local": dict(kind="local"), "recurrent": dict(kind="recurrent"), "grouped": dict(group=3), "spanned": dict(span=5)}[router]
        router = make_router(model, schedule, forecaster=kw.get("forecaster"), **made)
    return model.use(schedule, router, **kw)


def masked_rows(model, samples):
    """Logits of the prompts' tokens and of the new ones, by the masked reference."""
    pair = scoring.make_pair(model, samples)
    with torch.no_grad():
        states = scoring.begin_pair(model, pair)
        for l in range(model.config.n_layer):
            states, _ = reference.step_pair(model, l, pair, states)
        return [model.logits(state.x) for state in states]


def gathered_rows(model, samples, meter=None):
    """The same on the path that inference runs, but for the last block, which is run whole."""
    pair = replace(scoring.make_pair(model, samples), prompts=model.batch([prompt for prompt, _ in samples]))
    with torch.no_grad():
        return [model.logits(state.x) for state in scoring.run_pair(model, pair, meter)]


def states_of(model, prompts):
    """The Batch of some prompts, and the State after each block, the one before block 0 first."""
    batch = model.batch(prompts)
    states = [model.begin(batch)]
    with torch.no_grad():
        for l in range(model.config.n_layer):
            states.append(model.prefill_step(l, batch, states[-1]))
    return batch, states


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
    seqs = [tokens(96, 1), tokens(20, 2), tokens(17, 3), tokens(2, 4), tokens(12, 5)]
    samples = [(s[:n], s[n:]) for s, n in zip(seqs, (85, 17, 9, 1, 3))]
    model = routed()
    a, b = gathered_rows(model, samples), masked_rows(model, samples)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(a, b))
    model.use()
    assert not torch.allclose(a[0], gathered_rows(model, samples)[0], atol=1e-2)  # something was skipped


def test_last_block_gives_the_last_tokens_what_it_gives_all(tiny, routed):
    """What of the last block is not computed, nobody reads: the same logits, and the same keys and values in the cache."""
    model, prompts = routed(), [tokens(85, 1), tokens(17, 2), tokens(17, 3), tokens(1, 4), tokens(2, 5)]
    for how in ("routed", "dense"):
        model = model if how == "routed" else model.use()
        lean, whole = model.new_cache(5), model.new_cache(5)
        batch = model.batch(prompts)
        with torch.inference_mode():
            want = model.logits(model.run(model.prefill_step, batch, whole, None).x[batch.last])
        assert torch.allclose(model.prefill(prompts, lean), want, atol=2e-5)
        assert (lean.len == whole.len).all()
        for one, other in ((lean.k, whole.k), (lean.v, whole.v)):
            for l in range(6):
                used = torch.arange(one[l].shape[2]) < torch.as_tensor(lean.len[l])[:, None, None, None]
                used = used[..., 0, :, None].to(one[l].device)
                assert torch.allclose(one[l] * used, other[l] * used, atol=1e-6)


@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("shape", ["tied", "qwen2"])  # one without biases, one without a head of its own
def test_packed_equals_plain(folder, schedule, shape, mode, kv):
    samples = [(tokens(70, 1), tokens(20, 2)), (tokens(9, 3), tokens(21, 4)), (tokens(5, 5), tokens(1, 6))]
    path, got = folder(shape)[0], []
    for m in (FTPModel.from_pretrained(path), pack(FTPModel.from_pretrained(path))):
        use(m, Schedule(schedule.sparsity, m.fingerprint), kv=kv, **mode)
        got += [torch.cat(gathered_rows(m, samples)), m.generate([a for a, _ in samples], 8)]
    assert torch.allclose(got[0], got[2], atol=1e-4) and got[1] == got[3]


def test_packed_weights_are_held_once_and_give_no_gradients(folder):
    plain = FTPModel.from_pretrained(folder("tied")[0])
    packed = pack(FTPModel.from_pretrained(folder("tied")[0]))
    assert pack(packed) is packed and packed.fingerprint == plain.fingerprint
    assert all(b.down.weight.numel() == b.qkv_proj.weight.numel() == 0 for b in packed.blocks)
    assert packed.head.weight is packed.embed.weight and packed.embed.weight.shape == (97, 32)
    x = torch.randn(3, 32, requires_grad=True)
    plain.logits(x).sum().backward()
    with pytest.raises(FTPError, match="no gradients"):
        packed.logits(x)
    with pytest.raises(FTPError, match="--compile"):
        compile_model(packed)
    batch = packed.batch([tokens(5)])
    state = replace(packed.begin(batch), x=torch.randn(5, 32, requires_grad=True))
    with pytest.raises(FTPError, match="no gradients"):
        packed.prefill_step(0, batch, state)
    half = pack(FTPModel.from_pretrained(folder("tied")[0], dtype=torch.float16))  # no such kernels
    assert isinstance(half.blocks[0].down, torch.nn.Linear)


def test_a_state_that_is_kept_stays_as_it_was(tiny, schedule):
    """The state before a block, to which a search goes back, is the same after a pass as before."""
    use(tiny, schedule, "learned")
    batch, states = states_of(tiny, [tokens(90)])
    before = [s.x.clone() for s in states]
    again = states[2]
    for l in range(2, 6):
        again = tiny.prefill_step(l, batch, again)
    assert torch.equal(again.x, states[-1].x) and all(torch.equal(a, s.x) for a, s in zip(before, states))
    tiny.use()


def test_cached_decode_equals_one_pass(tiny, routed):
    """prefill + decode token by token == prefill + a chunk == block by block, and the batch == each alone."""
    model = routed()
    prompts, more = [tokens(20, 1), tokens(9, 2), tokens(15, 3)], [tokens(7, 4), tokens(7, 5), tokens(7, 6)]
    whole = gathered_rows(model, list(zip(prompts, more)))
    ends = np.cumsum([len(a) for a in prompts]) - 1
    want = [torch.cat((whole[0][e:e + 1], part)) for e, part in zip(ends.tolist(), whole[1].split(7))]

    def cached(rows, chunk):
        cache = model.new_cache(len(rows))
        out = [[t] for t in model.prefill([prompts[r] for r in rows], cache)]
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
            assert model.routing.router == "random" or torch.allclose(alone[0], got[r], atol=2e-5)
            assert (one.len[:, 0] == cache.len[:, r]).all()
    if model.routing.kv == "drop" and model.routing.decode == "threshold":
        assert int(cache.len.sum()) < 6 * (20 + 9 + 15 + 21) * 0.8
    if model.routing.kv == "keep":
        assert (cache.len == [27, 16, 22]).all()


def test_logits_after_a_prompt(tiny, routed):
    """after_prompt() gives what prefill and decoding give; the model itself refuses what is not causal."""
    model = routed()
    seqs, n = [tokens(30, 1), tokens(9, 2), tokens(12, 3)], [20, 9, 3]
    got = scoring.after_prompt(model, seqs, n)
    assert [len(g) for g in got] == [11, 1, 10]
    cache = model.new_cache(3)
    first = model.prefill([s[:m] for s, m in zip(seqs, n)], cache)
    assert torch.allclose(torch.stack([g[0] for g in got]), first, atol=1e-5)
    with pytest.raises(FTPError, match="not causal"):
        model(torch.tensor([tokens(30)]))


def test_batch_equals_one_by_one(tiny, routed):
    model = routed()
    if model.routing.router == "random":
        pytest.skip("random selection draws by the whole batch")
    prompts = [tokens(23, 1), tokens(2, 2), tokens(11, 3), tokens(11, 4)]
    both = model.generate(prompts, max_new_tokens=12)
    assert both == [model.generate([p], max_new_tokens=12)[0] for p in prompts]


def test_future_changes_nothing(tiny, routed):
    """Causal protocol: other tokens later leave earlier logits and decisions alone."""
    model = routed()
    kept = []
    for future in (tokens(10, 2), tokens(4, 2) + tokens(6, 9)):
        pair = scoring.make_pair(model, [(tokens(20, 1), future)])
        states, masks = scoring.begin_pair(model, pair), []
        with torch.no_grad():
            for l in range(6):
                states = scoring.step_pair(model, l, pair, states)
                masks += [states[0].kept.mask, states[1].kept.mask[:4]]
            kept.append((model.logits(states[0].x), model.logits(states[1].x)[:4], masks))
    assert torch.equal(kept[0][0], kept[1][0]) and torch.allclose(kept[0][1], kept[1][1], atol=2e-5)
    assert all(torch.equal(x, y) for x, y in zip(kept[0][2], kept[1][2]))


def test_joint_protocol_is_not_causal(tiny, schedule):
    """The leak that the causal protocol closes: routed together, the continuation changes the prompt's own pass."""
    tiny.use(schedule)
    a, b = (states_of(tiny, [tokens(20, 1) + tokens(n, 2)])[1][-1].x[:20] for n in (4, 10))
    assert not torch.allclose(a, b, atol=1e-3)
    tiny.use()


def test_quota_is_met_and_counted(tiny, routed, schedule):
    model = routed()
    r = model.routing
    if r.prefill == "argmax":
        pytest.skip("argmax decides its own number")
    meter = Meter(model)
    model.prefill([tokens(50, 1), tokens(33, 2)], meter=meter)
    want = [1 - (quota(50, s) + quota(33, s)) / 83 for s in r.sparsity]
    assert meter.sparsity("prefill") == pytest.approx(want)
    assert abs(meter.mean("prefill") - r.schedule.mean) < 0.02
    model.use(r.schedule, r.router, kv=r.kv, forecaster=r.forecaster)
    meter = Meter(model)
    model.prefill([tokens(50, 1)], meter=meter)
    if r.router == "static" or (r.learned and r.kv == "drop"):  # else the pairs depend on who is kept
        router = r.router if r.learned else None
        cost = prefill_flops(model.config, 50, r.schedule.sparsity, r.kv, router, head=0, forecaster=r.forecaster)
        dense = prefill_flops(model.config, 50, [0] * 6, head=0)
        assert meter.used("prefill") == pytest.approx(cost)
        assert meter.saved("prefill") == pytest.approx(1 - cost / dense)


@pytest.mark.parametrize("router", ["static", "random", "attention", "learned"])
def test_ends_are_always_kept(tiny, router):
    """The last token of a prompt, and as many first ones as the schedule says: up to a quarter of those kept, as the newest matter too."""
    for first, s, want in ((1, 0.5, 1), (4, 0.5, 4), (8, 0.5, 5), (8, 0.8, 2), (8, 0.95, 1)):
        schedule = Schedule([0.0] + [s] * (tiny.config.n_layer - 1), tiny.fingerprint, first=first)
        tiny.use(schedule, make_router(tiny, schedule) if router == "learned" else router)
        _, states = states_of(tiny, [tokens(40), tokens(3, 1)])
        for state in states[2:]:                                # block 0 is dense
            mask = state.kept.mask
            assert mask[:want].all() and mask[39] and mask[40] and mask[42] and state.kept.counts.tolist() == [quota(40, s), 2]
            if router == "static":
                newest = quota(40, s) - want
                assert not mask[want:40 - newest].any() and mask[40 - newest:40].all()
            else:
                assert bool(state.kept.free[:40].sum() == 40 - want - 1) and not state.kept.free[:want].any()
    tiny.use()


def test_scores_are_read_where_a_decision_needs_them(tiny, monkeypatch):
    """Behind dense first blocks the last of them is enough; one pass reads no others. What is not read would have changed nothing."""
    late = Schedule([0.0, 0.0, 0.0, 0.4, 0.5, 0.4], tiny.fingerprint)
    for one_pass, read in ((False, [2, 3, 4]), (True, [2])):
        for router in ("attention", make_router(tiny, late)):
            tiny.use(late, router, one_pass=one_pass)
            assert [l for l in range(6) if tiny.reads_scores(l)] == read
    for one_pass in (False, True):
        tiny.use(late, "attention", one_pass=one_pass)
        spared = tiny.prefill([tokens(40), tokens(23, 1)])
        with monkeypatch.context() as m:
            m.setattr("model_ftp.scores_matter", lambda s, leader, l, one: l < 3 or not one)
            assert torch.equal(tiny.prefill([tokens(40), tokens(23, 1)]), spared)


def test_blocks_share_a_decision(tiny, schedule):
    """In a group of blocks the first decides, by the mean of their sparsities; scores are only made where a decision comes next."""
    tiny.use(schedule, router := make_router(tiny, group=3))
    assert tiny.routing.leader == (0, 1, 1, 1, 4, 4) and tiny.routing.sparsity == pytest.approx([0, 0.5, 0.5, 0.5, 0.3, 0.3])
    assert [tiny.reads_scores(l) for l in range(6)] == [True, False, False, True, False, False]
    calls, forward = [], router.forward
    router.forward = lambda l, *a: calls.append(l) or forward(l, *a)
    _, states = states_of(tiny, [tokens(40)])
    kept = [s.kept for s in states[1:]]
    assert calls == [1, 4] and kept[1] is kept[2] is kept[3] and kept[4] is kept[5] and kept[3] is not kept[4]
    tiny.use(Schedule([0.0, 0.3, 0.0, 0.3, 1.0, 0.3], tiny.fingerprint), router)  # only blocks that skip some tokens, and lie side by side
    assert tiny.routing.leader == tuple(range(6))
    tiny.use()


def test_blocks_that_would_decide_alike_share(tiny):
    """One decision serves neighbours of equal sparsity where nothing that it reads differs: as if each had decided."""
    schedule = Schedule([0.0, 0.4, 0.4, 0.2, 0.4, 0.4], tiny.fingerprint)
    shared, own = (0, 1, 1, 3, 4, 4), tuple(range(6))
    router = make_router(tiny, schedule)
    samples = [(tokens(70, 1), tokens(20, 2)), (tokens(9, 3), tokens(21, 4))]
    for how, want in ((dict(router="static"), shared), (dict(router="attention", one_pass=True), shared), (dict(router="random", one_pass=True), own),
                      (dict(router="attention"), own), (dict(router=router, one_pass=True, decode="threshold"), shared), (dict(router=router), own),
                      (dict(router=lambda batch, scores, s: scores.value, one_pass=True), shared),
                      (dict(router=make_router(tiny, inputs=("position", "hidden")), one_pass=True), own),
                      (dict(router=make_router(tiny, kind="recurrent"), one_pass=True), own), (dict(router=make_router(tiny, kind="local"), one_pass=True), own)):
        tiny.use(schedule, **how)
        assert tiny.routing.leader == want
        if tiny.routing.decode == "threshold":                  # those of followers, which their leader's stand for
            tiny.routing = replace(tiny.routing, thresholds=(0.0, 0.1, 0.1, 0.2, -0.1, -0.1))
        got = torch.cat(gathered_rows(tiny, samples))
        tiny.routing = replace(tiny.routing, leader=own)
        assert torch.equal(torch.cat(gathered_rows(tiny, samples)), got)
    tiny.use()


def test_static_order(tiny, schedule):
    tiny.use(schedule)
    batch = tiny.batch([tokens(10)])
    kept, _ = tiny.route(3, batch, tiny.begin(batch))  # s = 0.7: keeps 3 of 10
    assert kept.rows.tolist() == [0, 8, 9]
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
            got = scoring.after_prompt(tiny, ids.tolist(), [9])[0]
            assert torch.allclose(got.cpu(), hf(ids).logits[0, 8:], atol=1e-4)
    finally:
        hf.model.layers, hf.config.num_hidden_layers = gone, 6
        for i, b in enumerate(gone):
            b.self_attn.layer_idx = i
    cache = tiny.new_cache(1)
    tiny.prefill([tokens(15)], cache)
    assert cache.len[3].item() == 0 and cache.bytes()[0] == tiny.config.kv_bytes(5 * 15, 4)
    tiny.use()


def test_decode_meets_its_threshold(tiny, schedule):
    tiny.use(schedule, make_router(tiny, schedule))
    samples = [(tokens(20, 100 + i), tokens(40, 200 + i)) for i in range(12)]
    calibrate_decode(tiny, samples)
    gathered_rows(tiny, samples, meter := Meter(tiny))
    assert meter.sparsity("decode") == pytest.approx(schedule.sparsity, abs=0.01)
    calibrate_decode(tiny, samples, sparsity=0.2)
    gathered_rows(tiny, samples, meter := Meter(tiny))
    assert meter.mean("decode") == pytest.approx(0.2, abs=0.01)
    tiny.use()


def test_gates_carry_gradients(tiny, schedule):
    r = make_router(tiny)
    tiny.use(schedule, r, decode="dense")
    pair = scoring.make_pair(tiny, [(tokens(16), tokens(8))])
    states = scoring.begin_pair(tiny, pair)
    for l in range(6):
        states, _ = reference.step_pair(tiny, l, pair, states)
    tiny.logits(scoring.predicting(pair, states)).square().mean().backward()
    assert r.w1.grad.abs().sum() > 0 and all(q.grad is None for q in tiny.parameters())
    tiny.use()


def test_flops_of_the_paper():
    """Share of prefill FLOPs saved on LLaMA2-7B at 1000 tokens, all positions through the head (method section 7)."""
    c = Config(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 1e4, None, False, False, 4096)
    for kv, want in (("drop", (21.9, 24.9, 29.8, 39.7)), ("keep", (18.1, 20.5, 24.6, 32.8))):
        dense = prefill_flops(c, 1000, [0] * 32, head=1000, last_only=False)
        got = [100 * (1 - prefill_flops(c, 1000, [S] * 32, kv, head=1000, last_only=False) / dense) for S in (0.22, 0.25, 0.30, 0.40)]
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
    assert list(tiny.routing.thresholds) == r.meta["decode_threshold"]
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
