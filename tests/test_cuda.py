"""The properties of test_model.py and test_properties.py on a GPU, and the stages there. Skipped where there is none: CI never has one.

    python -m pytest tests/test_cuda.py
"""
import json

import pytest
import test_model
import test_properties
import torch
from conftest import make_forecaster, make_router, tokens
from test_model import (  # noqa: F401  run here once more, with the models of this file
    MODES,
    routed,
    test_a_state_that_is_kept_stays_as_it_was,
    test_batch_equals_one_by_one,
    test_blocks_share_a_decision,
    test_blocks_that_would_decide_alike_share,
    test_cached_decode_equals_one_pass,
    test_decode_meets_its_threshold,
    test_ends_are_always_kept,
    test_future_changes_nothing,
    test_gates_carry_gradients,
    test_gathered_equals_masked,
    test_generation_stops_at_eos,
    test_joint_protocol_is_not_causal,
    test_last_block_gives_the_last_tokens_what_it_gives_all,
    test_logits_after_a_prompt,
    test_quota_is_met_and_counted,
    test_removed_block_is_absent,
    test_sampling_is_seeded,
    test_scores_are_read_where_a_decision_needs_them,
    test_static_order,
    test_zero_sparsity_is_dense,
)
from test_stages import call

from lib import scoring
from lib.artefacts import Schedule
from lib.compiling import compile_model
from lib.placement import PlacedModel
from model_ftp import FTPModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
DEVICE = "cuda"


@pytest.fixture(scope="session")
def tiny(folder):
    return FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE)


@pytest.fixture(scope="module")
def model(folder):
    m = FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE)
    yield m
    m.use()


@pytest.mark.parametrize("name", [n for n in dir(test_properties) if n.startswith("test_")])
def test_properties_hold(model, name):
    getattr(test_properties, name)(model=model)


@pytest.mark.parametrize("shape", test_model.SHAPES)
def test_dense_equals_hugging_face(folder, shape):
    path, hf = folder(shape)
    ids = torch.tensor([tokens(40, 1), tokens(40, 2)])
    m = FTPModel.from_pretrained(path, device=DEVICE)
    with torch.no_grad():
        assert torch.allclose(m(ids.to(DEVICE)).cpu(), hf(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
def test_gpu_equals_cpu(folder, schedule, mode, kv):
    """The same decisions and, within rounding, the same logits of prompts, scored tokens and generation."""
    samples = [(tokens(70, 1), tokens(20, 2)), (tokens(9, 3), tokens(21, 4)), (tokens(5, 5), tokens(1, 6))]
    got = []
    for device in ("cpu", DEVICE):
        m = FTPModel.from_pretrained(folder("gqa")[0], device=device)
        test_model.use(m, schedule, kv=kv, **mode)
        rows = torch.cat(test_model.gathered_rows(m, samples)).cpu()
        got.append((rows, m.generate([a for a, _ in samples], 8)))
    assert torch.allclose(got[0][0], got[1][0], atol=1e-4) and got[0][1] == got[1][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, schedule, dtype):
    """Near float32, on every kind of path."""
    samples = [(tokens(70, 1), tokens(20, 2)), (tokens(9, 3), tokens(21, 4))]
    m, half = (FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE, dtype=d) for d in (torch.float32, dtype))
    for router, how in (("static", {}), ("static", dict(kv="keep", forecaster=make_forecaster(m)))):
        with torch.no_grad():
            full, low = (torch.cat(test_model.gathered_rows(x.use(schedule, router, **how), samples)).float() for x in (m, half))
        assert (full - low).norm() / full.norm() < 0.1 and not torch.equal(full, low)
    half.use(schedule, make_router(half, schedule), decode="threshold")
    assert all(len(out) == 12 for out in half.generate([a for a, _ in samples], 12, eos=()))


def test_compiled_equals_plain(folder, schedule):
    m = FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE)
    samples = [(tokens(70, 1), tokens(20, 2)), (tokens(9, 3), tokens(21, 4))]
    m.use(schedule, make_router(m, schedule), decode="threshold")
    plain = torch.cat(test_model.gathered_rows(m, samples))
    compile_model(m)
    with torch.no_grad():
        assert torch.allclose(torch.cat(test_model.gathered_rows(m, samples)), plain, atol=1e-4)


