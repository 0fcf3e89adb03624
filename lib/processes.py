"""Several processes (torchrun), each with its share of the work.

Every rank runs the whole script on its share and learns the results of the others, so that all of
them decide alike. Rank 0 alone prints and writes. In one process everything here is the identity.
"""
import torch
import torch.distributed as dist

from lib.files import FTPError


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank; all ranks must call it.

    x is anything that pickles and lies on the CPU. The FTPError that a rank gives (see run() in
    lib/stage.py) is raised on all of them.
    """
    parts = [x] * world()
    if world() > 1:
        dist.all_gather_object(parts, x)
    for number, part in enumerate(parts):
        if isinstance(part, FTPError):
            part.rank = number  # who tells the user
            raise part
    return parts


def shard(items):
    """This rank's share of a list: every world-th item."""
    return items[rank()::world()]


def unshard(mine):
    """The whole list on every rank, in order, from what each rank made of its shard()."""
    parts = gather(mine)
    n = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(n)]


def from_all_ranks(mine):
    """One list on every rank, from lists of the same length that hold None where others worked."""
    return [next((x for x in places if x is not None), None) for places in zip(*gather(mine))]


def total(x):
    """Sum over the ranks of a small tensor x, on its device.

    The gradient is that of the own part alone, so that the ranks' gradients add up to the whole.
    """
    own = x.detach()
    whole = torch.stack(gather(own.cpu())).sum(0).to(x.device)
    return x + (whole - own)


def share_meter(meter):
    """What the meters of all ranks have counted together, as one Meter on every rank."""
    first, *others = gather(meter)
    for other in others:
        first.add(other)
    return first
