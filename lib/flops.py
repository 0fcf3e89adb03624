"""What a model costs, by its shape; and a Meter of what it really did.

FLOPs count a multiplication and an addition as two; norms, rotary and activations are left out.
All numbers are Python's, exact integers or floats of them.
"""
from lib.config import leaders, quota, scores_matter
from lib.last_block import is_lean

PHASES = ("prefill", "decode")     # of prompts, and of the tokens after them

# ------------------------------------------------------------------------------------------------
# formulas


def block_flops(config, tokens, pairs, kv_only=0):
    """FLOPs of one block.

    tokens: how many compute it; pairs: query-key pairs that they attend; kv_only: tokens that skip
    it and leave a key and value all the same.
    """
    maps = 2 * (config.p_attn + config.p_mlp) * tokens
    attention = 4 * config.n_head * config.head_dim * pairs  # scores, and the sum of values
    return maps + attention + 2 * config.p_kv * kv_only


def last_flops(config, keys, prompts=1):
    """FLOPs of the last block where only the last token of each prompt is read behind it.

    keys: tokens that leave a key and value there, of all the prompts.
    """
    return block_flops(config, prompts, keys, keys - prompts) if keys else 0


def score_flops(config, window, keys):
    """FLOPs of the attention scores of one block: `window` queries against `keys` keys."""
    return 2 * config.n_head * config.head_dim * window * keys


def head_flops(config, positions):
    """FLOPs of the logits of so many positions."""
    return 2 * config.vocab_size * config.hidden_size * positions


def prefill_flops(config, T, sparsity, kv="drop", router=None, window=16, head=1, forecaster=None,
                  last_only=True):
    """FLOPs of the prefill of one prompt of T tokens (method section 7).

    sparsity: a list over blocks. kv: "drop" or "keep" keys and values of skipped tokens. router: a
    Router, which adds its MLP and the scores that it reads, `window` queries a block. head: how
    many positions get logits. forecaster: the Forecaster in use. last_only: only the last token's
    output of the last block is computed; False, as papers count, all that do not skip it.
    """
    total = head_flops(config, head)
    lead = leaders(sparsity, 1 if router is None else router.group)
    for l, s in enumerate(sparsity):
        c, kept = config.block(l), quota(T, s)
        skips, lean = 0 < s < 1, last_only and l == len(sparsity) - 1
        all_keys = skips and kv == "keep"
        if lean:
            total += last_flops(c, T if all_keys else kept)
        elif all_keys:
            total += block_flops(c, kept, static_pairs(T, kept), T - kept)
        else:
            total += block_flops(c, kept, kept * (kept + 1) / 2)
        if skips and forecaster is not None and (all_keys or not lean):
            total += forecaster.flops(T - kept)
        if router is None:
            continue
        if skips and lead[l] == l:
            total += router.flops(T)
        if {"score", "rank"} & set(router.inputs) and scores_matter(sparsity, lead, l):
            total += score_flops(c, min(window, kept), kept)
    return total


def static_pairs(T, kept):
    """Pairs of the static router's kept tokens, where every earlier token has left a key.

    The first token sees its own, each of the newest kept - 1 all before it.
    """
    return 1 + sum(range(T - kept + 2, T + 1))


def memory(config, batch, length, sparsity, itemsize, kv="drop"):
    """Bytes that a prefill of `batch` prompts of `length` tokens needs, no forecaster.

    itemsize: bytes of a number. Returns {"weights"; "kv" of all blocks, with the cache's room for
    32 more tokens; "activations" of the block that has the most, mostly block 0, where no token
    skips; "total": weights, and the peak of activations and the keys and values so far}.
    """
    stored = peak = largest = 0
    for l, s in enumerate(sparsity):
        kept = batch * quota(length, s)
        keep = kv == "keep" and kept < batch * length
        if l == len(sparsity) - 1:
            held = last_activations(config, batch * length, kept, keep)
        else:
            held = activations(config, batch * length, kept, keep)
        if kept:                                           # a removed block has no cache
            rows = batch * length if keep else kept
            stored += config.kv_bytes(rows + 32 * batch, 1)
        peak = max(peak, stored + held)
        largest = max(largest, held)
    weights = config.parameters
    numbers = {"weights": weights, "kv": stored, "activations": largest, "total": weights + peak}
    return {name: n * itemsize for name, n in numbers.items()}


def activations(config, tokens, kept, keep):
    """Numbers that a block holds when its MLP has expanded; `kept` of `tokens` compute it."""
    d, D = config.hidden_size, config.head_dim
    q, k = config.n_head * D, config.n_kv_head * D
    states = tokens * (d + 2 * D)                          # and their rotary tables
    if 0 < kept < tokens:
        states += kept * (d + 2 * D)                       # the gathered ones
    if keep and kept:
        projected = kept * 2 * q + tokens * (3 * k + d)    # products, and their rotated copies
    else:
        projected = kept * (2 * q + 3 * k)
    inner = kept * (q + 3 * d + 2 * config.intermediate_size)
    return states + projected + inner


def last_activations(config, tokens, kept, keep):
    """The same of the last block, where the MLP expands the prompts' last tokens alone."""
    d, D = config.hidden_size, config.head_dim
    k = config.n_kv_head * D
    states = tokens * (d + 2 * D) + kept * d               # and the normalised ones
    if kept < tokens:
        states += kept * (d + 2 * D)
    return states + 3 * (tokens if keep else kept) * k     # projections, rotated keys


