"""The routed LLaMA of FTP: before every block a router decides, per token, compute or skip.

    model = FTPModel.from_pretrained("smollm2")       # or a folder, a hub id, a GGUF file
    logits = model(input_ids)                         # dense, (B, T) -> (B, T, vocab)
    model.use(schedule="schedule_ft.json", router="router.safetensors")
    model.generate([[1, 9690, 198]], max_new_tokens=64)

A prompt is known as a whole when it arrives: prefill() routes its tokens together. What follows
comes token by token: extend() routes each from what exists at its time, so that the future never
changes the past. Decoding is extend() with one token a row.

Sequences of a batch are packed, never padded: hidden states are (N, d), N the tokens of all
sequences one after the other. A skipped token is not multiplied by zero, it is absent: a block
runs on the gathered rows of its kept tokens. Read Block.prefill first.
"""
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.artefacts import FACTORS, INPUTS, KINDS, read_router, write_router
from lib.attention import Scores, runs, scores_of_new
from lib.batch import Batch, Kept, always, by_mask, first_of, of_spans
from lib.cache import KVCache, to_device
from lib.checkpoint import exported_routing, fingerprint, load_weights, read_config
from lib.config import quota, rope_frequencies, scores_matter
from lib.files import FTPError, tensors_id
from lib.finite import check_finite
from lib.inputs import check_generation, check_ids, check_input, check_place, id_lists, is_path
from lib.routing import Routing, make_routing, routing_span

# ------------------------------------------------------------------------------------------------
# who computes


def newest(batch, s, first):
    """The static router: a prompt's first tokens, then its newest, up to the quota -> Kept."""
    counts = np.array([quota(n, s) for n in batch.lengths.tolist()])
    rows = []
    for start, n, k in zip(batch.start, batch.lengths, counts):
        first_k = first_of(k, first)            # the paper: {x_0, x_T-1, x_T-2, ...}
        rows += [np.arange(start, start + first_k), np.arange(start + n - k + first_k, start + n)]
    # by lengths alone, on the host: no device is asked
    return Kept(batch, to_device(np.concatenate(rows), batch.seq.device), counts)


def choose(margin, batch, s, must, rule="topk"):
    """Who computes, by the router's margin (N,) -> Kept. must (N,): who does anyway, see always().

    topk: each prompt keeps the quota(T, s) tokens of the largest margin. argmax (the paper's): the
    tokens whose logit of compute is the larger one, as many as there are.
    """
    if rule == "argmax":
        return by_mask((margin > 0) | must, batch, margin, ~must)
    wanted, mask, start = margin.detach().masked_fill(must, torch.inf), must.clone(), 0
    for b, (n,) in runs(batch.lengths.tolist()):
        these = slice(start, start + b * n)                     # b prompts of n tokens, one topk
        best = wanted[these].view(b, n).topk(quota(n, s), 1, sorted=False).indices
        mask[these].view(b, n).scatter_(1, best, True)
        start = these.stop
    counts = np.array([quota(n, s) for n in batch.lengths.tolist()])
    rows = torch.nonzero_static(mask, size=int(counts.sum()))[:, 0]    # no wait for the device
    return Kept(batch, rows, counts, margin, ~must)


