"""A rival that drops a prompt's tokens for good, like LazyLLM (arXiv 2407.14057).

    model = LazyModel.of(FTPModel.from_pretrained("smollm2"))       # the same weights
    model.use("artifacts/rivals/lazyllm_0.30.json")

Each block keeps the tokens that the prompt's last token attends most; a dropped token stays
dropped in all blocks after. The schedule drops in three steps. Decoded tokens run all blocks.
"""
from dataclasses import replace

import torch

from analysis.rivals.common import nearest, prompt_flops
from analysis.rivals.removal import PartModel
from lib.artefacts import Schedule
from lib.files import check

PROGRESSIVE = "progressive"     # the selection's name, as --peer takes it
WINDOW = 1                      # the last token alone decides
STAGES = 4                      # the first of so many equal parts of the blocks is dense
STEPS = [i / 1000 for i in range(330)]      # three of them stay below 1


class LazyModel(PartModel):
    """FTPModel under progressive dropping. State.memory (N,): the tokens not yet dropped."""

    def use(self, schedule=None, router=PROGRESSIVE, **how):
        """As PartModel.use, without a choice of router."""
        if schedule is None:
            return super().use()
        check(router == PROGRESSIVE, f"--router {router}: this model drops tokens for good; "
                                     f"give {PROGRESSIVE}")
        return super().use(schedule, "attention", score=WINDOW, **how)

    def margins(self, l, batch, state):
        margin, state = super().margins(l, batch, state)
        if state.memory is not None:
            margin = margin.masked_fill(~state.memory, -torch.inf)
        return margin, state

    def route(self, l, batch, state, noise=0.0):
        kept, state = super().route(l, batch, state, noise)
        if 0 < self.routing.sparsity[l] < 1:
            # a block with room for more than are left takes some in that stay dropped
            alive = kept.mask if state.memory is None else kept.mask & state.memory
            state = replace(state, memory=alive)
        return kept, state


def lazyllm(model, samples, levels):
    """A quarter of the blocks dense, then three steps of sparsity u, 2u, 3u."""
    config = model.config
    dense = prompt_flops(config, samples)

    def steps(u):
        return [u * (STAGES * l // config.n_layer) for l in range(config.n_layer)]

    def cost(u):
        return prompt_flops(config, samples, steps(u))

    for level in levels:
        u = nearest(level, STEPS, cost, dense)
        yield level, Schedule(steps(u), model.fingerprint), {"step": u}
