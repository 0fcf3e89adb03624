"""The guide of the router: an order in which the tokens of a prompt are kept.

The guide loss teaches the router to decide as such an order does. The paper's order is
{first, newest ... oldest}. search_guide() finds a better one on samples, before the training.

    guide, tried = search_guide(kl_of_order, 40, random.Random(0))
    model.use(schedule, guide)                         # an order decides like any router
"""
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib.batch import of_spans
from lib.cache import to_device
from lib.calibration import decides
from lib.files import check, load_json
from lib.stage import bar
from model_ftp import choose

# What an order is made of.
KNOTS = 6           # of its curve: enough for a fall, a rise and a bend between
BEYOND = 9.0        # puts head and tail beyond any value that curve and weights reach

# What the search tries before it evolves, so that a short one has tried the simple shapes.
DIPS = (0.4, 0.6, 0.8)                # curves lowest at this place: both ends are kept, V-shaped
HEADS = (8, 16, 24, 32, 48, 20)       # tokens after the first that go before all others
RANKS = (0.5, 1.0, 2.0)               # what the rank of the attention counts beside the best curve
NEWEST = (0.0, 0.0, 0.0, 0.0, 2.0, 4.0)    # a curve: a third of newest, then by attention alone

# How the search evolves: an order is ten numbers, and some thirty trials are left for them.
PARENTS = 4                           # the best so far, of which a new one is made
ELITISM = 2                           # power > 1: better parents are drawn more often
WIDEST, NARROWEST = 0.25, 0.03        # standard deviation of a step, falling over the search
P_MIX, P_NOISE = 0.5, 0.6             # odds that a child leans to a second parent, and moves
P_HEAD, P_TAIL = 0.6, 0.4             # odds that its head, its tail changes
JUMPS = (-4, -2, -1, 1, 2, 4)         # by how many tokens


@dataclass
class Order:
    """A keeping order of prompt tokens; it serves as a router, see FTPModel.use().

    A token's value is a piecewise-linear curve over its place in the prompt, plus weights times
    its attention score and its rank. The first `head` tokens go before all others (but for the
    very first, which stays), the last `tail` stay the longest. Of `span` neighbours each has the
    mean.
    """
    curve: list                       # (KNOTS,) values at even distances, oldest to newest
    weights: list                     # of score and rank
    head: int = 0
    tail: int = 0
    span: int = 1

    @classmethod
    def static(cls):
        """The paper's order {first, newest ... oldest}."""
        return cls([i / (KNOTS - 1) for i in range(KNOTS)], [0.0, 0.0])

    @classmethod
    def attended(cls, span=1):
        """Some of the newest, then those that the last queries attend to most."""
        return cls(list(NEWEST), [0.0, 1.0], span=span)

    @classmethod
    def of_router(cls, path):
        """The guide that the router file at `path` was trained with. FTPError if it has none."""
        form = {"curve": [float], "weights": [float], "head": int, "tail": int,
                "span": (int, None)}
        check(Path(path).name, f"--guide {path}: no file; give a router's, or search, static or "
                               "attended")
        twin = Path(path).with_suffix(".json")
        stored = load_json(twin, "ftp-router-1", "--guide", {"meta": {"guide": form}})
        guide = stored["meta"]["guide"]
        check(len(guide["curve"]) == KNOTS and len(guide["weights"]) == 2,
              f"--guide: {path} is damaged (its guide has another shape); give another router")
        return cls(**{name: guide[name] for name in form if guide.get(name) is not None})

    def __call__(self, batch, scores, s):
        """The value of each token (N,) float32: the largest are kept, whatever the sparsity s."""
        curve = to_device(np.array(self.curve, dtype=np.float32), scores.value.device)
        place = batch.place[:, 0] * (KNOTS - 1)          # in knots, (N,)
        left = place.long().clamp(max=KNOTS - 2)           # the knot before it
        value = curve[left].lerp(curve[left + 1], place - left)
        value = value + self.weights[0] * scores.value + self.weights[1] * scores.rank
        in_tail = batch.local >= batch.size - self.tail
        in_head = batch.local < self.head
        value = value + BEYOND * (in_tail.float() - in_head.float())
        return of_spans(value, batch, self.span)

    def child(self, other, rng, width):
        """A neighbour whose values lie between this order's and another's, with some noise."""
        mix = rng.random() * (rng.random() < P_MIX)
        noise = width * (rng.random() < P_NOISE)

        def blend(mine, theirs):
            return [a + mix * (b - a) + rng.gauss(0, noise) for a, b in zip(mine, theirs)]

        def jump(n, odds):
            return max(0, n + rng.choice(JUMPS)) if rng.random() < odds else n

        # in this order, as each draws from rng
        curve = blend(self.curve, other.curve)
        weights = blend(self.weights, other.weights)
        head = jump(self.head, P_HEAD)
        tail = jump(self.tail, P_TAIL)
        return Order(curve, weights, head, tail, self.span)

    def __str__(self):
        curve = [round(v, 2) for v in self.curve]
        weights = [round(v, 2) for v in self.weights]
        spans = f", spans of {self.span}" if self.span > 1 else ""
        return f"curve {curve}, weights {weights}, head {self.head}, tail {self.tail}{spans}"

    def as_dict(self):
        """What artefacts store of it."""
        return asdict(self)


