"""The shape of a LLaMA-family model, its tensors' names, and what a pass of it costs in FLOPs and bytes."""
import math
import re
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise

import torch

from files import FTPError, misfit


@dataclass
class Config:
    """Shape of a LLaMA-family model, read from a Hugging Face config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: dict | None
    qkv_bias: bool
    tied: bool
    max_len: int
    eos: tuple = ()
    qk_norm: bool = False                             # Qwen3: queries and keys are normalised, head by head, before rotary
    nope: tuple = ()                                  # SmolLM3: blocks without rotary embedding
    shortcut: bool = False                            # a matrix on every residual (SliceGPT)
    widths: list | None = None                        # (K/V heads, MLP channels) of each block, where they differ
    FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model_type; Qwen1.5 and Qwen2.5 say qwen2, SmolLM2 says llama

    @classmethod
    def from_hf(cls, c, source="--model", generation=None):
        """Config from the dict `c` of a config.json; the end tokens of `generation`, the dict of a generation_config.json, are added.
        FTPError names any feature this model file lacks."""
        whole = ("max_position_embeddings", "sliding_window", "no_rope_layer_interval")
        if wrong := misfit(c, {"model_type": str, "rope_parameters": (dict, None), "rope_scaling": (dict, None), "no_rope_layers": ([int], None)}
                           | dict.fromkeys(whole, (int, None))) or misfit(generation or {}, {}, "generation_config.json"):
            raise FTPError(f"{source}: config.json is damaged ({wrong}); give a Hugging Face model folder")
        sliced = c.get("model_type") == "slicegpt"
        kind = c.get("sliced_from") if sliced else c.get("model_type")
        if kind not in cls.FAMILIES:
            raise FTPError(f"{source}: model_type {kind!r} is not supported; use a model whose model_type is one of {', '.join(cls.FAMILIES)}")
        rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        max_len, window = c.get("max_position_embeddings", 2048), None
        if kind == "mistral" or c.get("use_sliding_window"):  # a Mistral config that is silent about its window has 4096
            window = c.get("sliding_window", 4096)
        for bad, why in ((c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
                         (kind != "qwen2" and c.get("attention_bias"), "attention_bias"),
                         (c.get("mlp_bias"), "mlp_bias"),
                         (window and window < (max_len or 0), f"sliding-window attention ({window} of {max_len} tokens; within the window it changes "
                          f"nothing, so \"max_position_embeddings\": {window} in config.json would do)"),
                         (c.get("quantization_config"), "a quantised checkpoint"),
                         ((rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1, "partial_rotary_factor"),
                         (rope_type not in ("default", "llama3"), f"rope_type {rope_type!r}")):
            if bad:
                raise FTPError(f"{source}: {why} is not supported; use a model without it")
        try:
            d, h, n = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
            ends = [e for o in (c, generation or {}) for e in (o.get("eos_token_id"),) if e is not None]
            layers = range(min(n, 1000) if kind == "smollm3" else 0)  # more are refused below
            rotary = c.get("no_rope_layers") or [(l + 1) % c.get("no_rope_layer_interval", 4) for l in layers]
            made = cls(c["vocab_size"], d, c["intermediate_size"], n, h,
                       c.get("num_key_value_heads") or h, c.get("head_dim") or d // h, c.get("rms_norm_eps", 1e-6),
                       rope.get("rope_theta") or c.get("rope_theta") or (2e6 if kind == "smollm3" else 1e4),
                       rope if rope_type == "llama3" else None, kind == "qwen2",
                       bool(c.get("tie_word_embeddings", kind == "smollm3")), max_len,
                       tuple(sorted({t for e in ends for t in (e if isinstance(e, list) else [e])})),
                       kind == "qwen3", tuple(l for l in layers if not rotary[l]), sliced, c.get("widths"))
        except (KeyError, IndexError, TypeError, ZeroDivisionError) as e:
            raise FTPError(f"{source}: config.json has no usable {e}; give a complete LLaMA-family folder") from None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_layer", "n_head", "n_kv_head", "head_dim", "max_len")
        scale = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), float)
        wrong = misfit(asdict(made) | {"eos": list(made.eos)}, dict.fromkeys(sizes, int) | {
            "rms_eps": float, "rope_theta": float, "rope_scaling": (None, scale), "eos": [int], "widths": ([[int]], None)}, "config.json")
        if not wrong and not (all(0 < getattr(made, k) < 1 << 31 for k in sizes) and made.n_layer <= 1000 and made.n_head % made.n_kv_head == 0
                              and made.head_dim % 2 == 0 and made.rope_theta > 0 and made.rms_eps >= 0
                              and (made.widths is None or [len(w) for w in made.widths] == [2] * made.n_layer and min(map(min, made.widths)) > 0)):
            wrong = f"sizes out of range: {made}"
        if wrong:
            raise FTPError(f"{source}: {wrong}; give a complete LLaMA-family folder")
        return made

    def block(self, l):
        """The config of block l."""
        if not self.widths:
            return self
        kv, mlp = self.widths[l]
        return replace(self, n_head=kv * (self.n_head // self.n_kv_head), n_kv_head=kv, intermediate_size=mlp, widths=None)

    @property
    def parameters(self):
        """Parameters of the whole model."""
        heads = self.n_head + 2 * self.n_kv_head
        block = self.p_attn + self.p_mlp + 2 * self.hidden_size + (heads * self.qkv_bias + 2 * self.qk_norm) * self.head_dim
        return self.n_layer * block + self.vocab_size * self.hidden_size * (2 - self.tied) + self.hidden_size

    @property
    def p_attn(self):
        """Parameters of a block's q, k, v and o maps, and of the residual's where it has one."""
        return self.hidden_size * (self.head_dim * 2 * (self.n_head + self.n_kv_head) + self.shortcut * self.hidden_size)

    @property
    def p_kv(self):
        """Parameters of a block's k and v maps, what a skipped token costs under the K/V policy `keep`."""
        return self.hidden_size * self.head_dim * 2 * self.n_kv_head

    @property
    def p_mlp(self):
        return self.hidden_size * (3 * self.intermediate_size + self.shortcut * self.hidden_size)

    def block_flops(self, tokens, pairs, kv_only=0, mlp_tokens=None):
        """FLOPs of one block: `tokens` computed, `pairs` query-key pairs attended, `kv_only` tokens with K/V alone; mlp_tokens: those
        that run the MLP, where they are not those that run the attention."""
        return (2 * self.p_attn * tokens + 2 * self.p_mlp * (tokens if mlp_tokens is None else mlp_tokens)
                + 4 * self.n_head * self.head_dim * pairs + 2 * self.p_kv * kv_only)

    def score_flops(self, window, keys):
        """FLOPs of the attention scores of one block: `window` queries against `keys` keys."""
        return 2 * self.n_head * self.head_dim * window * keys

    def head_flops(self, positions):
        return 2 * self.vocab_size * self.hidden_size * positions

    def kv_bytes(self, stored, itemsize):
        """Bytes of keys and values for `stored` token-block entries."""
        return 2 * self.n_kv_head * self.head_dim * stored * itemsize

    def memory(self, batch, length, sparsity, itemsize, kv="drop"):
        """Bytes that a prefill of `batch` prompts of `length` tokens needs under a list of sparsities, K/V `kv`, numbers of `itemsize` bytes,
        no forecaster: {"weights", "kv" (all blocks, with the cache's room for 32 more tokens), "activations" (of the largest block),
        "total" (weights, and the peak of activations and the keys and values so far)}. Activations are what Block.forward holds when its MLP
        has expanded; block 0, where no token skips, mostly has the most."""
        d, D, Q, K, N = self.hidden_size, self.head_dim, self.n_head * self.head_dim, self.n_kv_head * self.head_dim, batch * length
        stored, peak, largest = 0, 0, 0
        for s in sparsity:
            M = batch * quota(length, s)
            routed, keep = 0 < M < N, kv == "keep" and 0 < M < N
            projected = M * 2 * Q + N * (3 * K + d) if keep else M * (2 * Q + 3 * K)  # products, and their rotated copies
            held = N * (d + 2 * D) + routed * M * (d + 2 * D) + projected + M * (Q + 3 * d + 2 * self.intermediate_size)
            stored += ((N if keep else M) + 32 * batch) * 2 * K if M else 0
            peak, largest = max(peak, stored + held), max(largest, held)
        return {k: v * itemsize for k, v in (("weights", self.parameters), ("kv", stored), ("activations", largest), ("total", self.parameters + peak))}

    def prefill_flops(self, T, sparsity, kv="drop", router=None, window=16, head=1, forecaster=None, parts=None):
        """FLOPs of the prefill of one prompt of T tokens under a list of sparsities (method section 7).

        `router` adds its MLP and the scores (`window` queries a block); `head` counts the positions that get logits.
        forecaster: the Forecaster in use. parts: as in Schedule.
        """
        total, lead = self.head_flops(head), leaders(sparsity, router.group if router is not None else 1)
        for l, s in enumerate(sparsity):
            k, c = quota(T, s), self.block(l)
            if parts and parts[l] != "both":
                attend = k * (parts[l] == "attention")
                total += c.block_flops(attend, attend * (attend + 1) / 2, mlp_tokens=k - attend)
            elif kv == "keep" and 0 < s:  # kept queries see every earlier key; which ones are kept is the static order
                pairs = sum(range(T - k + 2, T + 1)) + 1 if k else 0
                total += c.block_flops(k, pairs, T - k)
            else:
                total += c.block_flops(k, k * (k + 1) / 2)
            if router is not None and 0 < s < 1 and lead[l] == l:
                total += router.flops(T)
            if forecaster is not None and 0 < s < 1:
                total += forecaster.flops(T, k)
            if router is not None and {"score", "rank"} & set(router.inputs) and any(0 < v < 1 for v in sparsity[l + 1:]) and lead[l + 1] > l:
                total += c.score_flops(min(window, k), k)
        return total


