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
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HOME = Path(os.environ.get("FTP_HOME", Path(__file__).resolve().parent / "models"))  # where "smollm2" lies
FACTORS = ("position", "score", "rank", "sparsity")  # the paper's four inputs of the router
INPUTS = {"position": 3, "place": 1, "score": 1, "rank": 1, "sparsity": 1, "forecast": 1}  # numbers each enters with; "hidden" has hidden_size
PICKLED = ("; pickled weights are not read, as reading them can run code: convert them once, in a place you trust it, by python -c \"from transformers "
           "import AutoModelForCausalLM as M, AutoTokenizer as T; [X.from_pretrained('OLD').save_pretrained('NEW') for X in (M, T)]\"")
SELECTIONS = ("static", "random", "attention", "progressive")  # routers that need no training
NEAR = 64  # tokens within which the absolute distance to a prompt's start and end is told apart


class FTPError(ValueError):
    """An expected mistake: its text is one line that names the flag or file and the mend."""
    rank = -1  # of several processes the one that made it, once the others know


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
    qk_norm: bool = False                             # Qwen3: queries and keys are normalised, head by head, before rotary
    nope: tuple = ()                                  # SmolLM3: blocks without rotary embedding
    shortcut: bool = False                            # a matrix on every residual (SliceGPT)
    widths: list | None = None                        # (K/V heads, MLP channels) of each block, where they differ
    FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model_type; Qwen1.5 and Qwen2.5 say qwen2, SmolLM2 says llama

    @classmethod
    def from_hf(cls, c, source="--model", generation=None):
        """Config from the dict `c` of a config.json; the end tokens of `generation`, the dict of a generation_config.json, are added.
        FTPError names any feature this model file lacks."""
        whole = ("max_position_embeddings", "sliding_window", "no_rope_layer_interval")
        if wrong := misfit(c, {"model_type": str, "rope_parameters": (dict, None), "rope_scaling": (dict, None), "no_rope_layers": ([int], None)}
                           | dict.fromkeys(whole, (int, None))) or misfit(generation or {}, {}, "generation_config.json"):
            raise FTPError(f"{source}: config.json is damaged ({wrong}); give a Hugging Face model folder")
        sliced = c.get("model_type") == "slicegpt"
        kind = c.get("sliced_from") if sliced else c.get("model_type")
        if kind not in cls.FAMILIES:
            raise FTPError(f"{source}: model_type {kind!r} is not supported; use a model whose model_type is one of {', '.join(cls.FAMILIES)}")
        rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        max_len, window = c.get("max_position_embeddings", 2048), None
        if kind == "mistral" or c.get("use_sliding_window"):  # a Mistral config that is silent about its window has 4096
            window = c.get("sliding_window", 4096)
        for bad, why in ((c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
                         (kind != "qwen2" and c.get("attention_bias"), "attention_bias"),
                         (c.get("mlp_bias"), "mlp_bias"),
                         (window and window < (max_len or 0), f"sliding-window attention ({window} of {max_len} tokens; within the window it changes "
                          f"nothing, so \"max_position_embeddings\": {window} in config.json would do)"),
                         (c.get("quantization_config"), "a quantised checkpoint"),
                         ((rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1, "partial_rotary_factor"),
                         (rope_type not in ("default", "llama3"), f"rope_type {rope_type!r}")):
            if bad:
                raise FTPError(f"{source}: {why} is not supported; use a model without it")
        try:
            d, h, n = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
            ends = [e for o in (c, generation or {}) for e in (o.get("eos_token_id"),) if e is not None]
            layers = range(min(n, 1000) if kind == "smollm3" else 0)  # more are refused below
            rotary = c.get("no_rope_layers") or [(l + 1) % c.get("no_rope_layer_interval", 4) for l in layers]
            made = cls(c["vocab_size"], d, c["intermediate_size"], n, h,
                       c.get("num_key_value_heads") or h, c.get("head_dim") or d // h, c.get("rms_norm_eps", 1e-6),
                       rope.get("rope_theta") or c.get("rope_theta") or (2e6 if kind == "smollm3" else 1e4),
                       rope if rope_type == "llama3" else None, kind == "qwen2",
                       bool(c.get("tie_word_embeddings", kind == "smollm3")), max_len,
                       tuple(sorted({t for e in ends for t in (e if isinstance(e, list) else [e])})),
                       kind == "qwen3", tuple(l for l in layers if not rotary[l]), sliced, c.get("widths"))
        except (KeyError, IndexError, TypeError, ZeroDivisionError) as e:
            raise FTPError(f"{source}: config.json has no usable {e}; give a complete LLaMA-family folder") from None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_layer", "n_head", "n_kv_head", "head_dim", "max_len")
        scale = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), float)
        wrong = misfit(asdict(made) | {"eos": list(made.eos)}, dict.fromkeys(sizes, int) | {
            "rms_eps": float, "rope_theta": float, "rope_scaling": (None, scale), "eos": [int], "widths": ([[int]], None)}, "config.json")
        if not wrong and not (all(0 < getattr(made, k) < 1 << 31 for k in sizes) and made.n_layer <= 1000 and made.n_head % made.n_kv_head == 0
                              and made.head_dim % 2 == 0 and made.rope_theta > 0 and made.rms_eps >= 0
                              and (made.widths is None or [len(w) for w in made.widths] == [2] * made.n_layer and min(map(min, made.widths)) > 0)):
            wrong = f"sizes out of range: {made}"
        if wrong:
            raise FTPError(f"{source}: {wrong}; give a complete LLaMA-family folder")
        return made

    def block(self, l):
        """The config of block l."""
        if not self.widths:
            return self
        kv, mlp = self.widths[l]
        return replace(self, n_head=kv * (self.n_head // self.n_kv_head), n_kv_head=kv, intermediate_size=mlp, widths=None)

    @property
    def parameters(self):
        """Parameters of the whole model."""
        heads = self.n_head + 2 * self.n_kv_head
        block = self.p_attn + self.p_mlp + 2 * self.hidden_size + (heads * self.qkv_bias + 2 * self.qk_norm) * self.head_dim
        return self.n_layer * block + self.vocab_size * self.hidden_size * (2 - self.tied) + self.hidden_size

    @property
    def p_attn(self):
        """Parameters of a block's q, k, v and o maps, and of the residual's where it has one."""
        return self.hidden_size * (self.head_dim * 2 * (self.n_head + self.n_kv_head) + self.shortcut * self.hidden_size)

    @property
    def p_kv(self):
        """Parameters of a block's k and v maps, what a skipped token costs under the K/V policy `keep`."""
        return self.hidden_size * self.head_dim * 2 * self.n_kv_head

    @property
    def p_mlp(self):
        return self.hidden_size * (3 * self.intermediate_size + self.shortcut * self.hidden_size)

    def block_flops(self, tokens, pairs, kv_only=0, mlp_tokens=None):
        """FLOPs of one block: `tokens` computed, `pairs` query-key pairs attended, `kv_only` tokens with K/V alone; mlp_tokens: those
        that run the MLP, where they are not those that run the attention."""
        return (2 * self.p_attn * tokens + 2 * self.p_mlp * (tokens if mlp_tokens is None else mlp_tokens)
                + 4 * self.n_head * self.head_dim * pairs + 2 * self.p_kv * kv_only)

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

    def memory(self, batch, length, sparsity, itemsize, kv="drop"):
        """Bytes that a prefill of `batch` prompts of `length` tokens needs under a list of sparsities, K/V `kv`, numbers of `itemsize` bytes,
        no forecaster: {"weights", "kv" (all blocks, with the cache's room for 32 more tokens), "activations" (of the largest block),
        "total" (weights, and the peak of activations and the keys and values so far)}. Activations are what Block.forward holds when its MLP
        has expanded; block 0, where no token skips, mostly has the most."""
        d, D, Q, K, N = self.hidden_size, self.head_dim, self.n_head * self.head_dim, self.n_kv_head * self.head_dim, batch * length
        stored, peak, largest = 0, 0, 0
        for s in sparsity:
            M = batch * quota(length, s)
            routed, keep = 0 < M < N, kv == "keep" and 0 < M < N
            projected = M * 2 * Q + N * (3 * K + d) if keep else M * (2 * Q + 3 * K)  # products, and their rotated copies
            held = N * (d + 2 * D) + routed * M * (d + 2 * D) + projected + M * (Q + 3 * d + 2 * self.intermediate_size)
            stored += ((N if keep else M) + 32 * batch) * 2 * K if M else 0
            peak, largest = max(peak, stored + held), max(largest, held)
        return {k: v * itemsize for k, v in (("weights", self.parameters), ("kv", stored), ("activations", largest), ("total", self.parameters + peak))}

    def prefill_flops(self, T, sparsity, kv="drop", router=None, window=16, head=1, forecast_rank=None, parts=None):
        """FLOPs of the prefill of one prompt of T tokens under a list of sparsities (method section 7).

        `router` adds its MLP and the scores (`window` queries a block); `head` counts the positions that get logits.
        forecast_rank: rank of the forecaster, if one is in use. parts: as in Schedule.
        """
        total = self.head_flops(head)
        for l, s in enumerate(sparsity):
            k, c = quota(T, s), self.block(l)
            if parts and parts[l] != "both":
                attend = k * (parts[l] == "attention")
                total += c.block_flops(attend, attend * (attend + 1) / 2, mlp_tokens=k - attend)
            elif kv == "keep" and 0 < s:  # kept queries see every earlier key; which ones are kept is the static order
                pairs = sum(range(T - k + 2, T + 1)) + 1 if k else 0
                total += c.block_flops(k, pairs, T - k)
            else:
                total += c.block_flops(k, k * (k + 1) / 2)
            if router is not None and 0 < s < 1:
                total += router.flops(T)
            if forecast_rank and 0 < s < 1:
                total += self.forecast_flops(forecast_rank, T)
            if router is not None and {"score", "rank"} & set(router.inputs) and any(0 < v < 1 for v in sparsity[l + 1:]):
                total += c.score_flops(min(window, k), k)
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
        w1, b1, w2, b2 = (t[g].to(f.device) for t in (self.w1, self.b1, self.w2, self.b2))  # to the block's device, if the model has several
        z = torch.addmm(b1, f, w1)
        if self.kind == "recurrent":
            z = z if h is None else z + h @ self.u.to(f.device)
            z = h = torch.tanh(z)
        else:
            z = F.relu(z)
        return torch.addmm(b2, z, w2), h

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
        a, b, c = (t[l].to(x.device) for t in (self.a, self.b, self.c))
        out = torch.addmm(c, F.rms_norm(x, x.shape[1:]) @ a, b) if self.rank else c.expand(len(x), -1)
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

    k[l], v[l] (rows, n_kv_head, capacity, head_dim), rotated by true position; len (n_layer, rows), a host array, says how many
    entries count. The keys of a row are in the order of their positions, all of them older than a new query.
    """
    def __init__(self, config, rows, dtype):
        self.config, self.rows, self.dtype = config, rows, dtype
        self.k: list = [None] * config.n_layer
        self.v: list = [None] * config.n_layer
        self.len = np.zeros((config.n_layer, rows), dtype=np.int64)
        self.seen = np.zeros(rows, dtype=np.int64)    # tokens that went by, the next position

    def append(self, l, slots, counts, k, v):
        """Add k, v (sum(counts), n_kv_head, head_dim), packed by sequence, to the rows `slots` (B,) of block l."""
        old = self.len[l, slots]
        self.len[l, slots] = old + counts
        need, have = int(self.len[l].max()), 0 if self.k[l] is None else self.k[l].shape[2]
        if need > have:
            cap = need + 32 if have == 0 else max(need + 32, have * 5 // 4)  # amortised growth
            for store in (self.k, self.v):
                new = torch.zeros(self.rows, k.shape[1], cap, self.config.head_dim, dtype=self.dtype, device=k.device)
                if have:
                    new[:, :, :have] = store[l]
                store[l] = new
        first, at, n = int(slots[0]), int(old[0]), int(counts[0])
        if even(slots, old, counts):
            for store, t in ((self.k[l], k), (self.v[l], v)):
                store[first:first + len(slots), :, at:at + n] = t.unflatten(0, (-1, n)).transpose(1, 2)
            return
        row = torch.from_numpy(slots.repeat(counts)).to(k.device)
        col = torch.from_numpy(np.arange(len(k)) + (old - counts.cumsum() + counts).repeat(counts)).to(k.device)
        self.k[l][row, :, col] = k
        self.v[l][row, :, col] = v

    def mark(self):
        """The cache's present state, for rewind()."""
        return self.len.copy(), self.seen.copy()

    def rewind(self, mark):
        """Forget all that came after `mark`."""
        self.len, self.seen = mark[0].copy(), mark[1].copy()

    def bytes(self):
        """Bytes of the stored entries, (used, allocated)."""
        item = [self.config.block(l).kv_bytes(1, self.dtype.itemsize) for l in range(self.config.n_layer)]
        return (sum(n * i for n, i in zip(self.len.sum(1).tolist(), item)),
                sum(k.shape[0] * k.shape[2] * i for k, i in zip(self.k, item) if k is not None))


def even(slots, *lists):
    """Whether neighbouring cache rows take part, alike in each of `lists`: arrays of the length of slots."""
    n = len(slots)
    return n == 1 and int(lists[-1][0]) > 0 or bool((slots[1:] - slots[:-1] == 1).all() and all((a == a[0]).all() for a in lists) and lists[-1][0])


# ------------------------------------------------------------------------------------------------
# one pass of packed sequences through the blocks

class Pass:
    """State between two blocks: packed hidden states, positions and the table of latest attention scores.

    x (N, d); counts, set_counts, slots: host arrays. Of the n[b] tokens of sequence b the first n_set[b] are a prompt, routed together as a set; the others
    are decoded tokens, each routed by itself from what exists at its time (method section 6). score and rank (N,) are
    the router's factors 2 and 3. A Pass is replaced, never written to: keeping one keeps the state before a block.
    """
    rope: torch.Tensor  # (2, N, head_dim), see rotate(); set by FTPModel.begin()

    def __init__(self, x, n, n_set, cache, slots, own_scores):
        dev = x.device
        self.full, self.held, self.n, self.n_set, self.cache, self.slots = x, None, n, n_set, cache, slots
        self.own_scores = own_scores                  # whether decoded tokens need a score of their own
        self.counts, self.set_counts = np.array(n), np.array(n_set)
        self.start = [0, *accumulate(n)][:-1]
        past = np.zeros_like(self.counts) if cache is None else cache.seen[slots]
        self.has_past, self.end = bool(past.any()), int((past + self.counts).max())
        # the same facts for each packed row
        seq = np.arange(len(n)).repeat(self.counts)
        local = np.arange(len(seq)) - np.array(self.start)[seq]
        size = self.set_counts[seq]
        in_set, pos = local < size, local + past[seq]
        self.all_set, self.any_set = bool(in_set.all()), bool(in_set.any())
        self.dense_pairs = [float((pos[m] + 1).sum()) for m in (in_set, ~in_set)]
        # factor 1: place in the prompt, 0 first .. 1 newest; a decoded token is the newest of its time
        place = np.where(in_set, local / np.maximum(size - 1, 1), 1.0).astype(np.float32)
        self.seq, self.local, self.pos, self.in_set, self.size, self.place = (
            torch.from_numpy(t).to(dev) for t in (seq, local, pos, in_set, size, place))
        self.every = torch.arange(len(seq), device=dev)
        self.ends = self.in_set & ((self.local == 0) | (self.local == self.size - 1))   # always kept
        self.score, self.rank = torch.zeros_like(self.place), torch.zeros_like(self.place)
        self.known = {}                               # what the blocks have in common: position factors, static keep sets
        self.memory = None                            # hidden layer of a recurrent router
        self.forecast = None                          # what Forecaster gives for the block to come
        self.alive = torch.ones_like(self.in_set)         # tokens that progressive selection has not dropped yet
        self.trace = []                               # in training: (sparsity, router logits, Pass) a decision

    @property
    def x(self):
        """Hidden states (N, d); rows held back by a block whose keep set the next one may share are put in place."""
        if self.held is not None:
            (rows, h), self.held = self.held, None
            self.full = self.full.index_copy(0, rows, h)
        return self.full

    def next(self, **changed):
        new = Pass.__new__(Pass)
        new.__dict__.update(self.__dict__)
        if "x" in changed:
            new.full, new.held = changed.pop("x"), None
        new.__dict__.update(changed)
        return new

    def to(self, device):
        """This Pass on `device`; host arrays stay, and what its blocks had in common is found anew there."""
        if self.place.device == device:
            return self
        tensors = {k: v.to(device) for k, v in vars(self.next(x=self.x)).items() if torch.is_tensor(v)}
        return self.next(**tensors, held=None, known={})

    def with_own(self, rows, score, rank):
        """This Pass with the scores and ranks of decoded tokens set."""
        return self.next(score=self.score.index_copy(0, rows, score.flatten()),
                         rank=self.rank.index_copy(0, rows, rank.flatten()))


class Keep:
    """Tokens that compute a block: rows (M,) ascending, or None for all; counts (B,) of them in each sequence, set_counts
    of these in its prompt, host arrays; mask (N,) the rows as booleans; gate (N,) the same with a straight-through gradient;
    rope their rotary tables."""
    def __init__(self, p, rows, counts, set_counts, mask=None, gate=None):
        self.rows, self.counts, self.set_counts, self.mask, self.gate = rows, counts, set_counts, mask, gate
        self.rope = p.rope if rows is None else p.rope.index_select(1, rows)

    def decoded(self, p):
        """Those of them that are decoded tokens of the Pass."""
        counts, mask = self.counts - self.set_counts, ~p.in_set if self.mask is None else self.mask & ~p.in_set
        return Keep(p, torch.nonzero_static(mask, size=int(counts.sum()))[:, 0], counts, np.zeros_like(counts), mask)


def routing_span():
    """Marks routing for the profiler; nothing when none runs, as the mark itself costs as much as ten operators."""
    return torch.profiler.record_function("ftp_routing") if torch.autograd._profiler_enabled() else nullcontext()


def runs(*lists):
    """Neighbouring sequences of equal shape, so that they share one kernel: yields (first, how many, values)."""
    first = 0
    for values, group in groupby(zip(*lists)):
        b = len(list(group))
        yield first, b, values
        first += b


def attention_probs(q, k, last=None):
    """Probabilities (b, H, Q, K) of queries q (b, Q, H, D) over keys k (b, K, Hkv, D), float32.

    last (b, Q): index of the newest key each query sees; None: the queries are those of the last Q keys.
    """
    (b, Q, H, D), K, kv = q.shape, k.shape[1], k.shape[2]
    q = (q * D ** -0.5).view(b, Q, kv, -1, D).permute(0, 2, 3, 1, 4).reshape(b * kv, -1, D)
    w = torch.bmm(q, k.permute(0, 2, 3, 1).reshape(b * kv, D, K)).float().view(b, H, Q, K)
    if last is None:
        w[..., K - Q:].masked_fill_(torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    else:
        w.masked_fill_(torch.arange(K, device=q.device) > last[:, None, :, None], -torch.inf)
    return w.softmax(-1)


def by_quota(p, margin, s):
    """The quota(T, s) tokens of each prompt with the largest margin (N,), first and last always among them -> mask (N,)."""
    m, mask = margin.detach().masked_fill(p.ends, torch.inf), torch.zeros_like(p.in_set)
    for f, b, (n, size) in runs(p.n, p.n_set):
        if size:
            these = slice(p.start[f], p.start[f] + b * n)
            mask[these].view(b, n).scatter_(1, m[these].view(b, n)[:, :size].topk(quota(size, s), 1, sorted=False).indices, True)
    return mask


def least_kept(p, margin, mask):
    """The smallest margin kept in each token's prompt, (N,): a quota's threshold. At most 1e4, for prompts that keep their ends alone."""
    m = margin.detach().masked_fill(~(mask & p.in_set) | p.ends, 1e4)
    return m.new_full((len(p.n),), 1e4).scatter_reduce(0, p.seq, m, "amin")[p.seq]


def relative_score(p, keys):
    """Attention p among `keys` keys -> [0, 1]: log(1 + p * keys) / log(1 + keys), so that length does not matter."""
    return torch.log1p(p * keys) / (torch.log1p(keys) if torch.is_tensor(keys) else math.log1p(keys))


def own_score(p, last):
    """Score and rank of decoded tokens: attention p (b, Q, K) each gives itself, at key `last`, among what it sees."""
    own = p.gather(-1, last[..., None])
    keys = last + 1
    lower = ((p < own) & (torch.arange(p.shape[-1], device=p.device) <= last[..., None])).sum(-1)
    return relative_score(own[..., 0], keys), lower / (keys - 1).clamp(min=1)


def rotate(x, rope):
    """Rotary embedding in the half-rotation layout. x (N, heads, D), rope (2, N, D): cos, and sin with its first half negated."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope
    return torch.addcmul(x * cos[:, None], torch.cat((b, a), -1), sin[:, None])


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
        self.l, self.c, self.rotary = l, c, l not in c.nope
        d, D = c.hidden_size, c.head_dim
        self.norm1 = nn.RMSNorm(d, c.rms_eps)
        self.qkv = nn.Linear(d, (c.n_head + 2 * c.n_kv_head) * D, c.qkv_bias)   # rows: all queries, all keys, all values
        self.q_norm, self.k_norm = (nn.RMSNorm(D, c.rms_eps) if c.qk_norm else None for _ in "qk")
        self.o = nn.Linear(c.n_head * D, d, False)
        self.norm2 = nn.RMSNorm(d, c.rms_eps)
        self.gate = nn.Linear(d, c.intermediate_size, False)                    # one product with up measured slower on CPUs
        self.up = nn.Linear(d, c.intermediate_size, False)
        self.down = nn.Linear(c.intermediate_size, d, False)
        self.shortcut1, self.shortcut2 = (nn.Linear(d, d, False) if c.shortcut else nn.Identity() for _ in range(2))

    def heads(self, a, rope, first=0, last=None, missing=None):
        """Projections first..last (heads, of n_head queries + n_kv_head keys + n_kv_head values) of normalised states a (N, d), queries and
        keys normalised (Qwen3) and rotated -> (N, heads, head_dim). missing (N, 2 * n_kv_head * head_dim) is added to keys and values."""
        c, D = self.c, self.c.head_dim
        last = c.n_head + 2 * c.n_kv_head if last is None else last
        rows, bias = slice(first * D, last * D), self.qkv.bias
        t = F.linear(a, self.qkv.weight[rows], None if bias is None else bias[rows])
        if missing is not None:
            t = t + F.pad(missing, (t.shape[1] - missing.shape[1], 0))
        t, turned = t.unflatten(1, (-1, D)), min(last, c.n_head + c.n_kv_head) - first
        qk, n = t[:, :turned], max(c.n_head - first, 0)
        if c.qk_norm:
            qk = torch.cat((self.q_norm(qk[:, :n]), self.k_norm(qk[:, n:])), 1)
        return rotate(qk, rope) if self.rotary else qk, t[:, turned:]

    def rest(self, h, att, part="both"):
        """Residual adds and MLP. h, att (M, d)."""
        if part != "mlp":
            h = self.o(att).add_(self.shortcut1(h))
        if part == "attention":
            return h
        a = self.norm2(h)
        gate, up = self.gate(a), self.up(a)   # the widest states: no copies of them where no gradient needs them
        return self.down(F.silu(gate) * up if gate.requires_grad else F.silu(gate, inplace=True).mul_(up)).add_(self.shortcut2(h))

    def forward(self, p, keep, kv, score, part="both"):
        """Run the kept rows of p.x; returns the Pass after this block. Skipped rows are unchanged, or take p.forecast.

        kv "drop" or "keep": whether skipped tokens offer a key and value. score: W or "mean" to refresh the
        score table, None when no later decision reads it. part: "attention" or "mlp" runs this sub-block alone.
        """
        rows, at, stored, H, missing = keep.rows, None, keep.counts, self.c.n_head, None
        if p.forecast is None and (kv == "drop" or rows is None):
            if not keep.counts.any():
                return p
            h = p.x if rows is None else p.held[1] if p.held is not None and p.held[0] is rows else p.x.index_select(0, rows)
        else:
            x = p.x
            h = x if rows is None else x.index_select(0, rows)
        if p.forecast is not None:
            update, missing = p.forecast
            p = p.next(forecast=None, x=x + update)
        if part == "mlp":
            h = self.rest(h, None, part)
            return p.next(x=h) if rows is None else p.next(held=(rows, h))
        if kv == "keep" and rows is not None:
            a = self.norm1(x)
            k, v = self.heads(a, p.rope, H, missing=missing if missing is None else missing * ~keep.mask[:, None])
            q, _ = self.heads(a[rows], keep.rope, 0, H)
            at, stored = p.local[rows], p.counts
        else:
            qk, v = self.heads(self.norm1(h), keep.rope)
            q, k = qk[:, :H], qk[:, H:]
        if p.cache is not None:
            past = p.cache.len[self.l, p.slots]
            p.cache.append(self.l, p.slots, stored, k, v)
        if len(h) == 0:
            return p
        if p.has_past:
            att, p = self.attend_past(p, keep, q, past, at, score)
        else:
            att = self.attend(keep, q, k, v, stored, at)
            if score is not None:
                with routing_span():
                    p = self.observe(p, keep, q, k, stored, at, score)
        h = self.rest(h, att, part)
        return p.next(x=h) if rows is None else p.next(held=(rows, h))

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
        l, dev, K, V, lens = self.l, q.device, p.cache.k[self.l], p.cache.v[self.l], p.cache.len[self.l, p.slots]
        rows = p.every if keep.rows is None else keep.rows
        if max(p.n) == 1 and len(q) == len(lens) and even(p.slots, lens):
            first, C = int(p.slots[0]), int(lens[0])       # decode, and every query sees all keys of its row: no mask, no copies
            k, v = (t[first:first + len(lens), :, :C] for t in (K, V))
            if score is not None:
                probs = attention_probs(q[:, None], k.transpose(1, 2)).mean(1)
                p = p.with_own(rows, *own_score(probs, torch.full_like(rows, C - 1)[:, None]))
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True).flatten(1), p
        if max(p.n) == 1:  # decode: every cache row in one product, so that no keys are copied; idle rows are dropped
            slots, last = (torch.from_numpy(t).to(dev)[rows] for t in (p.slots, past))
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
                last = int(past[b]) + (torch.arange(n, device=dev) if at is None else at[r])
                k, v = (t[s:s + 1, :, :int(p.cache.len[l, s])] for t in (K, V))
                mask = torch.arange(k.shape[2], device=dev) <= last[:, None]
                o = F.scaled_dot_product_attention(q[r].transpose(0, 1)[None], k, v, mask, enable_gqa=True)
                out.append(o[0].transpose(0, 1).reshape(n, -1))
                if score is not None:
                    probs = attention_probs(q[None, r], k.transpose(1, 2), last[None]).mean(1)
                    p = p.with_own(rows[r], *own_score(probs, last[None]))
            i += n
        return torch.cat(out), p

    def observe(self, p, keep, q, k, stored, at, window):
        """Refresh the score table (method section 4): the attention each stored key of a prompt gets from the prompt's last
        `window` computed queries ("mean": from all, 64 at a time), and what each decoded token gives itself."""
        dev, rows = q.device, p.every if keep.rows is None else keep.rows
        key_rows = rows if at is None else p.every
        kset = keep.set_counts if at is None else p.set_counts
        score, rank, i, j = p.score.clone(), p.rank.clone(), 0, 0
        shapes = (t.tolist() for t in (keep.counts, stored, keep.set_counts, kset))
        for f, b, (c, m, qs, ks, size, n) in runs(*shapes, p.n_set, p.n):
            qb, kb = q[i:i + b * c].unflatten(0, (b, c)), k[j:j + b * m].unflatten(0, (b, m))
            last = p.every[:c].expand(b, c) if at is None else at[i:i + b * c].view(b, c)
            if qs:
                first = 0 if window == "mean" else max(0, qs - window)
                same = qs == ks and qs - first <= 64    # the last queries are those of the last keys
                got = sum(attention_probs(qb[:, lo:min(lo + 64, qs)], kb[:, :ks], None if same else last[:, lo:min(lo + 64, qs)]).sum((1, 2))
                          for lo in range(first, qs, 64)) / q.shape[1]
                if same:
                    viewers = (ks - p.every[:ks]).clamp(max=qs - first)
                else:
                    viewers = qs - torch.searchsorted(last[:, :qs].contiguous(), p.every[:ks].expand(b, ks).contiguous()).clamp(min=first)
                score[key_rows[j:j + b * m].view(b, m)[:, :ks]] = relative_score(got / viewers, ks)
                whole = slice(p.start[f], p.start[f] + b * n)  # rank over the prompt, skipped tokens by their older score
                order = score[whole].view(b, n)[:, :size].argsort(dim=1, stable=True)
                rank[whole].view(b, n)[:, :size].scatter_(1, order, torch.linspace(0, 1, size, device=dev).expand(b, size))
            if qs < c and p.own_scores:
                own = own_score(attention_probs(qb[:, qs:], kb, last[:, qs:]).mean(1), last[:, qs:])
                score[rows[i:i + b * c].view(b, c)[:, qs:]], rank[rows[i:i + b * c].view(b, c)[:, qs:]] = own
            i, j = i + b * c, j + b * m
        return p.next(score=score, rank=rank)

    def masked(self, p, keep, kv, score, part="both"):
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
        if part == "mlp":
            return p.next(x=skipped + gate.to(x.dtype)[:, None] * (self.rest(x, None, part) - skipped))
        qk, v = self.heads(a, p.rope, missing=missing)
        q, k = qk[:, :self.c.n_head], qk[:, self.c.n_head:]
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
        return p.next(x=skipped + gate.to(x.dtype)[:, None] * (self.rest(x, torch.cat(out), part) - skipped))


# ------------------------------------------------------------------------------------------------
# what really happened

class Stats:
    """Realised sparsity and FLOPs, of prompts ("prefill") and decoded tokens ("decode") apart, per block."""
    def __init__(self, n_layer):
        self.kept = {ph: [0] * n_layer for ph in ("prefill", "decode")}
        self.total = {"prefill": 0, "decode": 0}
        self.flops = {"prefill": 0.0, "decode": 0.0}
        self.dense_flops = {"prefill": 0.0, "decode": 0.0}
        self.late = {"prefill": 0.0, "decode": 0.0}          # FLOPs that the device counts, so that no block waits for it

    def add(self, other):
        """Count what `other` counted, too."""
        for ph in ("prefill", "decode"):
            self.kept[ph] = [a + b for a, b in zip(self.kept[ph], other.kept[ph])]
            for mine, theirs in ((self.total, other.total), (self.flops, other.flops), (self.dense_flops, other.dense_flops),
                                 (self.late, other.late)):
                mine[ph] += theirs[ph]

    def sparsity(self, phase):
        """Share of tokens that skipped, a list over blocks; None before any token of that phase."""
        n = self.total[phase]
        return [1 - k / n for k in self.kept[phase]] if n else None

    def mean(self, phase):
        s = self.sparsity(phase)
        return None if s is None else sum(s) / len(s)

    def used(self, phase):
        """FLOPs of the blocks, router and scores counted, head not."""
        return self.flops[phase] + float(self.late[phase])

    def saved(self, *phases):
        """Share of the blocks' FLOPs saved (router and scores counted, head not)."""
        dense = sum(self.dense_flops[ph] for ph in phases)
        return 1 - sum(self.used(ph) for ph in phases) / dense if dense else None


# ------------------------------------------------------------------------------------------------
# the model

class FTPModel(nn.Module):
    """A frozen LLaMA-family model with token routing. Dense until use() gives it a schedule."""

    def __init__(self, config):
        super().__init__()
        self.config = self.base = config              # base: what saved FLOPs are counted against, for a pruned model the original
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.block(l), l) for l in range(config.n_layer))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._rope = None
        self.use()

    # -- loading

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", device_map=None):
        """Read config.json and safetensors (one file or sharded) from "smollm2", a folder or a hub id, or a GGUF file. A folder that
        export.py wrote brings its schedule and router, which are then in use.

        The model is built without storage, and each tensor goes from the memory-mapped file straight to its place,
        dtype and device, so that the weights are held once. FTPError on anything missing, unknown or misshapen.
        device_map: for a model larger than one device, see place_blocks(); states move from block to block, all else follows them.
        """
        folder, read = find_model(path), {}
        for name in ("config.json", "generation_config.json"):
            try:
                read[name] = json.loads((folder / name).read_text()) if name == "config.json" or (folder / name).exists() else {}
            except (OSError, ValueError, RecursionError) as e:
                raise FTPError(f"--model: {folder}/{name} is not readable ({e}); give a Hugging Face model folder") from None
        with torch.device("meta"):
            model = cls(Config.from_hf(read["config.json"], f"--model {path}", read["generation_config.json"]))
        places = place_blocks(device_map, model.config, dtype.itemsize) if device_map else [device] * model.config.n_layer
        ends = {"embed": places[0], "norm": places[-1], "head": places[-1]}
        device_of = lambda name: places[int(name.split(".")[1])] if name.startswith("blocks.") else ends[name.split(".")[0]]
        want = {}                                     # name in the checkpoint -> our name, the rows of it that it fills
        for n in model.state_dict():
            if not (n == "head.weight" and model.config.tied):
                want |= {name: (n, rows) for name, rows in hf_parts(n, model.config)}
        try:
            for file in weight_files(folder):
                with safe_open(file, "pt") as f:
                    names = list(f.keys())
                for name in names:
                    if name not in want and name.startswith("model.") and not name.endswith("inv_freq"):
                        raise FTPError(f"--model: {file.name} has a tensor {name} twice, or one that this family has not; give a plain checkpoint")
                    if name not in want:
                        continue
                    mine, rows = want.pop(name)
                    owner, leaf = model.get_submodule(mine.rpartition(".")[0]), mine.rpartition(".")[2]
                    if getattr(owner, leaf).is_meta:
                        setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf), dtype=dtype, device=device_of(mine)), False))
                    with safe_open(file, "pt") as f:  # opened anew for each: mapped pages that were read go when it closes
                        t, place = f.get_tensor(name), getattr(owner, leaf).data[rows]
                    if model.config.widths:  # what was pruned are zeros at the end, so that any LLaMA loader can read the folder
                        t = t[tuple(map(slice, place.shape))]
                    if t.shape != place.shape:
                        raise FTPError(f"--model: {name} in {file.name} has shape {tuple(t.shape)}, config.json asks for "
                                       f"{tuple(place.shape)}; give a matching folder")
                    if not all(v.to(dtype).isfinite() for v in t.aminmax()):  # one pass, no copy; both are NaN where one value is
                        raise FTPError(f"--model: {name} in {file.name} has NaN or infinite values; fetch it again")
                    place.copy_(t)
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            if isinstance(e, FTPError):
                raise
            raise FTPError(f"--model: {file} is damaged ({(str(e).splitlines() or [type(e).__name__])[0]}); fetch it again") from None
        if want:
            raise FTPError(f"--model: {folder} lacks {len(want)} tensors, the first {next(iter(want))}; give the whole checkpoint")
        if model.config.tied:
            model.head.weight = model.embed.weight
        model.name = str(path)
        if (folder / "ftp" / "ftp.json").exists():
            o = load_json(folder / "ftp" / "ftp.json", "ftp-export-1", "--model", {
                "router": (str, None), "forecaster": (str, None), "routing": {"prefill": str, "decode": str, "kv": str, "one_pass": bool}})
            router, forecaster = (v if v in (None, "static") else folder / "ftp" / v for v in (o["router"], o["forecaster"]))
            model.use(folder / "ftp" / "schedule.json", router, forecaster=forecaster, **o["routing"])
        return model.eval()

    @property
    def dtype(self):
        return self.embed.weight.dtype

    @property
    def device(self):
        return self.embed.weight.device

    def place_of(self, l):
        """Device of block l."""
        return self.blocks[l].norm1.weight.device

    @property
    def fingerprint(self):
        """Tells models apart: a hash of the shape, and eight weights of the last norm."""
        late = ("qk_norm", "nope", "shortcut", "widths")  # count where they are set: artefacts made before these fields existed stay valid
        c = {k: v for k, v in asdict(self.config).items() if k not in ("eos", "max_len", *late) or k in late and v}
        return {"config": hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest()[:16],
                "norm": [round(v, 5) for v in self.norm.weight[:8].float().tolist()]}

    def compile(self, backend="inductor"):
        """torch.compile what a block computes around its attention: projections with rotary, and output projection with norm and MLP. Each is
        whole (a graph break would be an error), is shared by all blocks, and serves any number of rows, so that quotas and lengths may change. The
        attention is a fused kernel anyway; what the host decides - which rows, where in the cache - stays outside. Returns self. FTPError on a
        CPU without a C++ compiler."""
        if backend == "inductor" and self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise FTPError("--compile: no C++ compiler found; install g++ or set CXX, or leave --compile out")
        torch._dynamo.config.recompile_limit = 32  # all heads, K/V or Q alone; one row or several; rotary or not: more cases than torch's 8
        for b in self.blocks:
            b.heads, b.rest = (torch.compile(f, fullgraph=True, dynamic=True, backend=backend) for f in (b.heads, b.rest))
        return self

    # -- routing

    def use(self, schedule=None, router="static", *, prefill="topk", decode="dense", kv="drop", one_pass=False, score=None,
            forecaster=None, seed=0, removal="whole", mismatch=False):
        """Set how tokens are routed from now on; use() alone goes back to dense. Returns self.

        schedule: Schedule or path. router: Router or path, "static" (position only), "random", "attention" (by score), "progressive" (by the
        last token's attention; a dropped token stays dropped), or any function (Pass, s) -> (N,) whose largest values are kept.
        prefill: "topk" (each block keeps its quota) or "argmax" (the router's own decision, as in the paper).
        decode: "dense", "threshold" (calibrated), or "rule" (the paper's: skip blocks with s > 0.5). kv: "drop" or "keep" the K/V of skipped
        tokens. one_pass: decide all blocks from the scores of block 0. score: window W or "mean" (default: the router's).
        forecaster: Forecaster or path; skipped tokens then take its forecast instead of staying as they are.
        removal: whether the blocks and sub-blocks that a schedule removes are absent for every token ("whole") or for prompts alone
        ("prompt"): then decoded tokens run them, over the keys of decoded tokens (under kv "keep" over all).
        mismatch: run a router under another kv, one_pass or presence of a forecaster than it was trained with.
        """
        schedule = Schedule.load(schedule) if isinstance(schedule, (str, Path)) else schedule
        if isinstance(router, (str, Path)) and router not in SELECTIONS:
            router = Router.load(router)
        for flag, value, known in (("--prefill", prefill, ("topk", "argmax")), ("--kv", kv, ("drop", "keep")),
                                   ("--decode", decode, ("dense", "threshold", "rule")), ("--removal", removal, ("whole", "prompt"))):
            if value not in known:
                raise FTPError(f"{flag} {value}: unknown; choose from {', '.join(known)}")
        learned = isinstance(router, Router)
        thresholds = None
        if schedule is not None:
            if self.config.shortcut:
                raise FTPError("--schedule: a sliced model can't be routed, each of its sub-blocks has a basis of its own; leave the schedule out")
            if forecaster is not None and schedule.parts:
                raise FTPError("--forecaster: it forecasts whole blocks; give a schedule without parts")
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
        self.decode, self.thresholds, self.score_window = decode, thresholds, score or (router.score if learned else 1 if router == "progressive" else 16)
        self.removal = removal
        self.aim = None          # while calibrating or training: the share of decoded tokens that skips each block
        self.seed, self._random = seed, torch.Generator()
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
        if self.router in ("attention", "progressive"):
            return p.score.masked_fill(~p.alive, -torch.inf), None, p
        if not isinstance(self.router, Router):
            return self.router(p, s), None, p
        logits, memory = self.router(l, self.router.factors(p, s), p.memory)
        return logits[:, 0] - logits[:, 1], logits, p.next(memory=memory)

    def route(self, l, p, noise=None):
        """Decide block l -> Keep, Pass on the block's device. noise: None in inference; in training what is added to the margins, (N,) or 0, and the
        Keep gets gates with gradients."""
        s, p = self.schedule.sparsity[l] if self.schedule else 0.0, p.to(self.place_of(l))
        if s <= 0:
            return Keep(p, None, p.counts, p.set_counts), p
        if s >= 1:
            if self.removal == "prompt":
                every = Keep(p, None, p.counts, p.set_counts)
                return every.decoded(p) if p.any_set else every, p
            nothing = np.zeros_like(p.counts)
            return Keep(p, p.local[:0], nothing, nothing, torch.zeros_like(p.in_set)), p
        by_threshold, compute = not p.all_set and self.decode == "threshold", self.decode == "dense" or s <= 0.5
        if not p.any_set and not by_threshold and compute:   # decoded tokens that all compute
            return Keep(p, None, p.counts, p.set_counts), p
        if self.forecaster is not None:
            p = p.next(forecast=self.forecaster(l, p.x))
        same = (s, self.decode) if self.router == "static" and not by_threshold else None
        if same and p.known.get("of") == same:
            return p.known["keep"], p
        margin = logits = None
        if self.router != "static" and (p.any_set or by_threshold):
            margin, logits, p = self.margins(l, p, s)
            if noise is not None:
                margin = margin + noise
        # decoded tokens, each by itself
        theta, mask = 0.0, None if p.all_set else ~p.in_set
        if by_threshold:
            if self.aim is not None:
                self.thresholds[l] = float(margin.detach()[mask].quantile(self.aim[l]))
            theta = self.thresholds[l]
            mask = mask & (margin >= theta)
        elif mask is not None and not compute:
            mask = torch.zeros_like(mask)
        # the prompt, as a set
        if p.any_set and self.prefill == "argmax":
            chosen = (p.in_set & (margin > 0)) | p.ends
        elif p.any_set and self.router == "static":      # {x_0, x_T-1, x_T-2, ...}
            k = torch.tensor([quota(t, s) for t in p.n_set]).to(p.seq.device)[p.seq]
            chosen = (p.in_set & (p.local > p.size - k)) | p.ends
        elif p.any_set:
            chosen = by_quota(p, margin, s)
        mask = chosen if p.all_set else mask | chosen if p.any_set else mask
        # how many: known beforehand for quotas, else only the device knows
        if self.prefill == "argmax" and p.any_set or by_threshold:
            count = torch.zeros(2, len(p.n), device=mask.device).index_add(1, p.seq, torch.stack((mask, mask & p.in_set)).float())
            counts, set_counts = count.long().cpu().numpy()
        else:
            set_counts = np.array([quota(t, s) for t in p.n_set])
            counts = set_counts + (p.counts - p.set_counts) * compute
        gate = None
        if noise is not None and logits is not None:
            free = p.in_set & ~p.ends if not by_threshold else ~p.ends
            soft = torch.sigmoid(margin - torch.where(p.in_set, least_kept(p, margin, mask), theta))
            gate = mask + torch.where(free, soft - soft.detach(), 0.0)
            p.trace.append((s, logits, p))
        keep = Keep(p, torch.nonzero_static(mask, size=int(counts.sum()))[:, 0], counts, set_counts, mask, gate)
        if same:  # the next block may ask for the same
            p.known["of"], p.known["keep"] = same, keep
        return keep, p.next(alive=p.alive & mask) if self.router == "progressive" else p

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
        slots = np.arange(len(seqs)) if slots is None else np.asarray(slots)
        self._random.manual_seed(hash((self.seed, *(tuple(s[:n]) for s, n in zip(seqs, n_set)))))  # by the prompts: what ran before changes nothing
        p = Pass(F.embedding(ids, self.embed.weight), [len(s) for s in seqs], n_set, cache, slots, self.decode == "threshold")
        if p.has_past and p.any_set:
            raise FTPError("a prompt is routed as a whole: it can't be added to a filled cache")
        if p.end > self.config.max_len:
            raise FTPError(f"{p.end} tokens are more than the model's {self.config.max_len} (max_position_embeddings); shorten the text")
        if self._rope is None or self._rope.shape[1] < p.end or self._rope.device != ids.device or self._rope.dtype != self.dtype:
            angle = torch.arange(max(2 * p.end, 256))[:, None] * rope_frequencies(self.config)
            cos, sin = angle.cos(), angle.sin()
            self._rope = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1))).to(ids.device, self.dtype)
        p.rope = self._rope.index_select(1, p.pos)
        return p

    def step(self, l, p, masked=False, noise=None):
        """Route and run block l: Pass -> Pass."""
        with routing_span():
            keep, p = self.route(l, p, noise)
        todo = self.todo(l, p, keep)
        self.count(l, p, keep, todo)
        run = self.blocks[l].masked if masked else self.blocks[l]
        read = self.reads_scores(l) and (p.any_set or p.own_scores)    # decoded tokens that all compute need none
        for part, these in todo:
            p = run(p, these, self.kv, self.score_window if read else None, part)
        return p

    def todo(self, l, p, keep):
        """What runs of block l: [(part, Keep)], nothing of a removed block."""
        part = self.schedule.parts[l] if self.schedule and self.schedule.parts else "both"
        if self.schedule and self.schedule.sparsity[l] >= 1:
            return [] if self.removal == "whole" else [("both", keep)]
        if part == "both" or self.removal == "whole":
            return [(part, keep)]
        if not p.any_set:
            return [("both", keep)]
        return [(half, keep if half == part else keep.decoded(p)) for half in ("attention", "mlp")]

    def count(self, l, p, route, todo):
        """Add block l of a pass to the realised sparsity (a token that runs a part of it has not skipped) and FLOPs."""
        c, st = self.blocks[l].c, self.stats
        keep, mlp = (next((k for part, k in todo if part in ("both", half)), None) for half in ("attention", "mlp"))
        split = lambda k: (k.set_counts.tolist(), (k.counts - k.set_counts).tolist()) if k else ([0] * len(p.n), [0] * len(p.n))
        removed = self.schedule is not None and self.schedule.sparsity[l] >= 1
        kv_only = self.kv == "keep" and keep is not None and keep.rows is not None
        sets, singles = split(keep)
        attend, total = (sum(sets), sum(singles)), (sum(p.n_set), sum(p.n) - sum(p.n_set))
        kept, transform = (attend if k is keep else [sum(v) for v in split(k)] for k in (route, mlp))
        if kv_only:  # how many keys a kept query sees is known to the device alone: added there, read by Stats
            seen, in_set = (p.pos[keep.rows] + 1).double(), p.in_set[keep.rows]
            pairs = [(seen * m).sum().to(self.device) for m in (in_set, ~in_set)]
        else:
            past = p.cache.len[l, p.slots].tolist() if p.has_past else [0] * len(sets)
            pairs = sum(m * (m + 1) for m in sets) / 2, sum(n * (m + h) + n * (n + 1) / 2 for n, m, h in zip(singles, sets, past))
        routed = route.rows is not None and not removed
        for i, ph in enumerate(("prefill", "decode")):
            if not total[i]:
                continue
            st.kept[ph][l] += kept[i]
            if l == 0:
                st.total[ph] += total[i]
            st.dense_flops[ph] += self.base.n_layer / c.n_layer * self.base.block_flops(total[i], p.dense_pairs[i])
            st.flops[ph] += c.block_flops(attend[i], 0 if kv_only else pairs[i], (total[i] - attend[i]) * kv_only, transform[i])
            st.late[ph] = st.late[ph] + (c.block_flops(0, pairs[i]) if kv_only else 0)
            if routed and self.forecaster is not None:
                st.flops[ph] += c.forecast_flops(self.forecaster.rank, total[i])
            if routed and isinstance(self.router, Router) and (i == 0 or self.decode == "threshold"):
                st.flops[ph] += self.router.flops(total[i])
        if self.reads_scores(l) and keep is not None:
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
        return self.head(self.norm(x.to(self.norm.weight.device)).to(self.head.weight.device))

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
        p = self.through(self.begin(seqs, [len(s) if prompt else 0 for s in seqs], cache, slots))
        cache.seen[p.slots] += p.counts
        return self.logits(p.x[torch.from_numpy(p.counts.cumsum() - 1)] if last_only and len(p.x) > len(seqs) else p.x)

    def new_cache(self, rows):
        return KVCache(self.config, rows, self.dtype)

    def stream(self, prompts, max_new_tokens=64, temperature=0.0, top_p=1.0, seed=0, eos=None):
        """Generate token by token: yields a list with the new token of each prompt, None where one has ended.

        temperature 0 is greedy. Ends at any of `eos` (default: the model's end tokens), which is yielded.
        """
        longest = max(map(len, prompts), default=0) + max_new_tokens - 1  # the last new token is not run
        if longest > self.config.max_len:
            raise FTPError(f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones exceed the model's {self.config.max_len} "
                           "(max_position_embeddings); shorten the prompt or lower max_new_tokens")
        eos = set(self.config.eos if eos is None else eos)
        rng = torch.Generator(self.head.weight.device).manual_seed(seed)
        self.cache = cache = self.new_cache(len(prompts))
        alive = np.arange(len(prompts))
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


