"""The routed LLaMA of FTP: before every block a router decides, per token, compute or skip.

    model = FTPModel.from_pretrained("smollm2")            # or a folder, or a hub id
    logits = model(input_ids)                              # dense, (B, T) -> (B, T, vocab)
    model.use(schedule="schedule_ft.json", router="router.safetensors")
    model.generate([[1, 9690, 198]], max_new_tokens=64)

Sequences of a batch are packed, never padded: hidden states are (N, d) with N the tokens of all
sequences one after the other, so a batch mate or a pad can't reach a result. A skipped token is not
multiplied by zero, it is absent: a block runs on the gathered rows of its kept tokens.
"""
import contextlib
import copy
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HOME = Path(os.environ.get("FTP_HOME", Path(__file__).resolve().parent / "models"))  # where "smollm2" lies
FACTORS = ("position", "score", "rank", "sparsity")  # the paper's four inputs of the router
INPUTS = {"position": 3, "place": 1, "score": 1, "rank": 1, "sparsity": 1, "forecast": 1}  # numbers each enters with; "hidden" has hidden_size
NEAR = 64  # tokens within which the absolute distance to a prompt's start and end is told apart


class FTPError(ValueError):
    """An expected mistake: its text is one line that names the flag or file and the mend."""


# ------------------------------------------------------------------------------------------------
# files

