"""What FTP's stages write: the schedule (a sparsity a block), and the router's weights as read."""
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean

from lib.checkpoint import FINGERPRINT
from lib.config import leaders
from lib.files import (
    check,
    check_tensors,
    load_json,
    load_tensors,
    misfit,
    save_json,
    save_tensors,
)

FACTORS = ("position", "score", "rank", "sparsity")  # the paper's four inputs of the router
INPUTS = {                    # numbers each enters with; "hidden" enters with hidden_size
    "position": 3,
    "place": 1,
    "score": 1,
    "rank": 1,
    "sparsity": 1,
    "forecast": 1,
}
KINDS = ("global", "local", "recurrent")       # of a router
SELECTIONS = ("static", "random", "attention")  # routers that need no training
PARTS = ("both", "attention", "mlp")           # what a schedule can leave of a block
FIRST = 8    # a model without a start token puts its attention sink on any of the first tokens

# ------------------------------------------------------------------------------------------------
# the schedule

SCHEDULE = "ftp-schedule-1"
SCHEDULE_FORM = {
    "sparsity": [float],
    "fingerprint": FINGERPRINT,
    "decode_threshold": ([float], None),
    "router_id": (str, None),
    "meta": (dict, None),
    "parts": ([str], None),
    "first": (int, None),
}


@dataclass
class Schedule:
    """One sparsity per block, the share of tokens that skip it.

    1 removes the block; block 0 is 0 (or 1). decode_threshold, if any, holds the router margin
    below which a decoded token skips block l; it is only valid with the router whose id it
    carries. parts, if any, says of each block what is left of it: "both" sub-blocks, "attention"
    or "mlp". first: so many first tokens of a prompt always compute (paper: 1), as far as they are
    a quarter of what a block keeps. FTPError on anything else.
    """
    sparsity: list
    fingerprint: dict                      # of the model it was made for
    decode_threshold: list | None = None
    router_id: str | None = None
    meta: dict = field(default_factory=dict)
    parts: list | None = None
    first: int = 1

    def __post_init__(self):
        s, mend = self.sparsity, "make the schedule again"
        numbers = isinstance(s, list) and s and not misfit(s, [float])
        check(numbers and all(0 <= v <= 1 for v in s),
              f"--schedule: sparsities must be a list of numbers in [0, 1]; {mend}")
        check(s[0] in (0, 1),
              "--schedule: block 0 must have sparsity 0 (no attention score exists before it)")
        t = self.decode_threshold
        check(t is None or not misfit(t, [float]) and len(t) == len(s),
              f"--schedule: decode_threshold must hold one number a block; {mend}")
        p = self.parts
        known = p is None or isinstance(p, list) and all(v in PARTS for v in p)
        check(known and (p is None or len(p) == len(s)),
              f'--schedule: parts must hold "both", "attention" or "mlp" for each block; {mend}')

        check(self.first >= 1, f'--schedule: "first" is {self.first}, must be at least 1; {mend}')

    @property
    def mean(self):
        return sum(self.sparsity) / len(self.sparsity)

    @property
    def id(self):
        """12 hex digits, by which thresholds know their schedule."""
        values = [round(v, 6) for v in self.sparsity]
        first = [] if self.first == 1 else [f"first {self.first}"]
        text = json.dumps(values + (self.parts or []) + first)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def removes(self):
        """Whether it removes blocks or sub-blocks."""
        return max(self.sparsity) >= 1 or any(part != "both" for part in self.parts or [])

    def leaders(self, group, alike=False):
        """The block whose decision each block takes, see leaders() in lib/config.py."""
        return leaders(self.sparsity, group, alike)

    def grouped(self, group):
        """This schedule with the sparsity averaged over blocks that share a decision."""
        if group == 1:
            return self
        lead = self.leaders(group)
        shared = {}                        # leading block -> sparsities of those that follow it
        for l, s in zip(lead, self.sparsity):
            shared.setdefault(l, []).append(s)
        return replace(self, sparsity=[fmean(shared[l]) for l in lead])

    @classmethod
    def uniform(cls, model, sparsity, first=1):
        """The same sparsity in every block but the first, with mean `sparsity`."""
        n = model.config.n_layer
        check(not misfit(sparsity, float), f"--sparsity {sparsity}: give a number")
        s = sparsity * n / (n - 1)
        check(0 <= s < 1, f"--sparsity {sparsity}: out of range for a uniform schedule; "
                          f"give 0 <= S < {(n - 1) / n:.3f}")
        return cls([0.0] + [s] * (n - 1), model.fingerprint, first=first)

    @classmethod
    def load(cls, path):
        """Read a schedule's JSON; FTPError on what is no schedule."""
        stored = load_json(path, SCHEDULE, "--schedule", SCHEDULE_FORM)
        fields = {name: stored.get(name) for name in SCHEDULE_FORM}
        first = 1 if fields["first"] is None else fields["first"]
        return cls(**fields | {"meta": stored.get("meta") or {}, "first": first})

    def save(self, path):
        """Write it as JSON that people can read and change."""
        save_json(path, {"format": SCHEDULE, "mean": self.mean, **asdict(self)})