def targets_of(guide, batch, scores, s, free):
    """A guide's decisions for the free tokens (N,) of prompts: 1 compute, 0 skip.

    guide: an Order, or anything else that values tokens, like lib/worth.Oracle.
    """
    kept = choose(guide(batch, scores, s), batch, s, ~free)
    return kept.mask[free].float()


def simple_curves():
    """Curves that are tried first: the paper's, its reverse, and both ends before the middle."""
    line = Order.static().curve
    dips = [[abs(v - place) for v in line] for place in DIPS]
    return [line, line[::-1], *dips]


def search_guide(score, evaluations, rng, span=1):
    """The order of lowest score(order) -> it, and the scores of all in the order of trying.

    Simple curves come first (the paper's is the very first), then the best of them with heads, and
    with the attention; then an evolution strategy, which alone draws from rng, a random.Random.
    span: of all orders.
    """
    start = replace(Order.static(), span=span)
    changes = [                                            # of the best so far, one after another
        *({"curve": curve} for curve in simple_curves()),
        *({"head": head} for head in HEADS),
        *({"weights": [0.0, rank]} for rank in RANKS),
        Order.attended(span).as_dict(),
    ]
    tried = []                                             # (score, order)
    for n in bar(range(evaluations), desc="guide search", unit="order"):
        best = sorted(tried, key=itemgetter(0))
        if n < len(changes):
            order = replace(best[0][1] if best else start, **changes[n])
        else:
            mother = best[int(PARENTS * rng.random() ** ELITISM)][1]
            father = best[rng.randrange(PARENTS)][1]
            width = WIDEST * (1 - n / evaluations) + NARROWEST
            order = mother.child(father, rng, width)
        tried.append((score(order), order))
    winner = min(tried, key=itemgetter(0))[1]
    return winner, [value for value, _ in tried]


@torch.no_grad()
def decisions_of(model, router, samples, wanted=None):
    """What `router` would see where the model, routed by a guide, decides about prompts.

    samples: [(prompt ids, response ids)]. -> [(block, factors (N, n_inputs), free (N,), the guide's
    decisions about the free tokens (n,): 1 compute, 0 skip)], on the model's device, and the Batch.
    One run of the LLM.
    wanted: function (batch, scores, s, free) -> (n,), to be learned instead of the decisions.
    """
    batch = model.batch([prompt for prompt, _ in samples])
    state, found = model.begin(batch), []
    for l, s in enumerate(model.routing.sparsity):
        if decides(model.routing, l):
            kept, state = model.route(l, batch, state)
            forecast = None
            if "forecast" in router.inputs:
                forecast = model.routing.skipped.reach(l, state.x)
            factors = router.factors(kept.batch, state, s, forecast)
            free = kept.free
            if wanted is None:
                target = kept.mask[free].float()
            else:
                target = wanted(kept.batch, state.scores, s, free)
            found.append((l, *(t.to(model.device) for t in (factors, free, target))))
        state = model.prefill_step(l, batch, state)
    return found, batch


def imitate(router, blocks, batch, steps, lr, loss_of=F.binary_cross_entropy_with_logits):
    """Guide loss alone, without the LLM: the router learns what decisions_of() gave, blocks and
    their batch.

    lr: at the start, it falls to 0. loss_of: of margins and targets. -> its last value, a mean over
    blocks; nan if no steps.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr)
    loss = torch.tensor(torch.nan)
    for step in bar(range(steps), desc="guide", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        # all blocks in their order: a recurrent router goes on from the block before
        memory, loss = None, 0.0
        for l, factors, free, target in blocks:
            margin, memory = router(l, factors, memory)
            margin = of_spans(margin, batch, router.span)       # as it will decide
            loss = loss + loss_of(margin[free], target) / len(blocks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