def save_files(files):
    """Write {path: function of a temporary path}, all to temporary files and then renamed in this order: whatever ends the run, each
    path holds its old content or the whole new one. FTPError when the disk is full or the folder can't be written."""
    parts = {Path(p): Path(f"{p}.tmp") for p in files}
    try:
        for (path, part), fill in zip(parts.items(), files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(part)
            with open(part, "rb") as f:
                os.fsync(f.fileno())  # a crash of the machine must not rename an empty file either
    except BaseException as e:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(e, (OSError, SafetensorError)):
            raise FTPError(f"--out_dir: {next(iter(parts))} can't be written ({e}); make room or give another folder; an older file there "
                           "is untouched") from None
        raise
    for path, part in parts.items():
        os.replace(part, path)


def save_json(path, obj):
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    save_files({path: lambda part: part.write_text(json.dumps(obj, indent=1) + "\n")})


def tensors_id(tensors):
    """Hash of {name: tensor}, which ties weights to their twin."""
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        h.update(name.encode() + t.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


def save_tensors(path, tensors, twin):
    """Write path.safetensors (float32) and its readable JSON twin, each atomically."""
    path, tensors = Path(path).with_suffix(".safetensors"), {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    twin = {**twin, "id": tensors_id(tensors)}
    save_files({path: lambda part: save_file(tensors, part),
                path.with_suffix(".json"): lambda part: part.write_text(json.dumps(twin, indent=1) + "\n")})


def misfit(o, form, at="it"):
    """Where a JSON value departs from its form, in words, or None. Forms: float (any finite number), int (whole, 0 or more), str, bool,
    dict, list, None; {key: form}, where more keys may stand; [form], a list of them; (form, form), either."""
    if isinstance(form, dict) and isinstance(o, dict):
        return next((m for k, f in form.items() if (m := misfit(o.get(k), f, f"{at}.{k}"))), None)
    if isinstance(form, list) and isinstance(o, list):
        return next((m for i, v in enumerate(o) if (m := misfit(v, form[0], f"{at}[{i}]"))), None)
    if isinstance(form, tuple):
        return None if any(misfit(o, f) is None for f in form) else misfit(o, form[0], at)
    number = isinstance(o, (int, float)) and not isinstance(o, bool)
    good = {float: number and abs(o) < 1e300, int: number and isinstance(o, int) and 0 <= o < 2 ** 63, None: o is None}
    if good[form] if form is None or form in (float, int) else isinstance(form, type) and isinstance(o, form):
        return None
    kind = {float: "a finite number", int: "a whole number of at least 0"}.get(form) if isinstance(form, type) else None
    return f"{at} is {str(o)[:40]!r}, not {kind or getattr(form, '__name__', type(form).__name__)}"


FINGERPRINT = {"config": str, "norm": [float]}


def load_json(path, kind, flag, form=None):
    """Read an artefact whose "format" is `kind` and whose fields have the `form` of misfit(); FTPError names `flag` and the field."""
    try:
        obj = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FTPError(f"{flag}: no file {path}; run the stage that writes it, or give its path") from None
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"{flag}: {path} is not readable JSON ({e}); make it again") from None
    if not isinstance(obj, dict) or obj.get("format") != kind:
        found = str(obj.get("format"))[:40] if isinstance(obj, dict) else type(obj).__name__
        raise FTPError(f"{flag}: {path} is no {kind} file (found {found}); give the right file")
    if wrong := misfit(obj, form or {}):
        raise FTPError(f"{flag}: {path} is damaged ({wrong}); make it again")
    return obj


def read_tensors(path, flag):
    """{name: tensor} and the metadata of a safetensors file; FTPError names `flag`."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise FTPError(f"{flag}: no file {path}; run the stage that writes it, or give its path") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise FTPError(f"{flag}: {path} is damaged ({(str(e).splitlines() or [type(e).__name__])[0]}); make it again") from None


def load_tensors(path, kind, flag, form):
    """What save_tensors() wrote -> {name: tensor}, twin. Weights and twin of different runs are refused; where a run was killed between
    its two renames, the twin still lies beside the old one under its temporary name."""
    path, wrong = Path(path).with_suffix(".safetensors"), None
    tensors, _ = read_tensors(path, flag)
    for twin in (path.with_suffix(".json"), path.with_suffix(".json.tmp")):
        try:
            o = load_json(twin, kind, flag, form)
            if o.get("id") in (None, tensors_id(tensors)):
                return tensors, o
            wrong = wrong or FTPError(f"{flag}: {path} and {twin.name} are damaged, or not of one run; make them again")
        except FTPError as e:
            wrong = wrong or e
    assert wrong is not None
    raise wrong


def check_tensors(tensors, shapes, what):
    """FTPError unless `tensors` has exactly the names and `shapes`, in float32 and finite."""
    for name in sorted(tensors.keys() | shapes.keys()):
        t = tensors.get(name)
        why = ("is missing" if t is None else "is unknown" if name not in shapes else
               f"has shape {tuple(t.shape)}, not {tuple(shapes[name])}" if t.shape != tuple(shapes[name]) else
               f"is {t.dtype}, not float32" if t.dtype != torch.float32 else None if t.isfinite().all() else "has NaN or infinite values")
        if why:
            raise FTPError(f"{what}: tensor {name} {why}; make it again")


def check_fingerprint(made_for, model_print, what):
    """FTPError unless `made_for` is the fingerprint of this model (norms to 1 %: any dtype may load it)."""
    same = isinstance(made_for, dict) and made_for.get("config") == model_print["config"]
    if not (same and len(made_for.get("norm", [])) == len(model_print["norm"])
            and all(abs(a - b) <= 0.01 * abs(b) + 1e-3 for a, b in zip(made_for["norm"], model_print["norm"]))):
        raise FTPError(f"{what} was made for another model than the one loaded; give the --model it was made for, "
                       "or make it again")


# ------------------------------------------------------------------------------------------------
# configuration, and what a pass costs

@dataclass
class Config:
    """Shape of a LLaMA-family model, read from a Hugging Face config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: dict | None
    qkv_bias: bool
    tied: bool
    max_len: int
    eos: tuple = ()

    @classmethod
    def from_hf(cls, c, source="--model"):
        """Config from the dict `c` of a config.json. FTPError names any feature this model file lacks."""
        if wrong := misfit(c, {"model_type": str, "rope_parameters": (dict, None), "rope_scaling": (dict, None)}):
            raise FTPError(f"{source}: config.json is damaged ({wrong}); give a Hugging Face model folder")
        kind = c.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise FTPError(f"{source}: model_type {kind!r} is not supported; use a llama or qwen2 (Qwen1.5/2/2.5) model")
        rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        for bad, why in ((c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
                         (kind == "llama" and c.get("attention_bias"), "attention_bias"),
                         (c.get("mlp_bias"), "mlp_bias"),
                         (c.get("use_sliding_window"), "sliding-window attention"),
                         (c.get("quantization_config"), "a quantised checkpoint"),
                         (rope_type not in ("default", "llama3"), f"rope_type {rope_type!r}")):
            if bad:
                raise FTPError(f"{source}: {why} is not supported; use a model without it")
        try:
            d, h = c["hidden_size"], c["num_attention_heads"]
            eos = c.get("eos_token_id")
            made = cls(c["vocab_size"], d, c["intermediate_size"], c["num_hidden_layers"], h,
                       c.get("num_key_value_heads") or h, c.get("head_dim") or d // h, c.get("rms_norm_eps", 1e-6),
                       rope.get("rope_theta") or c.get("rope_theta") or 10000.0,
                       rope if rope_type == "llama3" else None, kind == "qwen2",
                       bool(c.get("tie_word_embeddings", False)), c.get("max_position_embeddings", 2048),
                       tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
        except (KeyError, TypeError, ZeroDivisionError) as e:
            raise FTPError(f"{source}: config.json has no usable {e}; give a complete LLaMA-family folder") from None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_layer", "n_head", "n_kv_head", "head_dim", "max_len")
        scale = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), float)
        wrong = misfit(asdict(made) | {"eos": list(made.eos)}, dict.fromkeys(sizes, int) | {
            "rms_eps": float, "rope_theta": float, "rope_scaling": (None, scale), "eos": [int]}, "config.json")
        if not wrong and not (all(0 < getattr(made, k) < 1 << 31 for k in sizes) and made.n_layer <= 1000 and made.n_head % made.n_kv_head == 0
                              and made.head_dim % 2 == 0 and made.rope_theta > 0 and made.rms_eps >= 0):
            wrong = f"sizes out of range: {made}"
        if wrong:
            raise FTPError(f"{source}: {wrong}; give a complete LLaMA-family folder")
        return made

    @property
    def p_attn(self):
        """Parameters of a block's q, k, v and o maps."""
        return self.hidden_size * self.head_dim * 2 * (self.n_head + self.n_kv_head)

    @property
    def p_kv(self):
        """Parameters of a block's k and v maps, what a skipped token costs under the K/V policy `keep`."""
        return self.hidden_size * self.head_dim * 2 * self.n_kv_head

    @property
    def p_mlp(self):
        return 3 * self.hidden_size * self.intermediate_size

    def block_flops(self, tokens, pairs, kv_only=0):
        """FLOPs of one block: `tokens` computed, `pairs` query-key pairs attended, `kv_only` tokens with K/V alone."""
        return (2 * (self.p_attn + self.p_mlp) * tokens + 4 * self.n_head * self.head_dim * pairs
                + 2 * self.p_kv * kv_only)

    def score_flops(self, window, keys):
        """FLOPs of the attention scores of one block: `window` queries against `keys` keys."""
        return 2 * self.n_head * self.head_dim * window * keys

    def forecast_flops(self, rank, tokens):
        """FLOPs of the forecast of one block; all tokens take it, the computed ones then overwrite theirs."""
        return 4 * (self.hidden_size + self.n_kv_head * self.head_dim) * rank * tokens

    def head_flops(self, positions):
        return 2 * self.vocab_size * self.hidden_size * positions

    def kv_bytes(self, stored, itemsize):
        """Bytes of keys and values for `stored` token-block entries."""
        return 2 * self.n_kv_head * self.head_dim * stored * itemsize

    def prefill_flops(self, T, sparsity, kv="drop", router=None, window=16, head=1, forecast_rank=None):
        """FLOPs of the prefill of one prompt of T tokens under a list of sparsities (method section 7).

        `router` adds its MLP and the scores (`window` queries a block); `head` counts the positions that get logits.
        forecast_rank: rank of the forecaster, if one is in use.
        """
        total = self.head_flops(head)
        for l, s in enumerate(sparsity):
            k = quota(T, s)
            if kv == "keep" and 0 < s:  # kept queries see every earlier key; which ones are kept is the static order
                pairs = sum(range(T - k + 2, T + 1)) + 1 if k else 0
                total += self.block_flops(k, pairs, T - k)
            else:
                total += self.block_flops(k, k * (k + 1) / 2)
            if router is not None and 0 < s < 1:
                total += router.flops(T)
            if forecast_rank and 0 < s < 1:
                total += self.forecast_flops(forecast_rank, T)
            if router is not None and {"score", "rank"} & set(router.inputs) and any(0 < v < 1 for v in sparsity[l + 1:]):
                total += self.score_flops(min(window, k), k)
        return total


def quota(T, s):
    """Tokens of a prompt of T that a block of sparsity s keeps: ceil((1-s)T), never without first and last."""
    return 0 if s >= 1 else T if s <= 0 else min(T, max(2, math.ceil((1 - s) * T - 1e-9)))


# ------------------------------------------------------------------------------------------------
# schedule and router

@dataclass
class Schedule:
    """One sparsity per block, the share of tokens that skip it; 1 removes the block, block 0 is 0 (or 1).

    decode_threshold, if any, holds the router margin below which a decoded token skips block l; it is only valid
    with the router whose id it carries.
    """
    sparsity: list
    fingerprint: dict
    decode_threshold: list | None = None
    router_id: str | None = None
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        s = self.sparsity
        if misfit(s, [float]) or not s or not all(0 <= v <= 1 for v in s):
            raise FTPError("--schedule: sparsities must be a list of numbers in [0, 1]; make the schedule again")
        if s[0] not in (0, 1):
            raise FTPError("--schedule: block 0 must have sparsity 0 (no attention score exists before it)")
        t = self.decode_threshold
        if t is not None and (misfit(t, [float]) or len(t) != len(s)):
            raise FTPError("--schedule: decode_threshold must hold one number a block; make the schedule again")

    @property
    def mean(self):
        return sum(self.sparsity) / len(self.sparsity)

    @property
    def id(self):
        return hashlib.sha256(json.dumps([round(v, 6) for v in self.sparsity]).encode()).hexdigest()[:12]

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
        o = load_json(path, "ftp-schedule-1", "--schedule", {"sparsity": [float], "fingerprint": FINGERPRINT, "meta": (dict, None),
                                                             "decode_threshold": ([float], None), "router_id": (str, None)})
        return cls(o["sparsity"], o["fingerprint"], o.get("decode_threshold"), o.get("router_id"), o.get("meta") or {})

    def save(self, path):
        save_json(path, {"format": "ftp-schedule-1", "mean": self.mean, **asdict(self)})


class Router(nn.Module):
    """2-layer MLP, inputs -> hidden -> 2 logits (compute, skip), shared by all blocks (method section 4).

    kind: "global" one MLP for all blocks, "local" one each, "recurrent" a global one whose hidden layer also
    sees its value at the previous block. inputs: any of FACTORS, "place" (position as one number), "hidden" (normalised state).
    meta["decode_threshold"] and meta["schedule_id"] belong together, as in Schedule.
    """
    KINDS = ("global", "local", "recurrent")

    def __init__(self, config, fingerprint, kind="global", inputs=FACTORS, width=64, score=16, meta=None):
        super().__init__()
        if kind not in self.KINDS or not inputs or any(i not in (*INPUTS, "hidden") for i in inputs):
            raise FTPError(f"--router_kind {kind} --inputs {','.join(inputs)}: kinds are {', '.join(self.KINDS)}; "
                           f"inputs {', '.join(INPUTS)}, hidden")
        self.kind, self.inputs, self.width, self.score, self.meta = kind, tuple(inputs), width, score, meta or {}
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
        """f (N, n_inputs), h (N, width) or None -> logits (N, 2), new h. The decision of block l."""
        g = l if self.kind == "local" else 0
        z = f @ self.w1[g] + self.b1[g]
        if self.kind == "recurrent":
            z = z if h is None else z + h @ self.u
            z = h = torch.tanh(z)
        else:
            z = F.relu(z)
        return z @ self.w2[g] + self.b2[g], h

    def factors(self, p, s):
        """The inputs (N, n_inputs) float32 for the tokens of a Pass at a block of sparsity s, each scaled to [0, 1] whatever the
        length. Position: place in the prompt (0 first, 1 newest), and distance to its start and end in units of NEAR tokens, at
        most 1. score: relative_score; rank: share of tokens with a lower one. "forecast": norm r of the forecast update against the
        state's, as r / (1 + r). "hidden": the state scaled to unit RMS."""
        near = lambda d: (d / NEAR).clamp(0, 1)[:, None]
        place = p.place[:, None]
        give = {"position": lambda: torch.cat((place, near(p.pos), near(p.size - 1 - p.local)), 1), "place": lambda: place,
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
            "width": self.width, "score": self.score, "n_layer": self.n_layer, "hidden_size": self.hidden_size,
            "parameters": sum(p.numel() for p in self.parameters()), "meta": self.meta})

    @classmethod
    def load(cls, path):
        tensors, o = load_tensors(path, "ftp-router-1", "--router", {
            "kind": str, "inputs": [str], "width": int, "score": (int, str), "n_layer": int, "hidden_size": int, "fingerprint": FINGERPRINT,
            "meta": ({"decode_threshold": ([float], None), "schedule_id": (str, None), "settings": (dict, None)}, None)})
        meta = o.get("meta") or {}
        unknown = [i for i in o["inputs"] if i not in (*INPUTS, "hidden")]
        for bad, why in ((unknown, f"it reads unknown inputs {', '.join(unknown)[:80]}"), (not o["inputs"], "it has no inputs"),
                         (o["kind"] not in cls.KINDS, f"it is of an unknown kind {o['kind'][:40]!r}"),
                         (not 0 < o["n_layer"] < 10_000, "n_layer is out of range"),
                         (o["score"] != "mean" and not (isinstance(o["score"], int) and o["score"] > 0), "score is neither a window nor mean"),
                         (len(meta.get("decode_threshold") or range(o["n_layer"])) != o["n_layer"], "decode_threshold has another number of blocks")):
            if bad:
                raise FTPError(f"--router: {path}: {why}; train it again")
        try:
            with torch.device("meta"):  # no storage before the shapes are known to be those of the file
                r = cls(type("shape", (), {"n_layer": o["n_layer"], "hidden_size": o["hidden_size"]}), o["fingerprint"], o["kind"], o["inputs"],
                        o["width"], o["score"], meta)
        except (RuntimeError, ZeroDivisionError, TypeError) as e:
            raise FTPError(f"--router: {path} is damaged ({str(e).splitlines()[0]}); train it again") from None
        check_tensors(tensors, {k: v.shape for k, v in r.state_dict().items()}, f"--router: {path}")
        r.load_state_dict(tensors, assign=True)
        return r


class Forecaster:
    """Linear forecast for a token that skips block l: what the block would have added to its state, and what is missing from the
    key and value that it offers. With u the state scaled to unit RMS (so that no massive activation rules), both are
    (u @ a[l]) @ b[l] + c[l]: its first d columns the update, the others the correction of key (before rotary) and value.

    a (n_layer, d, rank), b (n_layer, rank, d + 2 * n_kv_head * head_dim), c (n_layer, the same); rank 0 is the mean alone.
    Made by fit_forecaster.py.
    """
    def __init__(self, a, b, c, fingerprint, meta=None):
        self.a, self.b, self.c, self.fingerprint, self.meta = a, b, c, fingerprint, meta or {}

    @property
    def rank(self):
        return self.a.shape[2]

    @property
    def d(self):
        return self.a.shape[1]

    def to(self, device, dtype):
        a, b, c = (t.to(device, dtype) for t in (self.a, self.b, self.c))
        return Forecaster(a, b, c, self.fingerprint, self.meta)

    def __call__(self, l, x):
        """Tokens x (N, d) that skip block l -> their update (N, d), correction of keys and values (N, 2 * n_kv_head * head_dim)."""
        out = torch.addmm(self.c[l], F.rms_norm(x, x.shape[1:]) @ self.a[l], self.b[l]) if self.rank else self.c[l].expand(len(x), -1)
        return out[:, :self.d], out[:, self.d:]

    def save(self, path):
        save_tensors(path, {"a": self.a, "b": self.b, "c": self.c}, {
            "format": "ftp-forecaster-2", "fingerprint": self.fingerprint, "rank": self.rank, "meta": self.meta})

    @property
    def id(self):
        return tensors_id({"a": self.a, "b": self.b, "c": self.c})

    @classmethod
    def load(cls, path):
        t, o = load_tensors(path, "ftp-forecaster-2", "--forecaster", {"fingerprint": FINGERPRINT, "rank": int, "meta": (dict, None)})
        n, d, e = (list(t[k].shape[i:i + 1] if k in t else ()) for k, i in (("a", 0), ("a", 1), ("c", 1)))  # as far as there are any
        check_tensors(t, {"a": (*n, *d, o["rank"]), "b": (*n, o["rank"], *e), "c": (*n, *e)}, f"--forecaster: {path}")
        return cls(t["a"], t["b"], t["c"], o["fingerprint"], o.get("meta"))


# ------------------------------------------------------------------------------------------------
# KV cache

class KVCache:
    """Keys and values of the tokens that each block computed; rows and blocks may hold different tokens.

    k[l], v[l] (rows, n_kv_head, capacity, head_dim), rotated by true position; len (n_layer, rows) says how many
    entries count. The keys of a row are in the order of their positions, all of them older than a new query.
    """
    def __init__(self, config, rows, dtype, device):
        self.config, self.rows, self.dtype, self.device = config, rows, dtype, device
        self.k: list = [None] * config.n_layer
        self.v: list = [None] * config.n_layer
        self.len = torch.zeros(config.n_layer, rows, dtype=torch.int64)  # on the host: slicing needs it there
        self.seen = torch.zeros(rows, dtype=torch.int64)                 # tokens that went by, the next position

    def append(self, l, slots, counts, k, v):
        """Add k, v (sum(counts), n_kv_head, head_dim), packed by sequence, to the rows `slots` (B,) of block l."""
        old = self.len[l, slots]
        self.len[l, slots] = old + counts
        need = int(self.len[l].max())
        if self.k[l] is None and len(slots) == self.rows and bool((counts == need).all()) and bool((slots.diff() == 1).all()):
            self.k[l], self.v[l] = (t.unflatten(0, (self.rows, need)).transpose(1, 2) for t in (k, v))  # as it is, no copy
            return
        if self.k[l] is None or need > self.k[l].shape[2]:
            cap = need + 32 if self.k[l] is None else max(need + 32, self.k[l].shape[2] * 5 // 4)  # amortised growth
            for store in (self.k, self.v):
                new = torch.zeros(self.rows, self.config.n_kv_head, cap, self.config.head_dim, dtype=self.dtype, device=self.device)
                if store[l] is not None:
                    new[:, :, :store[l].shape[2]] = store[l]
                store[l] = new
        if len(k) == len(slots) and bool((counts == 1).all()):
            row, col = slots, old
        else:
            row = slots.repeat_interleave(counts)
            col = torch.arange(len(row)) + (old - counts.cumsum(0) + counts).repeat_interleave(counts)
        row, col = row.to(self.device), col.to(self.device)
        self.k[l][row, :, col] = k
        self.v[l][row, :, col] = v

    def mark(self):
        """The cache's present state, for rewind()."""
        return self.len.clone(), self.seen.clone()

    def rewind(self, mark):
        """Forget all that came after `mark`."""
        self.len, self.seen = mark[0].clone(), mark[1].clone()

    def bytes(self):
        """Bytes of the stored entries, (used, allocated)."""
        item = self.config.kv_bytes(1, self.dtype.itemsize)
        return int(self.len.sum()) * item, sum(k.shape[0] * k.shape[2] for k in self.k if k is not None) * item


# ------------------------------------------------------------------------------------------------
# one pass of packed sequences through the blocks

class Pass:
    """State between two blocks: packed hidden states, positions and the table of latest attention scores.

    x (N, d). Of the n[b] tokens of sequence b the first n_set[b] are a prompt, routed together as a set; the others
    are decoded tokens, each routed by itself from what exists at its time (method section 6). score and rank (N,) are
    the router's factors 2 and 3. A Pass is replaced, never written to: keeping one keeps the state before a block.
    """
    rope: tuple  # cos and sin (N, head_dim) of each row, set by FTPModel.begin()

    def __init__(self, x, n, n_set, cache, slots, own_scores):
        dev = x.device
        self.x, self.n, self.n_set, self.cache, self.slots = x, n, n_set, cache, slots
        self.own_scores = own_scores                  # whether decoded tokens need a score of their own
        self.counts, self.set_counts = torch.tensor(n), torch.tensor(n_set)
        self.start = [0, *accumulate(n)][:-1]
        past = torch.zeros_like(self.counts) if cache is None else cache.seen[slots]
        self.has_past, self.end = bool(past.any()), int((past + self.counts).max())
        # the same facts for each packed row
        seq = torch.arange(len(n)).repeat_interleave(self.counts)
        local = torch.arange(len(seq)) - torch.tensor(self.start)[seq]
        size = self.set_counts[seq]
        in_set, pos = local < size, local + past[seq]
        self.all_set, self.any_set = bool(in_set.all()), bool(in_set.any())
        self.dense_pairs = [float((pos[m] + 1).sum()) for m in (in_set, ~in_set)]
        # factor 1: place in the prompt, 0 first .. 1 newest; a decoded token is the newest of its time
        place = torch.where(in_set, local / (size - 1).clamp(min=1), 1.0)
        self.seq, self.local, self.pos, self.in_set, self.size, self.place = (
            t.to(dev) for t in (seq, local, pos, in_set, size, place))
        self.ends = self.in_set & ((self.local == 0) | (self.local == self.size - 1))   # always kept
        self.score, self.rank = torch.zeros_like(self.place), torch.zeros_like(self.place)
        self.memory = None                            # hidden layer of a recurrent router
        self.forecast = None                          # what Forecaster gives for the block to come
        self.trace = []                               # in training: (sparsity, router logits, Pass) a decision

    def next(self, **changed):
        new = copy.copy(self)
        new.__dict__.update(changed)
        return new

    def with_own(self, rows, score, rank):
        """This Pass with the scores and ranks of decoded tokens set."""
        return self.next(score=self.score.index_copy(0, rows, score.flatten()),
                         rank=self.rank.index_copy(0, rows, rank.flatten()))


class Keep:
    """Tokens that compute a block: rows (M,) ascending, or None for all; counts (B,) of them in each sequence, set_counts
    of these in its prompt; mask (N,) the same as booleans; gate (N,) the same with a straight-through gradient."""
    def __init__(self, rows, counts, set_counts, mask=None, gate=None):
        self.rows, self.counts, self.set_counts, self.mask, self.gate = rows, counts, set_counts, mask, gate


def runs(*lists):
    """Neighbouring sequences of equal shape, so that they share one kernel: yields (first, how many, values)."""
    first = 0
    for values, group in groupby(zip(*lists)):
        b = len(list(group))
        yield first, b, values
        first += b


def attention_probs(q, k, last):
    """Probabilities (b, Q, K) of queries q (b, Q, H, D) over keys k (b, K, Hkv, D), mean over heads, float32.

    last (b, Q): index of the newest key each query sees.
    """
    b, Q, H, D = q.shape
    g = H // k.shape[2]
    w = q.reshape(b, Q, -1, g, D).permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 1).unsqueeze(2)   # (b, Hkv, g, Q, K)
    seen = torch.arange(k.shape[1], device=q.device) <= last[:, None, None, :, None]
    return (w.float() * D ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1).mean((1, 2))


def by_quota(p, margin, s):
    """The quota(T, s) tokens of each prompt with the largest margin (N,), first and last always among them -> mask (N,),
    and the smallest margin kept in each token's prompt (N,)."""
    m = margin.detach().masked_fill(p.ends, torch.inf)
    mask, least = torch.zeros_like(p.in_set), torch.zeros_like(m)
    for f, b, (n, size) in runs(p.n, p.n_set):
        these = slice(p.start[f], p.start[f] + b * n)
        top = m[these].view(b, n)[:, :size].topk(quota(size, s), 1)
        mask[these].view(b, n).scatter_(1, top.indices, True)
        least[these].view(b, n)[:, :size] = top.values[:, -1:].clamp(max=1e4)
    return mask, least


def relative_score(p, keys):
    """Attention p among `keys` keys -> [0, 1]: log(1 + p * keys) / log(1 + keys), so that length does not matter."""
    return torch.log1p(p * keys) / torch.log1p(torch.as_tensor(keys, dtype=p.dtype, device=p.device))


def own_score(p, last):
    """Score and rank of decoded tokens: attention p (b, Q, K) each gives itself, at key `last`, among what it sees."""
    own = p.gather(-1, last[..., None])
    keys = last + 1
    lower = ((p < own) & (torch.arange(p.shape[-1], device=p.device) <= last[..., None])).sum(-1)
    return relative_score(own[..., 0], keys), lower / (keys - 1).clamp(min=1)


def rotate(x, cos, sin):
    """Rotary embedding in the half-rotation layout. x (N, heads, D), cos and sin (N, D)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


class Block(nn.Module):
    """One decoder layer with a router at its door.

        x (N, d) ──► keep? ──┬─ rows kept (M, d) ─ norm ─ q,k,v ─ rotary ─ attention ─ o ─(+)─ norm ─ SwiGLU ─(+)─┐
                             │        │                       │                            ▲   │                  ▲  │
                             │        └───────────────────────┼────────────────────────────┘   └──────────────────┘  │
                             │                                └─ K/V of kept tokens to the cache (keep: of all)      ▼
                             └─ rows skipped ────────────────────── unchanged, or forecast ────────────────────► scatter ─► x

    forward is what inference runs; masked is the reference of the same function, on all rows, with gradients.
    """
    def __init__(self, c, l):
        super().__init__()
        self.l, self.c = l, c
        d, D = c.hidden_size, c.head_dim
        self.norm1 = nn.RMSNorm(d, c.rms_eps)
        self.q = nn.Linear(d, c.n_head * D, c.qkv_bias)
        self.k = nn.Linear(d, c.n_kv_head * D, c.qkv_bias)
        self.v = nn.Linear(d, c.n_kv_head * D, c.qkv_bias)
        self.o = nn.Linear(c.n_head * D, d, False)
        self.norm2 = nn.RMSNorm(d, c.rms_eps)
        self.gate = nn.Linear(d, c.intermediate_size, False)
        self.up = nn.Linear(d, c.intermediate_size, False)
        self.down = nn.Linear(c.intermediate_size, d, False)

    def queries(self, a, rope):
        return rotate(self.q(a).view(len(a), self.c.n_head, self.c.head_dim), *rope)

    def keys_values(self, a, rope, missing=None):
        """Keys and values (N, n_kv_head, head_dim) of normalised states a; `missing` (N, 2 * n_kv_head * head_dim) is added."""
        k, v = self.k(a), self.v(a)
        if missing is not None:
            k, v = (t + m for t, m in zip((k, v), missing.chunk(2, -1)))
        shape = len(a), self.c.n_kv_head, self.c.head_dim
        return rotate(k.view(shape), *rope), v.view(shape)

    def rest(self, h, att):
        """Residual adds and MLP. h, att (M, d)."""
        h = h + self.o(att)
        a = self.norm2(h)
        return h + self.down(F.silu(self.gate(a)) * self.up(a))

    def forward(self, p, keep, kv, score):
        """Run the kept rows of p.x; returns the Pass after this block. Skipped rows are unchanged, or take p.forecast.

        kv "drop" or "keep": whether skipped tokens offer a key and value. score: W or "mean" to refresh the
        score table, None when no later decision reads it.
        """
        rows, x, at, stored = keep.rows, p.x, None, keep.counts
        rope = p.rope if rows is None else tuple(t[rows] for t in p.rope)
        h, missing = x if rows is None else x[rows], None
        if p.forecast is not None:
            update, missing = p.forecast
            x, p = x + update, p.next(forecast=None)
        if kv == "keep" and rows is not None:
            a = self.norm1(p.x)
            k, v = self.keys_values(a, p.rope, missing if missing is None else missing * ~keep.mask[:, None])
            a, at, stored = a[rows], p.local[rows], p.counts
        else:
            a = self.norm1(h)
            k, v = self.keys_values(a, rope)
        q = self.queries(a, rope)
        if p.cache is not None:
            past = p.cache.len[self.l, p.slots]
            p.cache.append(self.l, p.slots, stored, k, v)
        if len(h) == 0:
            return p.next(x=x)
        if p.has_past:
            att, p = self.attend_past(p, keep, q, past, at, score)
        else:
            att = self.attend(keep, q, k, v, stored, at)
            if score is not None:
                with torch.profiler.record_function("ftp_routing"):
                    p = self.observe(p, keep, q, k, stored, at, score)
        h = self.rest(h, att)
        return p.next(x=h if rows is None else x.index_copy(0, rows, h))

    def attend(self, keep, q, k, v, stored, at):
        """Attention within each sequence's stored keys; at (M,) index of each query among them (None: the same rows)."""
        out, i, j = [], 0, 0
        for _, b, (c, n) in runs(keep.counts.tolist(), stored.tolist()):
            if c:
                qb = q[i:i + b * c].unflatten(0, (b, c)).transpose(1, 2)
                kb, vb = (t[j:j + b * n].unflatten(0, (b, n)).transpose(1, 2) for t in (k, v))
                if at is None or c == n:
                    o = F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=True)
                else:  # in pieces: the i-th of c kept rows sees at most n - c + i + 1 keys, the others are not touched
                    last, part = at[i:i + b * c].view(b, 1, c, 1), []
                    for lo in range(0, c, 256):
                        m = n - c + min(lo + 256, c)
                        mask = torch.arange(m, device=q.device) <= last[:, :, lo:lo + 256]
                        part.append(F.scaled_dot_product_attention(qb[:, :, lo:lo + 256], kb[:, :, :m], vb[:, :, :m], mask, enable_gqa=True))
                    o = torch.cat(part, 2)
                out.append(o.transpose(1, 2).reshape(b * c, -1))
            i, j = i + b * c, j + b * n
        return out[0] if len(out) == 1 else torch.cat(out)

    def attend_past(self, p, keep, q, past, at, score):
        """New tokens over the cache, where their own keys already are -> att (M, H * D), Pass with their own scores."""
        l, dev, K, V = self.l, q.device, p.cache.k[self.l], p.cache.v[self.l]
        rows = torch.arange(len(p.x), device=dev) if keep.rows is None else keep.rows
        lens = p.cache.len[l, p.slots]
        if max(p.n) == 1 and score is None and (len(p.n) == 1 or (
                len(rows) == p.cache.rows and bool((lens == lens[0]).all() and (p.slots.diff() == 1).all()))):
            first, C = int(p.slots[0]), int(lens[0])       # decode, and every query sees all keys of its row: no mask, no copies
            k, v = (t[first:first + len(rows), :, :C] for t in (K, V))
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True).flatten(1), p
        if max(p.n) == 1:  # decode: every cache row in one product, so that no keys are copied; idle rows are dropped
            slots, last = p.slots.to(dev)[rows], past.to(dev)[rows]
            C, every = int(p.cache.len[l].max()), last.new_zeros(p.cache.rows).index_copy(0, slots, last)
            if len(rows) == 1:
                K, V, every, slots = (*(t[int(slots):int(slots) + 1] for t in (K, V)), last, slots * 0)
            qs = q.new_zeros(len(every), *q.shape[1:]).index_copy(0, slots, q).unflatten(1, (self.c.n_kv_head, -1))
            w = (qs @ K[:, :, :C].transpose(2, 3)).float() * self.c.head_dim ** -0.5       # (rows, Hkv, g, C)
            w = w.masked_fill(torch.arange(C, device=dev) > every[:, None, None, None], -torch.inf).softmax(-1)
            att = (w.to(q.dtype) @ V[:, :, :C]).flatten(1)[slots]
            if score is not None:
                p = p.with_own(rows, *own_score(w.mean((1, 2))[slots][:, None], last[:, None]))
            return att, p
        out, i = [], 0
        for b, n in enumerate(keep.counts.tolist()):  # several new tokens: teacher-forced scoring
            if n:
                r, s = slice(i, i + n), int(p.slots[b])
                last = past[b] + (torch.arange(n, device=dev) if at is None else at[r])
                k, v = (t[s:s + 1, :, :int(p.cache.len[l, s])] for t in (K, V))
                mask = torch.arange(k.shape[2], device=dev) <= last[:, None]
                o = F.scaled_dot_product_attention(q[r].transpose(0, 1)[None], k, v, mask, enable_gqa=True)
                out.append(o[0].transpose(0, 1).reshape(n, -1))
                if score is not None:
                    probs = attention_probs(q[None, r], k.transpose(1, 2), last[None])
                    p = p.with_own(rows[r], *own_score(probs, last[None]))
            i += n
        return torch.cat(out), p

    def observe(self, p, keep, q, k, stored, at, window):
        """Refresh the score table (method section 4): the attention each stored key of a prompt gets from the prompt's last
        `window` computed queries ("mean": from all, 64 at a time), and what each decoded token gives itself."""
        dev = q.device
        rows = torch.arange(len(p.x), device=dev) if keep.rows is None else keep.rows
        key_rows = rows if at is None else torch.arange(len(p.x), device=dev)
        kset = keep.set_counts if at is None else p.set_counts
        score, rank, i, j = p.score.clone(), p.rank.clone(), 0, 0
        shapes = (t.tolist() for t in (keep.counts, stored, keep.set_counts, kset))
        for f, b, (c, m, qs, ks, size, n) in runs(*shapes, p.n_set, p.n):
            qb, kb = q[i:i + b * c].unflatten(0, (b, c)), k[j:j + b * m].unflatten(0, (b, m))
            last = torch.arange(c, device=dev).expand(b, c) if at is None else at[i:i + b * c].view(b, c)
            if qs:
                first = 0 if window == "mean" else max(0, qs - window)
                got = sum(attention_probs(qb[:, lo:min(lo + 64, qs)], kb[:, :ks], last[:, lo:min(lo + 64, qs)]).sum(1)
                          for lo in range(first, qs, 64))
                viewers = (last[:, first:qs, None] >= torch.arange(ks, device=dev)).sum(1)
                score[key_rows[j:j + b * m].view(b, m)[:, :ks]] = relative_score(got / viewers, ks)
                whole = slice(p.start[f], p.start[f] + b * n)  # rank over the prompt, skipped tokens by their older score
                order = score[whole].view(b, n)[:, :size].argsort(dim=1, stable=True).argsort(dim=1)
                rank[whole].view(b, n)[:, :size] = order / max(size - 1, 1)
            if qs < c and p.own_scores:
                own = own_score(attention_probs(qb[:, qs:], kb, last[:, qs:]), last[:, qs:])
                score[rows[i:i + b * c].view(b, c)[:, qs:]], rank[rows[i:i + b * c].view(b, c)[:, qs:]] = own
            i, j = i + b * c, j + b * m
        return p.next(score=score, rank=rank)

    def masked(self, p, keep, kv, score):
        """The same function on all rows, with 0/1 gates instead of gathers; gates carry straight-through gradients.

        A skipped token's row is still computed (it sees its own key), so that its gate learns what the skip loses.
        """
        x, rows = p.x, keep.rows
        gate = keep.gate if keep.gate is not None else torch.ones_like(p.place) if rows is None else keep.mask.float()
        a, skipped, missing = self.norm1(x), x, None
        if p.forecast is not None:
            update, missing = p.forecast
            skipped, missing = x + update, missing * (1 - gate.to(x.dtype)[:, None]) if kv == "keep" else None
            p = p.next(forecast=None)
        q, (k, v) = self.queries(a, p.rope), self.keys_values(a, p.rope, missing)
        out = []
        for i, n in zip(p.start, p.n):
            qs, ks, vs = (t[i:i + n].transpose(0, 1) for t in (q, k, v))
            ks, vs = (t.repeat_interleave(self.c.n_head // self.c.n_kv_head, 0) for t in (ks, vs))
            w = (qs @ ks.transpose(1, 2)).float() * self.c.head_dim ** -0.5
            w = w.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
            w = (w - w.detach().amax(-1, keepdim=True)).exp()
            if kv == "drop":
                eye = torch.eye(n, device=x.device)
                w = w * (gate[i:i + n] * (1 - eye) + eye)
            out.append(((w / w.sum(-1, keepdim=True)).to(x.dtype) @ vs).transpose(0, 1).reshape(n, -1))
        if score is not None and (rows is None or len(rows)):
            with torch.no_grad():
                wide = kv == "keep" or rows is None
                p = self.observe(p, keep, q if rows is None else q[rows], k if wide else k[rows],
                                 p.counts if wide else keep.counts, p.local[rows] if wide and rows is not None else None, score)
        return p.next(x=skipped + gate.to(x.dtype)[:, None] * (self.rest(x, torch.cat(out)) - skipped))


# ------------------------------------------------------------------------------------------------
# what really happened

class Stats:
    """Realised sparsity and FLOPs, of prompts ("prefill") and decoded tokens ("decode") apart, per block."""
    def __init__(self, n_layer):
        self.kept = {ph: [0] * n_layer for ph in ("prefill", "decode")}
        self.total = {"prefill": 0, "decode": 0}
        self.flops = {"prefill": 0.0, "decode": 0.0}
        self.dense_flops = {"prefill": 0.0, "decode": 0.0}

    def add(self, other):
        """Count what `other` counted, too."""
        for ph in ("prefill", "decode"):
            self.kept[ph] = [a + b for a, b in zip(self.kept[ph], other.kept[ph])]
            for mine, theirs in ((self.total, other.total), (self.flops, other.flops), (self.dense_flops, other.dense_flops)):
                mine[ph] += theirs[ph]

    def sparsity(self, phase):
        """Share of tokens that skipped, a list over blocks; None before any token of that phase."""
        n = self.total[phase]
        return [1 - k / n for k in self.kept[phase]] if n else None

    def mean(self, phase):
        s = self.sparsity(phase)
        return None if s is None else sum(s) / len(s)

    def saved(self, *phases):
        """Share of the blocks' FLOPs saved (router and scores counted, head not)."""
        dense = sum(self.dense_flops[ph] for ph in phases)
        return 1 - sum(self.flops[ph] for ph in phases) / dense if dense else None


# ------------------------------------------------------------------------------------------------
# the model

class FTPModel(nn.Module):
    """A frozen LLaMA-family model with token routing. Dense until use() gives it a schedule."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(config.n_layer))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._rope = None
        self.use()

    # -- loading

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read config.json and safetensors (one file or sharded) from "smollm2", a folder or a hub id.

        The model is built without storage, and each tensor goes from the memory-mapped file straight to its place,
        dtype and device, so that the weights are held once. FTPError on anything missing, unknown or misshapen.
        """
        folder = find_model(path)
        try:
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as e:
            raise FTPError(f"--model: {folder}/config.json is not readable ({e}); give a Hugging Face model folder") from None
        with torch.device("meta"):
            model = cls(Config.from_hf(raw, f"--model {path}"))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FTPError(f"--model: no .safetensors file in {folder}; convert the checkpoint with transformers' save_pretrained")
        want = {hf_name(n): n for n in model.state_dict() if not (n == "head.weight" and model.config.tied)}
        try:
            for file in files:
                with safe_open(file, "pt") as f:
                    for name in f.keys():
                        if name in want:
                            mine = want.pop(name)
                            t = f.get_tensor(name).to(device=device, dtype=dtype)
                            owner, leaf = model.get_submodule(mine.rpartition(".")[0]), mine.rpartition(".")[2]
                            if t.shape != getattr(owner, leaf).shape:
                                raise FTPError(f"--model: {name} in {file.name} has shape {tuple(t.shape)}, config.json asks for "
                                               f"{tuple(getattr(owner, leaf).shape)}; give a matching folder")
                            if not t.sum(dtype=torch.float32).isfinite():  # one pass, no copy; NaN and inf survive a sum
                                raise FTPError(f"--model: {name} in {file.name} has NaN or infinite values; fetch it again")
                            setattr(owner, leaf, nn.Parameter(t, requires_grad=False))
                        elif name.startswith("model.") and not name.endswith("inv_freq"):
                            raise FTPError(f"--model: {file.name} has a tensor {name} twice or that no LLaMA or Qwen2 block reads; give a plain checkpoint")
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            if isinstance(e, FTPError):
                raise
            raise FTPError(f"--model: {file} is damaged ({str(e).splitlines()[0]}); fetch it again") from None
        if want:
            raise FTPError(f"--model: {folder} lacks {len(want)} tensors, the first {next(iter(want))}; give the whole checkpoint")
        if model.config.tied:
            model.head.weight = model.embed.weight
        model.name = str(path)
        return model.eval()

    @property
    def dtype(self):
        return self.embed.weight.dtype

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def fingerprint(self):
        """Tells models apart: a hash of the shape, and eight weights of the last norm."""
        c = {k: v for k, v in asdict(self.config).items() if k not in ("eos", "max_len")}
        return {"config": hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest()[:16],
                "norm": [round(v, 5) for v in self.norm.weight[:8].float().tolist()]}

    # -- routing

    def use(self, schedule=None, router="static", *, prefill="topk", decode="dense", kv="drop", one_pass=False, score=None,
            forecaster=None, seed=0, mismatch=False):
        """Set how tokens are routed from now on; use() alone goes back to dense. Returns self.

        schedule: Schedule or path. router: Router or path, "static" (position only), "random", "attention" (by score), or any
        function (Pass, s) -> (N,) whose largest values are kept.
        prefill: "topk" (each block keeps its quota) or "argmax" (the router's own decision, as in the paper).
        decode: "dense", "threshold" (calibrated), or "rule" (the paper's: skip blocks with s > 0.5). kv: "drop" or "keep" the K/V of skipped
        tokens. one_pass: decide all blocks from the scores of block 0. score: window W or "mean" (default: the router's).
        forecaster: Forecaster or path; skipped tokens then take its forecast instead of staying as they are.
        mismatch: run a router under another kv, one_pass or presence of a forecaster than it was trained with.
        """
        schedule = Schedule.load(schedule) if isinstance(schedule, (str, Path)) else schedule
        if isinstance(router, (str, Path)) and router not in ("static", "random", "attention"):
            router = Router.load(router)
        for flag, value, known in (("--prefill", prefill, ("topk", "argmax")), ("--kv", kv, ("drop", "keep")),
                                   ("--decode", decode, ("dense", "threshold", "rule"))):
            if value not in known:
                raise FTPError(f"{flag} {value}: unknown; choose from {', '.join(known)}")
        learned = isinstance(router, Router)
        thresholds = None
        if schedule is not None:
            check_fingerprint(schedule.fingerprint, self.fingerprint, "--schedule: it")
            if len(schedule.sparsity) != self.config.n_layer:
                raise FTPError(f"--schedule: it has {len(schedule.sparsity)} blocks, the model {self.config.n_layer}")
            if learned:
                check_fingerprint(router.fingerprint, self.fingerprint, "--router: it")
                if (router.n_layer, router.hidden_size) != (self.config.n_layer, self.config.hidden_size):
                    raise FTPError(f"--router: it is for {router.n_layer} blocks of width {router.hidden_size}, the model has "
                                   f"{self.config.n_layer} of {self.config.hidden_size}")
                now, trained = {"kv": kv, "one_pass": one_pass, "forecaster": forecaster is not None}, router.meta.get("settings") or {}
                was = {k: bool(trained[k]) if k == "forecaster" else trained[k] for k in now if k in trained and not mismatch}
                if differ := [k for k in was if was[k] != now[k]]:
                    raise FTPError("--router: it was trained with " + ", ".join(f"--{k} {was[k]}" for k in differ) + ", this is "
                                   + ", ".join(f"--{k} {now[k]}" for k in differ) + "; give what it was trained with, or --mismatch to run it all the same")
                router = router.to(self.device)
                if schedule.router_id == router.id:
                    thresholds = schedule.decode_threshold
                elif router.meta.get("schedule_id") == schedule.id:
                    thresholds = router.meta.get("decode_threshold")
        if isinstance(forecaster, (str, Path)):
            forecaster = Forecaster.load(forecaster)
        if forecaster is not None:
            check_fingerprint(forecaster.fingerprint, self.fingerprint, "--forecaster: it")
            if (forecaster.a.shape[:2], forecaster.c.shape[1]) != ((self.config.n_layer, self.config.hidden_size),
                                                                   self.config.hidden_size + self.config.kv_bytes(1, 1)):
                raise FTPError("--forecaster: its shape does not fit the model; fit it again with fit_forecaster.py")
            if forecaster.c.device != self.device or forecaster.c.dtype != self.dtype:
                forecaster = forecaster.to(self.device, self.dtype)
        self.forecaster = forecaster
        if learned and "forecast" in router.inputs and forecaster is None:
            raise FTPError("--router: it reads forecasts; give --forecaster, the one it was trained with")
        if prefill == "argmax" and not learned:
            raise FTPError("--prefill argmax: only a trained router decides by argmax; give --router, or --prefill topk")
        if decode == "threshold" and thresholds is None and schedule is not None:
            raise FTPError("--decode threshold: no thresholds are stored for this schedule and router; calibrate_decode() "
                           "or --decode dense")
        self.__dict__["router"] = router  # past nn.Module: the router is no part of the frozen model's parameters
        self.schedule, self.prefill, self.kv, self.one_pass = schedule, prefill, kv, one_pass
        self.decode, self.thresholds, self.score_window = decode, thresholds, score or (router.score if learned else 16)
        self.aim = None          # while calibrating or training: the share of decoded tokens that skips each block
        self._random = torch.Generator().manual_seed(seed)
        self.stats = Stats(self.config.n_layer)
        return self

    def reads_scores(self, l):
        """Whether a decision after block l uses the attention scores that block l can give."""
        if self.schedule is None or self.router in ("static", "random") or (self.one_pass and l > 0):
            return False
        uses = {"score", "rank"} & set(self.router.inputs) if isinstance(self.router, Router) else True
        return bool(uses) and any(0 < s < 1 for s in self.schedule.sparsity[l + 1:])

    def margins(self, l, p, s):
        """The router's preference for computing block l, (N,) float32, its logits (N, 2) if it is learned, and the Pass."""
        if self.router == "random":
            return torch.rand(len(p.x), generator=self._random).to(p.x.device), None, p
        if not isinstance(self.router, Router):
            return (p.score if self.router == "attention" else self.router(p, s)), None, p
        logits, memory = self.router(l, self.router.factors(p, s), p.memory)
        return logits[:, 0] - logits[:, 1], logits, p.next(memory=memory)

    def route(self, l, p, noise=None):
        """Decide block l -> Keep, Pass. noise: None in inference; in training the Gumbel temperature (0 for none), and the
        Keep gets gates with gradients."""
        s = self.schedule.sparsity[l] if self.schedule else 0.0
        if s <= 0:
            return Keep(None, p.counts, p.set_counts), p
        if s >= 1:
            nothing = torch.zeros_like(p.counts)
            return Keep(p.local[:0], nothing, nothing, torch.zeros_like(p.in_set)), p
        if self.forecaster is not None:
            p = p.next(forecast=self.forecaster(l, p.x))
        by_threshold = not p.all_set and self.decode == "threshold"
        margin = logits = None
        if self.router != "static" and (p.any_set or by_threshold):
            margin, logits, p = self.margins(l, p, s)
            if noise:
                u = torch.rand_like(margin).clamp(1e-6, 1 - 1e-6)
                margin = margin + noise * (u.log() - (1 - u).log())   # difference of two Gumbel draws
        # decoded tokens, each by itself
        theta, compute = 0.0, self.decode == "dense" or s <= 0.5
        if by_threshold:
            if self.aim is not None:
                self.thresholds[l] = float(margin.detach()[~p.in_set].quantile(self.aim[l]))
            theta = self.thresholds[l]
            mask = ~p.in_set & (margin >= theta)
        else:
            mask = ~p.in_set & compute
        # the prompt, as a set
        tau = torch.full_like(p.place, theta)
        if p.any_set and self.prefill == "argmax":
            mask = mask | (p.in_set & (margin > 0)) | p.ends
        elif p.any_set and self.router == "static":      # {x_0, x_T-1, x_T-2, ...}
            k = torch.tensor([quota(t, s) for t in p.n_set]).to(p.seq.device)[p.seq]
            mask = mask | (p.in_set & (p.local > p.size - k)) | p.ends
        elif p.any_set:
            chosen, least = by_quota(p, margin, s)
            mask, tau = mask | chosen, torch.where(p.in_set, least, tau)
        # how many: known beforehand for quotas, else only the device knows
        if self.prefill == "argmax" and p.any_set or by_threshold:
            count = torch.zeros(2, len(p.n), device=mask.device).index_add(1, p.seq, torch.stack((mask, mask & p.in_set)).float())
            counts, set_counts = count.long().cpu()
        else:
            set_counts = torch.tensor([quota(t, s) for t in p.n_set])
            counts = set_counts + (p.counts - p.set_counts) * compute
        gate = None
        if noise is not None and logits is not None:
            free = p.in_set & ~p.ends if not by_threshold else ~p.ends
            soft = torch.sigmoid(margin - tau)
            gate = mask + torch.where(free, soft - soft.detach(), 0.0)
            p.trace.append((s, logits, p))
        return Keep(torch.nonzero_static(mask, size=int(counts.sum()))[:, 0], counts, set_counts, mask, gate), p

    def calibrate_decode(self, samples, sparsity=None):
        """Set the thresholds with which decoded tokens skip block l at the rate s_l; returns them.

        samples: [(prompt ids, response ids)], responses run as decoded tokens, each block with the thresholds of the
        blocks before it in place. sparsity: another mean to reach in decode, the schedule's profile scaled to it.
        """
        if not isinstance(self.router, Router):
            raise FTPError("--decode threshold: only a trained router has margins to calibrate; give --router")
        s = self.schedule.sparsity
        scale = 1.0 if sparsity is None else sparsity / self.schedule.mean
        self.aim, self.thresholds, self.decode = [v if v >= 1 else min(v * scale, 0.98) for v in s], [0.0] * len(s), "threshold"
        self.score_rows(*zip(*((a + b, len(a)) for a, b in samples)), rows=[0])
        self.aim, self.stats = None, Stats(self.config.n_layer)
        return self.thresholds

    # -- running

    def begin(self, seqs, n_set, cache=None, slots=None):
        """Pass before block 0 of `seqs`, lists of token ids of which the first n_set[b] are prompt tokens."""
        if not seqs or not all(len(s) for s in seqs):
            raise FTPError("empty prompt: every sequence needs at least one token")
        ids = torch.tensor([t for s in seqs for t in s], device=self.device)
        low, high = int(ids.min()), int(ids.max())
        if high >= self.config.vocab_size or low < 0:
            raise FTPError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}; use the model's tokenizer")
        p = Pass(F.embedding(ids, self.embed.weight), [len(s) for s in seqs], n_set, cache, slots, self.decode == "threshold")
        if p.has_past and p.any_set:
            raise FTPError("a prompt is routed as a whole: it can't be added to a filled cache")
        if p.end > self.config.max_len:
            raise FTPError(f"{p.end} tokens are more than the model's {self.config.max_len} (max_position_embeddings); shorten the text")
        if self._rope is None or len(self._rope[0]) < p.end or self._rope[0].device != ids.device or self._rope[0].dtype != self.dtype:
            angle = torch.arange(max(2 * p.end, 256))[:, None] * rope_frequencies(self.config)
            angle = torch.cat((angle, angle), 1)
            self._rope = tuple(t.to(ids.device, self.dtype) for t in (angle.cos(), angle.sin()))
        p.rope = tuple(t[p.pos] for t in self._rope)
        return p

    def step(self, l, p, masked=False, noise=None):
        """Route and run block l: Pass -> Pass."""
        with torch.profiler.record_function("ftp_routing"):
            keep, p = self.route(l, p, noise)
        self.count(l, p, keep)
        if self.schedule and self.schedule.sparsity[l] >= 1:
            return p
        run = self.blocks[l].masked if masked else self.blocks[l]
        return run(p, keep, self.kv, self.score_window if self.reads_scores(l) else None)

    def count(self, l, p, keep):
        """Add block l of a pass to the realised sparsity and FLOPs."""
        c, st = self.config, self.stats
        removed = self.schedule is not None and self.schedule.sparsity[l] >= 1
        kv_only = self.kv == "keep" and keep.rows is not None and not removed
        sets = keep.set_counts.tolist()
        singles = [n - m for n, m in zip(keep.counts.tolist(), sets)]
        kept, total = (sum(sets), sum(singles)), (sum(p.n_set), sum(p.n) - sum(p.n_set))
        if kv_only:
            seen, in_set = p.pos[keep.rows] + 1, p.in_set[keep.rows]
            pairs = float(seen[in_set].sum()), float(seen[~in_set].sum())
        else:
            past = p.cache.len[l, p.slots].tolist() if p.has_past else [0] * len(sets)
            pairs = (sum(m * (m + 1) for m in sets) / 2, sum(n * (m + h) + n * (n + 1) / 2 for n, m, h in zip(singles, sets, past)))
        learned = isinstance(self.router, Router) and keep.rows is not None and not removed
        for i, ph in enumerate(("prefill", "decode")):
            st.kept[ph][l] += kept[i]
            if l == 0:
                st.total[ph] += total[i]
            st.dense_flops[ph] += c.block_flops(total[i], p.dense_pairs[i])
            st.flops[ph] += c.block_flops(kept[i], pairs[i], (total[i] - kept[i]) * kv_only)
            if self.forecaster is not None and keep.rows is not None and not removed:
                st.flops[ph] += c.forecast_flops(self.forecaster.rank, total[i])
            if learned and (i == 0 or self.decode == "threshold"):
                st.flops[ph] += self.router.flops(total[i])
        if self.reads_scores(l):
            width = math.inf if self.score_window == "mean" else self.score_window
            st.flops["prefill"] += c.score_flops(1, sum(min(m, width) * m for m in sets))

    def through(self, p, masked=False):
        """Run all blocks: Pass -> Pass. FTPError naming the first block whose output is NaN or infinite: a sum of the last states tells
        that there is one, and only then the pass is run again to find it."""
        q, mark = p, p.cache.mark() if p.cache is not None else None
        for l in range(self.config.n_layer):
            q = self.step(l, q, masked)
        if q.x.sum(dtype=torch.float32).isfinite():
            return q
        if mark is not None:
            p.cache.rewind(mark)
        bad = next((l for l in range(self.config.n_layer) if not (p := self.step(l, p, masked)).x.isfinite().all()), None)
        if bad is None:
            return q  # finite values whose sum is not
        if mark is not None:
            p.cache.rewind(mark)
        rows = (~p.x.isfinite().all(1)).nonzero()[:, 0]
        raise FTPError(f"NaN or infinite activations after block {bad}, in {len(rows)} of {len(p.x)} tokens, the first at position "
                       f"{int(p.pos[rows[0]])} of sequence {int(p.seq[rows[0]])}; use --dtype float32, and check the forecaster if there is one")

    def logits(self, x):
        """Next-token logits (M, vocab) of hidden states x (M, d) as they leave the last block."""
        return self.head(self.norm(x))

    def score_rows(self, seqs, n_prompt, rows=None, masked=False):
        """One pass without a cache: prompts as sets, the tokens after n_prompt[b] as decoded tokens (teacher-forced).

        Returns logits of the packed rows `rows` (all by default). Equal to a prefill followed by decoding those tokens.
        """
        with torch.no_grad():
            p = self.through(self.begin(list(seqs), list(n_prompt)), masked)
            return self.logits(p.x if rows is None else p.x[rows])

    def response_states(self, samples, max_tokens=2048, joint=False):
        """Last hidden states (R, d) of the rows that predict the responses of [(prompt ids, response ids)], and the sample of
        each row (R,): the quantity that teacher and routed model are compared by. joint routes the responses with their prompts."""
        states, owner = [], []
        with torch.inference_mode():
            for first, group in batches(samples, max_tokens):
                p, (rows, whose) = self.through(self.begin_samples(group, joint)), response_rows(group)
                states.append(p.x[rows])
                owner.append(whose + first)
        return torch.cat(states), torch.cat(owner)

    def begin_samples(self, samples, joint=False):
        return self.begin([a + b for a, b in samples], [len(a) + len(b) * joint for a, b in samples])

    def forward(self, input_ids, n_prompt=None, masked=False, attention_mask=None):
        """input_ids (B, T) int64 -> logits (B, T, vocab). The first n_prompt tokens (default: all T) are routed as a set,
        so with a schedule in use only their last position is causal; the rest are routed as decoded tokens.
        attention_mask (B, T): 0 at pads, left or right, which are no tokens: they get no position or quota, and logits 0."""
        B, T = input_ids.shape
        real = torch.ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        seqs = [ids[m].tolist() for ids, m in zip(input_ids.cpu(), real)]
        logits = self.score_rows(seqs, [len(s) if n_prompt is None else min(n_prompt, len(s)) for s in seqs], masked=masked)
        if attention_mask is None:
            return logits.view(B, T, -1)
        out = logits.new_zeros(B, T, logits.shape[1])
        out[real.to(out.device)] = logits
        return out

    @torch.inference_mode()
    def extend(self, seqs, cache, slots=None, prompt=False, last_only=False):
        """Run new tokens into the cache: prompts (prompt=True, routed as sets) or decoded tokens.

        seqs: one list of token ids a sequence; slots (B,) its cache row, by default in order. Returns packed logits
        (sum of lengths, vocab), or (B, vocab) of the last tokens with last_only.
        """
        slots = torch.arange(len(seqs)) if slots is None else slots
        p = self.through(self.begin(seqs, [len(s) if prompt else 0 for s in seqs], cache, slots))
        cache.seen[slots] += p.counts
        return self.logits(p.x[torch.tensor(p.start) + p.counts - 1] if last_only else p.x)

    def new_cache(self, rows):
        return KVCache(self.config, rows, self.dtype, self.device)

    def stream(self, prompts, max_new_tokens=64, temperature=0.0, top_p=1.0, seed=0, eos=None):
        """Generate token by token: yields a list with the new token of each prompt, None where one has ended.

        temperature 0 is greedy. Ends at any of `eos` (default: the model's end tokens), which is yielded.
        """
        longest = max(map(len, prompts), default=0) + max_new_tokens - 1  # the last new token is not run
        if longest > self.config.max_len:
            raise FTPError(f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones exceed the model's {self.config.max_len} "
                           "(max_position_embeddings); shorten the prompt or lower max_new_tokens")
        eos = set(self.config.eos if eos is None else eos)
        rng = torch.Generator(self.device).manual_seed(seed)
        self.cache = cache = self.new_cache(len(prompts))
        alive = torch.arange(len(prompts))
        logits = self.extend(prompts, cache, prompt=True, last_only=True)
        for i in range(max_new_tokens):
            new = sample(logits, temperature, top_p, rng).tolist()
            step = [None] * len(prompts)
            for b, t in zip(alive.tolist(), new):
                step[b] = t
            yield step
            go = [j for j, t in enumerate(new) if t not in eos]
            if not go or i + 1 == max_new_tokens:
                return
            alive = alive[go]
            logits = self.extend([[new[j]] for j in go], cache, alive, last_only=True)

    def generate(self, prompts, max_new_tokens=64, **kw):
        """Lists of token ids -> lists of new token ids, each up to its end token; arguments as stream()."""
        out = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **kw):
            for o, t in zip(out, step):
                if t is not None:
                    o.append(t)
        return out


