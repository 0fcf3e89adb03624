"""A model spread over two devices. No second device is needed: within TwoGPUs every tensor says where it would lie, and an operation on
tensors of different places fails as on real GPUs."""
from dataclasses import replace

import pytest
import torch
from conftest import make_router, tokens
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import lib.placement
from lib import reference, scoring
from lib.artefacts import KINDS, Schedule
from lib.files import FTPError
from lib.flops import Meter
from lib.forecast import fit
from lib.guide import Order, decisions_of, imitate
from lib.placement import PlacedModel, place_blocks
from lib.search import Fitness, block_influence
from model_ftp import FTPModel, Router
from train_router import guide_loss, sparsity_loss

HOST, GPUS = torch.device("cpu"), [torch.device("cuda", i) for i in range(2)]
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)  # GPUs take host indices here


def put(t, device):
    t.at = device
    return t


class TwoGPUs(TorchFunctionMode):
    """Tensors carry the device they were made on, or of the tensors they were made from, as an attribute; all data stays on the CPU."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = [getattr(t, "at", HOST) for t in tensors]
        if func == torch.Tensor.device.__get__:
            return places[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            there = [HOST] if func is torch.Tensor.cpu else [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.device)]
            dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
            new = args[0].to(*dtypes)
            return put(new.clone() if there and there[0] != places[0] else new, there[0] if there else places[0])
        assert func is not torch.Tensor.numpy or places[0] == HOST, "numpy of a GPU tensor"
        mixed = {p for t, p in zip(tensors, places) if p != HOST or (t.dim() and func not in INDEXING)}
        mixed |= {p for p in places[:1] if func in INDEXING}
        if len(mixed) > 1:
            raise RuntimeError(f"{func.__name__}: tensors on {' and '.join(sorted(map(str, mixed)))}")
        made = kwargs.get("device")
        if made is not None:
            kwargs["device"] = HOST
        out = func(*args, **kwargs)
        place = torch.device(made) if made is not None else next(iter(mixed), HOST)
        for t in tree_leaves(list(out) if isinstance(out, tuple) else out):
            if isinstance(t, torch.Tensor):
                put(t, place)
        return out


@pytest.fixture
def split(folder, monkeypatch):
    """split(shape) -> a tiny model whose blocks 0 to 2 and embedding are on cuda:0, the others with norm and head on cuda:1."""
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", type("Generator", (real,), {"__new__": lambda cls, device=None: real.__new__(cls)}))

    monkeypatch.setattr(Router, "to", lambda self, device: [put(p, device) for p in self.parameters()] and self)  # nn.Module.to swaps data unseen

    def make(shape):
        m = PlacedModel.from_pretrained(folder(shape)[0], spec="cpu=0-5")
        for name, p in m.named_parameters():
            put(p, GPUS[0 if name.startswith(("embed", "blocks.0", "blocks.1", "blocks.2")) else 1])
        put(m.head.weight, GPUS[not m.config.tied])
        return m
    return make


SAMPLES = [(tokens(20, 1), tokens(9, 2)), (tokens(31, 3), tokens(8, 4)), (tokens(31, 5), tokens(8, 6))]


def outputs(m, schedule, router, **routing):
    """Logits of a scored continuation, and of a prefill and two decoded tokens."""
    m.use(schedule, router, **routing)
    cache, meter = m.new_cache(3), Meter(m)
    states, _ = scoring.response_states(m, SAMPLES, meter=meter)
    with torch.inference_mode():
        got = [m.logits(states), m.prefill([a for a, _ in SAMPLES], cache)]
    got += [m.extend([[t]] * 3, cache) for t in (5, 9)]
    assert meter.sparsity("decode")
    return [g.cpu() for g in got], m.generate([a for a, _ in SAMPLES], 4)


CASES = [("gqa", "dense", {}), ("gqa", "static", {}), ("gqa", "random", {}), ("gqa", "attention", {"kv": "keep"}), ("tied", "global", {"decode": "threshold"}),
         ("gqa", "local", {"prefill": "argmax", "kv": "keep"}), ("gqa", "recurrent", {"decode": "threshold", "one_pass": True}),
         ("qwen2", "forecast", {"kv": "keep", "decode": "rule"})]


@pytest.mark.parametrize("shape, router, routing", CASES)
def test_split_model_equals_whole(folder, split, monkeypatch, shape, router, routing):
    """Every kind of router, both K/V policies, decode modes and forecasts: bit for bit, and no tensor stays behind."""
    monkeypatch.setattr("lib.batch.MULTIPLE", 1)  # which CPUs alone have, and which changes roundings
    whole, parts = FTPModel.from_pretrained(folder(shape)[0]), split(shape)
    schedule = Schedule([0.0, 0.3, 0.5, 0.5, 0.2, 0.4], whole.fingerprint)  # the two of 0.5 may share a decision, over the border
    if router == "forecast":
        routing = routing | {"forecaster": fit(whole, SAMPLES, SAMPLES, 4)}
        router = make_router(whole, schedule, inputs=("position", "score", "forecast"), forecaster=routing["forecaster"])
    elif router in KINDS:
        router = make_router(whole, schedule, kind=router, inputs=("position", "score", "rank", "hidden"))
    want = outputs(whole, None if router == "dense" else schedule, "static" if router == "dense" else router, **routing)
    with TwoGPUs():
        got = outputs(parts, None if router == "dense" else schedule, "static" if router == "dense" else router, **routing)
        batch = parts.batch([SAMPLES[0][0]])
        state = parts.begin(batch)
        for l in range(6):
            state = parts.prefill_step(l, batch, state)
            there = state.kept.batch
            assert state.x.device == state.scores.read(there).value.device == there.rope.device == there.pos.device == GPUS[l > 2]
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0])) and got[1] == want[1]


def test_the_check_can_fail(split, schedule):
    """Without the move between the blocks the run fails, so the test above does watch it."""
    m, real = split("gqa"), lib.placement.state_to
    stay = lambda state, device: state
    half = lambda state, device: replace(real(state, device), scores=replace(real(state, device).scores, rank=state.scores.rank))
    for move, router in ((stay, "static"), (half, make_router(m, inputs=("score", "rank")))):
        with pytest.MonkeyPatch.context() as patch, TwoGPUs(), pytest.raises(RuntimeError, match="tensors on cuda:0 and cuda:1"):
            patch.setattr(lib.placement, "state_to", move)
            outputs(m, schedule, router)


def test_search_and_training_on_a_split_model(folder, split):
    """What the stages compute from passes: block influence, fitness, forecasts' moments, the losses and their gradients."""
    def work(m):
        s = Schedule([0.0, 0.3, 0.5, 0.7, 0.2, 0.4], m.fingerprint)
        f = fit(m, SAMPLES, SAMPLES, 4)
        fit_kl = Fitness(m, SAMPLES).items((0, 300, 300, 300, 500, 400))
        torch.manual_seed(0)
        router, guide = Router(m.config, m.fingerprint).to(m.device), Order.static()
        m.use(s, guide)
        entropy = imitate(router, *decisions_of(m, router, SAMPLES), 3, 0.02)
        m.use(Schedule([0.0, 0.3, 0.5, 0.5, 0.2, 0.4], m.fingerprint), router, one_pass=True)  # block 3, there, takes the decision of 2, here
        assert m.routing.leader[3] == 2
        pair = scoring.make_pair(m, SAMPLES)
        states, taken = scoring.begin_pair(m, pair), []
        for l in range(6):
            states, decisions = reference.step_pair(m, l, pair, states)
            taken += decisions
        l_s, l_g = sparsity_loss(taken, False)[0], guide_loss(taken, guide)
        x = scoring.predicting(pair, states)
        kl = scoring.kl_divergence(m.logits(x.detach() * 0.9), m.logits(x)).mean()
        (kl.to(l_s.device) + l_s + l_g).backward()
        return [torch.tensor(block_influence(m, SAMPLES)), fit_kl, f.a, f.b, f.c, torch.tensor(entropy), *(q.grad for q in router.parameters())]

    want = work(FTPModel.from_pretrained(folder("gqa")[0]))
    with TwoGPUs():
        got = work(split("gqa"))
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and len(want) == 10


