"""Rivals that take blocks or sub-blocks out: ShortGPT (2403.03853) and BlockPruner (2406.10594).

    model = PartModel.of(FTPModel.from_pretrained("smollm2"))       # the same weights
    model.use("artifacts/rivals/blockpruner_0.30.json", removal="prompt")

A schedule's sparsity of 1 removes a block, its `parts` leave the attention or the MLP of one.
removal "whole": for every token, as the methods have it. "prompt": for prompts alone, so that
prefill saves what it saves and decoded tokens run the whole model, over the keys of decoded tokens
where the prompt has left none (with kv "keep" over those of all).
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from analysis.rivals.common import as_one_of, nearest, prompt_flops, text_batches
from lib.artefacts import PARTS, Schedule
from lib.config import Config
from lib.evaluation import nll
from lib.files import check, load_json, save_json
from lib.flops import Meter, block_flops
from lib.last_block import is_lean
from lib.routing import Routing
from lib.search import block_influence
from lib.skipped import Skipped, turn_keys
from lib.stage import progress, saved
from model_ftp import Block, FTPModel

REMOVALS = ("whole", "prompt")
HALVES = ("attention", "mlp")               # the sub-blocks of a block
STATE = "ftp-blockpruner-state-1"           # format of the file that --resume reads

# ------------------------------------------------------------------------------------------------
# half a block: other methods over the same weights


class HalfBlock(Block):
    """A decoder layer of which one sub-block is left."""

    @classmethod
    def of(cls, block):
        """The half of a whole Block, sharing its weights."""
        half = cls.__new__(cls)
        half.__dict__.update(vars(block))
        half.__dict__.pop("rest", None)        # a compiled one is the whole block's
        return half


class AttentionBlock(HalfBlock):
    """A decoder layer without its MLP."""

    def rest(self, h, att):
        """The output map with its residual, (M, d)."""
        return self.o(att).add_(h)


class MLPBlock(HalfBlock):
    """A decoder layer without its attention: nothing for the cache, no queries, no keys."""

    def prefill(self, x, kept, batch, cache):
        """As Block.prefill -> x, None, None."""
        x, _ = self.extend(x, kept, batch, cache)
        return x, None, None

    def prefill_last(self, x, kept, batch, cache):
        """As lib/last_block.prefill_last -> x, None, None."""
        h = self.mlp(x[batch.last])
        return h.new_zeros(x.shape).index_copy(0, batch.last, h), None, None

    def extend(self, x, kept, batch, cache):
        """As Block.extend -> x, None."""
        if kept.n == 0:                     # kernels do not take zero rows
            return x, None
        if kept.rows is None:
            return self.mlp(x), None
        h = self.mlp(x.index_select(0, kept.padded))
        return x.index_copy(0, kept.rows, h[:kept.n]), None

    def mlp(self, h):
        """The MLP with its norm and residual, (M, d)."""
        a = self.norm2(h)
        wide = F.silu(self.gate(a), inplace=True).mul_(self.up(a))
        return self.down(wide).add_(h)


# ------------------------------------------------------------------------------------------------
# the model without some sub-blocks


@dataclass(frozen=True)
class PartRouting(Routing):
    """A Routing that tells of each block what is left of it.

    parts (n_layer,): of PARTS; removal: whether the others are gone "whole" or for the "prompt".
    """
    parts: tuple = ()
    removal: str = "whole"

    def left(self, l, phase):
        """What the tokens of a phase, "prefill" or "decode", run of block l."""
        if phase == "decode" and self.removal == "prompt":
            return "both"
        return self.parts[l]

    def prefill_of(self, block, batch):
        half = self.half(block, "prefill")
        if not isinstance(half, MLPBlock):
            return super().prefill_of(half, batch)
        return half.prefill_last if is_lean(batch, half.l, len(self.parts)) else half.prefill

    def extend_of(self, block):
        half = self.half(block, "decode")
        return half.extend if isinstance(half, MLPBlock) else super().extend_of(half)

    def half(self, block, phase):
        """What is left of a block, as a Block."""
        part = self.left(block.l, phase)
        if part == "both":
            return block
        return AttentionBlock.of(block) if part == "attention" else MLPBlock.of(block)


class PartModel(FTPModel):
    """FTPModel whose schedule may leave half of a block."""

    @classmethod
    def of(cls, model):
        """A loaded FTPModel as one of this class, dense: the same weights, a routing of its own."""
        return as_one_of(cls, model).use()

    def use(self, schedule=None, router="static", *, removal="whole", **how):
        """As FTPModel.use, for a schedule that may have parts; removal: see above."""
        check(removal in REMOVALS,
              f"--removal {removal}: unknown; choose from {', '.join(REMOVALS)}")
        if isinstance(schedule, (str, Path)):
            schedule = Schedule.load(schedule)
        parts = schedule.parts if schedule else None
        check(not (parts and how.get("forecaster")),
              "--forecaster: it forecasts whole blocks; give a schedule without parts")
        super().use(schedule and replace(schedule, parts=None), router, **how)
        routing = vars(self.routing)
        if parts:
            routing = routing | {"schedule": replace(routing["schedule"], parts=parts)}
        parts = tuple(parts or ["both"] * self.config.n_layer)
        self.routing = PartRouting(**routing, parts=parts, removal=removal)
        return self

    def prefill_step(self, l, batch, state, cache=None, meter=None):
        r = self.routing
        # decoded tokens will run the attention that is absent here, and with kv "keep" see keys
        # of the prompt
        if r.removal == "prompt" and r.kv == "keep" and self.lacks_attention(l):
            self.leave_keys(l, batch, state, cache, meter)
        return super().prefill_step(l, batch, state, cache, part_meter(meter, r, "prefill"))

    def extend_step(self, l, batch, state, cache, meter=None):
        meter = part_meter(meter, self.routing, "decode")
        return super().extend_step(l, batch, state, cache, meter)

    def route_new(self, l, batch, state, noise=0.0):
        if self.routing.removal == "prompt" and self.routing.sparsity[l] >= 1:
            return batch.all, state         # a block that only the prompts lack
        return super().route_new(l, batch, state, noise)

    def lacks_attention(self, l):
        """Whether prompts do not run the attention of block l."""
        return self.routing.sparsity[l] >= 1 or self.routing.left(l, "prefill") == "mlp"

    def leave_keys(self, l, batch, state, cache, meter):
        """Own keys and values of all tokens to the cache, where the prompt runs no attention."""
        if cache is not None:
            _, kv = Skipped(keep=True).forecast(self.blocks[l], state.x)
            k, v = turn_keys(self.blocks[l], kv, batch.rope)
            cache.append(l, batch.rows, batch.lengths, k, v)
        if meter is not None:
            flops = block_flops(self.config.block(l), 0, 0, kv_only=int(batch.lengths.sum()))
            meter.flops["prefill"] += flops

    def reads_scores(self, l):
        """As FTPModel's; where no attention runs, scores stay as they are."""
        return self.routing.left(l, "prefill") != "mlp" and super().reads_scores(l)


