"""The routed LLaMA of FTP: before every block a router decides, per token, compute or skip.

    model = FTPModel.from_pretrained("smollm2").pack()     # or a folder, or a hub id; pack() for inference on a CPU
    logits = model(input_ids)                              # dense, (B, T) -> (B, T, vocab)
    model.use(schedule="schedule_ft.json", router="router.safetensors")
    model.generate([[1, 9690, 198]], max_new_tokens=64)

Sequences of a batch are packed, never padded: hidden states are (N, d) with N the tokens of all
sequences one after the other, so a batch mate or a pad can't reach a result. A skipped token is not
multiplied by zero, it is absent: a block runs on the gathered rows of its kept tokens.
"""
import hashlib
import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache, reduce
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from config import Config, hf_parts, leaders, place_blocks, quota, rope_frequencies
from files import FTPError, check_fingerprint, find_model, load_json, weight_files
from router import SELECTIONS, Forecaster, Router, Schedule

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


GRAIN = 8  # a CPU's kernels are made anew for each number of rows; with few different ones, a prompt does not pay for a length not met before

# ------------------------------------------------------------------------------------------------
# one pass of packed sequences through the blocks

class Pass:
    """State between two blocks: packed hidden states, positions and the table of latest attention scores.

    x (N, d); counts, set_counts, slots: host arrays. Of the n[b] tokens of sequence b the first n_set[b] are a prompt, routed together as a set; the others
    are decoded tokens, each routed by itself from what exists at its time (method section 6). score and rank (N,) are
    the router's factors 2 and 3. A Pass is replaced, never written to: keeping one keeps the state before a block. But with `alone`, that is where
    nobody keeps one, rows are scattered in place.
    """
    rope: torch.Tensor  # (2, N, head_dim), see rotate(); set by FTPModel.begin()

    def __init__(self, x, n, n_set, cache, slots, own_scores):
        dev = x.device
        self.full, self.held, self.n, self.n_set, self.cache, self.slots = x, None, n, n_set, cache, slots
        self.own_scores, self.alone = own_scores, False   # own_scores: whether decoded tokens need a score of their own
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
        self.known = {}                               # what the blocks have in common: position factors, ramps of ranks
        self.glance = None                            # what the last block left for observed(): its Keep, queries, keys, ...
        self.memory = None                            # hidden layer of a recurrent router
        self.kept = None, None                        # the last decision: of which block or static sparsity, and its Keep
        self.forecast = None                          # what Forecaster gives for the block to come
        self.alive = torch.ones_like(self.in_set)         # tokens that progressive selection has not dropped yet
        self.trace = []                               # in training: (sparsity, router's margins without noise, Pass) a decision

    @property
    def x(self):
        """Hidden states (N, d); rows held back by a block whose keep set the next one may share are put in place."""
        if self.held is not None:
            (rows, h), self.held = self.held, None
            self.full = (self.full.index_copy_ if self.alone else self.full.index_copy)(0, rows, h[:len(rows)])
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
        return self.next(**tensors, held=None, known={}, kept=(None, None))

    def observed(self):
        """This Pass with its table of scores refreshed, if the last block left queries q and keys k for it (method section 4): by the attention
        each stored key of a prompt gets from the prompt's last `window` computed queries ("mean": from all, 64 at a time), and by what each
        decoded token gives itself. Left to the next decision, as on a CPU small operators cost the most when a block has just displaced their code."""
        if self.glance is None:
            return self
        p, (keep, q, k, stored, at, window) = self, self.glance
        rows = p.every if keep.rows is None else keep.rows
        key_rows = rows if at is None else p.every
        kset = keep.set_counts if at is None else p.set_counts
        score, rank, known, i, j = p.score, p.rank.clone(), p.known, 0, 0
        shapes = (t.tolist() for t in (keep.counts, stored, keep.set_counts, kset))
        for f, b, (c, m, qs, ks, size, n) in runs(*shapes, p.n_set, p.n):
            qb, kb = q[i:i + b * c].unflatten(0, (b, c)), k[j:j + b * m].unflatten(0, (b, m))
            last = p.every[:c].expand(b, c) if at is None else at[i:i + b * c].view(b, c)
            if qs:
                first = 0 if window == "mean" else max(0, qs - window)
                same = qs == ks and qs - first <= 64    # the last queries are those of the last keys
                got = reduce(torch.add, (attention_probs(qb[:, lo:min(lo + 64, qs)], kb[:, :ks], None if same else last[:, lo:min(lo + 64, qs)]).sum((1, 2))
                                         for lo in range(first, qs, 64)))
                if same:
                    if qs - first not in known:
                        known[qs - first] = 1 / (q.shape[1] * (len(p.every) - p.every).clamp(max=qs - first))
                    weight = known[qs - first][-ks:]
                else:
                    weight = 1 / (q.shape[1] * (qs - torch.searchsorted(last[:, :qs].contiguous(), p.every[:ks].expand(b, ks).contiguous()).clamp(min=first)))
                seen = key_rows[j:j + b * m] if ks == m else key_rows[j:j + b * m].view(b, m)[:, :ks].flatten()
                score = score.scatter(0, seen, relative_score(got * weight, ks).flatten())
                whole = slice(p.start[f], p.start[f] + b * n)  # rank over the prompt, skipped tokens by their older score
                order = score[whole].view(b, n)[:, :size].sort(dim=1, stable=True).indices
                if ("ramp", size) not in known:
                    known["ramp", size] = torch.linspace(0, 1, size, device=q.device)
                rank[whole].view(b, n)[:, :size].scatter_(1, order, known["ramp", size].expand(b, size))
            if qs < c and p.own_scores:
                score = score.clone()
                own = own_score(attention_probs(qb[:, qs:], kb, last[:, qs:]).mean(1), last[:, qs:])
                score[rows[i:i + b * c].view(b, c)[:, qs:]], rank[rows[i:i + b * c].view(b, c)[:, qs:]] = own
            i, j = i + b * c, j + b * m
        return p.next(score=score, rank=rank, glance=None)

    def with_own(self, rows, score, rank):
        """This Pass with the scores and ranks of decoded tokens set."""
        return self.next(score=self.score.index_copy(0, rows, score.flatten()),
                         rank=self.rank.index_copy(0, rows, rank.flatten()))


