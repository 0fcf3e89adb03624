"""A rival that makes blocks narrower: structured width pruning, like LLM-Pruner (2305.11627).

The MLP channels (and K/V heads with their queries) of the least |gradient x weight| go. In the
written folder what goes is zeros behind what stays, so that it is still a LLaMA to others;
NarrowModel leaves the zeros out.
"""
from dataclasses import dataclass, replace

import torch

from analysis.rivals.common import Pruned, load_as, nearest, prompt_flops
from lib.config import Config
from lib.files import check, misfit
from lib.stage import progress
from model_ftp import FTPModel

MULTIPLE = 8                    # channels come in multiples, as kernels like them
WRITERS = ("o", "down")         # their columns are what the other maps' rows are

# ------------------------------------------------------------------------------------------------
# the narrow model


@dataclass
class NarrowConfig(Config):
    """Shape of a model whose blocks differ. widths: (K/V heads, MLP channels) of each."""
    widths: list | None = None

    @classmethod
    def from_hf(cls, hf, source="--model", generation=None):
        """As Config.from_hf; the folder's "widths" tell the blocks."""
        made = super().from_hf(hf, source, generation)
        widths = hf.get("widths")
        wrong = misfit(widths, [[int]], "config.json.widths")
        check(not wrong, f"{source}: {wrong}; give a folder that analysis/rivals/make.py wrote")
        pairs = len(widths) == made.n_layer and all(len(w) == 2 and min(w) > 0 for w in widths)
        check(pairs, f"{source}: widths in config.json must be {made.n_layer} pairs of numbers "
                     "above 0; make the folder again")
        return replace(made, widths=widths)

    def block(self, l):
        if not self.widths:
            return self
        kv_heads, channels = self.widths[l]
        queries = self.n_head // self.n_kv_head             # of a K/V head
        return replace(self, n_head=kv_heads * queries, n_kv_head=kv_heads,
                       intermediate_size=channels, widths=None)


class NarrowModel(FTPModel):
    """What width() has made."""

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a narrow folder."""
        return load_as(cls, NarrowConfig, path, dtype, device, first_values)


def first_values(tensor, shape):
    """A tensor without the zeros at its ends."""
    return tensor[tuple(map(slice, shape))]


def narrow_config(config, widths):
    """The shape of a model of this Config with these widths."""
    return NarrowConfig(**vars(config), widths=widths)


# ------------------------------------------------------------------------------------------------
# the method


def importance(model, samples, folder):
    """Sum over the samples of |gradient x weight| of the next-token loss -> {name: tensor}.

    By transformers' own model; names are Hugging Face's. LLM-Pruner adds the gradients first;
    texts cancel then, and it measured worse.
    """
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    weights = {name: p for name, p in hf.named_parameters() if "_proj.weight" in name}
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in weights.items()}
    for prompt, response in progress(samples, desc="gradients", unit="sample"):
        ids = torch.tensor([prompt + response], device=model.device)
        loss = hf(ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients):
            total[name] += (gradient * weight.detach()).abs()
    return {name: t.cpu() for name, t in total.items()}


def groups_of(config):
    """Of each half of a layer its maps, and the rows (of WRITERS: columns) that go together."""
    queries = config.head_dim * config.n_head // config.n_kv_head
    d = config.head_dim
    return {"self_attn": {"q": queries, "k": d, "v": d, "o": queries},
            "mlp": {"gate": 1, "up": 1, "down": 1}}


def axis_of(name):
    """The axis of a map's weight along which it is cut."""
    return 1 if name in WRITERS else 0


def best_first(taylor, layer, sizes):
    """Numbers of a half layer's K/V heads or channels, the most important first.

    layer: beginning of the names; sizes: {map: rows of each head or channel}.
    """
    scores = []
    for name, size in sizes.items():
        t = taylor[f"{layer}.{name}_proj.weight"].sum(1 - axis_of(name))
        scores.append(t.view(-1, size).sum(1))
    return sum(scores).argsort(descending=True)


def cut(tensor, axis, order, size, n):
    """A tensor with its groups of `size` rows in this order, those behind the first n zero."""
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    tensor = tensor.index_select(axis, rows)
    tensor.narrow(axis, n * size, len(rows) - n * size).zero_()
    return tensor


def narrow(config, tensors, taylor, widths):
    """A checkpoint's {name: tensor} with the best of each block; widths[l]: (heads, channels)."""
    new = dict(tensors)
    for l, counts in enumerate(widths):
        for (half, sizes), n in zip(groups_of(config).items(), counts):
            layer = f"model.layers.{l}.{half}"
            order = best_first(taylor, layer, sizes)
            for name, size in sizes.items():
                for kind in ("weight", "bias"):
                    full = f"{layer}.{name}_proj.{kind}"
                    if full in new:
                        new[full] = cut(new[full], axis_of(name), order, size, n)
    return new


def width(model, samples, levels, tensors, folder, kv_heads=0):
    """All blocks but the first and the last lose kv_heads K/V heads, the rest in channels.

    The ends stay whole, as LLM-Pruner keeps its ends. (On smollm2 at 30 % channels alone measured
    best: one K/V head of three is much.) tensors, folder: of the checkpoint.
    """
    config = model.config
    check(kv_heads < config.n_kv_head,
          f"--kv_heads {kv_heads}: must leave one of {config.n_kv_head}")
    dense, taylor = prompt_flops(config, samples), importance(model, samples, folder)
    ends, heads = [(config.n_kv_head, config.intermediate_size)], config.n_kv_head - kv_heads
    sizes = range(MULTIPLE, config.intermediate_size + 1, MULTIPLE)

    def widths(channels):
        return ends + [(heads, channels)] * (config.n_layer - 2) + ends

    def cost(channels):
        return prompt_flops(narrow_config(config, widths(channels)), samples)

    for level in levels:
        n = nearest(level, sizes, cost, dense)
        changes = {"widths": widths(n)}
        made = Pruned(narrow(config, tensors, taylor, widths(n)), changes, NarrowModel)
        yield level, made, {"kv_heads": heads, "mlp_channels": n}
