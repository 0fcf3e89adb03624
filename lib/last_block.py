"""The last block of a prompt, where nobody reads what most tokens become.

What follows asks for the state of each prompt's last token alone; of the others the last block's
keys and values are read, when decoding. So their queries, attention and MLP are not computed.
"""
import torch
import torch.nn.functional as F

from lib.attention import runs
from lib.packing import linear_outputs
from lib.skipped import turn_keys


def is_lean(batch, l, n_layer):
    """Whether block l is the last, and the prompts' last tokens all that is read behind it."""
    return batch.last_only and l == n_layer - 1


def prefill_last(block, skipped, x, kept, batch, cache):
    """As Block.prefill, but in the x that it returns only the rows batch.last are states.

    skipped: Skipped or None, as of Routing.
    """
    # keys and values of all tokens that leave one
    h = x if kept.rows is None else x.index_select(0, kept.padded)
    first = block.n_head * block.head_dim
    kv = linear_outputs(block.qkv_proj, block.norm1(h), first)[:kept.n]
    k, v = turn_keys(block, kv, kept.rope[:, :kept.n])
    counts = kept.counts
    if leaves_all(skipped, kept):
        _, kv = skipped.forecast(block, x[kept.skipped])
        k, v = skipped.fill(block, kept, batch, k, v, kv)
        counts = batch.lengths
    if cache is not None:
        cache.append(block.l, batch.rows, counts, k, v)

    # all else of the last tokens, which compute in every block that computes at all
    h = x[batch.last]
    q, _, _ = block.qkv(h, batch.rope[:, batch.last])
    h = block.rest(h, attend_last(q, k, v, counts))
    return h.new_zeros(len(x), h.shape[1]).index_copy(0, batch.last, h), q, k


def leaves_all(skipped, kept):
    """Whether tokens that skip the block leave keys and values there too."""
    return skipped is not None and skipped.keep and kept.rows is not None


def attend_last(q, k, v, counts):
    """Attention of the last tokens q (B, H, D), each over all keys of its prompt -> (B, H * D).

    k, v (sum of counts, Hkv, D); counts (B,): keys of each prompt, a host array.
    """
    out, i, j = [], 0, 0
    for b, (m,) in runs(counts.tolist()):
        kb, vb = (t[j:j + b * m].unflatten(0, (b, m)).transpose(1, 2) for t in (k, v))
        # a key head's queries are rows of one product
        qb = q[i:i + b].unflatten(1, (k.shape[1], -1))
        out.append(F.scaled_dot_product_attention(qb, kb, vb).flatten(1))
        i, j = i + b, j + b * m
    return torch.cat(out)