def place_blocks(spec, config, itemsize, free=None):
    """The device of each block. spec: a list like "cuda:0=0-15,cuda:1=16-31", or "auto": neighbours together, spread by weight over the
    fewest GPUs that hold the model in nine tenths of their free memory (the rest is for states and cache); the CPU where there is no GPU.

    The embedding goes with the first block, the final norm with the last, the head with the last or, where it is tied, with the
    embedding. free: bytes of each GPU, by default those that are free now.
    """
    L, c = config.n_layer, config
    if spec != "auto":
        parts = [re.fullmatch(r"(cpu|cuda:\d+)=(\d+)-(\d+)", s) for s in spec.split(",")]
        places = sorted((l, m[1]) for m in parts if m for l in range(int(m[2]), int(m[3]) + 1))
        if not all(parts) or [l for l, _ in places] != list(range(L)):
            raise FTPError(f"--device_map {spec}: give auto, or each of the blocks 0 to {L - 1} once, like cuda:0=0-{L // 2},cuda:1={L // 2 + 1}-{L - 1}")
        devices = [torch.device(name) for _, name in places]
        if any(d.type == "cuda" and d.index >= torch.cuda.device_count() for d in devices):
            raise FTPError(f"--device_map {spec}: there are {torch.cuda.device_count()} GPUs here; name only those")
        return devices
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())] if free is None else free
    if not free:
        return [torch.device("cpu")] * L
    sizes = torch.full((L,), float(c.p_attn + c.p_mlp)) * itemsize
    sizes[0] += c.vocab_size * c.hidden_size * itemsize
    sizes[-1] += c.vocab_size * c.hidden_size * itemsize * (not c.tied)
    n = next((n for n in range(1, len(free) + 1) if float(sizes.sum()) <= 0.9 * sum(free[:n])), None)
    if n is None:
        raise FTPError(f"--device_map auto: the weights take {float(sizes.sum()) / 1e9:.1f} GB, the GPUs have {sum(free) / 1e9:.1f} GB free; take a smaller "
                       f"--dtype, or leave some blocks to the CPU, like cuda:0=0-{L // 2},cpu={L // 2 + 1}-{L - 1}")
    edges = torch.tensor(free[:n]).cumsum(0) / sum(free[:n])
    middles = (sizes.cumsum(0) - sizes / 2) / sizes.sum()
    return [torch.device("cuda", i) for i in torch.bucketize(middles, edges[:-1]).tolist()]


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


