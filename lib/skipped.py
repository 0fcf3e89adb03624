"""What a token that skips a block becomes, and which key and value it leaves there.

The paper's answer is "nothing": its state stays, no key or value. Then Block.prefill and
Block.extend run. The other answers are one object, Skipped, whose prefill() and extend() stand in
for the block's: own keys and values (`--kv keep`), and what a Forecaster gives (fit_late_kv.py).
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.attention import runs
from lib.checkpoint import FINGERPRINT
from lib.files import check_tensors, load_tensors, save_tensors, tensors_id
from lib.packing import linear_outputs

PIECE = 256    # queries a piece of attention, so that keys after a piece's last are not touched


@dataclass(frozen=True)
class Skipped:
    """keep: whether skipped tokens leave a key and value. forecaster: Forecaster or None."""
    keep: bool
    forecaster: "Forecaster | None" = None

    def prefill(self, block, x, kept, batch, cache):
        """As Block.prefill."""
        if kept.rows is None:
            return block.prefill(x, kept, batch, cache)
        update, kv = self.forecast(block, x[kept.skipped])
        h = x.index_select(0, kept.padded)
        q, k, v = (t[:kept.n] for t in block.qkv(h, kept.rope))
        if self.keep:
            k, v = self.fill(block, kept, batch, k, v, kv)
            at = batch.local[kept.rows]
            att = attention_up_to(q, k, v, kept.counts, batch.lengths, at, len(h))
        else:
            att = block.attend(q, k, v, kept.counts, len(h))
        if cache is not None:
            cache.append(block.l, batch.rows, batch.lengths if self.keep else kept.counts, k, v)
        h = block.rest(h, att)[:kept.n]
        return self.scatter(x, kept, h, update), q, k

    def extend(self, block, x, kept, batch, cache):
        """As Block.extend."""
        if kept.rows is None:
            return block.extend(x, kept, batch, cache)
        update, kv = self.forecast(block, x[kept.skipped])
        h, rope = x.index_select(0, kept.rows), kept.rope[:, :kept.n]
        q, k, v = block.qkv(h, rope) if kept.n else no_heads(block, x)
        if self.keep:
            k, v = self.fill(block, kept, batch, k, v, kv)
            old = cache.append(block.l, batch.rows, batch.lengths, k, v)
            within = batch.local[kept.rows].cpu().numpy()
        else:
            old = cache.append(block.l, batch.rows, kept.counts, k, v)
            within = np.arange(kept.n) - (kept.counts.cumsum() - kept.counts).repeat(kept.counts)
        if kept.n:
            last, row = old.repeat(kept.counts) + within, batch.rows.repeat(kept.counts)
            h = block.rest(h, cache.attend(block.l, q, row, last, batch.lengths.max() == 1))
        return self.scatter(x, kept, h, update), q

    def forecast(self, block, x):
        """For skipped tokens x (n, d): update of their states or None, and their keys and values
        (n, 2 * n_kv_head * head_dim), before rotary, or None where they leave none."""
        update, more = (None, None) if self.forecaster is None else self.forecaster(block.l, x)
        if not self.keep:
            return update, None
        if more is not None and update is None:                 # a map gives them whole
            return None, more
        first = block.n_head * block.head_dim
        own = linear_outputs(block.qkv_proj, block.norm1(x), first)
        return update, own if more is None else own + more

    def fill(self, block, kept, batch, k, v, kv):
        """Keys and values of all tokens of the batch (N, n_kv_head, head_dim): those of the kept
        ones k, v, and of the skipped ones kv, not yet normalised or rotated."""
        gone = kept.skipped
        k_gone, v_gone = turn_keys(block, kv, batch.rope[:, gone])
        out = []
        for mine, theirs in ((k, k_gone), (v, v_gone)):
            whole = theirs.new_zeros(len(batch.every), *theirs.shape[1:])
            out.append(whole.index_copy(0, gone, theirs).index_copy(0, kept.rows, mine))
        return out

    def scatter(self, x, kept, h, update):
        """The states with h at the kept rows, and the others moved by their update."""
        if update is not None:
            gone = kept.skipped
            x = x.index_copy(0, gone, x[gone] + update)
        return x.index_copy(0, kept.rows, h)

    def reach(self, l, x):
        """How far the forecast moves tokens x (N, d): norm r against the state's as r / (1 + r)."""
        update, _ = self.forecaster(l, x)
        r = update.detach().float().norm(dim=1) / x.detach().float().norm(dim=1)
        return (1 - 1 / (1 + r))[:, None]

    def flops(self, tokens):
        """FLOPs of a forecast for so many skipped tokens, beside own keys and values."""
        return 0 if self.forecaster is None else self.forecaster.flops(tokens)


def no_heads(block, x):
    """Queries, keys and values of no token: kernels do not take zero rows."""
    q = x.new_zeros(0, block.n_head, block.head_dim)
    k = x.new_zeros(0, block.n_kv_head, block.head_dim)
    return q, k, k


def turn_keys(block, kv, rope):
    """Projections kv (n, 2 * n_kv_head * head_dim) -> keys, normalised and rotated as the block
    does, and values, (n, n_kv_head, head_dim) each."""
    k, v = kv.unflatten(1, (-1, block.head_dim)).chunk(2, 1)
    if block.k_norm is not None:
        k = block.k_norm(k)
    return block.rotate(k, rope) if block.rotary else k, v


