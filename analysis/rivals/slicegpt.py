"""A rival that rotates and cuts the residual: SliceGPT (arXiv 2401.15024).

Before each sub-block the residual is turned into its own principal components, of which the first
k stay; a dense matrix on every residual, its shortcut, leads from one basis to the next. Scales of
norms are folded into the matrices that read them.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from analysis.rivals.common import Pruned, load_as, nearest, prompt_flops, text_batches
from analysis.rivals.removal import AttentionBlock, MLPBlock
from lib.config import Config
from lib.files import check
from model_ftp import Block, FTPModel

TYPE = "slicegpt"               # model_type of a sliced folder, which nothing else loads
MULTIPLE = 8                    # dimensions come in multiples, as kernels like them

# what reads the residual in a sub-block, its norm before it, and what writes it
READERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
WRITERS = ("self_attn.o_proj", "mlp.down_proj")

# ------------------------------------------------------------------------------------------------
# the sliced model


@dataclass
class SlicedConfig(Config):
    """Shape of a sliced model. shortcut: a matrix on every residual, part of p_attn and p_mlp."""
    shortcut: bool = True

    @classmethod
    def from_hf(cls, hf, source="--model", generation=None):
        """As Config.from_hf; the folder's "sliced_from" tells the family."""
        check(hf.get("model_type") == TYPE, f"{source}: model_type is not {TYPE!r}; give a folder "
                                            "that analysis/rivals/make.py wrote")
        return super().from_hf({**hf, "model_type": hf.get("sliced_from")}, source, generation)

    @property
    def p_attn(self):
        return super().p_attn + self.shortcut * self.hidden_size ** 2

    @property
    def p_mlp(self):
        return super().p_mlp + self.shortcut * self.hidden_size ** 2


class SlicedBlock(Block):
    """A decoder layer whose residuals go through a matrix each."""
    def __init__(self, config, l):
        super().__init__(config, l)
        d = config.hidden_size
        self.shortcut1 = nn.Linear(d, d, bias=False)
        self.shortcut2 = nn.Linear(d, d, bias=False)

    def rest(self, h, att):
        h = self.o(att).add_(self.shortcut1(h))
        a = self.norm2(h)
        wide = F.silu(self.gate(a), inplace=True).mul_(self.up(a))
        return self.down(wide).add_(self.shortcut2(h))


class SlicedModel(FTPModel):
    """What slicegpt() has made. Dense: a token that skipped a block would miss its shortcuts."""
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(SlicedBlock(config, l) for l in range(config.n_layer))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a sliced folder."""
        return load_as(cls, SlicedConfig, path, dtype, device)

    def use(self, schedule=None, *router, **how):
        """use() alone. FTPError for a schedule."""
        check(schedule is None, "--schedule: a sliced model can't be routed, each of its "
                                "sub-blocks has a basis of its own; leave the schedule out")
        return super().use()


# ------------------------------------------------------------------------------------------------
# the method


def half_blocks(model):
    """All sub-blocks in the order in which they run."""
    return [half.of(block) for block in model.blocks for half in (AttentionBlock, MLPBlock)]


def principal_directions(states, k):
    """The first k principal directions (d, k), float64, of the rows of some states (N, d)."""
    covariance = sum(x.double().T @ x.double() for x in states)
    return torch.linalg.eigh(covariance)[1].flip(1)[:, :k]      # eigh gives the smallest first


@torch.inference_mode()
def principal_bases(model, texts, k):
    """Bases (d, k), float64, of the residual before each norm: 2 * n_layer + 1, as they run.

    texts: Batches. What comes after each sees the states cut to it, as in the sliced model.
    (Principal components of the norms' outputs measured worse.)
    """
    model.use()
    states, bases = [model.begin(batch).x for batch in texts], []
    for half in half_blocks(model):
        q = principal_directions(states, k)
        bases.append(q.cpu())
        for i, batch in enumerate(texts):
            cut = (states[i].double() @ q @ q.T).to(states[i].dtype)
            states[i], *_ = half.prefill(cut, batch.all, batch, None)
    return [*bases, principal_directions(states, k).cpu()]


def slice_to(model, texts, tensors, k):
    """The model in k of its d dimensions, Pruned; tensors: of its checkpoint.

    Every matrix that reads the residual takes its basis, with its norm's scale folded in, every one
    that writes it the next basis.
    """
    config, new = model.config, {}
    bases = principal_bases(model, texts, k)
    for l in range(config.n_layer):
        new |= sliced_layer(f"model.layers.{l}.", bases[2 * l:2 * l + 3], tensors, config)
    embed = double(tensors, "model.embed_tokens.weight")
    head = embed if config.tied else double(tensors, "lm_head.weight")
    scale = double(tensors, "model.norm.weight")
    new["model.embed_tokens.weight"] = embed @ bases[0]
    new["model.norm.weight"] = norm_scale(config, k)
    new["lm_head.weight"] = head * scale @ bases[-1]
    changes = {
        "model_type": TYPE,
        "architectures": None,
        "hidden_size": k,
        "head_dim": config.head_dim,
        # as for the norms' scales: beside the mean over k numbers, what was beside that over d
        "rms_norm_eps": config.rms_eps * config.hidden_size / k,
        "tie_word_embeddings": False,
    }
    return Pruned({name: t.float() for name, t in new.items()}, changes, SlicedModel)


def sliced_layer(at, bases, tensors, config):
    """{name: tensor} of one layer, `at` the beginning of its names.

    bases: three, before its attention, before its MLP and after it.
    """
    here, middle, after = bases
    new = {}
    for (norm, readers), q in zip(READERS, (here, middle)):
        scale = double(tensors, f"{at}{norm}.weight")
        new[f"{at}{norm}.weight"] = norm_scale(config, q.shape[1])
        for name in readers:
            new[f"{at}{name}.weight"] = double(tensors, f"{at}{name}.weight") * scale @ q
            if f"{at}{name}.bias" in tensors:
                new[f"{at}{name}.bias"] = tensors[f"{at}{name}.bias"]
    for name, q in zip(WRITERS, (middle, after)):
        new[f"{at}{name}.weight"] = q.T @ double(tensors, f"{at}{name}.weight")
    new[f"{at}shortcut1.weight"] = middle.T @ here
    new[f"{at}shortcut2.weight"] = after.T @ middle
    return new


def norm_scale(config, k):
    """Scales (k,) of a norm: its mean square is over k numbers, the original's over hidden_size."""
    return torch.full((k,), math.sqrt(config.hidden_size / k))


def double(tensors, name):
    """A tensor of a checkpoint in float64, on the CPU."""
    return tensors[name].cpu().double()


def slicegpt(model, samples, levels, tensors):
    """Each level's number of dimensions; tensors: of the checkpoint."""
    config = model.config
    texts, dense = text_batches(model, samples), prompt_flops(config, samples)
    sizes = range(MULTIPLE, config.hidden_size + 1, MULTIPLE)

    def cost(k):
        return prompt_flops(sliced_config(config, k), samples)

    for level in levels:
        k = nearest(level, sizes, cost, dense)
        notes = {"dimensions": k, "slicing": 1 - k / config.hidden_size}
        yield level, slice_to(model, texts, tensors, k), notes


def sliced_config(config, k):
    """The shape of a model of this Config when k dimensions are left."""
    return SlicedConfig(**vars(replace(config, hidden_size=k)))