def hf_parts(name, c):
    """Our parameter name -> [(name in a Hugging Face checkpoint, rows of ours that it fills)]."""
    c = c.block(int(name.split(".")[1])) if name.startswith("blocks.") else c
    for a, b in (("blocks.", "model.layers."), ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), (".qkv.", ".self_attn.qkv."),
                 (".q_norm.", ".self_attn.q_norm."), (".k_norm.", ".self_attn.k_norm."),
                 (".o.", ".self_attn.o_proj."), (".gate.", ".mlp.gate_proj."), (".up.", ".mlp.up_proj."), (".down.", ".mlp.down_proj.")):
        name = name.replace(a, b)
    if ".qkv." in name:
        ends = [*accumulate(n * c.head_dim for n in (0, c.n_head, c.n_kv_head, c.n_kv_head))]
        return [(name.replace(".qkv.", f".{part}_proj."), slice(*rows)) for part, rows in zip("qkv", pairwise(ends))]
    return [({"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}.get(name, name),
             slice(None))]


def weight_files(folder):
    """The safetensors files of a checkpoint: model.safetensors, else the shards that its index names, else all there are."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    try:
        o = json.loads(index.read_text()) if index.exists() else {"weight_map": {}}
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"--model: {index} is damaged ({e}); fetch it again") from None
    names = list(o["weight_map"].values()) if misfit(o, {"weight_map": dict}) is None else [None]
    if misfit(names, [str]):
        raise FTPError(f"--model: {index} is damaged (no map of file names); fetch it again")
    files = [folder / n for n in sorted(set(names))]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FTPError(f"--model: no .safetensors file in {folder}; give a folder that has them{PICKLED}")
    for f in files:
        if not os.path.exists(f):
            raise FTPError(f"--model: {folder} lacks {f.name[:60]}, which its index names; fetch the whole checkpoint")
    return files


def find_model(path):
    """Folder of a model: "smollm2" (made by prepare.py), a local folder, a GGUF file (converted once, into models/gguf), or a hub id,
    fetched into the hub's cache."""
    if str(path) == "smollm2":
        if not (HOME / "smollm2" / "config.json").exists():
            raise FTPError("--model smollm2: not there yet; run `python prepare.py` first")
        return HOME / "smollm2"
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file() and Path(path).suffix == ".gguf":
        file = Path(path).resolve()
        made_from = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
        folder = HOME / "gguf" / f"{file.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
        if not (folder / "config.json").exists():
            from convert import from_gguf
            from_gguf(file, folder)
        return folder
    if Path(path).is_file():
        raise FTPError(f"--model {path}: a {Path(path).suffix or 'plain'} file; give the folder of a safetensors checkpoint, or a .gguf file"
                       + PICKLED * (Path(path).suffix in (".bin", ".pt", ".pth")))
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise FTPError(f"--model {path}: no such folder; give \"smollm2\", a folder, or a hub id like owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"],
                                      ignore_patterns=["consolidated*", "original/*"]))  # Mistral's second copy of the weights, LLaMA's
    except Exception as e:  # the hub client raises many kinds, all meaning the same to the user
        raise FTPError(f"--model {path}: not fetched from the hub ({str(e).splitlines()[0]}); check the id, or give a local folder") from None