def attention_up_to(q, k, v, counts, lengths, at, n):
    """Attention of kept queries over all tokens' keys, within each sequence -> (n, H * D).

    q (M, H, D); k, v (N, Hkv, D); counts, lengths (B,): queries and keys of each sequence; at (M,):
    index of each query among the keys. Rows beyond M are filled with anything finite.
    """
    out, i, j = [], 0, 0
    for b, (c, m) in runs(counts.tolist(), lengths.tolist()):
        if c:
            qb = q[i:i + b * c].unflatten(0, (b, c)).transpose(1, 2)
            kb, vb = (t[j:j + b * m].unflatten(0, (b, m)).transpose(1, 2) for t in (k, v))
            last = at[i:i + b * c].view(b, 1, c, 1)
            parts = []
            for low in range(0, c, PIECE):
                # the i-th of c kept rows sees at most m - c + i + 1 keys
                high = min(low + PIECE, c)
                reach = m - c + high
                mask = torch.arange(reach, device=q.device) <= last[:, :, low:high]
                parts.append(F.scaled_dot_product_attention(
                    qb[:, :, low:high], kb[:, :, :reach], vb[:, :, :reach], mask, enable_gqa=True))
            out.append(torch.cat(parts, 2).transpose(1, 2).reshape(b * c, -1))
        i, j = i + b * c, j + b * m
    if n > len(q):
        out.append(q[:1].flatten(1).expand(n - len(q), -1))
    return out[0] if len(out) == 1 else torch.cat(out)


class Forecaster:
    """What a token that skips block l takes: a linear map of u, its state scaled to unit RMS (so
    that no massive activation rules).

    With a and b, low rank: (u @ a[l]) @ b[l] + c[l], its first d columns the update of the state,
    the others what the block's own projections miss of the key (before rotary) and value.
    With b None the state stays as it was, for nothing but later keys and values reads it, and
    u @ a[l] + c[l] are key and value themselves, in place of the block's projections.

    a (n, d, rank), b (n, rank, d + e), c (n, d + e) for the last n of n_layer blocks, with
    e = 2 * n_kv_head * head_dim; with b None a (n, d, e), c (n, e). Made by fit_late_kv.py.
    """
    def __init__(self, a, b, c, n_layer, fingerprint, meta=None):
        self.a, self.b, self.c = a, b, c
        self.n_layer, self.fingerprint, self.meta = n_layer, fingerprint, meta or {}

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
        """Width of the model's states."""
        return self.a.shape[1]

    def to(self, device, dtype):
        t = {"b": None} | {k: t.to(device, dtype) for k, t in self.tensors.items()}
        return Forecaster(t["a"], t["b"], t["c"], self.n_layer, self.fingerprint, self.meta)

    def __call__(self, l, x):
        """Tokens x (N, d) that skip block l -> update (N, d), or None with b None, and what is
        missing from their keys and values, or these themselves, (N, e)."""
        a, c = (t[l - self.first].to(x.device) for t in (self.a, self.c))
        u = F.rms_norm(x, x.shape[1:])
        if self.b is None:
            return None, u @ a + c
        inner = u @ a if a.shape[1] else x.new_zeros(len(x), 0)
        out = torch.addmm(c, inner, self.b[l - self.first].to(x.device))
        return out.tensor_split([self.d], 1)

    def flops(self, tokens):
        """FLOPs for so many skipped tokens beside their own keys and values; with b None the maps
        stand in for these projections at the same cost."""
        return 0 if self.b is None else 2 * self.rank * (self.d + self.b.shape[2]) * tokens

    def save(self, path, dtype=torch.float32):
        """Write forecaster.safetensors and its readable twin; bfloat16 takes half the room."""
        save_tensors(path, self.tensors, {
            "format": "ftp-forecaster-3", "fingerprint": self.fingerprint, "rank": self.rank,
            "n_layer": self.n_layer, "meta": self.meta}, dtype)

    @property
    def id(self):
        return tensors_id(self.tensors)

    @classmethod
    def load(cls, path):
        """What save() wrote. FTPError if it is damaged."""
        t, o = load_tensors(path, "ftp-forecaster-3", "--forecaster", {
            "fingerprint": FINGERPRINT, "rank": (int, str), "n_layer": int, "meta": (dict, None)})
        t = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in t.items()}
        size = {k: list(t[k].shape) if k in t else [] for k in "ac"}
        n, d, e = size["a"][:1], size["a"][1:2], size["c"][1:2]
        if o["rank"] == "full":
            want = {"a": (*n, *d, *e), "c": (*n, *e)}
        else:
            want = {"a": (*n, *d, o["rank"]), "b": (*n, o["rank"], *e), "c": (*n, *e)}
        check_tensors(t, want, f"--forecaster: {path}")
        return cls(t["a"], t.get("b"), t["c"], o["n_layer"], o["fingerprint"], o.get("meta"))


def is_kv_only(forecaster):
    """Whether a Forecaster gives keys and values alone."""
    return forecaster is not None and forecaster.b is None