def quota(T, s):
    """Tokens of a prompt of T that a block of sparsity s keeps: ceil((1-s)T), never without first and last."""
    return 0 if s >= 1 else T if s <= 0 else min(T, max(2, math.ceil((1 - s) * T - 1e-9)))


def leaders(sparsity, group):
    """The block whose decision each block takes, a list: of up to `group` neighbouring blocks that skip, the first decides for all."""
    lead = []
    for l, s in enumerate(sparsity):
        follows = l > 0 and 0 < s < 1 and 0 < sparsity[l - 1] < 1 and l - lead[-1] < group
        lead.append(lead[-1] if follows else l)
    return lead


def rope_frequencies(c):
    """Rotary frequencies (head_dim / 2,) float32, with LLaMA-3's scaling where the config has it (Llama 3.1 report)."""
    f = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if c.rope_scaling:
        r = c.rope_scaling
        turns = r["original_max_position_embeddings"] * f / (2 * math.pi)  # rotations within the original context
        share = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        f = f * (share + (1 - share) / r["factor"])
    return f


def hf_parts(name, c):
    """Our parameter name -> [(name in a Hugging Face checkpoint, rows of ours that it fills)]."""
    c = c.block(int(name.split(".")[1])) if name.startswith("blocks.") else c
    for a, b in (("blocks.", "model.layers."), ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), (".qkv.", ".self_attn.qkv."),
                 (".q_norm.", ".self_attn.q_norm."), (".k_norm.", ".self_attn.k_norm."),
                 (".o.", ".self_attn.o_proj."), (".gate.", ".mlp.gate_proj."), (".up.", ".mlp.up_proj."), (".down.", ".mlp.down_proj.")):
        name = name.replace(a, b)
    if ".qkv." in name:
        ends = [*accumulate(n * c.head_dim for n in (0, c.n_head, c.n_kv_head, c.n_kv_head))]
        return [(name.replace(".qkv.", f".{part}_proj."), slice(*rows)) for part, rows in zip("qkv", pairwise(ends))]
    return [({"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}.get(name, name),
             slice(None))]


def place_blocks(spec, config, itemsize, free=None):
    """The device of each block. spec: a list like "cuda:0=0-15,cuda:1=16-31", or "auto": neighbours together, spread by weight over the
    fewest GPUs that hold the model in nine tenths of their free memory (the rest is for states and cache); the CPU where there is no GPU.

    The embedding goes with the first block, the final norm with the last, the head with the last or, where it is tied, with the
    embedding. free: bytes of each GPU, by default those that are free now.
    """
    L, c = config.n_layer, config
    if spec != "auto":
        parts = [re.fullmatch(r"(cpu|cuda:\d+)=(\d+)-(\d+)", s) for s in spec.split(",")]
        places = sorted((l, m[1]) for m in parts if m for l in range(int(m[2]), int(m[3]) + 1))
        if not all(parts) or [l for l, _ in places] != list(range(L)):
            raise FTPError(f"--device_map {spec}: give auto, or each of the blocks 0 to {L - 1} once, like cuda:0=0-{L // 2},cuda:1={L // 2 + 1}-{L - 1}")
        devices = [torch.device(name) for _, name in places]
        if any(d.type == "cuda" and d.index >= torch.cuda.device_count() for d in devices):
            raise FTPError(f"--device_map {spec}: there are {torch.cuda.device_count()} GPUs here; name only those")
        return devices
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())] if free is None else free
    if not free:
        return [torch.device("cpu")] * L
    sizes = torch.full((L,), float(c.p_attn + c.p_mlp)) * itemsize
    sizes[0] += c.vocab_size * c.hidden_size * itemsize
    sizes[-1] += c.vocab_size * c.hidden_size * itemsize * (not c.tied)
    n = next((n for n in range(1, len(free) + 1) if float(sizes.sum()) <= 0.9 * sum(free[:n])), None)
    if n is None:
        raise FTPError(f"--device_map auto: the weights take {float(sizes.sum()) / 1e9:.1f} GB, the GPUs have {sum(free) / 1e9:.1f} GB free; take a smaller "
                       f"--dtype, or leave some blocks to the CPU, like cuda:0=0-{L // 2},cpu={L // 2 + 1}-{L - 1}")
    edges = torch.tensor(free[:n]).cumsum(0) / sum(free[:n])
    middles = (sizes.cumsum(0) - sizes / 2) / sizes.sum()
    return [torch.device("cuda", i) for i in torch.bucketize(middles, edges[:-1]).tolist()]