def sample(logits, temperature, top_p, rng):
    """Next tokens (B,) from logits (B, vocab): greedy at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    prob, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    prob = prob.masked_fill(prob.cumsum(-1) - prob >= top_p, 0)
    return token.gather(1, torch.multinomial(prob, 1, generator=rng))[:, 0]


def rope_frequencies(c):
    """Rotary frequencies (head_dim / 2,) float32, with LLaMA-3's scaling where the config has it (Llama 3.1 report)."""
    f = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if c.rope_scaling:
        r = c.rope_scaling
        turns = r["original_max_position_embeddings"] * f / (2 * math.pi)  # rotations within the original context
        share = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        f = f * (share + (1 - share) / r["factor"])
    return f


def batches(samples, max_tokens):
    """Groups of neighbouring samples of at most max_tokens together: yields (index of the first, list of samples)."""
    group, first, size = [], 0, 0
    for i, s in enumerate(samples):
        n = len(s[0]) + len(s[1])
        if group and size + n > max_tokens:
            yield first, group
            group, first, size = [], i, 0
        group.append(s)
        size += n
    yield first, group


def response_rows(samples):
    """Rows of packed (prompt + response) sequences whose logits predict a response token, and the sample of each."""
    rows, owner, start = [], [], 0
    for i, (prompt, response) in enumerate(samples):
        first = start + len(prompt) - 1
        rows += range(first, first + len(response))
        owner += [i] * len(response)
        start += len(prompt) + len(response)
    return torch.tensor(rows), torch.tensor(owner)


