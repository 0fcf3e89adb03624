"""The shape of a LLaMA-family model, and how many tokens a block keeps."""
import math
from dataclasses import asdict, dataclass

import torch

from lib.files import check, misfit

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Values of model_type; Qwen1.5 and Qwen2.5 say qwen2, SmolLM2 says llama.

MAY_LACK_WHOLE = ("max_position_embeddings", "sliding_window", "no_rope_layer_interval")
HF_FORM = {                   # of a config.json; what every shape has is checked in wrong_size()
    "model_type": str,
    "rope_parameters": (dict, None),
    "rope_scaling": (dict, None),
    "no_rope_layers": ([int], None),
    **dict.fromkeys(MAY_LACK_WHOLE, (int, None)),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "n_layer", "n_head", "n_kv_head",
         "head_dim", "max_len")
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MOST_BLOCKS = 1000


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
    tied: bool               # whether the head's weight is the embedding's
    max_len: int             # tokens
    eos: tuple = ()          # end tokens
    qk_norm: bool = False    # Qwen3: queries and keys are normalised, head by head, before rotary
    nope: tuple = ()         # SmolLM3: blocks without rotary embedding

    @classmethod
    def from_hf(cls, hf, source="--model", generation=None):
        """Config from the dict `hf` of a config.json.

        generation: the dict of a generation_config.json, whose end tokens are added. FTPError
        names any feature that this model file lacks.
        """
        generation = generation or {}
        wrong = misfit(hf, HF_FORM) or misfit(generation, {}, "generation_config.json")
        check(not wrong, f"{source}: config.json is damaged ({wrong}); "
                         "give a Hugging Face model folder")
        refuse_features(hf, source)
        try:
            made = cls(**shape_fields(hf), eos=end_tokens(hf, generation))
        except (KeyError, IndexError, TypeError, ZeroDivisionError) as e:
            wrong = f"config.json has no usable {e}"
        wrong = wrong or wrong_size(made)
        check(not wrong, f"{source}: {wrong}; give a complete LLaMA-family folder")
        return made

    def block(self, l):
        """The shape of block l; a model whose blocks differ overrides this."""
        return self

    @property
    def p_attn(self):
        """Parameters of a block's q, k, v and o maps."""
        return self.hidden_size * self.head_dim * 2 * (self.n_head + self.n_kv_head)

    @property
    def p_kv(self):
        """Parameters of a block's k and v maps: what a skipped token costs if its K/V are kept."""
        return self.hidden_size * self.head_dim * 2 * self.n_kv_head

    @property
    def p_mlp(self):
        """Parameters of a block's gate, up and down maps."""
        return self.hidden_size * 3 * self.intermediate_size

    @property
    def parameters(self):
        """Parameters of the whole model."""
        bias = (self.n_head + 2 * self.n_kv_head) * self.head_dim * self.qkv_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        block = self.p_attn + self.p_mlp + bias + norms
        vocabulary = self.vocab_size * self.hidden_size     # once where embedding and head are one
        return self.n_layer * block + vocabulary * (2 - self.tied) + self.hidden_size

    def kv_bytes(self, stored, itemsize):
        """Bytes of the keys and values of `stored` token-block entries."""
        return 2 * self.n_kv_head * self.head_dim * stored * itemsize


# ------------------------------------------------------------------------------------------------
# a config.json of Hugging Face

def refuse_features(hf, source):
    """FTPError that names the first feature of a config.json that changes the model's function."""
    kind = hf["model_type"]
    check(kind in FAMILIES, f"{source}: model_type {kind!r} is not supported; use a model whose "
                            f"model_type is one of {', '.join(FAMILIES)}")
    activation, rotary = hf.get("hidden_act", "silu"), rope_type(hf)
    partial = rope_fields(hf).get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    window, length = sliding_window(hf), hf.get("max_position_embeddings", 2048) or 0
    too_narrow = (
        f"sliding-window attention ({window} of {length} tokens; within the window it changes "
        f'nothing, so "max_position_embeddings": {window} in config.json would do)')
    for present, feature in (
            (activation != "silu", f"hidden_act {activation!r}"),
            (kind != "qwen2" and hf.get("attention_bias"), "attention_bias"),
            (hf.get("mlp_bias"), "mlp_bias"),
            (window and window < length, too_narrow),
            (hf.get("quantization_config"), "a quantised checkpoint"),
            (partial != 1, "partial_rotary_factor"),
            (rotary not in ("default", "llama3"), f"rope_type {rotary!r}")):
        check(not present, f"{source}: {feature} is not supported; use a model without it")


