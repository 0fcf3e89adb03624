"""Sub-block schedules, removal in prompts alone, progressive selection, and the rival methods against brute force."""
import copy
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_hf, make_router, tokens

from analysis.rivals import benchmark, evaluate, make
from analysis.rivals.common import (
    Pruned,
    prompt_flops,
    read_tensors,
    realised,
    text_batches,
    write_folder,
)
from analysis.rivals.laco import collapse, combine, laco, merge, original
from analysis.rivals.lazyllm import LazyModel, lazyllm
from analysis.rivals.peers import load_peers, load_pruned
from analysis.rivals.removal import PartModel, blockpruner, part_config, shortgpt, without
from analysis.rivals.slicegpt import SlicedModel, half_blocks, principal_bases, slice_to
from analysis.rivals.swiftkv import Swift, SwiftModel, swiftkv, train
from analysis.rivals.width import NarrowModel, importance, narrow, narrow_config, width
from lib import reference
from lib.artefacts import Schedule
from lib.checkpoint import check_fingerprint
from lib.files import FTPError
from lib.flops import Meter
from lib.forecast import Tuning
from lib.scoring import after_prompt, begin_pair, make_pair, predicting, run_pair
from lib.stage import run
from model_ftp import FTPModel

PARTS = ["both", "mlp", "both", "attention", "both", "mlp"]
SOME = [0.0, 0.0, 1.0, 0.0, 0.4, 0.3]
WHOLE = [float(s == 1) for s in SOME]


def sample_texts(n=4):
    return [(tokens(14 + i, i), tokens(9, 50 + i)) for i in range(n)]


def last_states(model, ids):
    """States (N, d) after the last block of one sequence that runs as a prompt."""
    return model.run(model.prefill_step, model.batch([ids]), None, None).x


def text_logits(model, ids):
    """Logits (N, vocab) of one sequence that runs as a prompt, whatever the schedule."""
    with torch.inference_mode():
        return model.logits(last_states(model, ids))


def mean_nll(model, samples):
    """Mean next-token loss over all tokens but each first, by text_logits() alone."""
    loss, n = 0.0, 0
    for a, b in samples:
        logp, ids = text_logits(model, a + b)[:-1].log_softmax(-1), torch.tensor(a + b)
        loss, n = loss - logp.gather(1, ids[1:, None]).sum().item(), n + len(ids) - 1
    return loss / n


def routed(tiny, schedule, router="static", **how):
    """The tiny model under a rival's routing."""
    if router == "progressive":
        return LazyModel.of(tiny).use(schedule, **how)
    return PartModel.of(tiny).use(schedule, router, **how)


def zeroed(model):
    """A copy that has every removed sub-block, its output matrix zero."""
    model = copy.deepcopy(model)
    for block, part in zip(model.blocks, model.routing.parts):
        for name, gone in ((block.o, part == "mlp"), (block.down, part == "attention")):
            if gone:
                name.weight.data = torch.zeros_like(name.weight)
    return model


def masked_pair(model, pair):
    """run_pair() by the masked reference, of which a removed sub-block is one that gives zero."""
    prompts, responses = begin_pair(model, pair)
    without_parts, keep = zeroed(model), model.routing.kv == "keep"
    for l, block in enumerate(model.blocks):
        x = prompts.x
        prompts, held, _ = reference.prefill_step(without_parts, l, pair.prompts, prompts)
        runner = without_parts
        if model.routing.removal == "prompt":
            runner = model
            if model.lacks_attention(l):
                _, k, v = block.qkv(x, pair.prompts.rope)
                held = reference.Held(k, v, torch.ones(len(x)), pair.prompts.none) if keep else None
        responses, _ = reference.extend_step(runner, l, pair.responses, responses, held)
    return prompts, responses


# ------------------------------------------------------------------------------------------------
# the engine