# ------------------------------------------------------------------------------------------------
# what really happened


class Meter:
    """Realised sparsity and FLOPs of what a model was handed it for, by phase.

    total: tokens that went by; kept: a list over blocks, how many of them computed it; flops, and
    dense, what all tokens in all blocks would have cost (router and scores counted, head not).
    base: shape that saved FLOPs are counted against, for a pruned model the original's.
    """
    def __init__(self, model, base=None):
        self.config = model.config
        self.base = base or model.config
        self.total = dict.fromkeys(PHASES, 0)
        self.kept = {phase: [0] * self.config.n_layer for phase in PHASES}
        self.flops = dict.fromkeys(PHASES, 0.0)
        self.dense = dict.fromkeys(PHASES, 0.0)
        self.late = dict.fromkeys(PHASES, 0.0)   # FLOPs that the device counts: no block waits

    # -- counting: the model calls these for every block

    def prefill(self, model, l, batch, kept):
        """Prompts `batch`, of which the tokens `kept` compute block l."""
        n = kept.counts
        pairs = float((n * (n + 1)).sum()) / 2             # kept tokens see the kept before them
        self.count("prefill", model, l, batch, kept, pairs)
        if model.reads_scores(l):
            window = model.routing.window
            queries = n if window == "mean" else n.clip(max=window)
            each = int((queries * n).sum())
            self.flops["prefill"] += score_flops(self.config.block(l), 1, each)

    def extend(self, model, l, batch, kept, past):
        """New tokens `batch`, of which `kept` compute block l, where keys `past` (B,) lie."""
        pairs = causal_pairs(kept.counts, past)
        self.count("decode", model, l, batch, kept, pairs)

    def count(self, phase, model, l, batch, kept, pairs):
        """One block of a batch; pairs: query-key pairs, if skipped tokens have left no keys."""
        c, routing = self.config.block(l), model.routing
        tokens, computed = int(batch.lengths.sum()), int(kept.counts.sum())
        self.total[phase] += tokens if l == 0 else 0
        self.kept[phase][l] += computed
        lean = is_lean(batch, l, self.config.n_layer)
        self.dense[phase] += self.dense_block(batch, tokens, lean)
        # removed blocks cost nothing, and where all compute nothing was decided
        routed = kept.rows is not None and routing.sparsity[l] < 1
        all_keys = routed and routing.kv == "keep"
        if lean:
            keys = tokens if all_keys else computed
            self.flops[phase] += last_flops(c, keys, len(batch.lengths))
        elif all_keys:
            # how many keys a kept query sees is its position, which is on the device
            seen = (batch.pos[kept.rows] + 1).double().sum().to(model.device)
            self.late[phase] = self.late[phase] + block_flops(c, 0, seen)
            self.flops[phase] += block_flops(c, computed, 0, tokens - computed)
        else:
            self.flops[phase] += block_flops(c, computed, pairs)
        if routed and routing.skipped is not None and (all_keys or not lean):
            self.flops[phase] += routing.skipped.flops(tokens - computed)
        if routed and self.asks(routing, phase, l):
            self.flops[phase] += routing.router.flops(tokens)

    def dense_block(self, batch, tokens, lean):
        """FLOPs of all tokens in one block of `base`, in a share where it has more blocks.

        lean: this is the last block, which is not computed whole in a dense model either.
        """
        pairs = causal_pairs(batch.lengths, batch.past)
        share = self.base.n_layer / self.config.n_layer
        whole = block_flops(self.base, tokens, pairs)
        if lean:
            return (share - 1) * whole + last_flops(self.base, tokens, len(batch.lengths))
        return share * whole

    @staticmethod
    def asks(routing, phase, l):
        """Whether a trained router was asked about block l."""
        own = routing.learned and routing.leader[l] == l   # of a group the first block decides
        return own and (phase == "prefill" or routing.decode == "threshold")

    def add(self, other):
        """Count what `other` counted, too."""
        for phase in PHASES:
            pairs = zip(self.kept[phase], other.kept[phase])
            self.kept[phase] = [a + b for a, b in pairs]
            for name in ("total", "flops", "dense", "late"):
                mine, theirs = getattr(self, name), getattr(other, name)
                mine[phase] = mine[phase] + theirs[phase]

    def __getstate__(self):
        """On its way to another process: nothing on a device."""
        late = {phase: float(flops) for phase, flops in self.late.items()}
        return {**vars(self), "late": late}

    # -- what was counted

    def sparsity(self, phase):
        """Share of tokens that skipped, a list over blocks; None before any token of the phase."""
        n = self.total[phase]
        return [1 - kept / n for kept in self.kept[phase]] if n else None

    def mean(self, phase):
        """sparsity(), over all blocks."""
        s = self.sparsity(phase)
        return None if s is None else sum(s) / len(s)

    def used(self, phase):
        """FLOPs of the blocks, router and scores counted, head not."""
        return self.flops[phase] + float(self.late[phase])

    def saved(self, *phases):
        """Share of the blocks' FLOPs saved in these phases together; None before any."""
        dense = sum(self.dense[phase] for phase in phases)
        used = sum(self.used(phase) for phase in phases)
        return 1 - used / dense if dense else None


def causal_pairs(new, past):
    """Query-key pairs of new tokens (B,) after past ones (B,): each sees itself and all before."""
    return float((new * past).sum()) + float((new * (new + 1)).sum()) / 2