# ------------------------------------------------------------------------------------------------
# the router

ROUTER = "ftp-router-1"
ROUTER_META = {               # what a router says of its training, as far as something reads it
    "decode_threshold": ([float], None),
    "schedule_id": (str, None),
    "settings": (dict, None),
}
ROUTER_FORM = {
    "kind": str,
    "inputs": [str],
    "width": int,
    "score": (int, str),
    "group": (int, None),
    "span": (int, None),
    "n_layer": int,
    "hidden_size": int,
    "fingerprint": FINGERPRINT,
    "meta": (ROUTER_META, None),
}


def read_router(path):
    """A router as train_router.py wrote it -> {name: tensor (float32)}, its readable twin.

    The twin always has "meta" (maybe empty), "group" and "span". FTPError on unknown kinds and
    inputs, and where a tensor is missing, of another shape than the twin asks for, or not finite.
    """
    tensors, twin = load_tensors(path, ROUTER, "--router", ROUTER_FORM)
    twin["meta"] = twin.get("meta") or {}
    for name in ("group", "span"):         # older files lack them
        twin[name] = 1 if twin.get(name) is None else twin[name]
    why = wrong_router(twin)
    check(not why, f"--router: {path}: {why}; train it again")
    check_tensors(tensors, router_shapes(twin), f"--router: {path}")
    return tensors, twin


def wrong_router(twin):
    """Why a twin describes no router that exists, or None."""
    unknown = [name for name in twin["inputs"] if name not in INPUTS and name != "hidden"]
    score, blocks = twin["score"], twin["n_layer"]
    window = score == "mean" or isinstance(score, int) and score > 0
    thresholds = twin["meta"].get("decode_threshold")
    reasons = (
        (unknown, f"it reads unknown inputs {', '.join(unknown)[:80]}"),
        (not twin["inputs"], "it has no inputs"),
        (twin["kind"] not in KINDS, f"it is of an unknown kind {twin['kind'][:40]!r}"),
        (not twin["width"], "width is out of range"),
        (not 0 < blocks < 10_000, "n_layer is out of range"),
        (twin["group"] < 1, "group is out of range"),
        (twin["span"] < 1, "span is out of range"),
        (not window, "score is neither a window nor mean"),
        (thresholds and len(thresholds) != blocks, "decode_threshold has another number of blocks"),
    )
    return next((why for bad, why in reasons if bad), None)


def router_shapes(twin):
    """Shapes of a router's tensors; see Router in model_ftp.py for what they do."""
    n_inputs = sum(twin["hidden_size"] if name == "hidden" else INPUTS[name]
                   for name in twin["inputs"])
    width = twin["width"]
    g = twin["n_layer"] if twin["kind"] == "local" else 1  # MLPs
    shapes = {
        "w1": (g, n_inputs, width),
        "b1": (g, width),
        "w2": (g, width, 2),
        "b2": (g, 2),
    }
    if twin["kind"] == "recurrent":
        shapes["u"] = (width, width)
    return shapes


def write_router(path, router):
    """Write a Router's tensors as router.safetensors, and its readable twin router.json."""
    names = ("fingerprint", "kind", "width", "score", "group", "span", "n_layer", "hidden_size",
             "meta")
    twin = {name: getattr(router, name) for name in names}
    twin["inputs"] = list(router.inputs)
    twin["parameters"] = sum(p.numel() for p in router.parameters())
    save_tensors(path, router.state_dict(), {"format": ROUTER, **twin})