def test_a_model_on_gpu_and_host(folder, schedule):
    """The last blocks on the GPU, the first on the CPU: as on one device."""
    samples = [(tokens(20, 1), tokens(9, 2)), (tokens(31, 3), tokens(8, 4))]
    one = FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE)
    two = PlacedModel.from_pretrained(folder("gqa")[0], spec="cpu=0-2,cuda:0=3-5")
    auto = PlacedModel.from_pretrained(folder("gqa")[0], spec="auto")
    assert all(p.device.type == "cuda" for p in auto.parameters())
    with torch.inference_mode():
        got = []
        for m in (one, two, auto):
            m.use(schedule, make_router(m, schedule), decode="threshold")
            got.append((m.logits(scoring.response_states(m, samples)[0]).cpu(), m.generate([a for a, _ in samples], 6)))
    assert all(torch.allclose(x, got[0][0], atol=1e-4) and text == got[0][1] for x, text in got[1:])


def test_a_prefill_waits_for_no_answer_of_the_device(folder):
    """Routing a prompt by quota is launched as a whole: only the end of a prefill needs the device's numbers."""
    m = FTPModel.from_pretrained(folder("gqa")[0], device=DEVICE)
    schedule = Schedule([0.0, *[0.3] * 5], m.fingerprint)
    m.use(schedule, make_router(m))
    batch = m.batch([tokens(70, 1), tokens(33, 2)])
    state = m.begin(batch)
    with torch.inference_mode():
        for l in range(6):
            state = m.prefill_step(l, batch, state)                # the tables that later passes find made
        torch.cuda.set_sync_debug_mode("error")
        try:
            state = m.begin(batch)
            for l in range(6):
                state = m.prefill_step(l, batch, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.kept.n < 103


def test_stages_in_sequence(workshop, tmp_path):
    """All stages with their default device, which is the GPU here."""
    model, d = workshop
    small = ["--model", model, "--out_dir", tmp_path, "--data", d / "alpaca.json", "--nsamples", 4]
    found = ["--schedule", tmp_path / "schedule.json"]
    call("search_scheduler.py", *small, "--nwatch", 4, "--sparsity", "0.3", "--evaluations", 10, "--population", 5, "--elite", 2)
    call("train_router.py", *small, *found, "--nwatch", 4, "--guide_evals", 4, "--guide_samples", 2, "--warmup", 20, "--steps", 4,
         "--eval_every", 2, "--calibration_samples", 2)
    router = ["--router", tmp_path / "router.safetensors"]
    call("finetune_static.py", *small, *found, *router, "--nwatch", 4, "--evaluations", 6, "--population", 5, "--elite", 2, "--calibration_samples", 2)
    call("fit_late_kv.py", *small, *found, "--nheld", 2, "--nwatch", 2, "--rank", 4, "--tune", 2)
    found[1] = tmp_path / "schedule_ft.json"
    call("evaluate.py", *small, *found, *router, "--rows", "cut,uniform,static,random,attention,ftp,ftp_decode,rule", "--calibration_samples", 2,
         "--tasks", f"choice={d / 'task.jsonl'},words={d / 'lambada.jsonl'}", "--text", d / "book.txt", "--context", 32, "--scored", 8)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert len(rows) == 9 and all(r["kl"] >= 0 for r in rows)
    call("benchmark.py", "--model", model, "--out_dir", tmp_path, *found, *router, "--lengths", "64,128", "--n_decode", 4, "--rounds", 2, "--verify")
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert bench["config"]["device"] == torch.cuda.get_device_name() and bench["config"]["dtype"] == "bfloat16"
    assert all(r["median_ms"] > 0 and r["peak_mb"] > 0 for r in bench["rows"])