# ------------------------------------------------------------------------------------------------
# FLOPs of what is left


@dataclass
class PartConfig(Config):
    """Shape of a model that lacks sub-blocks, for counting alone; parts (n_layer,): of PARTS."""
    parts: tuple = ()

    def block(self, l):
        if self.parts[l] == "attention":
            return replace(self, intermediate_size=0)
        if self.parts[l] == "mlp":
            return replace(self, n_head=0, n_kv_head=0)
        return self


def part_config(config, parts):
    """The PartConfig of a whole model's Config."""
    return PartConfig(**vars(config), parts=tuple(parts))


class PartMeter(Meter):
    """A view of a Meter: what is counted here stands there, by the FLOPs of what is left."""
    def __init__(self, meter, config):
        vars(self).update(vars(meter))      # the very same counters
        self.config = config


def part_meter(meter, routing, phase):
    """What a PartModel counts into: a Meter, or None."""
    parts = [routing.left(l, phase) for l in range(len(routing.parts))]
    if meter is None or set(parts) == {"both"}:
        return meter
    return PartMeter(meter, part_config(meter.config, parts))


# ------------------------------------------------------------------------------------------------
# ShortGPT


def shortgpt(model, samples, levels):
    """The blocks of lowest Block Influence go, ranked once."""
    influence, dense = block_influence(model, samples), prompt_flops(model.config, samples)
    n = len(influence)
    order = sorted(range(n), key=influence.__getitem__)

    def sparsity(k):
        return [float(l in order[:k]) for l in range(n)]

    def cost(k):
        return prompt_flops(model.config, samples, sparsity(k))

    for level in levels:
        gone = order[:nearest(level, range(n), cost, dense)]
        schedule = Schedule(sparsity(len(gone)), model.fingerprint)
        yield level, schedule, {"block_influence": influence, "removed": gone}


