"""What FTP learns: the schedule (a sparsity a block), the router (a 2-layer MLP), the forecaster (what a skipped block would have added)."""
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import leaders
from files import FINGERPRINT, FTPError, check_tensors, load_json, load_tensors, misfit, save_json, save_tensors, tensors_id

FACTORS = ("position", "score", "rank", "sparsity")  # the paper's four inputs of the router
INPUTS = {"position": 3, "place": 1, "score": 1, "rank": 1, "sparsity": 1, "forecast": 1}  # numbers each enters with; "hidden" has hidden_size
SELECTIONS = ("static", "random", "attention", "progressive")  # routers that need no training
NEAR = 64  # tokens within which the absolute distance to a prompt's start and end is told apart


@dataclass
class Schedule:
    """One sparsity per block, the share of tokens that skip it; 1 removes the block, block 0 is 0 (or 1).

    decode_threshold, if any, holds the router margin below which a decoded token skips block l; it is only valid
    with the router whose id it carries. parts, if any, says of each block what is left of it: "both" sub-blocks, "attention" or "mlp".
    """
    sparsity: list
    fingerprint: dict
    decode_threshold: list | None = None
    router_id: str | None = None
    meta: dict = field(default_factory=dict)
    parts: list | None = None

    def __post_init__(self):
        s = self.sparsity
        if misfit(s, [float]) or not s or not all(0 <= v <= 1 for v in s):
            raise FTPError("--schedule: sparsities must be a list of numbers in [0, 1]; make the schedule again")
        if s[0] not in (0, 1):
            raise FTPError("--schedule: block 0 must have sparsity 0 (no attention score exists before it)")
        t = self.decode_threshold
        if t is not None and (misfit(t, [float]) or len(t) != len(s)):
            raise FTPError("--schedule: decode_threshold must hold one number a block; make the schedule again")
        t = self.parts
        if t is not None and not (isinstance(t, list) and len(t) == len(s) and all(v in ("both", "attention", "mlp") for v in t)):
            raise FTPError('--schedule: parts must hold "both", "attention" or "mlp" for each block; make the schedule again')

    def grouped(self, group):
        """This schedule with the sparsity averaged over blocks that share a decision, see leaders()."""
        s, lead = self.sparsity, leaders(self.sparsity, group)
        return self if group == 1 else replace(self, sparsity=[fmean(v for v, b in zip(s, lead) if b == a) for a in lead])

    @property
    def mean(self):
        return sum(self.sparsity) / len(self.sparsity)

    @property
    def id(self):
        return hashlib.sha256(json.dumps([round(v, 6) for v in self.sparsity] + (self.parts or [])).encode()).hexdigest()[:12]

    @property
    def removes(self):
        """Whether it removes blocks or sub-blocks."""
        return max(self.sparsity) >= 1 or any(v != "both" for v in self.parts or [])

    @classmethod
    def uniform(cls, model, sparsity):
        """The same sparsity in every block but the first, with mean `sparsity`."""
        n = model.config.n_layer
        s = sparsity * n / (n - 1)
        if not 0 <= s < 1:
            raise FTPError(f"--sparsity {sparsity}: out of range for a uniform schedule; give 0 <= S < {(n - 1) / n:.3f}")
        return cls([0.0] + [s] * (n - 1), model.fingerprint)

    @classmethod
    def load(cls, path):
        o = load_json(path, "ftp-schedule-1", "--schedule", {"sparsity": [float], "fingerprint": FINGERPRINT, "meta": (dict, None), "parts": ([str], None),
                                                             "decode_threshold": ([float], None), "router_id": (str, None)})
        return cls(o["sparsity"], o["fingerprint"], o.get("decode_threshold"), o.get("router_id"), o.get("meta") or {}, o.get("parts"))

    def save(self, path):
        save_json(path, {"format": "ftp-schedule-1", "mean": self.mean, **asdict(self)})


