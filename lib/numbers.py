"""Figures over items and over seeds."""
import math
import statistics


def standard_error(values):
    """Standard error of the mean; 0 for one value."""
    n = len(values)
    mean = sum(values) / n
    squares = sum((v - mean) ** 2 for v in values)
    return math.sqrt(squares / max(n - 1, 1) / n)


def error_of(values):
    """The standard error of a tensor of items, as text; of one item it is unknown, not 0."""
    return f"{standard_error(values.tolist()):.4f}" if len(values) > 1 else "unknown"


def spread(values):
    """Over seeds: {"mean", "std", "n"} of the values that are there (None is not).

    std is None for one value, mean for none.
    """
    there = [v for v in values if v is not None]
    return {
        "mean": statistics.mean(there) if there else None,
        "std": statistics.stdev(there) if len(there) > 1 else None,
        "n": len(there),
    }


def shown(s):
    """A spread as text: "0.5000 ± 0.1000"."""
    if s["mean"] is None:
        return "-"
    if s["std"] is None:
        return f"{s['mean']:.4f}"
    return f"{s['mean']:.4f} ± {s['std']:.4f}"
