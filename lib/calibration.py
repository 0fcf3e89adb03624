"""Thresholds for decoded tokens: how small a margin skips a block at the rate of its sparsity.

    thresholds = calibrate_decode(model, samples)      # and model.routing decides by them

A prompt's tokens compete for a quota. A decoded token is alone, and compares its margin with a
threshold: the quantile of the margins of calibration responses.
"""
import torch

from lib.files import check, misfit
from lib.routing import with_thresholds
from lib.scoring import begin_pair, make_pair, step_pair

MOST = 0.98     # of decoded tokens skip a block, where a mean is asked that would scale beyond


@torch.inference_mode()
def calibrate_decode(model, samples, sparsity=None):
    """Find thresholds for the schedule and router in use, and route by them -> list of n_layer.

    samples: [(prompt ids, response ids)]. A token that computes a block changes what the blocks
    after it see, so each block runs with its threshold in place before the next is looked at.
    sparsity: another mean to reach in decode; the schedule's profile is scaled to it. FTPError
    without a trained router.
    """
    routing = model.routing
    check(routing.learned, "--decode threshold: only a trained router has margins to calibrate; "
                           "give --router")
    check(sparsity is None or not misfit(sparsity, float) and 0 <= sparsity < 1,
          f"--decode_sparsity {sparsity}: must lie in [0, 1)")
    check(isinstance(samples, list) and samples and all(len(s) == 2 for s in samples),
          "--data: give a list of samples, (prompt ids, response ids) each")
    shares = skip_shares(routing.schedule, sparsity)
    pair = make_pair(model, samples)
    thresholds = [0.0] * len(shares)
    # from the first block on: where tokens decide by thresholds, each gives itself a score
    model.routing = with_thresholds(routing, thresholds)
    states = begin_pair(model, pair)
    for l in range(len(shares)):
        if decides(routing, l):
            prompts, responses = states
            margin, _ = model.margins(l, pair.responses, responses)     # (N,) of the responses
            thresholds[l] = float(margin.quantile(shares[l]))
            model.routing = with_thresholds(routing, thresholds)
        states = step_pair(model, l, pair, states)
    return thresholds


def skip_shares(schedule, mean):
    """The share of decoded tokens that is to skip each block, n_layer; mean None: the prompts'."""
    scale = 1.0 if mean is None else mean / schedule.mean
    # a block that the schedule removes stays removed
    return [s if s >= 1 else min(s * scale, MOST) for s in schedule.sparsity]


def decides(routing, l):
    """Whether block l has a threshold of its own: tokens skip it, and no leader of a group
    decides for it."""
    return 0 < routing.sparsity[l] < 1 and routing.leader[l] == l