def rope_fields(hf):
    """The settings of rotary embedding, under the name of transformers 5 or 4."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def rope_type(hf):
    rope = rope_fields(hf)
    return rope.get("rope_type", rope.get("type", "default"))


def sliding_window(hf):
    """How many tokens back attention reaches, None for all of them."""
    if hf["model_type"] == "mistral" or hf.get("use_sliding_window"):
        return hf.get("sliding_window", 4096)  # a Mistral config that is silent means 4096
    return None


def shape_fields(hf):
    """The fields of Config, but the end tokens; KeyError, TypeError, ... on what is no shape."""
    kind, rope = hf["model_type"], rope_fields(hf)
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    theta = 2e6 if kind == "smollm3" else 1e4
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        intermediate_size=hf["intermediate_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=heads,
        n_kv_head=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or theta,
        rope_scaling=dict(rope) if rope_type(hf) == "llama3" else None,
        qkv_bias=kind == "qwen2",
        tied=bool(hf.get("tie_word_embeddings", kind == "smollm3")),
        max_len=hf.get("max_position_embeddings", 2048),
        qk_norm=kind == "qwen3",
        nope=blocks_without_rotary(hf))


def blocks_without_rotary(hf):
    """SmolLM3's: those with a 0 in the list, or where there is none every fourth."""
    if hf["model_type"] != "smollm3":
        return ()
    blocks = range(min(hf["num_hidden_layers"], MOST_BLOCKS))  # more are refused afterwards
    every = hf.get("no_rope_layer_interval", 4)
    rotary = hf.get("no_rope_layers") or [(l + 1) % every for l in blocks]
    return tuple(l for l in blocks if not rotary[l])


def end_tokens(hf, generation):
    """The end tokens that either file names, each an id or a list of ids."""
    named = [file.get("eos_token_id") for file in (hf, generation)]
    ends = set()
    for ids in named:
        if ids is not None:
            ends.update(ids if isinstance(ids, list) else [ids])
    return tuple(sorted(ends))


def wrong_size(config):
    """What no model can have, in words, or None."""
    form = {
        **dict.fromkeys(SIZES, int),
        "rms_eps": float,
        "rope_theta": float,
        "rope_scaling": (None, dict.fromkeys(SCALING, float)),
        "eos": [int],
    }
    wrong = misfit({**asdict(config), "eos": list(config.eos)}, form, "config.json")
    if wrong:
        return wrong
    good = (all(0 < getattr(config, name) < 1 << 31 for name in SIZES)
            and config.n_layer <= MOST_BLOCKS
            and config.n_head % config.n_kv_head == 0
            and config.head_dim % 2 == 0
            and config.rope_theta > 0
            and config.rms_eps >= 0)
    return None if good else f"sizes out of range: {config}"


# ------------------------------------------------------------------------------------------------
# what follows from a shape, or from a schedule's sparsities

def rope_frequencies(config):
    """Rotary frequencies (head_dim / 2,) float32, radians a token.

    With LLaMA 3's scaling where the config has it (Llama 3.1 report): slow turns are slowed down
    by "factor", fast ones stay, those between "low_freq_factor" and "high_freq_factor" are mixed.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    f = config.rope_theta ** -exponents
    scaling = config.rope_scaling
    if not scaling:
        return f
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)  # in the old context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return f * (share + (1 - share) / scaling["factor"])


def quota(T, s):
    """Tokens of a prompt of T that a block of sparsity s keeps: ceil((1 - s) T).

    Never without the first and the last one.
    """
    if s >= 1:
        return 0
    if s <= 0:
        return T
    kept = math.ceil((1 - s) * T - 1e-9)  # 0.7 * 10 must not round up to 8
    return min(T, max(2, kept))


def leaders(sparsity, group, alike=False):
    """The block whose decision each block takes, a list of block numbers.

    Of up to `group` neighbouring blocks that skip, the first one decides for all. alike: so it
    does for those of its sparsity, as they would decide the same.
    """
    lead = []
    for l, s in enumerate(sparsity):
        skips = 0 < s < 1 and l > 0 and 0 < sparsity[l - 1] < 1
        follows = skips and (l - lead[-1] < group or alike and s == sparsity[l - 1])
        lead.append(lead[-1] if follows else l)
    return lead


def scores_matter(sparsity, leader, l, one_pass=False):
    """Whether a decision behind block l reads the attention scores that block l gives.

    sparsity, leader (n_layer,): as of lib/routing.Routing. one_pass: all blocks decide by the
    scores that the first decision has read.
    """
    after = sparsity[l + 1:]
    if not any(0 < s < 1 for s in after) or leader[l + 1] <= l:
        return False                        # nobody decides any more, or not before the next scores
    if after[0] <= 0:
        return False                        # a dense block gives every token a newer one
    return not (one_pass and any(0 < s < 1 for s in sparsity[:l + 1]))
