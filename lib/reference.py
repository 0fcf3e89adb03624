"""The masked block: the same function as the gathered one, on all rows, with 0/1 gates.

Skips nothing, so it is slow, and carries gradients: a gate is 0 or 1 forward, and backward the
sigmoid of the margin over the one that just stayed (straight-through). A skipped token's row is
still computed (it sees its own key), so that its gate learns what the skip loses. Tests hold that
it equals what inference runs.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from lib.attention import scores_of_new
from lib.packing import plain_weight

KEEPS_ENDS_ALONE = 1e4      # stands for the threshold of a prompt that keeps nothing but its ends


@dataclass(frozen=True)
class Decision:
    """What a router decided about a batch: s of the block, margin (N,) without noise and with
    gradient, free (N,): about whom; and the batch and scores that it saw."""
    s: float
    margin: torch.Tensor
    free: torch.Tensor
    batch: object
    scores: object


@dataclass(frozen=True)
class Held:
    """Keys and values (N, n_kv_head, D), gates (N,) and the Kept that a batch left in a block."""
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    kept: object


def step_pair(model, l, pair, states, noise=(0.0, 0.0)):
    """As scoring.step_pair, masked -> States, and the Decisions that block l took of its own."""
    prompts, held, decided = prefill_step(model, l, pair.prompts, states[0], noise[0])
    responses, more = extend_step(model, l, pair.responses, states[1], held, noise[1])
    return (prompts, responses), decided + more


def prefill_step(model, l, batch, state, noise=0.0):
    """As FTPModel.prefill_step -> State, what the prompts left, and the Decisions taken."""
    r, s = model.routing, model.routing.sparsity[l]
    kept, state = model.route(l, batch, state, noise)
    batch = kept.batch                                      # where block l is
    if s >= 1:
        return replace(state, kept=kept), None, []
    gate, decided = gates(kept), []
    if kept.margin is not None and 0 < s:
        if r.learned:
            gate = straight_through(kept, least_kept(kept), kept.free)
        if r.leader[l] == l and r.learned:
            decided = [Decision(s, kept.margin - noise, kept.free, batch, state.scores)]
    x, held, q, k = masked(model, l, state.x, kept, gate, batch)
    scores = state.scores
    if model.reads_scores(l):
        rows = batch.every if kept.rows is None else kept.rows
        k = k if r.kv == "keep" else k[rows]                # the keys that inference would hold
        scores = scores.read(batch).see(kept, q[rows], k, r.window)
    return type(state)(x, scores, kept, state.memory), held, decided


def extend_step(model, l, batch, state, held, noise=0.0):
    """As FTPModel.extend_step, over what the prompts left -> State and the Decisions taken."""
    r, s = model.routing, model.routing.sparsity[l]
    kept, state = model.route_new(l, batch, state, noise)
    batch = kept.batch
    if kept.n == 0 and r.absent(l):
        return replace(state, kept=kept), []
    gate, decided = gates(kept), []
    if kept.margin is not None and r.learned and 0 < s:
        free = torch.ones_like(kept.mask)
        gate = straight_through(kept, r.thresholds[r.leader[l]], free)
        if r.leader[l] == l:
            decided = [Decision(s, kept.margin - noise, free, batch, state.scores)]
    x, mine, q, k = masked(model, l, state.x, kept, gate, batch, held)
    scores = state.scores
    if kept.n and r.decode == "threshold" and model.reads_scores(l):
        scores = scores_over(model, l, scores, kept, q, mine, held)
    return type(state)(x, scores, kept, state.memory), decided


def gates(kept):
    """0 or 1 for each token, (N,) float32."""
    return kept.mask.float()


def straight_through(kept, threshold, free):
    """The gates with the gradient of a sigmoid around the threshold, on the rows `free` (N,)."""
    soft = torch.sigmoid(kept.margin - threshold)
    return kept.mask + torch.where(free, soft - soft.detach(), 0.0)


def least_kept(kept):
    """The smallest margin kept in each token's prompt, (N,): a quota's threshold."""
    batch = kept.batch
    m = kept.margin.detach().masked_fill(~(kept.mask & kept.free), KEEPS_ENDS_ALONE)
    least = m.new_full((len(batch.lengths),), KEEPS_ENDS_ALONE)
    return least.scatter_reduce(0, batch.seq, m, "amin")[batch.seq]


def masked(model, l, x, kept, gate, batch, past=None):
    """Block l on all rows x (N, d) -> states, Held, queries (N, H, D) and keys (N, Hkv, D).

    gate (N,): 1 computes, 0 skips. past: Held of what lies before the batch's tokens.
    """
    block, skipped = model.blocks[l], model.routing.skipped
    keep = skipped is not None and skipped.keep
    stay, open_ = x, gate.to(x.dtype)[:, None]
    q, k, v = block.qkv(x, batch.rope)
    if skipped is not None and kept.rows is not None:
        stay, k, v = what_skipping_leaves(block, skipped, x, open_, batch, k, v)
    held = Held(k, v, gate, kept)
    att = gated_attention(q, held, batch, past, all_keys=keep)
    new = block.rest(x, att)
    return stay + open_ * (new - stay), held, q, k


def what_skipping_leaves(block, skipped, x, gate, batch, k, v):
    """States, keys and values of tokens that skip, mixed with the block's own k, v by the gate."""
    update, kv = skipped.forecaster(block.l, x) if skipped.forecaster else (None, None)
    stay = x if update is None else x + update
    if not skipped.keep or kv is None:
        return stay, k, v
    first = block.n_head * block.head_dim
    own = F.linear(block.norm1(x), *kv_weights(block, first))
    # a low-rank forecast tells what is missing from them, a map stands for them
    more = kv if update is not None else kv - own
    kv = own + (1 - gate) * more
    k, v = kv.unflatten(1, (-1, block.head_dim)).chunk(2, 1)
    k = k if block.k_norm is None else block.k_norm(k)
    return stay, block.rotate(k, batch.rope) if block.rotary else k, v