class Keep:
    """Tokens that compute a block: rows (M,) ascending, or None for all; counts (B,) of them in each sequence, set_counts
    of these in its prompt, host arrays; mask (N,) the rows as booleans; gate (N,) the same with a straight-through gradient; take the rows that a
    block gathers, on CPUs with the last repeated up to a multiple of GRAIN; rope the rotary tables of these."""
    def __init__(self, p, rows, counts, set_counts, mask=None, gate=None):
        self.rows, self.counts, self.set_counts, self.mask, self.gate = rows, counts, set_counts, mask, gate
        pad = -len(rows) % GRAIN if rows is not None and rows.device.type == "cpu" and len(rows) > 64 else 0
        self.take = torch.cat((rows, rows[-1:].expand(pad))) if pad else rows
        self.rope = p.rope if rows is None else p.rope.index_select(1, self.take)

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


@lru_cache
def later(n, device):
    """Which of n keys come after each of n queries, (n, n)."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)


def attention_probs(q, k, last=None):
    """Probabilities (b, H, Q, K) of queries q (b, Q, H, D) over keys k (b, K, Hkv, D), float32.

    last (b, Q): index of the newest key each query sees; None: the queries are those of the last Q keys.
    """
    (b, Q, H, D), K, kv = q.shape, k.shape[1], k.shape[2]
    q = (q * D ** -0.5).view(b, Q, kv, -1, D).permute(0, 2, 3, 1, 4).reshape(b * kv, -1, D)
    w = torch.bmm(q, k.transpose(1, 2).reshape(b * kv, K, D).mT).view(b, H, Q, K)
    if last is None:
        w[..., K - Q:].masked_fill_(later(Q, q.device), -torch.inf)
    else:
        w.masked_fill_(torch.arange(K, device=q.device) > last[:, None, :, None], -torch.inf)
    return w.softmax(-1, dtype=torch.float32)


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


class Linear(nn.Linear):
    """nn.Linear of which parts may be asked for, and whose weight may be packed, see FTPModel.pack()."""
    weight: nn.Parameter
    packed: dict | None = None                        # (first, last): weight of these outputs as the CPU's kernels read it

    def plain(self):
        """The weight (out, in)."""
        return self.weight if self.packed is None else self.packed[0, None].to_dense()

    def forward(self, x, first=0, last=None):
        """x (N, in) -> outputs first..last, (N, last - first). FTPError where a packed weight would have to give gradients."""
        bias = None if self.bias is None else self.bias[first:last]
        if self.packed is None:
            return F.linear(x, self.weight[first:last], bias)
        if x.requires_grad:
            raise FTPError("a packed model gives no gradients; train one on which pack() was not called")
        if (first, last) not in self.packed:
            self.packed[first, last] = torch.ops.mkldnn._reorder_linear_weight(self.plain()[first:last])
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[first, last], bias, "none", [], "")

    def pack(self, keep):
        """Pack the weight; keep: whether it is needed plain as well."""
        self.packed = {(0, None): torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())}
        if not keep:
            self.weight = nn.Parameter(self.weight.new_empty(0), False)


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
        self.qkv = Linear(d, (c.n_head + 2 * c.n_kv_head) * D, c.qkv_bias)   # rows: all queries, all keys, all values
        self.q_norm, self.k_norm = (nn.RMSNorm(D, c.rms_eps) if c.qk_norm else None for _ in "qk")
        self.o = Linear(c.n_head * D, d, False)
        self.norm2 = nn.RMSNorm(d, c.rms_eps)
        self.gate = Linear(d, c.intermediate_size, False)                    # one product with up measured slower on CPUs
        self.up = Linear(d, c.intermediate_size, False)
        self.down = Linear(c.intermediate_size, d, False)
        self.shortcut1, self.shortcut2 = (Linear(d, d, False) if c.shortcut else nn.Identity() for _ in range(2))

    def project(self, a, first=0, last=None):
        """Heads first..last (of n_head queries + n_kv_head keys + n_kv_head values) of normalised states a (N, d) -> (N, heads * head_dim)."""
        return self.qkv(a, first * self.c.head_dim, None if last is None else last * self.c.head_dim)

    def turn(self, t, rope, first=0):
        """Projections t (N, heads * head_dim), heads from `first` on, as attention takes them: queries and keys normalised (Qwen3) and
        rotated (N, heads, head_dim), and values."""
        c = self.c
        t = t.unflatten(1, (-1, c.head_dim))
        turned = min(t.shape[1], c.n_head + c.n_kv_head - first)
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
        rows, take, at, stored, H, update, more = keep.rows, keep.take, None, keep.counts, self.c.n_head, None, None
        if p.forecast is None and (kv == "drop" or rows is None):
            if not keep.counts.any():
                return p
            h = p.x if rows is None else p.held[1] if p.held is not None and p.held[0] is rows else p.x.index_select(0, take)
        else:
            x = p.x
            h = x if rows is None else x.index_select(0, take)
        if p.forecast is not None:
            update, more = p.forecast
            p = p.next(forecast=None, x=x + update if update.shape[1] else x)
        if part == "mlp":
            h = self.rest(h, None, part)
            return p.next(x=h) if rows is None else p.next(held=(rows, h))
        if kv == "keep" and rows is not None:
            if update is not None and not update.shape[1]:     # the forecast is the skipped tokens' keys and values themselves
                q, own = self.project(self.norm1(h)).split([H * self.c.head_dim, more.shape[1]], 1)
                more = more.index_copy(0, rows, own[:len(rows)])
            else:
                a = self.norm1(x)
                q, own = self.project(a[take], 0, H), self.project(a, H)
                more = own if more is None else own + more * ~keep.mask[:, None]
            (q, _), (k, v) = self.turn(q, keep.rope), self.turn(more, p.rope, H)
            q, at, stored = q[:len(rows)], p.local[rows], p.counts
        else:
            qk, v = self.turn(self.project(self.norm1(h)), keep.rope)
            q, k, v = (t if rows is None else t[:len(rows)] for t in (qk[:, :H], qk[:, H:], v))
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
                p = p.next(glance=(keep, q, k, stored, at, score))
        h = self.rest(h, att if len(att) == len(h) else F.pad(att, (0, 0, 0, len(h) - len(att))), part)
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
        if max(p.n) == 1:  # decode; a key head's queries are rows of one product, so that its keys are read once and never copied
            if len(q) == len(lens) and even(p.slots, lens):        # all rows compute, and each sees all its keys
                first, C, mine, mask = int(p.slots[0]), int(lens[0]), slice(None), None
                k, v, newest = K[first:first + len(lens), :, :C], V[first:first + len(lens), :, :C], torch.full_like(rows, C - 1)
            else:                                                  # every cache row in one product; idle rows are dropped
                mine, last = (torch.from_numpy(t).to(dev)[rows] for t in (p.slots, past))
                C, newest = int(p.cache.len[l].max()), last.new_zeros(p.cache.rows).index_copy(0, mine, last)
                if len(rows) == 1:
                    K, V, newest, mine = (*(t[int(mine):int(mine) + 1] for t in (K, V)), last, mine * 0)
                k, v, mask = K[:, :, :C], V[:, :, :C], torch.arange(C, device=dev) <= newest[:, None, None, None]
                q = q.new_zeros(len(newest), *q.shape[1:]).index_copy(0, mine, q)
            att = F.scaled_dot_product_attention(q.unflatten(1, (self.c.n_kv_head, -1)), k, v, mask).flatten(1)
            if score is not None:
                own = own_score(attention_probs(q[:, None], k.transpose(1, 2), newest[:, None]).mean(1), newest[:, None])
                p = p.with_own(rows, *(t[mine] for t in own))
            return att[mine], p
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

    def masked(self, p, keep, kv, score, part="both"):
        """The same function on all rows, with 0/1 gates instead of gathers; gates carry straight-through gradients.

        A skipped token's row is still computed (it sees its own key), so that its gate learns what the skip loses.
        """
        x, rows = p.x, keep.rows
        gate = keep.gate if keep.gate is not None else torch.ones_like(p.place) if rows is None else keep.mask.float()
        t, skipped, wide = self.project(self.norm1(x)), x, self.c.n_head * self.c.head_dim
        if p.forecast is not None:
            update, more = p.forecast
            if update.shape[1]:
                skipped = x + update
            if kv == "keep":
                more = (1 - gate.to(x.dtype)[:, None]) * (more if update.shape[1] else more - t[:, wide:])
                t = t + F.pad(more, (wide, 0))
            p = p.next(forecast=None)
        if part == "mlp":
            return p.next(x=skipped + gate.to(x.dtype)[:, None] * (self.rest(x, None, part) - skipped))
        qk, v = self.turn(t, p.rope)
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
            wide = kv == "keep" or rows is None
            q, k = (t.detach() if every else t.detach()[rows] for t, every in ((q, rows is None), (k, wide)))
            p = p.next(glance=(keep, q, k, p.counts if wide else keep.counts, p.local[rows] if wide and rows is not None else None, score))
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
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._rope = None
        self.some = None                              # first_values() from before pack()
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

    def first_values(self):
        """Eight values of each tensor, lists of floats: what a tuned model is known by."""
        return self.some or [p.flatten()[:8].bfloat16().tolist() for p in self.parameters()]

    def pack(self):
        """On CPUs: bring the weights once into the layout that the kernels read (oneDNN's), into which every product otherwise brings them anew, and
        drop the plain ones (a tied head keeps them, for the embedding). For inference only: a packed model has no gradients, can't be compiled, and
        stays on its device. A dtype or device without such kernels is left as it is. Returns self."""
        if self.dtype == torch.float32 or self.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.some = self.first_values()
            for m in self.modules():
                if isinstance(m, Linear) and m.packed is None and m.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
                    m.pack(keep=m.weight is self.embed.weight)
        return self

    def compile(self, backend="inductor"):
        """torch.compile what a block computes around its attention: projections with rotary, and output projection with norm and MLP. Each is
        whole (a graph break would be an error), is shared by all blocks, and serves any number of rows, so that quotas and lengths may change. The
        attention is a fused kernel anyway; what the host decides - which rows, where in the cache - stays outside. Returns self. FTPError on a
        CPU without a C++ compiler."""
        if self.some:
            raise FTPError("--compile: the model is packed; compile one on which pack() was not called")
        if backend == "inductor" and self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise FTPError("--compile: no C++ compiler found; install g++ or set CXX, or leave --compile out")
        torch._dynamo.config.recompile_limit = 32  # all heads, K/V or Q alone; one row or several; rotary or not: more cases than torch's 8
        for b in self.blocks:
            b.turn, b.rest = (torch.compile(f, fullgraph=True, dynamic=True, backend=backend) for f in (b.turn, b.rest))
        return self

    # -- routing

    def use(self, schedule=None, router="static", *, prefill="topk", decode="dense", kv="drop", one_pass=False, score=None,
            group=None, forecaster=None, seed=0, removal="whole", mismatch=False):
        """Set how tokens are routed from now on; use() alone goes back to dense. Returns self.

        schedule: Schedule or path. router: Router or path, "static" (position only), "random", "attention" (by score), "progressive" (by the
        last token's attention; a dropped token stays dropped), or any function (Pass, s) -> (N,) whose largest values are kept.
        prefill: "topk" (each block keeps its quota) or "argmax" (the router's own decision, as in the paper).
        decode: "dense", "threshold" (calibrated), or "rule" (the paper's: skip blocks with s > 0.5). kv: "drop" or "keep" the K/V of skipped
        tokens. one_pass: decide all blocks from the scores of block 0. score: window W or "mean" (default: the router's).
        group: so many neighbouring blocks share the decision of the first, with the mean of their sparsities (default: the router's, or 1).
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
            f, d, e = forecaster, self.config.hidden_size, self.config.kv_bytes(1, 1)
            if (f.n_layer, f.d, f.c.shape[1]) != (self.config.n_layer, d, e if f.b is None else d + e) or len(f.a) > f.n_layer:
                raise FTPError("--forecaster: its shape does not fit the model; fit it again with fit_forecaster.py")
            if f.c.device != self.device or f.c.dtype != self.dtype:
                forecaster = f.to(self.device, self.dtype)
            if f.b is None and kv != "keep":
                raise FTPError(f"--kv {kv}: this forecaster gives keys and values alone; give --kv keep")
            if schedule is not None and any(0 < v < 1 for v in schedule.sparsity[:f.first]):
                raise FTPError(f"--forecaster: it serves blocks from {f.first} on, the schedule skips in earlier ones; fit it for this schedule")
        self.forecaster = forecaster
        if learned and "forecast" in router.inputs and forecaster is None:
            raise FTPError("--router: it reads forecasts; give --forecaster, the one it was trained with")
        if prefill == "argmax" and not learned:
            raise FTPError("--prefill argmax: only a trained router decides by argmax; give --router, or --prefill topk")
        if decode == "threshold" and thresholds is None and schedule is not None:
            raise FTPError("--decode threshold: no thresholds are stored for this schedule and router; calibrate_decode() "
                           "or --decode dense")
        self.__dict__["router"] = router  # past nn.Module: the router is no part of the frozen model's parameters
        group = group or (router.group if learned else 1)
        self.schedule, self.prefill, self.kv, self.one_pass = schedule and schedule.grouped(group), prefill, kv, one_pass
        self.lead = leaders(self.schedule.sparsity if schedule else [0.0] * self.config.n_layer, group)
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
        return bool(uses) and any(0 < s < 1 for s in self.schedule.sparsity[l + 1:]) and self.lead[l + 1] > l

    def margins(self, l, p, s):
        """The router's preference for computing block l, (N,) float32, and the Pass."""
        if self.router == "random":
            return torch.rand(len(p.x), generator=self._random).to(p.x.device), p
        if self.router in ("attention", "progressive"):
            return p.score.masked_fill(~p.alive, -torch.inf), p
        if not isinstance(self.router, Router):
            return self.router(p, s), p
        margin, memory = self.router(l, self.router.factors(p, s), p.memory)
        return margin, p if memory is None else p.next(memory=memory)

    def route(self, l, p, noise=None):
        """Decide block l -> Keep, Pass on the block's device. noise: None in inference; in training what is added to the margins, (N,) or 0, and the
        Keep gets gates with gradients."""
        s, p = self.schedule.sparsity[l] if self.schedule else 0.0, p.observed().to(self.place_of(l))
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
        same = ("static", s, self.decode) if self.router == "static" else self.lead[l]
        if p.kept[0] == same:
            return p.kept[1], p
        logit = margin = None
        if self.router != "static" and (p.any_set or by_threshold):
            logit, p = self.margins(l, p, s)
            margin = logit if noise is None else logit + noise
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
            counts = set_counts if p.all_set else set_counts + (p.counts - p.set_counts) * compute
        gate = None
        if noise is not None and isinstance(self.router, Router):
            free = p.in_set & ~p.ends if not by_threshold else ~p.ends
            soft = torch.sigmoid(margin - torch.where(p.in_set, least_kept(p, margin, mask), theta))
            gate = mask + torch.where(free, soft - soft.detach(), 0.0)
            p.trace.append((s, logit, p))
        keep = Keep(p, torch.nonzero_static(mask, size=int(counts.sum()))[:, 0], counts, set_counts, mask, gate)
        return keep, p.next(kept=(same, keep), **{"alive": p.alive & mask} if self.router == "progressive" else {})

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
                st.flops[ph] += self.forecaster.flops(total[i], kept[i])
            if routed and self.lead[l] == l and isinstance(self.router, Router) and (i == 0 or self.decode == "threshold"):
                st.flops[ph] += self.router.flops(total[i])
        if self.reads_scores(l) and keep is not None:
            width = math.inf if self.score_window == "mean" else self.score_window
            st.flops["prefill"] += c.score_flops(1, sum(min(m, width) * m for m in sets))

    def through(self, p, masked=False):
        """Run all blocks: Pass -> Pass. FTPError naming the first block whose output is NaN or infinite: a sum of the last states tells
        that there is one, and only then the pass is run again to find it."""
        q, mark = p.next(x=p.x.clone(), alone=True), p.cache.mark() if p.cache is not None else None
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