def by_sample(values, owner):
    """Mean of values (R,) over each sample, (samples,) float32 on the CPU."""
    n = owner.bincount()
    return torch.zeros(len(n)).index_add(0, owner, values.float().cpu()) / n


def kl_divergence(teacher, student):
    """KL(teacher || student) of next-token distributions, nats per token: logits (M, vocab) -> (M,) float32."""
    t, s = (z.float().log_softmax(-1) for z in (teacher, student))
    return (t.exp() * (t - s)).sum(-1)


def hf_name(name):
    """Our parameter name -> the one in a Hugging Face checkpoint."""
    for a, b in (("blocks.", "model.layers."), ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"),
                 (".gate.", ".mlp.gate_proj."), (".up.", ".mlp.up_proj."), (".down.", ".mlp.down_proj."),
                 *((f".{m}.", f".self_attn.{m}_proj.") for m in "qkvo")):
        name = name.replace(a, b)
    return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight"}.get(name, name)


def find_model(path):
    """Folder of a model: "smollm2" (made by prepare.py), a local folder, or a hub id, fetched into the hub's cache."""
    if str(path) == "smollm2":
        if not (HOME / "smollm2" / "config.json").exists():
            raise FTPError("--model smollm2: not there yet; run `python prepare.py` first")
        return HOME / "smollm2"
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise FTPError(f"--model {path}: no such folder; give \"smollm2\", a folder, or a hub id like owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as e:  # the hub client raises many kinds, all meaning the same to the user
        raise FTPError(f"--model {path}: not fetched from the hub ({str(e).splitlines()[0]}); check the id, or give a local folder") from None