class Router(nn.Module):
    """2-layer MLP, inputs -> hidden -> 2 logits (compute, skip), shared by all blocks (method section 4).

    kind: "global" one MLP for all blocks, "local" one each, "recurrent" a global one whose hidden layer also
    sees its value at the previous decision. inputs: any of FACTORS, "place" (position as one number), "hidden" (normalised state).
    score: attention from the last so many prompt queries, or "mean". group: so many neighbouring blocks share a decision.
    meta["decode_threshold"] and meta["schedule_id"] belong together, as in Schedule.
    """
    KINDS = ("global", "local", "recurrent")

    def __init__(self, config, fingerprint, kind="global", inputs=FACTORS, width=64, score=16, group=1, meta=None):
        super().__init__()
        if kind not in self.KINDS or not inputs or any(i not in (*INPUTS, "hidden") for i in inputs):
            raise FTPError(f"--router_kind {kind} --inputs {','.join(inputs)}: kinds are {', '.join(self.KINDS)}; "
                           f"inputs {', '.join(INPUTS)}, hidden")
        self.kind, self.inputs, self.width, self.score, self.group, self.meta = kind, tuple(inputs), width, score, group, meta or {}
        self.fingerprint, self.n_layer, self.hidden_size = fingerprint, config.n_layer, config.hidden_size
        n, g = self.n_inputs, config.n_layer if kind == "local" else 1
        self.w1 = nn.Parameter(4 * torch.randn(g, n, width))
        self.b1 = nn.Parameter(-(self.w1.detach() * torch.rand(g, n, width)).sum(1))  # kinks spread over the inputs' range, [0, 1]
        self.w2 = nn.Parameter(torch.randn(g, width, 2) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(g, 1))  # starts near dense
        if kind == "recurrent":
            self.u = nn.Parameter(torch.randn(width, width) / math.sqrt(width) / 2)

    @property
    def n_inputs(self):
        return sum(self.hidden_size if i == "hidden" else INPUTS[i] for i in self.inputs)

    @property
    def id(self):
        return tensors_id(self.state_dict())

    def forward(self, l, f, h=None):
        """f (N, n_inputs), h (N, width) or None -> logit of compute over that of skip (N,), new h. The decision of block l."""
        g = l if self.kind == "local" else 0
        w1, b1, w2, b2 = (t[g].to(f.device) for t in (self.w1, self.b1, self.w2, self.b2))  # to the block's device, if the model has several
        z = torch.addmm(b1, f, w1)
        if self.kind == "recurrent":
            z = z if h is None else z + h @ self.u.to(f.device)
            z = h = torch.tanh(z)
        else:
            z = F.relu(z)
        return torch.addmv(b2.diff(), z, w2.diff(dim=1)[:, 0], beta=-1, alpha=-1), h  # the two logits' difference: all that softmax and argmax see

    def factors(self, p, s):
        """The inputs (N, n_inputs) float32 for the tokens of a Pass at a block of sparsity s, each scaled to [0, 1] whatever the
        length. Position: place in the prompt (0 first, 1 newest), and distance to its start and end in units of NEAR tokens, at
        most 1. score: relative_score; rank: share of tokens with a lower one. "forecast": norm r of the forecast update against the
        state's, as r / (1 + r). "hidden": the state scaled to unit RMS."""
        place = p.place[:, None]
        if "position" not in p.known:  # the same before every block
            p.known["position"] = torch.cat((place, *((d / NEAR).clamp(0, 1)[:, None] for d in (p.pos, p.size - 1 - p.local))), 1)
        give = {"position": lambda: p.known["position"], "place": lambda: place,
                "score": lambda: p.score[:, None], "rank": lambda: p.rank[:, None], "sparsity": lambda: torch.full_like(place, s),
                "forecast": lambda: 1 - 1 / (1 + p.forecast[0].detach().float().norm(dim=1) / p.x.detach().float().norm(dim=1))[:, None],
                "hidden": lambda: F.rms_norm(p.x.detach().float(), p.x.shape[1:])}
        return torch.cat([give[i]() for i in self.inputs], 1)

    def flops(self, tokens):
        n = self.n_inputs + (self.width if self.kind == "recurrent" else 0)
        return 2 * tokens * self.width * (n + 2)

    def save(self, path):
        """router.safetensors, and a readable twin router.json."""
        save_tensors(path, self.state_dict(), {
            "format": "ftp-router-1", "fingerprint": self.fingerprint, "kind": self.kind, "inputs": list(self.inputs),
            "width": self.width, "score": self.score, "group": self.group, "n_layer": self.n_layer, "hidden_size": self.hidden_size,
            "parameters": sum(p.numel() for p in self.parameters()), "meta": self.meta})

    @classmethod
    def load(cls, path):
        tensors, o = load_tensors(path, "ftp-router-1", "--router", {
            "kind": str, "inputs": [str], "width": int, "score": (int, str), "group": (int, None), "n_layer": int, "hidden_size": int,
            "fingerprint": FINGERPRINT, "meta": ({"decode_threshold": ([float], None), "schedule_id": (str, None), "settings": (dict, None)}, None)})
        meta = o.get("meta") or {}
        unknown = [i for i in o["inputs"] if i not in (*INPUTS, "hidden")]
        for bad, why in ((unknown, f"it reads unknown inputs {', '.join(unknown)[:80]}"), (not o["inputs"], "it has no inputs"),
                         (o["kind"] not in cls.KINDS, f"it is of an unknown kind {o['kind'][:40]!r}"),
                         (not 0 < o["n_layer"] < 10_000, "n_layer is out of range"),
                         (o.get("group") is not None and o["group"] < 1, "group is out of range"),
                         (o["score"] != "mean" and not (isinstance(o["score"], int) and o["score"] > 0), "score is neither a window nor mean"),
                         (len(meta.get("decode_threshold") or range(o["n_layer"])) != o["n_layer"], "decode_threshold has another number of blocks")):
            if bad:
                raise FTPError(f"--router: {path}: {why}; train it again")
        try:
            with torch.device("meta"):  # no storage before the shapes are known to be those of the file
                r = cls(type("shape", (), {"n_layer": o["n_layer"], "hidden_size": o["hidden_size"]}), o["fingerprint"], o["kind"], o["inputs"],
                        o["width"], o["score"], o.get("group") or 1, meta)
        except (RuntimeError, ZeroDivisionError, TypeError) as e:
            raise FTPError(f"--router: {path} is damaged ({str(e).splitlines()[0]}); train it again") from None
        check_tensors(tensors, {k: v.shape for k, v in r.state_dict().items()}, f"--router: {path}")
        r.load_state_dict(tensors, assign=True)
        return r