class Router(nn.Module):
    """2-layer MLP, factors -> hidden -> 2 logits (compute, skip), shared by all blocks.

    kind: "global" is the paper's, one MLP for all blocks; "local" one each; "recurrent" a global
    one whose hidden layer sees its value at the decision before. inputs: of FACTORS, "place",
    "forecast", "hidden". score: W or "mean". group, span: so many neighbouring blocks share a
    decision, so many neighbouring tokens of a prompt the mean of their margins.
    """
    def __init__(self, config, made_for, kind="global", inputs=FACTORS, width=64, score=16, group=1,
                 meta=None, span=1):
        super().__init__()
        unknown = [i for i in inputs if i not in INPUTS and i != "hidden"]
        if kind not in KINDS or not inputs or unknown:
            raise FTPError(f"--router_kind {kind} --inputs {','.join(inputs)}: kinds are "
                           f"{', '.join(KINDS)}; inputs {', '.join(INPUTS)}, hidden")
        self.kind, self.inputs, self.width, self.score = kind, tuple(inputs), width, score
        self.group, self.span, self.meta, self.fingerprint = group, span, meta or {}, made_for
        self.n_layer, self.hidden_size = config.n_layer, config.hidden_size
        self.n_inputs = sum(INPUTS.get(i, config.hidden_size) for i in inputs)
        n, g = self.n_inputs, config.n_layer if kind == "local" else 1
        self.w1 = nn.Parameter(4 * torch.randn(g, n, width))
        # the kinks of the hidden units are spread over the inputs' range, [0, 1]
        self.b1 = nn.Parameter(-(self.w1.detach() * torch.rand(g, n, width)).sum(1))
        self.w2 = nn.Parameter(torch.randn(g, width, 2) / math.sqrt(width))
        self.b2 = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(g, 1))    # starts near dense
        if kind == "recurrent":
            self.u = nn.Parameter(torch.randn(width, width) / math.sqrt(width) / 2)

    def forward(self, l, f, memory=None):
        """Factors f (N, n_inputs) -> margin (N,), logit of compute over that of skip; memory."""
        g = l if self.kind == "local" else 0
        hidden = torch.addmm(self.b1[g], f, self.w1[g])
        if self.kind == "recurrent":
            hidden = hidden if memory is None else hidden + memory @ self.u
            hidden = memory = torch.tanh(hidden)
        else:
            hidden = F.relu(hidden)
        # the difference of the two logits is all that softmax and argmax see
        w2, b2 = self.w2[g].diff(dim=1)[:, 0], self.b2[g].diff()
        return torch.addmv(b2, hidden, w2, beta=-1, alpha=-1), memory

    def factors(self, batch, state, s, forecast=None):
        """The inputs (N, n_inputs) float32, each in [0, 1] whatever the length of the prompt.

        position: place in the prompt (0 first, 1 newest; a new token is the newest of its time)
        and distances to its start and end. score, rank: see Scores. sparsity: s of the block.
        place: the first of position alone. hidden: the state at unit RMS. forecast: how far the
        forecast moves the token, norm r against the state's as r / (1 + r).
        """
        give = {"position": lambda: batch.position, "place": lambda: batch.place,
                "score": lambda: state.scores.value[:, None],
                "rank": lambda: state.scores.rank[:, None],
                "sparsity": lambda: torch.full_like(state.scores.value, s)[:, None],
                "hidden": lambda: F.rms_norm(state.x.detach().float(), state.x.shape[1:]),
                "forecast": lambda: forecast}
        return torch.cat([give[i]() for i in self.inputs], 1)

    def flops(self, tokens):
        """FLOPs of a decision about so many tokens."""
        n = self.n_inputs + (self.width if self.kind == "recurrent" else 0)
        return 2 * tokens * self.width * (n + 2)

    @property
    def id(self):
        return tensors_id(self.state_dict())

    def save(self, path):
        """Write router.safetensors and its readable twin router.json."""
        write_router(path, self)

    @classmethod
    def load(cls, path):
        """What save() wrote. FTPError if it is damaged."""
        tensors, twin = read_router(path)
        how = {k: twin[k] for k in ("kind", "inputs", "width", "score", "group", "span", "meta")}
        with torch.device("meta"):                              # the file's tensors are its storage
            router = cls(SimpleNamespace(**twin), twin["fingerprint"], **how)
        router.load_state_dict(tensors, assign=True)
        return router


# ------------------------------------------------------------------------------------------------
# the routed block


