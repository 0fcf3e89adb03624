"""A rival that takes late keys and values from one earlier state: SwiftKV (arXiv 2410.03960).

    model = FTPModel.from_pretrained("smollm2")
    SwiftModel.of(model, Swift.load("swiftkv_0.30.safetensors")).generate([[1, 9690]])

Of a prompt, the blocks from `first` on run for its ends alone. Their keys and values, of all tokens
and of decoded ones too, are projections of the state before block `first` under one norm. This norm
and W_Q, W_K and W_V of these blocks are trained: by the KL to the dense model at a temperature of
2, and by the squared error of the states before the last block. All else stays frozen.

Not as published: it is trained for minutes, on what --data gives.
"""
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F

from analysis.rivals.common import as_one_of, nearest, prompt_flops
from lib.artefacts import Schedule
from lib.checkpoint import FINGERPRINT, check_fingerprint
from lib.files import check_tensors, load_tensors, save_tensors, tensors_id
from lib.forecast import Learner, descend
from lib.last_block import is_lean
from lib.packing import plain_weight
from lib.scoring import joint_rows, kl_divergence
from lib.skipped import attention_up_to, turn_keys
from lib.stage import progress
from model_ftp import FTPModel, State

FORMAT = "ftp-swiftkv-1"
SKIP = 0.999                                # of the late blocks: a prompt keeps its ends alone
TRAINED = {"norm": ("norm",), "q": ("q", "q_bias"), "kv": ("kv", "kv_bias")}

# ------------------------------------------------------------------------------------------------
# what is trained, and the model that runs it


def late_sparsity(n_layer, first):
    """The sparsity of each block, a list: from block `first` on a prompt's ends alone compute."""
    return [0.0] * first + [SKIP] * (n_layer - first)


class Swift:
    """The norm and projections of the last n of n_layer blocks, as trained.

    tensors: norm (d,), q (n, n_head * head_dim, d), kv (n, 2 * n_kv_head * head_dim, d), and where
    the model has biases q_bias, kv_bias; float32.
    """
    def __init__(self, tensors, n_layer, fingerprint, meta=None):
        self.tensors, self.n_layer = tensors, n_layer
        self.fingerprint, self.meta = fingerprint, meta or {}

    @classmethod
    def of(cls, model, first):
        """Untrained: the blocks' own projections, and the norm of block `first`."""
        blocks = model.blocks[first:]
        size = [blocks[0].n_head * blocks[0].head_dim, 2 * blocks[0].n_kv_head * blocks[0].head_dim]
        tensors = {"norm": blocks[0].norm1.weight}
        weights = torch.stack([plain_weight(block.qkv_proj) for block in blocks])
        tensors["q"], tensors["kv"] = weights.split(size, 1)
        if blocks[0].qkv_proj.bias is not None:
            biases = torch.stack([block.qkv_proj.bias for block in blocks])
            tensors["q_bias"], tensors["kv_bias"] = biases.split(size, 1)
        tensors = {name: t.detach().float().clone() for name, t in tensors.items()}
        return cls(tensors, model.config.n_layer, model.fingerprint)

    @property
    def first(self):
        """The first block that it serves."""
        return self.n_layer - len(self.tensors["q"])

    @property
    def schedule(self):
        """The Schedule by which prompts run."""
        return Schedule(late_sparsity(self.n_layer, self.first), self.fingerprint, first=1)

    def to(self, device, dtype):
        tensors = {name: t.to(device, dtype) for name, t in self.tensors.items()}
        return Swift(tensors, self.n_layer, self.fingerprint, self.meta)

    def project(self, name, l, x):
        """The projection `name`, "q" or "kv", of block l: states x (N, d) -> (N, outputs)."""
        w, bias = self.tensors[name], self.tensors.get(f"{name}_bias")
        i = l - self.first
        return F.linear(x, w[i].to(x), None if bias is None else bias[i].to(x))

    def normed(self, x, eps):
        """States x (N, d) as keys and values are projected from."""
        return F.rms_norm(x, x.shape[1:], self.tensors["norm"].to(x), eps)

    @property
    def id(self):
        return tensors_id(self.tensors)

    def save(self, path):
        """Write path.safetensors and its readable twin."""
        save_tensors(path, self.tensors, {"format": FORMAT, "n_layer": self.n_layer,
                                          "fingerprint": self.fingerprint, "meta": self.meta})

    @classmethod
    def load(cls, path):
        """What save() wrote. FTPError if it is damaged."""
        t, o = load_tensors(path, FORMAT, "--peer", {
            "n_layer": int, "fingerprint": FINGERPRINT, "meta": (dict, None)})
        size = {name: tuple(t[name].shape) if name in t else () for name in ("q", "kv")}
        n, d = size["q"][:1], size["q"][2:]
        want = {"norm": d, "q": (*n, *size["q"][1:2], *d), "kv": (*n, *size["kv"][1:2], *d)}
        if "q_bias" in t or "kv_bias" in t:
            want |= {"q_bias": size["q"][:2], "kv_bias": size["kv"][:2]}
        check_tensors(t, want, f"--peer: {path}")
        return cls(t, o["n_layer"], o["fingerprint"], o.get("meta"))