# ------------------------------------------------------------------------------------------------
# BlockPruner


def what_is_left(n_layer, removed):
    """Sparsities and parts of a schedule without the sub-blocks (block, half) in `removed`."""
    sparsity, parts = [], []
    for l in range(n_layer):
        left = [half for half in HALVES if (l, half) not in removed]
        sparsity.append(0.0 if left else 1.0)
        parts.append(left[0] if len(left) == 1 else "both")
    return sparsity, parts


def without(model, removed):
    """Schedule without the sub-blocks (block, half) in `removed`."""
    sparsity, parts = what_is_left(model.config.n_layer, removed)
    return Schedule(sparsity, model.fingerprint, parts=parts)


def step_all(model, l, texts, states):
    """Block l on each Batch of `texts` -> their States."""
    return [model.prefill_step(l, batch, state) for batch, state in zip(texts, states)]


def text_loss(model, texts, states):
    """Mean loss, nats, of all tokens of the texts but the first ones, from their last States."""
    x, samples = [], []
    for batch, state in zip(texts, states):
        x.append(state.x[batch.local < batch.size - 1])     # nothing follows a text's last token
        samples += [(ids[:1], ids[1:]) for ids in batch.seqs]
    return nll(model, torch.cat(x), samples)


@torch.inference_mode()
def weakest(model, texts, removed):
    """(loss, (block, half)) of the sub-block whose absence, beside those removed, harms least.

    model: PartModel; texts: Batches. What the candidates have in common, the blocks before the one
    that each lacks, runs once.
    """
    n = model.config.n_layer
    model.use(without(model, removed))
    before = [[model.begin(batch) for batch in texts]]      # States before each block
    for l in range(n - 1):
        before.append(step_all(model, l, texts, before[-1]))
    losses = []
    for l, half in [(l, half) for l in range(n) for half in HALVES]:
        if (l, half) in removed:
            continue
        model.use(without(model, [*removed, (l, half)]))
        states = before[l]
        for k in range(l, n):
            states = step_all(model, k, texts, states)
        losses.append((text_loss(model, texts, states), (l, half)))
    return min(losses)


def blockpruner(model, samples, levels, state_path=None, resume=False, settings=None):
    """Sub-blocks go one by one, each time the one whose absence leaves the best perplexity.

    The order of removal is saved to state_path after each; with resume the search goes on there.
    """
    model, config = PartModel.of(model), model.config
    texts, dense = text_batches(model, samples), prompt_flops(config, samples)
    trail = read_trail(state_path, settings) if resume and state_path.exists() else []

    def gone(n):
        return [(step["block"], step["part"]) for step in trail[:n]]

    def cost(n):
        sparsity, parts = what_is_left(config.n_layer, gone(n))
        return prompt_flops(part_config(config, parts), samples, sparsity)

    bar = progress(desc="blockpruner", unit="sub-block", initial=len(trail))
    while 1 - cost(len(trail)) / dense < max(levels):
        loss, (l, half) = weakest(model, texts, gone(len(trail)))
        trail.append({"block": l, "part": half, "ppl": math.exp(loss)})
        bar.update()
        if state_path:
            save_json(state_path, {"format": STATE, "settings": settings, "trail": trail})
            saved[state_path] = f"{len(trail)} sub-blocks removed"
    bar.close()
    for level in levels:
        n = nearest(level, range(len(trail) + 1), cost, dense)
        yield level, without(model, gone(n)), {"removed": trail[:n]}


def read_trail(path, settings):
    """The order of removal that an interrupted run has saved. FTPError if it was another run."""
    form = {"trail": [{"block": int, "part": str, "ppl": float}]}
    old = load_json(path, STATE, "--resume", form)
    check(old.get("settings") == settings,
          f"--resume: {path} belongs to a run with other settings; give them again, or drop "
          "--resume")
    check(all(step["part"] in PARTS for step in old["trail"]),
          f"--resume: {path} is damaged; start again without --resume")
    return old["trail"]
