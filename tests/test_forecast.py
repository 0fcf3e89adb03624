"""Forecasts of skipped tokens, and late keys and values: fitted in closed form, tuned, and used."""
import pytest
import torch
import torch.nn.functional as F
from conftest import tokens

from lib import scoring
from lib.artefacts import Schedule
from lib.flops import Meter
from lib.forecast import Learner, Moments, Tuning, add_moments, fit, own_map, solve, tune
from lib.skipped import Forecaster
from model_ftp import FTPModel


def samples_of(n, first=0):
    """Prompts of 40 tokens with responses of 20."""
    return [(tokens(40, first + i), tokens(20, 100 + first + i)) for i in range(n)]


def distance(model, samples, want):
    """Mean squared difference of the states that predict the responses from `want`."""
    return float((scoring.response_states(model, samples)[0] - want).square().mean())


@torch.no_grad()
def test_forecaster_is_the_least_squares_fit(tiny):
    """The closed form from moments against torch's lstsq on the raw rows, error for error; lower ranks only lose; rank 0 is the mean."""
    tiny.use()
    block, kv = tiny.blocks[2], lambda x: block.qkv_proj(block.norm1(x))[:, -2 * 2 * 8:]
    m, xs, ys = Moments.none(32, 32 + 32), [], []
    for i in range(40):
        batch = tiny.batch([tokens(50, i)])
        now = tiny.begin(batch)
        after = tiny.prefill_step(2, batch, now).x
        noisy = now.x + 0.1 * torch.randn(now.x.shape, generator=torch.Generator().manual_seed(i))
        add_moments(m, block, batch, noisy, now.x, after)
        xs.append(F.rms_norm(noisy, (32,))[1:])
        ys.append(torch.cat((after - noisy, kv(now.x) - kv(noisy)), 1)[1:])
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    weight = torch.cat([(1 / t.square().sum()).expand(t.shape[1]) for t in y.split([32, 16, 16], 1)]) / 3
    wrong = lambda got: float(((got - y).square().sum(0) * weight).sum() / (y.square().sum(0) * weight).sum())
    one = torch.cat((x, torch.ones(len(x), 1)), 1)
    best = wrong(one @ torch.linalg.lstsq(one, y).solution)
    got = {r: solve(m, m, r) for r in (0, 4, 16, 32)}
    for a, b, c, _, e in got.values():
        assert wrong(x @ a @ b + c) == pytest.approx(e, rel=1e-4)
    assert got[32][-1] == pytest.approx(best, rel=1e-3) and got[0][-1] == pytest.approx(wrong(y.mean(0).expand_as(y)), rel=1e-4)
    assert best <= got[16][-1] < got[4][-1] < got[0][-1]


def test_fitted_forecaster_comes_closer_to_dense(tiny, schedule, tmp_path):
    """On new text, the model that forecasts its skipped tokens is closer to the dense one than the one that leaves them; files round-trip."""
    samples = samples_of(60)
    f = fit(tiny, samples[:40], samples[40:], 32, schedule)
    f.save(tmp_path / "f.safetensors")
    g = Forecaster.load(tmp_path / "f.safetensors")
    assert torch.equal(f.a, g.a) and torch.equal(f.b, g.b) and len(f.meta["held_out_error"]) == 5 and f.first == 1
    new = [(tokens(40, 1000 + i), tokens(20, 2000 + i)) for i in range(10)]
    want = scoring.response_states(tiny.use(), new)[0]
    away = {name: distance(tiny.use(schedule, kv="keep", forecaster=h), new, want) for name, h in (("stay", None), ("forecast", g))}
    assert 0 < away["forecast"] < 0.8 * away["stay"]
    tiny.use()