class Block(nn.Module):
    """One decoder layer with a router at its door.

        x (N, d) ─► keep? ─┬─ kept (M, d) ─ norm ─ q, k, v ─ attention ─ o ─(+)─ MLP ─(+)─┐
                           │       │                 │                   ▲   │         ▲  │
                           │       └─────────────────┼───────────────────┘   └─────────┘  │
                           │                         └─ keys and values to the cache      ▼
                           └─ skipped ───────────── unchanged ────────────────────────► scatter ─► x
    """
    def __init__(self, config, l):
        super().__init__()
        c = config.block(l)
        d, D = c.hidden_size, c.head_dim
        self.l, self.n_head, self.n_kv_head, self.head_dim = l, c.n_head, c.n_kv_head, D
        self.rotary = l not in c.nope                                     # SmolLM3
        self.norm1 = nn.RMSNorm(d, c.rms_eps)
        self.qkv_proj = nn.Linear(d, (c.n_head + 2 * c.n_kv_head) * D, c.qkv_bias)
        self.q_norm = nn.RMSNorm(D, c.rms_eps) if c.qk_norm else None     # Qwen3
        self.k_norm = nn.RMSNorm(D, c.rms_eps) if c.qk_norm else None
        self.o = nn.Linear(c.n_head * D, d, bias=False)
        self.norm2 = nn.RMSNorm(d, c.rms_eps)
        self.gate = nn.Linear(d, c.intermediate_size, bias=False)
        self.up = nn.Linear(d, c.intermediate_size, bias=False)           # with gate in one: slower
        self.down = nn.Linear(c.intermediate_size, d, bias=False)

    def prefill(self, x, kept, batch, cache):
        """The prompts' tokens x (N, d): kept ones compute, the others pass unchanged -> x, q, k."""
        h = x if kept.rows is None else x.index_select(0, kept.padded)             # gather
        q, k, v = (t[:kept.n] for t in self.qkv(h, kept.rope))
        if cache is not None:
            cache.append(self.l, batch.rows, kept.counts, k, v)    # a skipped token leaves none
        h = self.rest(h, self.attend(q, k, v, kept.counts, len(h)))
        x = h if kept.rows is None else x.index_copy(0, kept.rows, h[:kept.n])     # scatter
        return x, q, k

    def extend(self, x, kept, batch, cache):
        """New tokens x (N, d) over the cache: one a row when decoding -> x, q."""
        h = x if kept.rows is None else x.index_select(0, kept.rows)
        q, k, v = self.qkv(h, kept.rope[:, :kept.n])
        old = cache.append(self.l, batch.rows, kept.counts, k, v)
        within = np.arange(kept.n) - (kept.counts.cumsum() - kept.counts).repeat(kept.counts)
        last = old.repeat(kept.counts) + within                    # the key each query sees last
        row = batch.rows.repeat(kept.counts)
        h = self.rest(h, cache.attend(self.l, q, row, last, batch.lengths.max() == 1))
        return h if kept.rows is None else x.index_copy(0, kept.rows, h), q

    def qkv(self, h, rope):
        """States h (M, d) -> queries (M, n_head, D), keys and values (M, n_kv_head, D)."""
        t = self.qkv_proj(self.norm1(h)).unflatten(1, (-1, self.head_dim))
        qk, v = t.split([self.n_head + self.n_kv_head, self.n_kv_head], 1)
        if self.q_norm is not None:
            q, k = qk.split([self.n_head, self.n_kv_head], 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        if self.rotary:
            qk = self.rotate(qk, rope)
        return *qk.split([self.n_head, self.n_kv_head], 1), v

    @staticmethod
    def rotate(x, rope):
        """Rotary embedding, half-rotation layout. x (N, heads, D); rope (2, N, D): cos, and sin
        with its first half negated."""
        (a, b), (cos, sin) = x.chunk(2, -1), rope
        return torch.addcmul(x * cos[:, None], torch.cat((b, a), -1), sin[:, None])

    def rest(self, h, att):
        """What follows the attention: output map and MLP with their residuals. h, att (M, ...)."""
        h = self.o(att).add_(h)
        a = self.norm2(h)
        gate, up = self.gate(a), self.up(a)
        # the widest states of a block: no copies of them where no gradient needs them
        wide = F.silu(gate) * up if gate.requires_grad else F.silu(gate, inplace=True).mul_(up)
        return self.down(wide).add_(h)

    @staticmethod
    def attend(q, k, v, lengths, n):
        """Attention within each sequence: q (M, H, D), k, v (M, Hkv, D) -> (n, H * D).

        lengths (B,): tokens of each. n >= M: rows that fill up to a multiple get anything finite.
        """
        out, i = [], 0
        for b, (m,) in runs(lengths.tolist()):
            if m:
                rows = slice(i, i + b * m)
                qb, kb, vb = (t[rows].unflatten(0, (b, m)).transpose(1, 2) for t in (q, k, v))
                o = F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=True)
                out.append(o.transpose(1, 2).reshape(b * m, -1))
                i = rows.stop
        if n > len(q):
            out.append(q[:1].flatten(1).expand(n - len(q), -1))
        return out[0] if len(out) == 1 else torch.cat(out)


