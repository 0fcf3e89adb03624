"""torch.compile of what a block computes around its attention."""
import os
import shutil

import torch

from lib.files import check
from lib.packing import is_packed

CASES = 32    # one row or several, rotary or not, each dtype: more than torch's limit of 8


def compile_model(model, backend="inductor"):
    """Compile the projections with norm and rotary, and the output map with the MLP; returns model.

    Each is whole (a graph break would be an error), is shared by all blocks, and serves any number
    of rows, so that quotas and lengths may change. The attention is a fused kernel anyway; what the
    host decides, which rows and where in the cache, stays outside. FTPError for a packed model, and
    on a CPU without a C++ compiler.
    """
    check(not is_packed(model), "--compile: the model is packed; compile one that is not")
    compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    check(backend != "inductor" or model.device.type != "cpu" or compiler,
          "--compile: no C++ compiler found; install g++ or set CXX, or leave --compile out")
    torch._dynamo.config.recompile_limit = CASES
    for block in model.blocks:
        block.qkv, block.rest = (
            torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
            for f in (block.qkv, block.rest))
    return model