@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_map_of_own_projections_changes_nothing(folder, shape):
    """Keys and values by the maps that equal the blocks' projections, biases and all, are those that K/V kept without a forecaster are."""
    model = FTPModel.from_pretrained(folder(shape)[0])
    with torch.no_grad():
        a, c = (torch.stack(t).float() for t in zip(*(own_map(b) for b in model.blocks[2:])))
    f, s = Forecaster(a, None, c, 6, model.fingerprint), Schedule([0.0, 0.0, 0.3, 0.5, 0.9, 0.9], model.fingerprint)
    pair = scoring.make_pair(model, [(tokens(30, 1), tokens(10, 3)), (tokens(20, 2), tokens(3, 4))])

    def rows(**how):
        with torch.no_grad():
            return model.logits(torch.cat([state.x for state in scoring.run_pair(model.use(s, **how), pair)]))

    want, got = rows(kv="keep"), rows(kv="keep", forecaster=f)
    assert torch.allclose(want, got, atol=1e-3) and not torch.allclose(want, rows(), atol=1e-2)


def test_late_keys_and_values(tiny, tmp_path):
    """Where skips run to the last block: fitted keys and values are closer to dense than stale ones, tuned ones closer still on what they were
    tuned on; they cost what the block's own projections do; and they take nothing but the dense states before the first skip."""
    late = Schedule([0.0, 0.0, 0.0, 0.5, 0.9, 0.9], tiny.fingerprint)
    samples = samples_of(60)
    f = fit(tiny, samples[:40], samples[40:], None, late)
    assert f.first == 3 and f.a.shape == (3, 32, 32) and f.rank == "full"
    want = scoring.response_states(tiny.use(), samples)[0]
    away = lambda h: distance(tiny.use(late, kv="keep", forecaster=h), samples, want)
    stale, fitted = away(None), away(f)

    def cost(h):
        meter = Meter(tiny)
        scoring.response_states(tiny.use(late, kv="keep", forecaster=h), samples, meter=meter)
        return meter.used("prefill")

    # none is made for the kept tokens, which nothing would read: exactly the projections that the maps stand in for
    assert cost(f) == cost(None)
    learner = Learner(f, Tuning(30, 2e-3, eval_every=10))
    tune(tiny, learner, samples[:40], samples[40:50], late)
    history = learner.history
    assert 0 < away(f) < fitted < 0.8 * stale and min(k for _, k in history) < history[0][1]
    f.save(tmp_path / "f.safetensors")
    assert Forecaster.load(tmp_path / "f.safetensors").id == f.id
    with torch.no_grad():  # by hand: block 4's cache holds the maps of the state before block 3 for the tokens that skip both
        cache = tiny.use(late, kv="keep", forecaster=f).new_cache(1)
        prompt = tokens(40, 7)
        tiny.prefill([prompt], cache)
        tiny.use()
        batch = tiny.batch([prompt])
        state = tiny.begin(batch)
        for l in range(3):
            state = tiny.prefill_step(l, batch, state)
        v = (F.rms_norm(state.x, (32,)) @ f.a[1] + f.c[1])[:, 16:].view(40, 2, 8)
        assert torch.allclose(cache.v[4][0, :, 1:20].transpose(0, 1), v[1:20], atol=1e-5)
    tiny.use()


def test_a_word_counts_as_much_as_a_text(tiny):
    late = Schedule([0.0, 0.0, 0.0, 0.5, 0.9, 0.9], tiny.fingerprint)
    f = fit(tiny, samples_of(20), samples_of(10, 20), None, late)
    watched = [(tokens(40, 1), tokens(20, 2)), (tokens(40, 3), tokens(2, 4))]
    learner = Learner(f, Tuning(1, 1e-9, eval_every=1))
    tune(tiny, learner, watched, watched, late)
    dense, owner = scoring.response_states(tiny.use(), watched)
    routed, _ = scoring.response_states(tiny.use(late, kv="keep", forecaster=f), watched)
    kl = scoring.response_kl(tiny.use(), dense, routed)
    each = scoring.by_sample(kl, owner)
    assert learner.history[0][1] == pytest.approx(float(each.mean()), rel=1e-4)
    assert abs(float(each.mean()) - float(kl.mean())) > 1e-3 * float(kl.mean())     # which the mean over tokens is not
