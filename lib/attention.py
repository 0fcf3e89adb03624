"""What the router knows of attention: a table of the latest scores, made beside the fused kernel.

A token's score is the attention it gets from the last queries of its prompt (method section 4).
The map of all queries and keys is never stored: the last W = 16 queries cost O(W T).
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch

PIECE = 64   # queries of which probabilities are held at a time, where all queries count


def runs(*lists):
    """Neighbouring sequences of equal shape, so that they share one kernel.

    lists: one value a sequence each. Yields (how many sequences, their values).
    """
    for values, group in groupby(zip(*lists)):
        yield len(list(group)), values


@lru_cache
def later(n, device):
    """Which of n keys come after each of n queries, (n, n) bool."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)


def attention_probs(q, k, last=None):
    """Probabilities (b, H, Q, K), float32, of queries q (b, Q, H, D) over keys k (b, K, Hkv, D).

    last (b, Q): index of the newest key that each query sees. None: the queries belong to the
    last Q of the keys.
    """
    b, n_query, n_head, d = q.shape
    n_key, n_kv = k.shape[1:3]
    # the query heads of a key head are rows of one product: its keys are read once
    q = (q * d ** -0.5).view(b, n_query, n_kv, -1, d).permute(0, 2, 3, 1, 4)
    k = k.transpose(1, 2).reshape(b * n_kv, n_key, d)
    w = torch.bmm(q.reshape(b * n_kv, -1, d), k.mT).view(b, n_head, n_query, n_key)
    if last is None:
        w[..., n_key - n_query:].masked_fill_(later(n_query, q.device), -torch.inf)
    else:
        unseen = torch.arange(n_key, device=q.device) > last[:, None, :, None]
        w.masked_fill_(unseen, -torch.inf)
    return w.softmax(-1, dtype=torch.float32)


def relative_score(p, keys):
    """Attention p among `keys` keys -> [0, 1], so that the length does not matter."""
    norm = torch.log1p(keys) if torch.is_tensor(keys) else math.log1p(keys)
    return torch.log1p(p * keys) / norm


def own_scores(probs, last):
    """Score and rank of new tokens, (b, Q) each: the attention that each gives itself.

    probs (b, Q, K): mean over heads; last (b, Q): index of the token's own key.
    """
    own = probs.gather(-1, last[..., None])
    seen = torch.arange(probs.shape[-1], device=probs.device) <= last[..., None]
    lower = ((probs < own) & seen).sum(-1)
    return relative_score(own[..., 0], last + 1), lower / last.clamp(min=1)


@dataclass(frozen=True)
class Scores:
    """The latest attention scores of a batch's tokens: the router's factors 2 and 3.

    value (N,) float32 in [0, 1], rank (N,) share of the prompt's tokens with a lower score. A
    token that skips a block keeps its older score. Never written to: see() and read() make anew.
    """
    value: torch.Tensor
    rank: torch.Tensor
    pending: tuple | None = None    # what the last block left: its Kept, queries, keys, window

    def see(self, kept, q, k, window):
        """Note the queries q (M, H, D) and keys k of a block; read() evaluates them.

        k holds the kept tokens, or all tokens of the batch where skipped ones leave a key too.
        window: the last so many queries count, or "mean" for all.
        """
        return replace(self, pending=(kept, q.detach(), k.detach(), window))

    def read(self, batch):
        """The table with what the last block left.

        Left to the next decision and done in one go with it: on a CPU small operators cost the
        most when a block has just displaced their code (2.6 -> 2.2 % of a prefill).
        """
        if self.pending is None:
            return self
        kept, q, k, window = self.pending
        rows = batch.every if kept.rows is None else kept.rows
        of_all = len(k) == len(batch.every)
        key_rows, key_counts = (batch.every, batch.lengths) if of_all else (rows, kept.counts)
        # where skipped tokens leave keys too, a query sees those up to its own place
        at = batch.local[rows] if of_all and kept.rows is not None else None

        value, rank, i, j, start = self.value, self.rank.clone(), 0, 0, 0
        for b, (n_query, n_key, size) in runs(kept.counts, key_counts, batch.lengths):
            queries, keys = slice(i, i + b * n_query), slice(j, j + b * n_key)
            if n_query:
                got = received(q[queries].unflatten(0, (b, n_query)),
                               k[keys].unflatten(0, (b, n_key)),
                               None if at is None else at[queries].view(b, n_query), window)
                got = relative_score(got, n_key).flatten()
                value = value.index_copy(0, key_rows[keys], got)
                # rank over the whole prompt, where skipped tokens stand with their older score
                whole = slice(start, start + b * size)
                order = value[whole].view(b, size).sort(dim=1, stable=True).indices
                ramp = torch.linspace(0, 1, size, device=q.device).expand(b, size)
                rank[whole].view(b, size).scatter_(1, order, ramp)
            i, j, start = queries.stop, keys.stop, start + b * size
        return Scores(value, rank)

    def with_own(self, rows, value, rank):
        """The table with the scores and ranks of the new tokens `rows` set."""
        return Scores(self.value.index_copy(0, rows, value.flatten()),
                      self.rank.index_copy(0, rows, rank.flatten().float()))


def received(q, k, at, window):
    """Mean attention (b, K) that each key gets, over heads and the last `window` queries.

    q (b, Q, H, D), k (b, K, Hkv, D); at (b, Q): index among the keys of each query, None where
    queries and keys belong to the same tokens. A key's mean is over the queries that can see it.
    """
    b, n_query, n_head, _ = q.shape
    n_key = k.shape[1]
    first = 0 if window == "mean" else max(0, n_query - window)
    place = torch.arange(n_key, device=q.device)
    if at is None and n_query - first <= PIECE:
        total = attention_probs(q[:, first:], k).sum((1, 2))
    else:
        last = place.expand(b, n_key) if at is None else at
        total = 0
        for low in range(first, n_query, PIECE):
            piece = slice(low, min(low + PIECE, n_query))
            total = total + attention_probs(q[:, piece], k, last[:, piece]).sum((1, 2))
    # a key is seen by the queries from its own place on
    if at is not None:
        place = torch.searchsorted(at.contiguous(), place.expand(b, n_key).contiguous())
    seers = n_query - place.clamp(min=first)
    return total * (1 / (n_head * seers))


def scores_of_new(scores, batch, kept, q, keys, counts, left_all):
    """The Scores of new tokens with what each gives itself, over the keys of its row.

    q (M, H, D): queries of the kept tokens; keys (B, Hkv, K, D) of the rows, counts (B,) of them,
    a host array. left_all: whether skipped tokens left a key too.
    """
    rows = batch.every if kept.rows is None else kept.rows
    new = batch.lengths if left_all else kept.counts
    i = 0
    for b, n in enumerate(kept.counts.tolist()):
        if n:
            mine = slice(i, i + n)
            within = batch.local[rows[mine]] if left_all else batch.every[:n]
            last = (within + int(counts[b] - new[b]))[None]
            k = keys[b, :, :int(counts[b])].transpose(0, 1)[None]
            probs = attention_probs(q[None, mine], k, last).mean(1)
            scores = scores.with_own(rows[mine], *own_scores(probs, last))
        i += n
    return scores