@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_a_removed_sub_block_is_one_whose_output_matrix_is_zero(folder, shape):
    path, hf = folder(shape)
    hf, ids = copy.deepcopy(hf), tokens(20)
    for layer, part, s in zip(hf.model.layers, PARTS, SOME):
        if part == "mlp" or s == 1:
            layer.self_attn.o_proj.weight.data.zero_()
        if part == "attention" or s == 1:
            layer.mlp.down_proj.weight.data.zero_()
    model = FTPModel.from_pretrained(path)
    model = routed(model, Schedule(WHOLE, model.fingerprint, parts=PARTS))
    torch.testing.assert_close(text_logits(model, ids), hf(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("removal", ["whole", "prompt"])
@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize("router", ["static", "attention", "progressive"])
@torch.inference_mode()
def test_parts_scored_decoded_and_masked_are_the_same(tiny, removal, kv, router):
    a, b = tokens(23), tokens(6, 1)
    model = routed(tiny, Schedule(SOME, tiny.fingerprint, parts=PARTS), router, removal=removal, kv=kv)
    pair = make_pair(model, [(a, b), (a[:9], b)])
    once = Meter(model)
    states = run_pair(model, pair, once)
    masked = masked_pair(model, pair)
    torch.testing.assert_close(predicting(pair, masked), predicting(pair, states), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(masked[1].x, states[1].x, atol=1e-4, rtol=1e-4)
    # with a cache, and token by token
    cache, meter = model.new_cache(2), Meter(model)
    first = model.prefill([a, a[:9]], cache, meter)
    step = [model.extend([[t], [t]], cache, meter=meter) for t in b]
    want = model.logits(states[1].x).unflatten(0, (2, len(b)))
    torch.testing.assert_close(torch.stack(step, 1), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first, model.logits(predicting(pair, states))[[0, len(b)]], atol=1e-4, rtol=1e-4)
    for phase in ("prefill", "decode"):
        assert meter.used(phase) == pytest.approx(once.used(phase))
    assert cache.len[0].tolist() == [len(a) + len(b), 9 + len(b)]
    # where attention is removed, no keys: none at all, or those of decoded tokens (keep: of all)
    there = 0 if removal == "whole" else len(b) + len(a) * (kv == "keep")
    assert cache.len[1, 0] == cache.len[2, 0] == there
    # keys that skipped tokens or absent attention leave are counted, in both ways of running
    assert 0 < meter.used("prefill") < meter.dense["prefill"]


@torch.inference_mode()
def test_removal_in_prompts_leaves_decoded_tokens_their_own_attention(tiny):
    """With every block removed in the prompt, a decoded text is read as if no prompt were there, but for its positions."""
    a, b = tokens(10), tokens(8, 1)
    model = routed(tiny, Schedule([1.0] * 6, tiny.fingerprint), removal="prompt")
    pair = make_pair(model, [(a, b)])
    got = model.logits(run_pair(model, pair)[1].x)
    torch.testing.assert_close(got, text_logits(tiny.use(), b), atol=1e-4, rtol=1e-4)  # rotary embedding is relative
    for whole in (tiny, PartModel.of(tiny)):  # the plain model runs schedules that remove whole blocks
        prompts, responses = run_pair(whole.use(Schedule([1.0] * 6, tiny.fingerprint)), pair)
        torch.testing.assert_close(torch.cat((prompts.x, responses.x)), tiny.embed.weight[a + b])  # the last block is gone, too
    tiny.use()


@pytest.mark.parametrize("router", ["static", "attention"])
def test_flops_of_parts(tiny, router):
    c, T = tiny.config, 31
    model = routed(tiny, Schedule(WHOLE, tiny.fingerprint, parts=PARTS), router)
    meter = Meter(model)
    model.prefill([tokens(T)], meter=meter)
    assert meter.used("prefill") == prompt_flops(part_config(c, PARTS), [(tokens(T), [])], WHOLE)
    attn, mlp = 2 * c.p_attn * T + 4 * 32 * T * (T + 1) / 2, 2 * c.p_mlp * T
    # the last block is an MLP, which only the last token runs; dense, the others leave keys and values there
    used = 2 * (attn + mlp) + mlp + attn + 2 * c.p_mlp
    assert meter.used("prefill") == used
    last = 2 * c.p_kv * (T - 1) + 2 * (c.p_attn + c.p_mlp) + 4 * 32 * T
    assert meter.saved("prefill") == pytest.approx(1 - used / (5 * (attn + mlp) + last))
    assert meter.dense["decode"] == 0
    model.use(model.routing.schedule, router, removal="prompt")
    meter = Meter(model)
    run_pair(model, make_pair(model, [(tokens(T)[:T - 8], tokens(T)[T - 8:])]), meter)
    assert meter.saved("prefill") > 0.3
    # decoded tokens run every sub-block, but reach no prompt keys where attention is removed: three blocks of 8 x 23 pairs
    assert meter.dense["decode"] - meter.used("decode") == 4 * 32 * 3 * 8 * 23


def test_a_meter_adds_up_over_parts(tiny):
    """What a rival counts stands in the Meter that was handed in, whose own shape stays."""
    model = routed(tiny, Schedule(SOME, tiny.fingerprint, parts=PARTS), kv="keep")
    whole, parts = Meter(model), [Meter(model), Meter(model)]
    for meter, seed in zip(parts, (1, 2)):
        model.prefill([tokens(20, seed)], meter=meter)
        model.prefill([tokens(20, seed)], meter=whole)
    parts[0].add(parts[1])
    assert whole.used("prefill") == pytest.approx(parts[0].used("prefill")) and whole.kept == parts[0].kept
    assert whole.config is tiny.config and whole.total["prefill"] == 40


@torch.inference_mode()
def test_a_dropped_token_stays_dropped(tiny):
    kept, ids = [], tokens(30)
    model = routed(tiny, Schedule([0.0, 0.2, 0.4, 0.4, 0.6, 0.8], tiny.fingerprint), "progressive")
    assert model.routing.window == 1
    batch = model.batch([ids])
    state = model.begin(batch)
    for l in range(6):
        state = model.prefill_step(l, batch, state)
        kept.append(set(range(30)) if state.kept.rows is None else set(state.kept.rows.tolist()))
    assert all(b <= a for a, b in itertools.pairwise(kept)) and kept[2] == kept[3] and len(kept[5]) == 6 < len(kept[1]) == 24
    # what stays is what the last token looks at most, in the first decision
    scores = model.prefill_step(0, batch, model.begin(batch)).scores.read(batch)
    least = set(scores.value[1:-1].argsort()[:6].add(1).tolist())
    assert set(range(30)) - kept[1] == least


def test_schedules_with_parts_are_files(tiny, tmp_path):
    s = Schedule([0.0] * 6, tiny.fingerprint, parts=PARTS)
    s.save(tmp_path / "s.json")
    t = Schedule.load(tmp_path / "s.json")
    plain = Schedule([0.0] * 6, tiny.fingerprint)
    assert t == s and t.id == s.id != plain.id and s.removes and not plain.removes and Schedule([1.0] * 6, {}).removes
    for bad in (["both"] * 5, ["norm"] * 6, "both"):
        with pytest.raises(FTPError, match="--schedule: parts"):
            Schedule([0.0] * 6, tiny.fingerprint, parts=bad)
    model = PartModel.of(tiny)
    with pytest.raises(FTPError, match="--removal"):
        model.use(s, removal="some")
    with pytest.raises(FTPError, match="analysis/rivals"):
        tiny.use(s)
    with pytest.raises(FTPError, match="progressive"):
        LazyModel.of(tiny).use(plain, "random")
    # the rival's routing is its own, the weights are not
    assert model.use(tmp_path / "s.json").routing.schedule == s and tiny.use().routing.schedule is None
    assert model.blocks[1].o.weight is tiny.blocks[1].o.weight


def test_the_artefacts_of_this_repository_are_read():
    files = sorted((ROOT / "artifacts/rivals").glob("*.json"))
    assert len(files) == 9
    for peer in load_peers([f"{f.stem}={f}" + "+progressive" * f.stem.startswith("lazyllm") for f in files]):
        assert len(peer.schedule.sparsity) == 30 and peer.removal in ("whole", "prompt")
        assert peer.router == ("progressive" if peer.name.startswith("lazyllm") else "static")


# ------------------------------------------------------------------------------------------------
# the methods

def test_shortgpt_removes_what_changes_least(tiny):
    samples, influence = sample_texts(), []
    tiny.use()
    for l in range(6):
        cos = []
        for a, b in samples:
            batch = tiny.batch([a + b])
            state = tiny.begin(batch)
            for k in range(l):
                state = tiny.prefill_step(k, batch, state)
            cos.append(torch.cosine_similarity(state.x, tiny.prefill_step(l, batch, state).x))
        influence.append(1 - torch.cat(cos).mean().item())
    for level, s, _ in shortgpt(tiny, samples, [0.2, 0.45]):
        order = sorted(range(6), key=influence.__getitem__)
        shares = [1 - prompt_flops(tiny.config, samples, [float(l in order[:n]) for l in range(6)]) / prompt_flops(tiny.config, samples) for n in range(6)]
        n = min(range(6), key=lambda n: abs(shares[n] - level))
        assert {l for l in range(6) if s.sparsity[l] == 1} == set(order[:n]) and n > 0
        assert realised(tiny.use(s), samples) == pytest.approx(shares[n])
    tiny.use()


def test_blockpruner_takes_the_best_of_all(tiny, tmp_path):
    samples, removed, model = sample_texts(), [], PartModel.of(tiny)
    (level, s, notes), = blockpruner(tiny, samples, [0.3], tmp_path / "state.json", settings={})
    for step in notes["removed"]:  # each pick against every sub-block that is left
        losses = {}
        for sub in itertools.product(range(6), ("attention", "mlp")):
            if sub not in removed:
                model.use(without(model, [*removed, sub]))
                losses[sub] = mean_nll(model, samples)
        assert min(losses, key=losses.get) == (step["block"], step["part"])
        assert step["ppl"] == pytest.approx(torch.tensor(min(losses.values())).exp().item(), rel=1e-4)
        removed.append((step["block"], step["part"]))
    assert abs(realised(model.use(s), samples) - 0.3) < 0.06  # the nearest: within half of the smaller sub-block
    again = list(blockpruner(tiny, samples, [0.15, 0.3], tmp_path / "state.json", True, {}))
    assert again[1][1].parts == s.parts and again[0][2]["removed"] == notes["removed"][:len(again[0][2]["removed"])]
    with pytest.raises(FTPError, match="--resume"):
        list(blockpruner(tiny, samples, [0.3], tmp_path / "state.json", True, {"seed": 1}))


def test_lazyllm_meets_its_budget(tiny):
    samples = [(tokens(60 + i, i), tokens(4, i)) for i in range(4)]
    for level, s, _ in lazyllm(tiny, samples, [0.22, 0.35]):
        assert abs(realised(LazyModel.of(tiny).use(s), samples) - level) < 0.02
        assert sorted(s.sparsity) == s.sparsity and s.sparsity[0] == 0


def test_laco_merges():
    layers = original(6)
    assert merge(layers, 2, 2, last=True) == layers[:2] + (layers[4],) + layers[5:]
    assert merge(layers, 2, 2, last=False)[2] == ((2, -1), (3, 1), (4, 1))
    twice = merge(merge(layers, 3, 2, last=False), 2, 1, last=False)  # theta_2 + (theta_3' - theta_2)
    assert twice[2] == ((2, 0), (3, -1), (4, 1), (5, 1)) and len(twice) == 3
    # in place, the sum telescopes to the last layer, whatever the weights
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    place = theta[0].clone()
    for k in range(1, 4):
        place += theta[k] - place
    torch.testing.assert_close(place, theta[3])
    summed = combine(merge(layers, 0, 3, last=False)[0], theta.__getitem__)
    torch.testing.assert_close(summed, theta[0] + sum(theta[k] - theta[0] for k in (1, 2, 3)))


def test_laco_walks_from_the_top_while_it_stays_similar():
    turns = itertools.cycle((0.1, 0.9))  # every second candidate is accepted
    layers = collapse(12, 5, 0.5, lambda _: next(turns), True, 3)
    # 9 no; 8 takes 9, 10; two down, 6 no; 5 takes 6, 7; 3 no; 2 takes 3, the last one that has to go
    assert [i for (i, _), in layers] == [0, 1, 3, 4, 7, 10, 11]
    assert len(collapse(12, 5, 1.0, lambda _: 0.9, True, 3)) == 12


def test_laco_similarity_is_that_of_the_written_model(folder, tmp_path):
    path, _ = folder("gqa")
    model, samples = FTPModel.from_pretrained(path), sample_texts()
    for last in (False, True):
        (level, pruned, notes), = laco(model, samples, [0.3], read_tensors(path), last)
        saved = write_folder(path, tmp_path / "laco", pruned, {"fingerprint": model.fingerprint}, model, samples)
        whole, lean = (prompt_flops(model.config, samples, s) for s in ([0.0] * 6, [1.0] * 5 + [0.0]))
        assert saved == pytest.approx(2 / 5 * (whole - lean) / whole)  # two blocks that are not the lean last one
        made, cos = load_pruned(tmp_path / "laco", model), []
        for a, b in samples:
            cos.append(torch.cosine_similarity(*(m.norm(last_states(m, a + b)) for m in (model.use(), made))))
        assert torch.cat(cos).mean().item() == pytest.approx(notes["cosine"], abs=1e-5)
        assert notes["cosine"] > notes["threshold"]


@pytest.mark.parametrize("shape", ["gqa", "tied", "qwen2"])
def test_slicegpt_without_slicing_is_the_dense_model(folder, tmp_path, shape):
    path, _ = folder(shape)
    model, samples, ids = FTPModel.from_pretrained(path), sample_texts(), torch.tensor([tokens(25, 9)])
    made = slice_to(model, text_batches(model, samples), read_tensors(path), 32)
    write_folder(path, tmp_path / "whole", made, {"fingerprint": model.fingerprint}, model, samples)
    whole = load_pruned(tmp_path / "whole", model)
    assert isinstance(whole, SlicedModel)
    torch.testing.assert_close(whole(ids), model.use()(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole.embed.weight[:, :8], model.embed.weight[:, :8], atol=1e-2)  # it is another basis
    with pytest.raises(FTPError, match="can't be routed"):
        whole.use(Schedule.uniform(whole, 0.3))
    with pytest.raises(FTPError, match="slicegpt"):  # the plain model has no shortcuts
        FTPModel.from_pretrained(tmp_path / "whole")


def test_slicegpt_equals_projections_of_the_dense_model(folder, tmp_path):
    """Cutting to k dimensions is projecting what enters each sub-block on its first k directions, norms over all d."""
    path, _ = folder("gqa")
    model, samples, k = FTPModel.from_pretrained(path), sample_texts(), 24
    texts = text_batches(model, samples)
    bases = principal_bases(model, texts, k)
    saved = write_folder(path, tmp_path / "cut", slice_to(model, texts, read_tensors(path), k), {"fingerprint": model.fingerprint}, model, samples)
    batch = model.use().batch([tokens(25, 9)])
    x = model.begin(batch).x
    for half, q in zip(half_blocks(model), bases):
        x, *_ = half.prefill(x @ q.float() @ q.float().T, batch.all, batch, None)
    q = bases[-1].float()
    cut = load_pruned(tmp_path / "cut", model)
    torch.testing.assert_close(cut(torch.tensor([tokens(25, 9)]))[0], model.logits(x @ q @ q.T), atol=1e-3, rtol=1e-3)
    c, T = model.config, [len(a) for a, _ in samples]
    linear = 2 * (k * (8 * 2 * (4 + 2)) + k * 3 * 48 + 2 * k * k)   # q, k, v, o; the MLP; two shortcuts
    want = sum(5 * (linear * t + 4 * 32 * t * (t + 1) / 2) + linear + 4 * 32 * t + 2 * k * 8 * 2 * 2 * (t - 1) for t in T)
    assert saved == pytest.approx(1 - want / prompt_flops(c, samples))
    # what is kept of the variance is the most that k directions can keep
    x = torch.cat([model.embed.weight[a + b].double() for a, b in samples])
    assert ((x @ bases[0]) ** 2).sum() == pytest.approx(float(torch.linalg.svdvals(x)[:k].square().sum()))


@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_width_pruning_of_dead_parts_loses_nothing(tmp_path, shape):
    from transformers import AutoModelForCausalLM
    hf, gone, per = make_hf(shape), [3, 11, 12, 30, 31, 40, 41, 47], {"gqa": 2, "qwen2": 1}[shape]
    for i, layer in enumerate(hf.model.layers):
        layer.mlp.down_proj.weight.data[:, gone] = 0
        layer.mlp.up_proj.weight.data[gone] = 0
        layer.self_attn.o_proj.weight.data[:, (i % 2) * 8 * per:(i % 2) * 8 * per + 8 * per] = 0  # the queries of one K/V head
        layer.self_attn.v_proj.weight.data[(i % 2) * 8:(i % 2) * 8 + 8] = 0
    hf.save_pretrained(tmp_path / "hf")
    model, samples, ids = FTPModel.from_pretrained(tmp_path / "hf"), sample_texts(), torch.tensor([tokens(25, 9)])
    tensors, taylor, n = read_tensors(tmp_path / "hf"), importance(model, samples, tmp_path / "hf"), model.config.n_kv_head
    widths = [(n, 48), *[(n - 1, 40)] * 5]
    made = Pruned(narrow(model.config, tensors, taylor, widths), {"widths": widths}, NarrowModel)
    saved = write_folder(tmp_path / "hf", tmp_path / "narrow", made, {"fingerprint": model.fingerprint}, model, samples)
    less = load_pruned(tmp_path / "narrow", model)
    torch.testing.assert_close(less(ids), model(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    sizes = [(b.n_head, b.n_kv_head, *b.down.weight.shape[::-1]) for b in less.blocks]
    assert sizes == [(4, n, 48, 32)] + [((n - 1) * per, n - 1, 40, 32)] * 5 and saved > 0.15
    of_block = lambda heads, kv, ch, T: 2 * T * 32 * (8 * 2 * (heads + kv) + 3 * ch) + 4 * heads * 8 * T * (T + 1) / 2
    of_last = lambda heads, kv, ch, T: 2 * 32 * (8 * 2 * (heads + kv) + 3 * ch) + 4 * heads * 8 * T + 2 * 32 * 8 * 2 * kv * (T - 1)
    want, dense = (sum(of(h, kv, ch, len(a)) for of, (h, kv, ch, _) in zip([of_block] * 5 + [of_last], s) for a, _ in samples)
                   for s in (sizes, sizes[:1] * 6))
    assert saved == pytest.approx(1 - want / dense)
    # a cache of uneven blocks
    cache = less.new_cache(1)
    less.prefill([ids[0, :20].tolist()], cache)
    step = [less.extend([[t]], cache) for t in ids[0, 20:].tolist()]
    torch.testing.assert_close(torch.cat(step), model(ids)[0, 20:], atol=1e-4, rtol=1e-4)
    assert cache.bytes()[0] == 25 * 2 * 8 * 4 * (n + 5 * (n - 1))
    # by hand: the gradient of each loss times the weight, of one matrix
    w, want = hf.model.layers[2].mlp.gate_proj.weight, 0
    for ids in (torch.tensor([a + b]) for a, b in samples):
        want = want + (torch.autograd.grad(hf(ids, labels=ids).loss, w)[0] * w).abs()
    torch.testing.assert_close(taylor["model.layers.2.mlp.gate_proj.weight"], want.detach())


def test_width_keeps_the_ends(folder):
    path, _ = folder("tied")
    model, samples = FTPModel.from_pretrained(path), sample_texts()
    for kv_heads in (0, 1):
        (level, (tensors, changes, _), notes), = width(model, samples, [0.3], read_tensors(path), path, kv_heads)
        w = changes["widths"]
        assert w[0] == w[-1] == (2, 48) and set(w[1:-1]) == {(2 - kv_heads, notes["mlp_channels"])}
        cut = narrow_config(model.config, w)
        assert abs(1 - prompt_flops(cut, samples) / prompt_flops(model.config, samples) - 0.3) < 0.04
        zero = (tensors["model.layers.2.mlp.up_proj.weight"] == 0).all(1)
        assert int(zero.sum()) == 48 - notes["mlp_channels"] and zero[notes["mlp_channels"]:].all()


# ------------------------------------------------------------------------------------------------
# the scripts

def call(script, *words):
    """A script as a user starts it -> stdout."""
    got = subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return got.stdout


@pytest.fixture
def mistake(monkeypatch, capsys):
    """mistake(script, words) -> the one line on stderr that it ends in, with code 2; in this process, as it is quick."""
    def made(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(script.main)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1, lines
        return lines[0]
    return made


@pytest.fixture(scope="module")
def rivals(workshop, tmp_path_factory):
    """All artefacts at 0.3 of the workshop's model."""
    out = tmp_path_factory.mktemp("rivals")
    got = call("analysis/rivals/make.py", "--methods", ",".join(make.METHODS), "--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--nsamples", 6, "--max_response", 16,
               "--flops_saved", 0.3, "--swift_steps", 3, "--out_dir", out)
    assert got.count("of the prompts' block FLOPs saved") == len(make.METHODS)
    return out


def test_artefacts_and_loadability(rivals, workshop):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dense = FTPModel.from_pretrained(workshop[0])
    for method in make.METHODS:
        path = rivals / f"{method}_0.30"
        if path.is_dir():
            o, model = json.loads((path / "pruned.json").read_text()), load_pruned(path, dense)
            check_fingerprint(o["fingerprint"], dense.fingerprint, path)
            assert o["format"] == "ftp-pruned-1" and AutoTokenizer.from_pretrained(path)
            ids = torch.tensor([tokens(12)])
            if method == "slicegpt":
                with pytest.raises((ValueError, KeyError)):  # it must not load there with its shortcuts left out
                    AutoModelForCausalLM.from_pretrained(path)
            else:
                torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(path)(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
        elif method == "swiftkv":
            o = Swift.load(f"{path}.safetensors").meta
        else:
            o = Schedule.load(f"{path}.json").meta
        assert o["method"] == method and abs(o["flops_saved"] - 0.3) < 0.09 and o["settings"]["nsamples"] == 6 and o["seconds"] >= 0


def test_peers_are_rows(rivals, workshop, tmp_path, mistake):
    peers = [w for m in make.METHODS for w in ("--peer", f"{m}={rivals / m}_0.30" + {"lazyllm": ".json+progressive", "swiftkv": ".safetensors"}.get(
        m, "" if (rivals / f"{m}_0.30").is_dir() else ".json"))]
    words = ["--model", workshop[0], "--out_dir", tmp_path, "--data", workshop[1] / "alpaca.json"]
    args = ["analysis/rivals/evaluate.py", *words, "--text", workshop[1] / "book.txt", "--context", 24, "--scored", 8, "--nwindows", 6, "--rows", "",
            "--tasks", f"cat={workshop[1] / 'task.jsonl'}"]
    call(*args, *peers)
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert set(rows) == {"dense", "shortgpt_prompt", "blockpruner_prompt", *make.METHODS}
    for name, r in rows.items():
        if name == "dense":
            continue
        assert r["kl"] > 0.001 and 0.2 < r["flops_saved_prefill"] < 0.4
        everywhere = name not in ("lazyllm", "shortgpt_prompt", "blockpruner_prompt", "swiftkv")
        assert r["flops_saved_total"] == pytest.approx(r["flops_saved_prefill"], abs=0.06) if everywhere else (
            r["flops_saved_total"] < r["flops_saved_prefill"] - 0.01)
    got = call(*args, *peers[:-4], "--resume")  # rivals may come and go between runs
    assert "laco:" not in got and "dense:" not in got and "slicegpt" in got and "width" not in got
    assert "--peer" in mistake(evaluate, *words, "--rows", "", "--peer", "x=nowhere.json")
    assert "two of one name" in mistake(evaluate, *words, "--rows", "", *peers[:2], *peers[:2])
    assert "brings its routing" in mistake(evaluate, *words, "--rows", "", "--peer", f"s={rivals}/swiftkv_0.30.safetensors+random")
    assert "row's name already" in mistake(evaluate, *words, "--rows", "", "--peer", f"dense={rivals}/lazyllm_0.30.json")
    assert "--lengths" in mistake(benchmark, "--model", workshop[0], "--out_dir", tmp_path, "--lengths", "1", *peers)
    call("analysis/rivals/benchmark.py", "--model", workshop[0], "--out_dir", tmp_path, "--lengths", 48, "--rounds", 1, "--n_decode", 3, "--no_hf",
         "--peers", *peers)
    all_rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    bench = [r for r in all_rows if r["name"] in rows]
    assert {r["name"] for r in bench} == set(rows) and "removal 2/6" in {r["name"] for r in all_rows}
    for r in bench:
        if r["name"] != "dense" and r["phase"] == "prefill":
            assert 1.2 < r["flops_bound"] < 1.7, r["name"]
        if r["name"] in ("laco", "slicegpt", "width", "shortgpt") and r["phase"] == "decode":
            assert r["flops_bound"] > 1.15


def test_a_peer_of_another_model_is_refused(rivals, workshop, folder, tmp_path, mistake):
    other = tmp_path / "other"
    shutil.copytree(rivals / "width_0.30", other)
    o = json.loads((other / "pruned.json").read_text())
    (other / "pruned.json").write_text(json.dumps(o | {"fingerprint": FTPModel.from_pretrained(folder("gqa")[0]).fingerprint}))
    words = ["--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--text", "", "--rows", "", "--out_dir", tmp_path]
    assert "another model" in mistake(evaluate, *words, "--peer", f"w={other}")
    s = Schedule.load(rivals / "shortgpt_0.30.json")
    replace(s, fingerprint=FTPModel.from_pretrained(folder("gqa")[0]).fingerprint).save(tmp_path / "s.json")
    assert "another model" in mistake(evaluate, *words, "--peer", f"s={tmp_path}/s.json")
    swift = Swift.load(rivals / "swiftkv_0.30.safetensors")
    swift.fingerprint = FTPModel.from_pretrained(folder("gqa")[0]).fingerprint
    swift.save(tmp_path / "swift.safetensors")
    assert "another model" in mistake(evaluate, *words, "--peer", f"s={tmp_path}/swift.safetensors")


@pytest.mark.parametrize("flags", [("--flops_saved", "0.9"), ("--flops_saved", "much"), ("--methods", "best"), ("--nsamples", "0"),
                                   ("--device_map", "cpu=0-5")])
def test_mistakes_of_make(workshop, tmp_path, flags, mistake):
    line = mistake(make, "--model", workshop[0], "--out_dir", tmp_path, "--data", workshop[1] / "alpaca.json", *flags)
    assert flags[0] in line


def test_hidden_state_router_is_a_peer(workshop, tmp_path):
    """A router file as a peer: what a Mixture-of-Depths-like router, trained by train_router.py --inputs hidden, is compared as."""
    model = FTPModel.from_pretrained(workshop[0])
    s = Schedule.uniform(model, 0.3)
    s.save(tmp_path / "s.json")
    make_router(model, inputs=("hidden",)).save(tmp_path / "router.safetensors")
    call("analysis/rivals/evaluate.py", "--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--text", "", "--rows", "",
         "--out_dir", tmp_path, "--peer", f"mod={tmp_path}/s.json+{tmp_path}/router.safetensors", "--peer", f"att={tmp_path}/s.json+attention")
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert rows["mod"]["sparsity_prefill"] == pytest.approx(0.3, abs=0.03) and rows["mod"]["kl"] != rows["att"]["kl"]


# ------------------------------------------------------------------------------------------------
# SwiftKV


def moved_swift(model, first, seed=0):
    """A Swift whose every tensor is off from the model's own."""
    swift, rng = Swift.of(model, first), torch.Generator().manual_seed(seed)
    for t in swift.tensors.values():
        t += 0.1 * torch.randn(t.shape, generator=rng)
    return swift


@pytest.mark.parametrize("shape", ["mha", "gqa", "qwen2"])
def test_swiftkv_runs_late_blocks_for_last_tokens_alone(folder, shape):
    model = FTPModel.from_pretrained(folder(shape)[0])
    swift = moved_swift(model, 3)
    routed, whole = SwiftModel.of(model, swift), SwiftModel.of(model, swift).use()
    texts, n = [tokens(30, 1), tokens(22, 2)], [17, 9]
    for text, k, got in zip(texts, n, after_prompt(routed, texts, n)):
        # late keys depend on no late state: all tokens in all blocks give the same
        torch.testing.assert_close(got, text_logits(whole, text)[k - 1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got, after_prompt(routed, [text], [k])[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(got, text_logits(model, text)[k - 1:], atol=1e-2)
    meter = Meter(routed)
    routed.prefill(texts, meter=meter)
    assert meter.kept["prefill"][:3] == [52, 52, 52] and meter.kept["prefill"][3:] == [4] * (model.config.n_layer - 3)
    assert model.use() is model and not any(model.routing.sparsity)


def test_swiftkv_learns_what_it_is_told_to(tiny):
    samples, how = sample_texts(6), Tuning(30, 3e-3, 3, warmup=3)
    swift = moved_swift(tiny, 3)
    before = {name: t.clone() for name, t in swift.tensors.items()}
    losses = train(tiny, swift, samples, how, trained=("kv",))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert torch.equal(swift.tensors["norm"], before["norm"]) and torch.equal(swift.tensors["q"], before["q"])
    assert not torch.equal(swift.tensors["kv"], before["kv"])
    assert not any(p.requires_grad and p.grad is not None for p in tiny.parameters())
    found = {level: made for level, made, _ in swiftkv(tiny, samples, [0.2, 0.45], Tuning(0))}
    assert found[0.2].first > found[0.45].first
    for level, made in found.items():
        assert realised(SwiftModel.of(tiny, made), samples) == pytest.approx(level, abs=0.09)


def test_a_damaged_swiftkv_is_refused(tiny, tmp_path):
    swift = moved_swift(tiny, 4)
    swift.save(tmp_path / "s")
    again = Swift.load(tmp_path / "s.safetensors")
    assert again.id == swift.id and again.first == 4 and again.schedule == swift.schedule
    for name in ("q", "kv", "norm"):
        bad = Swift(swift.tensors | {name: swift.tensors[name][..., :-1]}, swift.n_layer, swift.fingerprint)
        bad.save(tmp_path / "bad")
        with pytest.raises(FTPError, match="--peer"):
            Swift.load(tmp_path / "bad.safetensors")