class Forecaster:
    """What a token that skips block l takes instead: a linear map of u, its state scaled to unit RMS (so that no massive activation rules).

    With a and b, low-rank: (u @ a[l]) @ b[l] + c[l], its first d columns the update of the state, the others what is missing from the
    key (before rotary) and value that the block's own projections give. With b None the state stays as it was, for nothing but later
    keys and values reads it, and u @ a[l] + c[l] are key and value themselves, in place of the block's projections.

    a (n, d, rank), b (n, rank, d + 2 * n_kv_head * head_dim), c (n, the same) for the last n of n_layer blocks; rank 0 is the mean alone.
    With b None: a (n, d, 2 * n_kv_head * head_dim), c (n, the same). Made by fit_forecaster.py.
    """
    def __init__(self, a, b, c, n_layer, fingerprint, meta=None):
        self.a, self.b, self.c, self.n_layer, self.fingerprint, self.meta = a, b, c, n_layer, fingerprint, meta or {}

    @property
    def first(self):
        """The first block that it serves."""
        return self.n_layer - len(self.a)

    @property
    def tensors(self):
        return {k: t for k, t in (("a", self.a), ("b", self.b), ("c", self.c)) if t is not None}

    @property
    def rank(self):
        return "full" if self.b is None else self.a.shape[2]

    @property
    def d(self):
        return self.a.shape[1]

    def to(self, device, dtype):
        t = {"b": None} | {k: t.to(device, dtype) for k, t in self.tensors.items()}
        return Forecaster(t["a"], t["b"], t["c"], self.n_layer, self.fingerprint, self.meta)

    def __call__(self, l, x):
        """Tokens x (N, d) that skip block l -> update (N, d) and missing part of keys and values (N, 2 * n_kv_head * head_dim); with b None
        (N, 0) and the keys and values."""
        t = {k: t[l - self.first].to(x.device) for k, t in self.tensors.items()}
        out = F.rms_norm(x, x.shape[1:]) @ t["a"] if t["a"].shape[1] else x.new_zeros(len(x), 0)
        out = out + t["c"] if self.b is None else torch.addmm(t["c"], out, t["b"])
        return out.tensor_split([0 if self.b is None else self.d], 1)

    def flops(self, tokens, kept):
        """FLOPs that it adds before one block, of whose `tokens` `kept` compute it: all take the forecast, the computed ones then overwrite
        theirs. A skipped token's keys and values count as the block's own; with b None they cost the same."""
        return 2 * self.a[0].numel() * kept if self.b is None else 2 * self.rank * (self.d + self.b.shape[2]) * tokens

    def save(self, path):
        save_tensors(path, self.tensors, {"format": "ftp-forecaster-3", "fingerprint": self.fingerprint, "rank": self.rank,
                                          "n_layer": self.n_layer, "meta": self.meta})

    @property
    def id(self):
        return tensors_id(self.tensors)

    @classmethod
    def load(cls, path):
        t, o = load_tensors(path, "ftp-forecaster-3", "--forecaster", {"fingerprint": FINGERPRINT, "rank": (int, str), "n_layer": int, "meta": (dict, None)})
        n, d, e = (list(t[k].shape[i:i + 1] if k in t else ()) for k, i in (("a", 0), ("a", 1), ("c", 1)))  # as far as there are any
        want = {"a": (*n, *d, *e), "c": (*n, *e)} if o["rank"] == "full" else {"a": (*n, *d, o["rank"]), "b": (*n, o["rank"], *e), "c": (*n, *e)}
        check_tensors(t, want, f"--forecaster: {path}")
        return cls(t["a"], t.get("b"), t["c"], o["n_layer"], o["fingerprint"], o.get("meta"))