class SwiftModel(FTPModel):
    """FTPModel under a Swift. State.memory (N, d): what late keys and values are projected from.

    Under use() alone every token of a prompt runs all blocks, over the same keys: the last token's
    logits are the same, as late keys depend on no late state. So it is trained.
    """
    @classmethod
    def of(cls, model, swift):
        """A loaded FTPModel as one of this class: the same weights, and those of `swift`."""
        check_fingerprint(swift.fingerprint, model.fingerprint, "--peer: it")
        made = as_one_of(cls, model)
        made.swift = swift.to(model.device, model.dtype)
        return made.use(swift.schedule, kv="keep")

    def late(self, l, batch, state, rows):
        """The State, with a memory before block `first`, and of block l the queries of tokens
        `rows` (M,) and all keys and values, (M or N, heads, head_dim)."""
        if l == self.swift.first:
            state = replace(state, memory=self.swift.normed(state.x, self.config.rms_eps))
        block = self.blocks[l]
        k, v = turn_keys(block, self.swift.project("kv", l, state.memory), batch.rope)
        h = block.norm1(state.x[rows])
        q = self.swift.project("q", l, h).unflatten(1, (-1, block.head_dim))
        q = q if block.q_norm is None else block.q_norm(q)
        q = block.rotate(q, batch.rope[:, rows]) if block.rotary else q
        return state, q, k, v

    def prefill_step(self, l, batch, state, cache=None, meter=None):
        if l < self.swift.first:
            return super().prefill_step(l, batch, state, cache, meter)
        kept, state = self.route(l, batch, state)
        if meter is not None:
            meter.prefill(self, l, batch, kept)
        # as in our own models, nobody reads the last block's output of the others
        counts = kept.counts
        rows = batch.every if kept.rows is None else kept.rows
        if is_lean(batch, l, self.config.n_layer):
            counts, rows = counts.clip(max=1), batch.last
        state, q, k, v = self.late(l, batch, state, rows)
        if cache is not None:
            cache.append(l, batch.rows, batch.lengths, k, v)
        block = self.blocks[l]
        h = state.x[rows]
        if len(rows) == len(batch.every):
            att = block.attend(q, k, v, batch.lengths, len(h))
        else:
            att = attention_up_to(q, k, v, counts, batch.lengths, batch.local[rows], len(h))
        x = state.x.index_copy(0, rows, block.rest(h, att))
        return State(x, state.scores, kept, state.memory)

    def extend_step(self, l, batch, state, cache, meter=None):
        if l < self.swift.first:
            return super().extend_step(l, batch, state, cache, meter)
        if meter is not None:
            meter.extend(self, l, batch, batch.all, cache.len[l, batch.rows])
        state, q, k, v = self.late(l, batch, state, batch.every)
        old = cache.append(l, batch.rows, batch.lengths, k, v)
        last = old.repeat(batch.lengths) + batch.local.cpu().numpy()    # each query's newest key
        row = batch.rows.repeat(batch.lengths)
        att = cache.attend(l, q, row, last, batch.lengths.max() == 1)
        return State(self.blocks[l].rest(state.x, att), state.scores, batch.all, state.memory)


# ------------------------------------------------------------------------------------------------
# the training


def run_blocks(model, batch, state, blocks):
    """The State behind the blocks of a range, of whole texts that run as prompts."""
    for l in blocks:
        state = model.prefill_step(l, batch, state)
    return state


def distance(model, student, group, temperature, mse):
    """The loss of a step: KL(dense || student) of the response tokens, nats, and `mse` times the
    squared error of all states before the last block, as a share of theirs."""
    batch = model.batch([[*prompt, *response] for prompt, response in group])
    last = model.config.n_layer - 1
    late, final = range(student.swift.first, last), range(last, last + 1)

    # what comes before the late blocks is the same for both
    with torch.no_grad():
        start = run_blocks(model, batch, model.begin(batch), range(student.swift.first))
        wanted = run_blocks(model, batch, start, late)
        teacher = run_blocks(model, batch, wanted, final)
    found = run_blocks(student, batch, start, late)
    learned = run_blocks(student, batch, found, final)

    rows = joint_rows(batch, group)
    logits = [model.logits(state.x[rows]) / temperature for state in (teacher, learned)]
    kl = kl_divergence(*logits).mean() * temperature ** 2
    size = wanted.x.float().square().mean(1)
    missed = (found.x.float() - wanted.x.float()).square().mean(1)
    return kl + mse * (missed / size).mean()


def train(model, swift, samples, how, temperature=2.0, mse=1.0, trained=tuple(TRAINED)):
    """Train a Swift of the dense `model` on samples [(prompt ids, response ids)] in place ->
    [loss of each step]. how: a Tuning; trained: of TRAINED."""
    student = SwiftModel.of(model, swift).use()
    student.swift = swift.to(model.device, torch.float32)      # small steps need its digits
    learner = Learner(student.swift, how)
    for part in trained:
        for name in TRAINED[part]:
            if name in learner.tensors:
                learner.tensors[name].requires_grad_()
    rng, losses = Random(how.seed), []
    for _ in progress(range(how.steps), "swiftkv", "step"):
        learner.step += 1
        group = rng.sample(samples, min(how.batch_size, len(samples)))
        loss = distance(model, student, group, temperature, mse)
        descend(learner, loss)
        losses.append(loss.item())
    swift.tensors = {name: t.detach().cpu() for name, t in learner.tensors.items()}
    return losses


def swiftkv(model, samples, levels, how, **settings):
    """As the other methods: a Swift for each level, trained. settings: of train()."""
    config = model.config
    dense = prompt_flops(config, samples)

    def cost(first):
        return prompt_flops(config, samples, late_sparsity(config.n_layer, first), "keep")

    for level in levels:
        swift = Swift.of(model, nearest(level, range(1, config.n_layer), cost, dense))
        losses = train(model, swift, samples, how, **settings)
        tenth = max(len(losses) // 10, 1)
        notes = {"first": swift.first, "steps": how.steps,
                 "loss_first": sum(losses[:tenth]) / tenth if losses else None,
                 "loss_last": sum(losses[-tenth:]) / tenth if losses else None}
        yield level, swift, notes