def kv_weights(block, first):
    """Weight and bias of a block's key and value projections."""
    bias = block.qkv_proj.bias
    return plain_weight(block.qkv_proj)[first:], None if bias is None else bias[first:]


def gated_attention(q, held, batch, past, all_keys):
    """Attention within each sequence, keys weighted by their gates -> (N, H * D).

    A query always sees its own key: a skipped row's output is what it would have been. all_keys:
    skipped tokens leave keys too, so that no gate closes one.
    """
    out = []
    for b, (start, n) in enumerate(zip(batch.start.tolist(), batch.lengths.tolist())):
        mine = slice(start, start + n)
        k, v, gate = held.k[mine], held.v[mine], held.gate[mine]
        before = 0
        if past is not None:
            there = past.kept.batch
            rows = slice(int(there.start[b]), int(there.start[b] + there.lengths[b]))
            before = rows.stop - rows.start
            k, v = torch.cat((past.k[rows], k)), torch.cat((past.v[rows], v))
            gate = torch.cat((past.gate[rows], gate))
        out.append(one_attention(q[mine], k, v, None if all_keys else gate, before))
    return torch.cat(out)


def one_attention(q, k, v, gate, before):
    """q (n, H, D) over k, v (before + n, Hkv, D), gate (before + n,) or None -> (n, H * D)."""
    n, n_head, d = q.shape
    k, v = (t.repeat_interleave(n_head // t.shape[1], 1).transpose(0, 1) for t in (k, v))
    w = (q.transpose(0, 1) @ k.transpose(1, 2)).float() * d ** -0.5
    future = torch.ones(n, len(k[0]), dtype=torch.bool, device=q.device).triu(before + 1)
    w = w.masked_fill(future, -torch.inf)
    w = (w - w.detach().amax(-1, keepdim=True)).exp()
    if gate is not None:
        own = torch.eye(n, len(k[0]), device=q.device)
        own = own.roll(before, 1) if before else own
        w = w * (gate * (1 - own) + own)
    att = (w / w.sum(-1, keepdim=True)).to(q.dtype) @ v
    return att.transpose(0, 1).reshape(n, -1)


def scores_over(model, l, scores, kept, q, mine, past):
    """Scores of new tokens over the keys that inference would hold: those of a cache."""
    cache, keep = model.new_cache(len(kept.counts)), model.routing.kv == "keep"
    for held in (past, mine):
        there = held.kept.batch
        rows = there.every if keep or held.kept.rows is None else held.kept.rows
        counts = there.lengths if keep else held.kept.counts
        k, v = held.k.detach()[rows], held.v.detach()[rows]
        cache.append(l, np.arange(len(counts)), counts, k, v)
    batch = kept.batch
    q = q.detach()[batch.every if kept.rows is None else kept.rows]
    keys, counts = cache.keys(l, np.arange(len(kept.counts)))
    return scores_of_new(scores, batch, kept, q, keys, counts, keep)