# ------------------------------------------------------------------------------------------------
# the model


@dataclass(frozen=True)
class State:
    """What stands between two blocks. Never written to: keeping one keeps the state there.

    x (N, d); scores: the router's factors 2 and 3; kept: the decision of the block before;
    memory (N, width): the hidden layer of a recurrent router.
    """
    x: torch.Tensor
    scores: Scores
    kept: Kept | None = None
    memory: torch.Tensor | None = None


class FTPModel(nn.Module):
    """A frozen LLaMA-family model with token routing. Dense until use() gives it a schedule."""

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.routing = config, "model", Routing.dense(config.n_layer)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(config.n_layer))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._rope = None                                       # rotary table, grows with need

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read "smollm2", a folder, a hub id or a GGUF file; weights are held once, frozen.

        A folder that extras/export.py wrote brings its schedule and router, which are then in use.
        FTPError on anything missing, unknown, misshapen or not finite.
        """
        dtype, device = check_place(dtype, device)
        folder, config = read_config(path)
        with torch.device("meta"):                              # no storage before the weights come
            model = cls(config)
        load_weights(model, folder, dtype, lambda name: device)
        model.name = str(path)
        if routing := exported_routing(folder):
            model.use(**routing)
        return model.eval()

    def use(self, schedule=None, router="static", **how):
        """Set how tokens are routed from now on; use() alone goes back to dense. Returns self.

        schedule: Schedule or path. router: Router or path, "static", "random", "attention", or a
        function (batch, scores, s) -> (N,) whose largest values are kept. how: see make_routing.
        """
        router = Router.load(router) if is_path(router) else router
        self.routing = make_routing(self, schedule, router, **how)
        return self

    # -- one block: route, then run

    def prefill_step(self, l, batch, state, cache=None, meter=None):
        """Route and run block l on prompts -> State; its .kept tells who computed."""
        with routing_span():
            kept, state = self.route(l, batch, state)
        batch = kept.batch                                      # where block l is
        if meter is not None:
            meter.prefill(self, l, batch, kept)
        if kept.n == 0:                                         # a block that the schedule removes
            return replace(state, kept=kept)
        x, q, k = self.routing.prefill_of(self.blocks[l], batch)(state.x, kept, batch, cache)
        scores = state.scores
        if self.reads_scores(l):                                # read() at the next decision
            scores = scores.read(batch).see(kept, q, k, self.routing.window)
        return State(x, scores, kept, state.memory)

    def route(self, l, batch, state, noise=0.0):
        """Who of the prompts computes block l -> Kept, State. noise: on margins, in training."""
        r = self.routing
        s = r.sparsity[l]
        if s <= 0:                                              # block 0 has no scores before it
            return batch.all, state
        if s >= 1:                                              # removed, for every token
            return batch.none, state
        if r.leader[l] < l:                                     # the one before decides for it, too
            return state.kept, state
        if r.router == "static":
            return newest(batch, s, r.first), state
        margin, state = self.margins(l, batch, state)
        return choose(margin + noise, batch, s, always(batch, s, r.first), r.prefill), state

    def margins(self, l, batch, state):
        """The router's preference for computing block l, (N,) float32; State with fresh scores."""
        r, s = self.routing, self.routing.sparsity[l]
        if r.router == "random":
            return r.draw(l, batch), state
        state = replace(state, scores=state.scores.read(batch))
        if r.router == "attention":
            return state.scores.value, state
        if not isinstance(r.router, Router):
            return r.router(batch, state.scores, s), state
        forecast = r.skipped.reach(l, state.x) if "forecast" in r.router.inputs else None
        f = r.router.factors(batch, state, s, forecast)
        margin, memory = self.ask(l, f, state.memory)
        return of_spans(margin, batch, r.router.span), replace(state, memory=memory)

    def ask(self, l, f, memory):
        """The router's answer to factors f (N, n_inputs)."""
        return self.routing.router(l, f, memory)

    def extend_step(self, l, batch, state, cache, meter=None):
        """Route and run block l on new tokens over the cache -> State."""
        with routing_span():
            kept, state = self.route_new(l, batch, state)
        batch = kept.batch
        if meter is not None:
            meter.extend(self, l, batch, kept, cache.len[l, batch.rows])
        if kept.n == 0 and self.routing.absent(l):
            return replace(state, kept=kept)
        x, q = self.routing.extend_of(self.blocks[l])(state.x, kept, batch, cache)
        scores = state.scores
        if kept.n and self.routing.decode == "threshold" and self.reads_scores(l):
            keys, counts = cache.keys(l, batch.rows)
            left_all = self.routing.kv == "keep"
            scores = scores_of_new(scores, batch, kept, q, keys, counts, left_all)
        return State(x, scores, kept, state.memory)

    def route_new(self, l, batch, state, noise=0.0):
        """Who of the new tokens computes block l, each decided by itself -> Kept, State."""
        r = self.routing
        s = r.sparsity[l]
        if s >= 1 or r.decode == "rule" and s > 0.5:            # the paper's rule
            return batch.none, state
        if s <= 0 or r.decode != "threshold":                   # dense decoding, the default
            return batch.all, state
        if r.leader[l] < l:
            return state.kept, state
        margin, state = self.margins(l, batch, state)
        margin = margin + noise
        # a token alone has no rank and no quota: it compares with what calibration found
        return by_mask(margin >= r.thresholds[l], batch, margin), state

    def reads_scores(self, l):
        """Whether a later decision uses the attention scores that block l can give."""
        r = self.routing
        if r.schedule is None or r.router in ("static", "random"):
            return False
        if isinstance(r.router, Router) and not {"score", "rank"} & set(r.router.inputs):
            return False
        return scores_matter(r.sparsity, r.leader, l, r.one_pass)

    # -- all blocks

    @torch.inference_mode()
    def prefill(self, prompts, cache=None, meter=None):
        """Prompts (lists of ids), each routed as a whole -> logits (B, vocab) of last tokens."""
        batch = self.batch(prompts, last_only=True)
        state = self.run(self.prefill_step, batch, cache, meter)
        if cache is not None:
            cache.seen[batch.rows] += batch.lengths
        return self.logits(state.x[batch.last.to(state.x.device)])

    @torch.inference_mode()
    def extend(self, new, cache, rows=None, meter=None):
        """New tokens (lists of ids) of cache rows `rows` -> logits (sum of lengths, vocab)."""
        rows = np.arange(len(new)) if rows is None else np.asarray(rows)
        batch = self.batch(new, cache.seen[rows], rows)
        state = self.run(self.extend_step, batch, cache, meter)
        cache.seen[rows] += batch.lengths
        return self.logits(state.x)

    def run(self, step, batch, cache, meter):
        """All blocks -> State. FTPError names the block where values stop being finite."""
        mark = cache and cache.mark()                           # to run again, if need be
        state = start = self.begin(batch)
        for l in range(self.config.n_layer):
            state = step(l, batch, state, cache, meter)
        check_finite(state.x, step, batch, start, cache, mark)
        return state

    def batch(self, seqs, past=None, rows=None, last_only=False):
        """Pack lists of token ids; past, rows (B,), last_only: see Batch."""
        seqs = id_lists(seqs)
        check_ids(seqs, self.config.vocab_size)
        before = [0] * len(seqs) if past is None else past
        longest = max(len(s) + int(p) for s, p in zip(seqs, before))
        if longest > self.config.max_len:
            raise FTPError(f"{longest} tokens are more than the model's {self.config.max_len} "
                           "(max_position_embeddings); shorten the text")
        return Batch(seqs, self.rope_table(longest), past, rows, last_only)

    def rope_table(self, n):
        """cos and signed sin of the first n positions at least, (2, n, head_dim)."""
        t = self._rope
        if t is None or t.shape[1] < n or (t.device, t.dtype) != (self.device, self.dtype):
            angle = torch.arange(max(2 * n, 256))[:, None] * rope_frequencies(self.config)
            cos, sin = angle.cos(), angle.sin()
            t = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))
            self._rope = t = t.to(self.device, self.dtype)
        return t

    def begin(self, batch):
        """The State before block 0."""
        x = F.embedding(batch.ids, self.embed.weight)
        none = torch.zeros(len(x), device=x.device)             # no attention was seen yet
        return State(x, Scores(none, none))

    def logits(self, x):
        """Next-token logits (M, vocab) of hidden states x (M, d) as they leave the last block."""
        return self.head(self.norm(x))

    @torch.inference_mode()
    def forward(self, input_ids, attention_mask=None):
        """Logits (B, T, vocab) of the dense model for input_ids (B, T); 0 at pads.

        attention_mask (B, T): 0 at pads, which are no tokens. FTPError while a schedule is in use:
        a prompt is then routed as a whole, and no generation has logits of its inner positions.
        """
        check_input(input_ids)
        if any(self.routing.sparsity):
            raise FTPError("a schedule is in use: logits inside a routed prompt are not causal; "
                           "use prefill(), generate(), lib.scoring.after_prompt(), or use() alone")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.cpu().bool()
        seqs = [ids[m].tolist() for ids, m in zip(input_ids.cpu(), real)]
        logits = self.logits(self.run(self.prefill_step, self.batch(seqs), None, None).x)
        out = logits.new_zeros(*real.shape, logits.shape[1])    # packed rows go to their places
        out[real.to(out.device)] = logits
        return out

    def stream(self, prompts, max_new_tokens=64, temperature=0.0, top_p=1.0, seed=0, eos=None,
               meter=None):
        """Generate token by token: yields a list with each prompt's new token, None where it ended.

        temperature 0 is greedy. Ends at any of `eos` (default: the model's), which is yielded.
        """
        prompts = id_lists(prompts)
        check_generation(prompts, max_new_tokens, temperature, top_p, self.config.max_len)
        eos = set(self.config.eos if eos is None else eos)
        rng = torch.Generator(self.head.weight.device).manual_seed(seed)
        cache, alive = self.new_cache(len(prompts)), np.arange(len(prompts))
        logits = self.prefill(prompts, cache, meter)
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
            logits = self.extend([[new[j]] for j in go], cache, alive, meter)

    def generate(self, prompts, max_new_tokens=64, **how):
        """Lists of token ids -> lists of new token ids, each up to its end token; see stream()."""
        prompts = id_lists(prompts)
        out = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **how):
            for o, t in zip(out, step):
                o += [] if t is None else [t]
        return out

    def new_cache(self, rows):
        return KVCache(self.config, rows, self.dtype)

    @property
    def dtype(self):
        return self.embed.weight.dtype

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def fingerprint(self):
        """Tells models apart: hashes of shape and weights; artefacts carry it."""
        return fingerprint(self)


def sample(logits, temperature, top_p, rng):
    """Next tokens (B,) from logits (B, vocab): greedy at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    prob, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    prob = prob.masked_fill(prob.cumsum(-1) - prob >= top_p, 0)     # the likeliest always stays
    return token.gather(1, torch.multinomial(prob, 1, generator=rng))[:, 0]
