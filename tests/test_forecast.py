"""Forecasts of skipped tokens, and late keys and values: fitted in closed form, tuned, and used."""
import pytest
import torch
from conftest import tokens
from test_model import gathered_rows

from lib.artefacts import Schedule
from lib.flops import Meter
from lib.forecast import Learner, Moments, Tuning, add_moments, fit, own_map, solve, tune
from lib.scoring import response_states
from lib.skipped import Forecaster
from model_ftp import FTPModel


def test_forecaster_is_the_least_squares_fit(tiny, tmp_path):
    """The closed form from moments against torch's lstsq on the raw rows, error for error; lower ranks only lose; rank 0 is the mean."""
    tiny.use()
    block, d, e = tiny.blocks[2], 32, 32 + 2 * 2 * 8
    m, xs, ys = Moments.none(d, e), [], []
    kv = lambda x: block.qkv_proj(block.norm1(x))[:, -2 * 2 * 8:]
    with torch.no_grad():
        for i in range(40):
            batch = tiny.batch([tokens(50, i)])
            state = tiny.begin(batch)
            for l in range(2):
                state = tiny.prefill_step(l, batch, state)
            now, new = state.x, tiny.prefill_step(2, batch, state).x
            noisy = now + 0.1 * torch.randn(now.shape, generator=torch.Generator().manual_seed(i))
            add_moments(m, block, batch, noisy, now, new)
            xs.append(torch.nn.functional.rms_norm(noisy, (32,))[1:])
            ys.append(torch.cat((new - noisy, kv(now) - kv(noisy)), 1)[1:])
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
    samples = [(tokens(40, i), tokens(20, 100 + i)) for i in range(60)]
    f = fit(tiny, samples[:40], samples[40:], 32, schedule)
    f.save(tmp_path / "f.safetensors")
    g = Forecaster.load(tmp_path / "f.safetensors")
    assert torch.equal(f.a, g.a) and torch.equal(f.b, g.b) and len(f.meta["held_out_error"]) == 5 and f.first == 1
    new = [(tokens(40, 1000 + i), tokens(20, 2000 + i)) for i in range(10)]
    want = response_states(tiny.use(), new)[0]
    away = {name: float((response_states(tiny.use(schedule, kv="keep", forecaster=h), new)[0] - want).square().mean())
            for name, h in (("stay", None), ("forecast", g))}
    assert 0 < away["forecast"] < 0.8 * away["stay"]
    tiny.use()


@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_map_of_own_projections_changes_nothing(folder, shape):
    """Keys and values by the maps that equal the blocks' projections, biases and all, are those that K/V kept without a forecaster are."""
    model = FTPModel.from_pretrained(folder(shape)[0])
    with torch.no_grad():
        a, c = (torch.stack(t).float() for t in zip(*(own_map(b) for b in model.blocks[2:])))
    f, s = Forecaster(a, None, c, 6, model.fingerprint), Schedule([0.0, 0.0, 0.3, 0.5, 0.9, 0.9], model.fingerprint)
    samples = [(tokens(30, 1), tokens(10, 3)), (tokens(20, 2), tokens(3, 4))]
    want, got = (torch.cat(gathered_rows(model.use(s, kv="keep", forecaster=h), samples)) for h in (None, f))
    assert torch.allclose(want, got, atol=1e-3) and not torch.allclose(want, torch.cat(gathered_rows(model.use(s), samples)), atol=1e-2)


def test_late_keys_and_values(tiny, tmp_path):
    """Where skips run to the last block: fitted keys and values are closer to dense than stale ones, tuned ones closer still on what they were
    tuned on; they cost what the block's own projections do; and they take nothing but the dense states before the first skip."""
    late = Schedule([0.0, 0.0, 0.0, 0.5, 0.9, 0.9], tiny.fingerprint)
    samples = [(tokens(40, i), tokens(20, 100 + i)) for i in range(60)]
    f = fit(tiny, samples[:40], samples[40:], None, late)
    assert f.first == 3 and f.a.shape == (3, 32, 32) and f.rank == "full"
    want, meters = response_states(tiny.use(), samples)[0], []

    def away(h):
        meters.append(Meter(tiny))
        return float((response_states(tiny.use(late, kv="keep", forecaster=h), samples, meter=meters[-1])[0] - want).square().mean())
    stale, fitted = away(None), away(f)
    assert meters[0].used("prefill") == meters[1].used("prefill")     # a map costs what the block's own projections do
    learner = Learner(f, Tuning(steps=30, lr=2e-3, eval_every=10))
    tune(tiny, learner, samples[:40], samples[40:50], late)
    assert 0 < away(f) < fitted < 0.8 * stale and min(k for _, k in learner.history) < learner.history[0][1]
    f.save(tmp_path / "f.safetensors")
    assert Forecaster.load(tmp_path / "f.safetensors").id == f.id
    with torch.no_grad():  # by hand: block 4's cache holds the maps of the state before block 3 for the tokens that skip both
        cache = tiny.use(late, kv="keep", forecaster=f).new_cache(1)
        prompt = tokens(40, 7)
        tiny.prefill([prompt], cache)
        batch = tiny.use().batch([prompt])
        state = tiny.begin(batch)
        for l in range(3):
            state = tiny.prefill_step(l, batch, state)
        v = (torch.nn.functional.rms_norm(state.x, (32,)) @ f.a[1] + f.c[1])[:, 16:].view(40, 2, 8)
        assert torch.allclose(cache.v[4][0, :, 1:20].transpose(0, 1), v[1:20], atol=1e-5)
    tiny.use()


