"""Weights in the layout that a CPU's kernels read (oneDNN's), for inference alone.

Every product otherwise brings its weight into that layout anew. Products of packed weights are the
same bit for bit in bfloat16, and within 1e-5 in float32.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.checkpoint import sample_of
from lib.files import FTPError


def pack(model):
    """Pack the weights of a model's linear maps and drop the plain ones; returns the model.

    For inference on CPUs only: a packed model gives no gradients and stays on its device. What has
    no such kernels (a GPU, float16) is left as it is. A tied head keeps its weight, which the
    embedding reads.
    """
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported() and model.dtype == torch.bfloat16
    if not (half or model.dtype == torch.float32) or not torch.backends.mkldnn.is_available():
        return model
    linears = [(owner, name, m) for owner in model.modules() for name, m in owner.named_children()
               if isinstance(m, nn.Linear) and m.weight.device.type == "cpu"]
    for owner, name, m in linears:
        tied = m.weight is model.embed.weight
        setattr(owner, name, PackedLinear(m, tied, sample_of(m.weight)))
    return model


def is_packed(model):
    return any(isinstance(m, PackedLinear) for m in model.modules())


class PackedLinear(nn.Module):
    """nn.Linear whose weight is packed; `weight` stays plain only where something else reads it."""
    def __init__(self, linear, keep_plain, sample):
        super().__init__()
        empty = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        self.weight = linear.weight if keep_plain else empty
        self.bias, self.sample = linear.bias, sample       # sample: see lib/checkpoint.fingerprint
        self.packed = {0: torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())}

    def plain(self):
        """The weight (out, in)."""
        return self.packed[0].to_dense()

    def forward(self, x, first=0):
        """x (N, in) -> outputs from `first` on, (N, out - first)."""
        if x.requires_grad:
            raise FTPError("a packed model gives no gradients; train one that is not packed")
        if first not in self.packed:
            part = self.plain()[first:].contiguous()
            self.packed[first] = torch.ops.mkldnn._reorder_linear_weight(part)
        bias = None if self.bias is None else self.bias[first:]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[first], bias, "none", [], "")


def linear_outputs(linear, x, first):
    """Outputs of a linear map from `first` on, the rows before are not computed."""
    if isinstance(linear, PackedLinear):
        return linear(x, first)
    return F.linear(x, linear.weight[first:], None if linear.bias is None else linear.bias[first:])


def plain_weight(linear):
    """The weight (out, in) of a linear map, packed or not."""
    return linear.plain() if isinstance(linear, PackedLinear) else linear.weight