def test_placement(tiny, folder, monkeypatch):
    """Blocks go by weight to the fewest GPUs; the loader puts each tensor where its block is."""
    c, count = tiny.config, lambda places: [places.count(g) for g in GPUS]
    block, ends = 4 * (c.p_attn + c.p_mlp), 4 * c.vocab_size * c.hidden_size
    every = 6 * block + 2 * ends
    assert count(place_blocks("auto", c, 4, [2 * every])) == [6, 0] == count(place_blocks("auto", c, 4, [2 * every] * 2))
    assert count(place_blocks("auto", c, 4, [0.6 * every] * 2)) == [3, 3] and count(place_blocks("auto", c, 4, [0.3 * every, 0.9 * every])) == [1, 5]
    assert sum(count(place_blocks("auto", c, 2, [every] * 2))) == 6 == count(place_blocks("auto", c, 2, [every] * 2))[0]
    assert place_blocks("auto", c, 4, []) == [HOST] * 6
    with pytest.raises(FTPError, match="--device_map auto: the weights take"):
        place_blocks("auto", c, 4, [0.5 * every] * 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place_blocks("cpu=0-1,cuda:1=2-5", c, 4) == [HOST] * 2 + [GPUS[1]] * 4
    for bad in ("cpu=0-4", "cpu=0-3,cuda:0=3-5", "cuda:7=0-5", "gpu=0-5", "cpu"):
        with pytest.raises(FTPError, match="--device_map"):
            place_blocks(bad, c, 4)
    meta = torch.device("meta")  # the one other device that every machine has
    monkeypatch.setattr(lib.placement, "place_blocks", lambda *_: [HOST] * 3 + [meta] * 3)
    for shape in ("gqa", "tied"):
        m = PlacedModel.from_pretrained(folder(shape)[0], spec="auto")
        assert {n: p.device for n, p in m.named_parameters()} == {
            n: meta if n in ("norm.weight", "head.weight") or n.startswith(("blocks.3", "blocks.4", "blocks.5")) else HOST for n, _ in m.named_parameters()}
        assert [m.place_of(l) for l in range(6)] == [HOST] * 3 + [meta] * 3 and m.head.weight.device == (HOST if m.config.tied else meta)
