"""Where values stopped being finite: looked for only when the last states tell that they did."""
import torch

from lib.files import FTPError


def check_finite(x, step, batch, start, cache, mark):
    """FTPError naming the first block after which states are NaN or infinite, if x (N, d) are.

    One sum tells; then the blocks run again from `start`, over the cache as it was at `mark`.
    """
    if x.sum(dtype=torch.float32).isfinite():
        return
    if cache is not None:
        cache.rewind(mark)
    state, n_layer = start, step.__self__.config.n_layer
    for l in range(n_layer):
        state = step(l, batch, state, cache)
        if not state.x.isfinite().all():
            break
    else:
        return                                          # finite values whose sum is not
    if cache is not None:
        cache.rewind(mark)
    rows = (~state.x.isfinite().all(1)).nonzero()[:, 0]
    raise FTPError(
        f"NaN or infinite activations after block {l}, in {len(rows)} of {len(x)} tokens, the "
        f"first at position {int(batch.pos[rows[0]])} of sequence {int(batch.seq[rows[0]])}; use "
        "--dtype float32, and check the forecaster if there is one")
