"""The KV cache: keys and values of the tokens that each block computed."""
import numpy as np
import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of the tokens that each block computed; rows and blocks hold different ones.

    k[l], v[l] (rows, n_kv_head, capacity, head_dim), rotated by true position. len (n_layer, rows),
    a host array, says how many count; they stand in the order of their positions.
    seen (rows,): tokens that went by, the next position.
    """
    def __init__(self, config, rows, dtype):
        self.config, self.n_rows, self.dtype = config, rows, dtype
        self.k: list = [None] * config.n_layer
        self.v: list = [None] * config.n_layer
        self.len = np.zeros((config.n_layer, rows), dtype=np.int64)
        self.seen = np.zeros(rows, dtype=np.int64)

    def append(self, l, rows, counts, k, v):
        """Add k, v (sum of counts, n_kv_head, head_dim) to cache rows `rows` (B,) of block l.

        Returns how many keys each of them held before, (B,).
        """
        old = self.len[l, rows]
        self.len[l, rows] = old + counts
        self.grow(l, int(self.len[l].max()), k)
        if neighbours(rows, old, counts):                       # a block of memory, no scatter
            here, new = slice(rows[0], rows[0] + len(rows)), slice(old[0], old[0] + counts[0])
            for store, t in ((self.k[l], k), (self.v[l], v)):
                store[here, :, new] = t.unflatten(0, (len(rows), -1)).transpose(1, 2)
            return old
        within = np.arange(len(k)) - (counts.cumsum() - counts).repeat(counts)
        row = to_device(rows.repeat(counts), k.device)
        col = to_device(old.repeat(counts) + within, k.device)
        self.k[l][row, :, col] = k
        self.v[l][row, :, col] = v
        return old

    def grow(self, l, need, like):
        """Room for `need` entries a row in block l, by a quarter more than there was."""
        have = 0 if self.k[l] is None else self.k[l].shape[2]
        if need <= have:
            return
        shape = (self.n_rows, like.shape[1], max(need + 32, have * 5 // 4), like.shape[2])
        for store in (self.k, self.v):
            new = torch.zeros(shape, dtype=self.dtype, device=like.device)
            if have:
                new[:, :, :have] = store[l]
            store[l] = new

    def attend(self, l, q, row, last, one_each):
        """Attention of queries q (M, n_head, D) over what block l holds -> (M, n_head * D).

        row, last (M,): of each query its cache row and the newest key it sees, host arrays.
        one_each: every query is its row's only one, as when decoding.
        """
        n_kv = self.k[l].shape[1]
        if one_each:
            k, v, mask, mine = self.decode_view(l, row, last)
            if mine is not None:                                # every cache row in one product,
                q = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, mine, q)    # idle ones dropped
            # a key head's queries are rows of one product, so that a key is read once, never copied
            out = F.scaled_dot_product_attention(q.unflatten(1, (n_kv, -1)), k, v, mask).flatten(1)
            return out if mine is None else out[mine]
        # several new tokens a row, when scoring: rows of about as many share a product
        out = torch.empty_like(q)
        rows, first, counts = np.unique(row, return_index=True, return_counts=True)
        for mine in alike(counts):
            # short rows are filled up with their last query, which gives the same once more
            within = np.minimum(np.arange(counts[mine].max()), counts[mine, None] - 1)
            place = first[mine, None] + within                  # (R, Q), as rows of q
            at = to_device(place, q.device)
            out[at] = self.attend_rows(l, q[at], rows[mine], last[place])
        return out.flatten(1)

    def attend_rows(self, l, q, rows, last):
        """Attention of as many queries in each of the cache rows `rows`, q (R, Q, n_head, D), over
        their keys up to `last` (R, Q), host arrays -> (R, Q, n_head, D)."""
        n, at = int(last.max()) + 1, to_device(rows, q.device)
        k, v = self.k[l][at, :, :n], self.v[l][at, :, :n]
        n_kv = k.shape[1]
        group = q.shape[2] // n_kv
        seen = torch.arange(n, device=q.device) <= to_device(last, q.device)[:, :, None]
        mask = seen.repeat(1, group, 1)[:, None]                # (R, 1, group * Q, n)
        # as when decoding, the queries of a key head are rows of one product
        q = q.unflatten(2, (n_kv, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def decode_view(self, l, row, last):
        """Keys, values, mask and places for one query a row; no copy of a key is made."""
        n, dev = int(last.max()) + 1, self.k[l].device
        if neighbours(row, last):
            here = slice(row[0], row[0] + len(row))
            return self.k[l][here, :, :n], self.v[l][here, :, :n], None, None
        newest = np.zeros(self.n_rows, dtype=np.int64)
        newest[row] = last
        newest = to_device(newest, dev)
        mask = torch.arange(n, device=dev) <= newest[:, None, None, None]
        return self.k[l][:, :, :n], self.v[l][:, :, :n], mask, to_device(row, dev)

    def keys(self, l, rows):
        """Keys of cache rows `rows` (B,) in block l, (B, n_kv_head, K, head_dim), and how many of
        each count, (B,)."""
        return self.k[l][to_device(rows, self.k[l].device)], self.len[l, rows]

    def forget(self, l):
        """Drop what block l holds, for passes that go block by block."""
        self.k[l] = self.v[l] = None
        self.len[l] = 0

    def mark(self):
        """The present state, for rewind()."""
        return self.len.copy(), self.seen.copy()

    def rewind(self, mark):
        """Forget all that came after `mark`."""
        self.len, self.seen = mark[0].copy(), mark[1].copy()

    def bytes(self):
        """Bytes of the stored entries, (used, allocated)."""
        each = [self.config.block(l).kv_bytes(1, self.dtype.itemsize) for l in range(len(self.k))]
        used = sum(n * e for n, e in zip(self.len.sum(1).tolist(), each))
        room = [0 if k is None else k.shape[0] * k.shape[2] for k in self.k]
        return used, sum(n * e for n, e in zip(room, each))


def neighbours(rows, *lists):
    """Whether cache rows lie side by side and are alike in each of `lists`, host arrays (B,)."""
    if not len(rows) or lists[-1][0] < 0:
        return False
    side_by_side = bool((rows[1:] - rows[:-1] == 1).all())
    return side_by_side and all(bool((a == a[0]).all()) for a in lists)


def alike(counts):
    """Groups of rows whose counts (B,) differ by less than a factor of two: arrays of indices."""
    order = np.argsort(counts, kind="stable")
    power = np.floor(np.log2(counts[order])).astype(int)
    return np.split(order, np.flatnonzero(np.diff(power)) + 1)


def to_device(array, device):
    """A host array as a tensor there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # a GPU fetches it when its turn comes, from memory that stays where it is: the host goes on
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
