"""Packed tokens: who is in a batch, and who of them computes a block."""
from functools import cached_property, partial

import numpy as np
import torch

from lib.cache import to_device
from lib.config import quota

MULTIPLE = 8     # CPU kernels are made anew for each number of rows: a prompt of a length not met
                 # before took 479 ms, a repeated one 451; in multiples of eight 412 and 422
NEAR = 64        # within so many tokens the router tells distances to the prompt's ends apart


class Batch:
    """Sequences packed one after the other: N tokens of B sequences.

    lengths, start, past, rows (B,): host arrays. past: tokens that came before; rows: cache rows.
    seq, local, pos, size (N,): of each token its sequence, its place in it, its position, and the
    length of its sequence. last (B,): rows of the sequences' last tokens. last_only: of prompts,
    that nobody reads the last block's output of other rows.
    """
    def __init__(self, seqs, rope, past=None, rows=None, last_only=False):
        device, self.last_only = rope.device, last_only
        lengths = np.array([len(s) for s in seqs])
        self.lengths, self.start = lengths, lengths.cumsum() - lengths
        self.new = past is not None                      # tokens after a prompt, not prompts
        self.past = np.asarray(past) if self.new else np.zeros_like(lengths)
        self.rows = np.arange(len(seqs)) if rows is None else np.asarray(rows)
        seq = np.arange(len(seqs)).repeat(lengths)
        local = np.arange(len(seq)) - self.start[seq]
        to = partial(to_device, device=device)
        self.seqs, self.ids = seqs, to(np.array([t for s in seqs for t in s]))
        self.seq, self.local, self.size = to(seq), to(local), to(lengths[seq])
        self.pos = to(local + self.past[seq])
        self.every = torch.arange(len(seq), device=device)
        self.last = to(self.start + lengths - 1)
        self.whole_rope = rope
        self.rope = rope.index_select(1, self.pos)              # (2, N, head_dim): cos and sin
        self.all = Kept(self, None, lengths)
        self.none = Kept(self, self.every[:0], np.zeros_like(lengths))

    @cached_property
    def is_last(self):
        """The sequences' last tokens as a mask, (N,)."""
        return self.local == self.size - 1

    @cached_property
    def place(self):
        """Factor 1 as one number, (N, 1): 0: first of a prompt, 1: its last, or a new one."""
        if self.new:
            return torch.ones_like(self.pos, dtype=torch.float32)[:, None]
        # in float64, as one float32 division would round otherwise than routers were trained with
        return (self.local.double() / (self.size - 1).clamp(min=1)).float()[:, None]

    @cached_property
    def position(self):
        """Factor 1 as three numbers, (N, 3): place, distance to the start, distance to the end."""
        to_end = torch.zeros_like(self.pos) if self.new else self.size - 1 - self.local
        near = [(d / NEAR).clamp(0, 1)[:, None] for d in (self.pos, to_end)]
        return torch.cat((self.place, *near), 1)

    def on(self, device):
        """This Batch on another device, for a model that is spread over several."""
        return Batch(self.seqs, self.whole_rope.to(device), self.past if self.new else None,
                     self.rows, self.last_only)


class Kept:
    """The tokens of a batch that compute a block.

    rows (M,): ascending, None for all. counts (B,): how many of each sequence, a host array.
    padded: rows up to a multiple, see MULTIPLE. margin (N,): what they were chosen by, if anything;
    free (N,): the tokens that it decides about, as the others compute anyway.
    """
    def __init__(self, batch, rows, counts, margin=None, free=None):
        self.batch, self.rows, self.counts = batch, rows, counts
        self.margin, self.free = margin, free
        self.n = int(counts.sum())
        self.padded, self.rope = rows, batch.rope
        if rows is not None:
            fill = -self.n % MULTIPLE if self.n > 64 and rows.device.type == "cpu" else 0
            self.padded = torch.cat((rows, rows[-1:].expand(fill))) if fill else rows
            self.rope = batch.rope.index_select(1, self.padded)

    @property
    def mask(self):
        """The same as booleans, (N,)."""
        mask = torch.zeros_like(self.batch.every, dtype=torch.bool)
        return ~mask if self.rows is None else mask.index_fill(0, self.rows, True)

    @property
    def skipped(self):
        """The rows of the other tokens, (N - M,)."""
        n = len(self.batch.every) - self.n
        return torch.nonzero_static(~self.mask, size=n)[:, 0]


def of_spans(values, batch, size):
    """Values (N,) of prompts' tokens -> the mean of each token's span of `size` neighbours.

    Of a span that a quota cuts in two the later tokens come first. New tokens have no neighbours.
    """
    if size == 1 or batch.new:
        return values
    # spans count from each prompt's first token, so that what stands before it changes nothing
    spans = -(-batch.lengths // size)
    first = to_device(spans.cumsum() - spans, values.device)
    span = first[batch.seq] + batch.local // size
    zero = values.new_zeros(int(spans.sum()))
    total = zero.index_add(0, span, values)
    count = zero.index_add(0, span, torch.ones_like(values))
    return (total / count)[span] + 1e-5 * (batch.local % size)


def first_of(kept, first):
    """How many first tokens of a prompt compute anyway, where a block keeps `kept` of them."""
    return max(1, min(first, kept // 4))        # in a short prompt the newest need the room


def always(batch, s, first):
    """The tokens of prompts that compute a block of sparsity s whoever decides, (N,): see Schedule.

    The first ones, where attention sinks lie, and the last, which the answer follows.
    """
    room = [first_of(quota(n, s), first) for n in batch.lengths.tolist()]
    if len(set(room)) == 1:                                     # the usual case needs no lookup
        return (batch.local < room[0]) | batch.is_last
    room = to_device(np.array(room), batch.seq.device)
    return (batch.local < room[batch.seq]) | batch.is_last


def by_mask(mask, batch, margin, free=None):
    """Kept of a mask (N,) whose numbers the device alone knows."""
    counts = torch.zeros(len(batch.lengths), device=mask.device)
    counts = counts.index_add(0, batch.seq, mask.float()).long().cpu().numpy()
    return Kept(batch, mask.nonzero()[:, 0], counts, margin, free)
