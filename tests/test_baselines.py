"""Sub-block schedules, removal in prompts alone, progressive selection, and the rival methods against brute force."""
import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_hf, make_router, tokens

sys.path.insert(0, str(ROOT / "analysis"))
import baselines as B  # noqa: E402

from files import FTPError, check_fingerprint  # noqa: E402
from model_ftp import FTPModel  # noqa: E402
from router import Schedule  # noqa: E402

PARTS = ["both", "mlp", "both", "attention", "both", "mlp"]
SOME = [0.0, 0.0, 1.0, 0.0, 0.4, 0.3]


def sample_texts(n=4):
    return [(tokens(14 + i, i), tokens(9, 50 + i)) for i in range(n)]


def mean_nll(model, samples):
    """Mean next-token loss over all tokens but each first, by forward() alone."""
    loss, n = 0.0, 0
    for a, b in samples:
        ids = torch.tensor([a + b])
        logp = model(ids)[0, :-1].log_softmax(-1)
        loss, n = loss - logp.gather(1, ids[0, 1:, None]).sum().item(), n + len(ids[0]) - 1
    return loss / n


# ------------------------------------------------------------------------------------------------
# the engine

@pytest.mark.parametrize("shape", ["gqa", "qwen2"])
def test_a_removed_sub_block_is_one_whose_output_matrix_is_zero(folder, shape):
    path, hf = folder(shape)
    hf, ids = copy.deepcopy(hf), torch.tensor([tokens(20)])
    for layer, part, s in zip(hf.model.layers, PARTS, SOME):
        if part == "mlp" or s == 1:
            layer.self_attn.o_proj.weight.data.zero_()
        if part == "attention" or s == 1:
            layer.mlp.down_proj.weight.data.zero_()
    model = FTPModel.from_pretrained(path)
    model.use(Schedule([float(s == 1) for s in SOME], model.fingerprint, parts=PARTS))
    torch.testing.assert_close(model(ids), hf(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("removal", ["whole", "prompt"])
@pytest.mark.parametrize("kv", ["drop", "keep"])
@pytest.mark.parametrize("router", ["static", "attention", "progressive"])
def test_parts_scored_decoded_and_masked_are_the_same(tiny, removal, kv, router):
    a, b = tokens(23), tokens(6, 1)
    tiny.use(Schedule(SOME, tiny.fingerprint, parts=PARTS), router, removal=removal, kv=kv)
    once = tiny.score_rows([a + b, a[:9] + b], [len(a), 9])
    one = copy.deepcopy(tiny.stats)
    torch.testing.assert_close(tiny.score_rows([a + b, a[:9] + b], [len(a), 9], masked=True), once, atol=1e-4, rtol=1e-4)
    tiny.use(tiny.schedule, router, removal=removal, kv=kv)
    cache = tiny.new_cache(2)
    tiny.extend([a, a[:9]], cache, prompt=True)
    step = [tiny.extend([[t], [t]], cache) for t in b]
    for i, got in enumerate(step):
        torch.testing.assert_close(got, once[[len(a) + i, len(a) + len(b) + 9 + i]], atol=1e-4, rtol=1e-4)
    for phase in ("prefill", "decode"):
        assert tiny.stats.used(phase) == pytest.approx(one.used(phase))
    assert cache.len[0].tolist() == [len(a) + len(b), 9 + len(b)]
    # where attention is removed, no keys: none at all, or those of decoded tokens (keep: of all)
    there = 0 if removal == "whole" else len(b) + len(a) * (kv == "keep")
    assert cache.len[1, 0] == cache.len[2, 0] == there


def test_removal_in_prompts_leaves_decoded_tokens_their_own_attention(tiny):
    """With every block removed in the prompt, a decoded text is read as if no prompt were there, but for its positions."""
    a, b = tokens(10), tokens(8, 1)
    tiny.use(Schedule([1.0] * 6, tiny.fingerprint), removal="prompt")
    got = tiny.score_rows([a + b], [len(a)])[len(a):]
    tiny.use()
    torch.testing.assert_close(got, tiny.score_rows([b], [0]), atol=1e-4, rtol=1e-4)  # rotary embedding is relative
    tiny.use(Schedule([1.0] * 6, tiny.fingerprint))
    torch.testing.assert_close(tiny.score_rows([a + b], [len(a)]), tiny.logits(tiny.embed.weight[a + b]))


@pytest.mark.parametrize("router", ["static", "attention"])
def test_flops_of_parts(tiny, router):
    c, T = tiny.config, 31
    tiny.use(Schedule([float(s == 1) for s in SOME], tiny.fingerprint, parts=PARTS), router)
    tiny.score_rows([tokens(T)], [T])
    assert tiny.stats.flops["prefill"] == c.prefill_flops(T, tiny.schedule.sparsity, head=0, parts=PARTS)
    attn, mlp = 2 * c.p_attn * T + 4 * 32 * T * (T + 1) / 2, 2 * c.p_mlp * T
    assert tiny.stats.flops["prefill"] == 2 * (attn + mlp) + 2 * mlp + attn
    assert tiny.stats.saved("prefill") == pytest.approx(1 - (2 * (attn + mlp) + 2 * mlp + attn) / (6 * (attn + mlp)))
    dense = tiny.stats.dense_flops["decode"]
    tiny.use(tiny.schedule, router, removal="prompt").score_rows([tokens(T)], [T - 8])
    assert dense == 0 and tiny.stats.saved("prefill") > 0.3
    # decoded tokens run every sub-block, but reach no prompt keys where attention is removed: three blocks of 8 x 23 pairs
    assert tiny.stats.dense_flops["decode"] - tiny.stats.flops["decode"] == 4 * 32 * 3 * 8 * 23


def test_a_dropped_token_stays_dropped(tiny):
    kept = []
    tiny.use(Schedule([0.0, 0.2, 0.4, 0.4, 0.6, 0.8], tiny.fingerprint), "progressive")
    assert tiny.score_window == 1
    p = tiny.begin([tokens(30)], [30])
    for l in range(6):
        before = p
        keep, p = tiny.route(l, p)
        kept.append(set(range(30)) if keep.rows is None else set(keep.rows.tolist()))
        p = tiny.step(l, before)
    assert all(b <= a for a, b in itertools.pairwise(kept)) and kept[2] == kept[3] and len(kept[5]) == 6 < len(kept[1]) == 24
    # what stays is what the last token looks at most, in the first decision
    q = tiny.step(0, tiny.begin([tokens(30)], [30]))
    least = set(q.observed().score[1:-1].argsort()[:6].add(1).tolist())
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
    with pytest.raises(FTPError, match="--removal"):
        tiny.use(s, removal="some")


# ------------------------------------------------------------------------------------------------
# the methods

def test_shortgpt_removes_what_changes_least(tiny):
    samples, influence = sample_texts(), []
    tiny.use()
    for l in range(6):
        cos = []
        for a, b in samples:
            p = tiny.begin([a + b], [0])
            for k in range(l):
                p = tiny.step(k, p)
            cos.append(torch.cosine_similarity(p.x, tiny.step(l, p).x))
        influence.append(1 - torch.cat(cos).mean().item())
    for level, s, _ in B.shortgpt(tiny, samples, [0.2, 0.45]):
        n = round(6 * level)
        assert {l for l in range(6) if s.sparsity[l] == 1} == set(sorted(range(6), key=influence.__getitem__)[:n])
        tiny.use(s)
        assert B.realised(tiny, samples) == pytest.approx(n / 6)


def test_blockpruner_takes_the_best_of_all(tiny, tmp_path):
    samples, removed = sample_texts(), []
    (level, s, notes), = B.blockpruner(tiny, samples, [0.3], tmp_path / "state.json", settings={})
    for step in notes["removed"]:  # each pick against every sub-block that is left
        losses = {}
        for sub in itertools.product(range(6), ("attention", "mlp")):
            if sub not in removed:
                tiny.use(B.without(tiny, [*removed, sub]))
                losses[sub] = mean_nll(tiny, samples)
        assert min(losses, key=losses.get) == (step["block"], step["part"])
        assert step["ppl"] == pytest.approx(torch.tensor(min(losses.values())).exp().item(), rel=1e-4)
        removed.append((step["block"], step["part"]))
    tiny.use(s)
    assert abs(B.realised(tiny, samples) - 0.3) < 0.06  # the nearest: within half of the smaller sub-block
    again = list(B.blockpruner(tiny, samples, [0.15, 0.3], tmp_path / "state.json", True, {}))
    assert again[1][1].parts == s.parts and again[0][2]["removed"] == notes["removed"][:len(again[0][2]["removed"])]
    with pytest.raises(FTPError, match="--resume"):
        list(B.blockpruner(tiny, samples, [0.3], tmp_path / "state.json", True, {"seed": 1}))


def test_lazyllm_meets_its_budget(tiny):
    samples = [(tokens(60 + i, i), tokens(4, i)) for i in range(4)]
    for level, s, _ in B.lazyllm(tiny, samples, [0.22, 0.4]):
        tiny.use(s, "progressive")
        assert abs(B.realised(tiny, samples) - level) < 0.02
        assert sorted(s.sparsity) == s.sparsity and s.sparsity[0] == 0


def test_laco_merges(tiny):
    layers = tuple(((i, 1),) for i in range(6))
    assert B.merge(layers, 2, 2, last=True) == layers[:2] + (layers[4],) + layers[5:]
    assert B.merge(layers, 2, 2, last=False)[2] == ((2, -1), (3, 1), (4, 1))
    twice = B.merge(B.merge(layers, 3, 2, last=False), 2, 1, last=False)  # theta_2 + (theta_3' - theta_2)
    assert twice[2] == ((2, 0), (3, -1), (4, 1), (5, 1)) and len(twice) == 3
    # in place, the sum telescopes to the last layer, whatever the weights
    theta = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    place = theta[0].clone()
    for k in range(1, 4):
        place += theta[k] - place
    torch.testing.assert_close(place, theta[3])
    summed = B.combine(B.merge(layers, 0, 3, last=False)[0], theta.__getitem__)
    torch.testing.assert_close(summed, theta[0] + sum(theta[k] - theta[0] for k in (1, 2, 3)))


def test_laco_walks_from_the_top_while_it_stays_similar():
    turns = itertools.cycle((0.1, 0.9))  # every second candidate is accepted
    layers = B.collapse(12, 5, 0.5, lambda _: next(turns), True, 3)
    # 9 no; 8 takes 9, 10; two down, 6 no; 5 takes 6, 7; 3 no; 2 takes 3, the last one that has to go
    assert [i for (i, _), in layers] == [0, 1, 3, 4, 7, 10, 11]
    assert len(B.collapse(12, 5, 1.0, lambda _: 0.9, True, 3)) == 12


def test_laco_similarity_is_that_of_the_written_model(folder, tmp_path):
    path, _ = folder("gqa")
    model, samples = FTPModel.from_pretrained(path), sample_texts()
    for last in (False, True):
        (level, (tensors, changes), notes), = B.laco(model, samples, [0.3], B.read_tensors(path), last)
        saved = B.write_folder(path, tmp_path / "laco", tensors, changes, {"fingerprint": model.fingerprint}, model, samples)
        assert saved == pytest.approx(2 / 6)
        made, cos = FTPModel.from_pretrained(tmp_path / "laco"), []
        for a, b in samples:
            states = []
            for m in (model.use(), made):
                p = m.begin([a + b], [0])
                for l in range(m.config.n_layer):
                    p = m.step(l, p)
                states.append(m.norm(p.x))
            cos.append(torch.cosine_similarity(*states))
        assert torch.cat(cos).mean().item() == pytest.approx(notes["cosine"], abs=1e-5)
        assert notes["cosine"] > notes["threshold"]


@pytest.mark.parametrize("shape", ["gqa", "tied", "qwen2"])
def test_slicegpt_without_slicing_is_the_dense_model(folder, tmp_path, shape):
    path, _ = folder(shape)
    model, samples = FTPModel.from_pretrained(path), sample_texts()
    groups, tensors, ids = B.whole_texts(samples), B.read_tensors(path), torch.tensor([tokens(25, 9)])
    made = B.slice_to(model, groups, tensors, 32)
    B.write_folder(path, tmp_path / "whole", *made, {"fingerprint": model.fingerprint}, model, samples)
    whole = FTPModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(whole(ids), model.use()(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole.embed.weight[:, :8], model.embed.weight[:, :8], atol=1e-2)  # it is another basis
    with pytest.raises(FTPError, match="can't be routed"):
        whole.use(Schedule.uniform(whole, 0.3))


def test_slicegpt_equals_projections_of_the_dense_model(folder, tmp_path):
    """Cutting to k dimensions is projecting what enters each sub-block on its first k directions, norms over all d."""
    path, _ = folder("gqa")
    model, samples, k = FTPModel.from_pretrained(path), sample_texts(), 24
    groups = B.whole_texts(samples)
    bases = B.principal_bases(model, groups, k)
    saved = B.write_folder(path, tmp_path / "cut", *B.slice_to(model, groups, B.read_tensors(path), k), {"fingerprint": model.fingerprint},
                           model, samples)
    p = model.use().begin([tokens(25, 9)], [25])
    for i, (block, part) in enumerate((b, part) for b in model.blocks for part in ("attention", "mlp")):
        q = bases[i].float()
        p = block(p.next(x=p.x @ q @ q.T), B.every(p), "drop", None, part)
    q = bases[-1].float()
    cut = FTPModel.from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(cut(torch.tensor([tokens(25, 9)]))[0], model.logits(p.x @ q @ q.T), atol=1e-3, rtol=1e-3)
    c, T = model.config, [len(a) for a, _ in samples]
    linear = 2 * (k * (8 * 2 * (4 + 2)) + k * 3 * 48 + 2 * k * k)   # q, k, v, o; the MLP; two shortcuts
    want = sum(6 * (linear * t + 4 * 32 * t * (t + 1) / 2) for t in T)
    assert saved == pytest.approx(1 - want / B.prompt_flops(c, samples))
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
    tensors, taylor, n = B.read_tensors(tmp_path / "hf"), B.importance(model, samples, tmp_path / "hf"), model.config.n_kv_head
    widths = [(n, 48), *[(n - 1, 40)] * 5]
    saved = B.write_folder(tmp_path / "hf", tmp_path / "narrow", B.narrow(model.config, tensors, taylor, widths), {"widths": widths},
                           {"fingerprint": model.fingerprint}, model, samples)
    narrow = FTPModel.from_pretrained(tmp_path / "narrow")
    torch.testing.assert_close(narrow(ids), model(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    sizes = [(b.c.n_head, b.c.n_kv_head, *b.down.weight.shape[::-1]) for b in narrow.blocks]
    assert sizes == [(4, n, 48, 32)] + [((n - 1) * per, n - 1, 40, 32)] * 5 and saved > 0.15
    of_block = lambda heads, kv, ch, T: 2 * T * 32 * (8 * 2 * (heads + kv) + 3 * ch) + 4 * heads * 8 * T * (T + 1) / 2
    want, dense = (sum(of_block(h, kv, ch, len(a)) for h, kv, ch, _ in s for a, _ in samples) for s in (sizes, sizes[:1] * 6))
    assert saved == pytest.approx(1 - want / dense)
    # a cache of uneven blocks
    cache = narrow.new_cache(1)
    narrow.extend([ids[0, :20].tolist()], cache, prompt=True)
    step = [narrow.extend([[t]], cache) for t in ids[0, 20:].tolist()]
    torch.testing.assert_close(torch.cat(step), model(ids)[0, 20:], atol=1e-4, rtol=1e-4)
    assert cache.bytes()[0] == 25 * 2 * 8 * 4 * (n + 5 * (n - 1))
    # by hand: the gradient of each loss times the weight, of one matrix
    w, want = hf.model.layers[2].mlp.gate_proj.weight, 0
    for ids in (torch.tensor([a + b]) for a, b in samples):
        want = want + (torch.autograd.grad(hf(ids, labels=ids).loss, w)[0] * w).abs()
    torch.testing.assert_close(taylor["model.layers.2.mlp.gate_proj.weight"], want.detach())


def test_width_keeps_the_ends(tmp_path, folder):
    path, _ = folder("tied")
    model, samples = FTPModel.from_pretrained(path), sample_texts()
    for kv_heads in (0, 1):
        (level, (tensors, changes), notes), = B.width(model, samples, [0.3], B.read_tensors(path), path, kv_heads)
        w = changes["widths"]
        assert w[0] == w[-1] == (2, 48) and set(w[1:-1]) == {(2 - kv_heads, notes["mlp_channels"])}
        cut = B.replace(model.config, widths=w)
        assert abs(1 - B.prompt_flops(cut, samples) / B.prompt_flops(model.config, samples) - 0.3) < 0.04
        zero = (tensors["model.layers.2.mlp.up_proj.weight"] == 0).all(1)
        assert int(zero.sum()) == 48 - notes["mlp_channels"] and zero[notes["mlp_channels"]:].all()


# ------------------------------------------------------------------------------------------------
# the scripts

def call(*words, ok=True):
    got = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert not ok or got.returncode == 0, got.stderr
    return got


@pytest.fixture(scope="module")
def rivals(workshop, tmp_path_factory):
    """All artefacts at 0.3 of the workshop's model."""
    out = tmp_path_factory.mktemp("rivals")
    got = call("analysis/baselines.py", "--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--nsamples", 6, "--max_response", 16,
               "--flops_saved", 0.3, "--out_dir", out)
    assert got.stdout.count("of the prompts' block FLOPs saved") == len(B.METHODS)
    return out


def test_artefacts_and_loadability(rivals, workshop):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dense = FTPModel.from_pretrained(workshop[0])
    for method in B.METHODS:
        path = rivals / f"{method}_0.30"
        if path.is_dir():
            o, model = json.loads((path / "pruned.json").read_text()), FTPModel.from_pretrained(path)
            check_fingerprint(o["fingerprint"], dense.fingerprint, path)
            assert o["format"] == "ftp-pruned-1" and AutoTokenizer.from_pretrained(path)
            ids = torch.tensor([tokens(12)])
            if method == "slicegpt":
                with pytest.raises((ValueError, KeyError)):  # it must not load there with its shortcuts left out
                    AutoModelForCausalLM.from_pretrained(path)
            else:
                torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(path)(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
        else:
            o = Schedule.load(f"{path}.json").meta
        assert o["method"] == method and abs(o["flops_saved"] - 0.3) < 0.07 and o["settings"]["nsamples"] == 6 and o["seconds"] >= 0


def test_peers_are_rows(rivals, workshop, tmp_path):
    peers = [w for m in B.METHODS for w in ("--peer", f"{m}={rivals / m}_0.30" + {"lazyllm": ".json+progressive"}.get(
        m, "" if (rivals / f"{m}_0.30").is_dir() else ".json"))]
    words = ["--model", workshop[0], "--out_dir", tmp_path, "--data", workshop[1] / "alpaca.json"]
    args = ["evaluate.py", *words, "--text", workshop[1] / "book.txt", "--context", 24, "--scored", 8, "--nwindows", 6, "--rows", "",
            "--tasks", f"cat={workshop[1] / 'task.jsonl'}", *peers]
    call(*args)
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert set(rows) == {"dense", "shortgpt_prompt", "blockpruner_prompt", *B.METHODS}
    for name, r in rows.items():
        if name == "dense":
            continue
        assert r["kl"] > 0.001 and 0.2 < r["flops_saved_prefill"] < 0.4
        everywhere = name not in ("lazyllm", "shortgpt_prompt", "blockpruner_prompt")
        assert r["flops_saved_total"] == pytest.approx(r["flops_saved_prefill"], abs=0.03) if everywhere else (
            r["flops_saved_total"] < r["flops_saved_prefill"] - 0.01)
    got = call(*args, "--resume")
    assert "laco:" not in got.stdout and "dense:" not in got.stdout
    bad = call("evaluate.py", *words, "--rows", "", "--peer", "x=nowhere.json", ok=False)
    assert bad.returncode == 2 and "--peer" in bad.stderr and len(bad.stderr.splitlines()) == 1
    got = call("benchmark.py", "--model", workshop[0], "--out_dir", tmp_path, "--lengths", 48, "--rounds", 1, "--n_decode", 3, "--no_hf", *peers)
    bench = [r for r in json.loads((tmp_path / "bench.json").read_text())["rows"] if r["name"] in rows]
    assert {r["name"] for r in bench} == set(rows)
    for r in bench:
        if r["name"] != "dense" and r["phase"] == "prefill":
            assert 1.2 < r["flops_bound"] < 1.7, r["name"]
        if r["name"] in ("laco", "slicegpt", "width", "shortgpt") and r["phase"] == "decode":
            assert r["flops_bound"] > 1.15


def test_a_peer_of_another_model_is_refused(rivals, workshop, folder, tmp_path):
    other = tmp_path / "other"
    import shutil
    shutil.copytree(rivals / "width_0.30", other)
    o = json.loads((other / "pruned.json").read_text())
    (other / "pruned.json").write_text(json.dumps(o | {"fingerprint": FTPModel.from_pretrained(folder("gqa")[0]).fingerprint}))
    got = call("evaluate.py", "--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--text", "", "--rows", "", "--out_dir", tmp_path,
               "--peer", f"w={other}", ok=False)
    assert got.returncode == 2 and "another model" in got.stderr


@pytest.mark.parametrize("flags", [("--flops_saved", "0.9"), ("--flops_saved", "much"), ("--methods", "best"), ("--nsamples", "0")])
def test_mistakes_of_baselines(workshop, tmp_path, flags):
    got = call("analysis/baselines.py", "--model", workshop[0], "--out_dir", tmp_path, "--data", workshop[1] / "alpaca.json", *flags, ok=False)
    assert got.returncode == 2 and flags[0] in got.stderr and len(got.stderr.splitlines()) == 1


def test_hidden_state_router_is_a_peer(workshop, tmp_path):
    """A router file as a peer: what a Mixture-of-Depths-like router, trained by train_router.py --inputs hidden, is compared as."""
    model = FTPModel.from_pretrained(workshop[0])
    s = Schedule.uniform(model, 0.3)
    s.save(tmp_path / "s.json")
    make_router(model, inputs=("hidden",)).save(tmp_path / "router.safetensors")
    call("evaluate.py", "--model", workshop[0], "--data", workshop[1] / "alpaca.json", "--text", "", "--rows", "", "--out_dir", tmp_path,
         "--peer", f"mod={tmp_path}/s.json+{tmp_path}/router.safetensors", "--peer", f"att={tmp_path}/s.json+attention")
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert rows["mod"]["sparsity_prefill"] == pytest.approx(0.3, abs=0.03) and rows["mod"]["kl"] != rows["att"]["kl"]
