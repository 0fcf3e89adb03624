"""How figures look: one colour a method everywhere, names beside the lines."""
import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")   # figures are files; a machine without a screen draws them too
import matplotlib.pyplot as plt

LABELLED = 8   # series with a name in one panel; more can't be told apart

# The order is that in which series get a name, where a panel has too many of them.
COLOURS = {
    "dense": "#222222",
    "ftp": "#d55e00",
    "late": "#009e73",
    "static": "#0072b2",
    "forecast": "#e69f00",
    "shortgpt": "#332288",
    "blockpruner": "#aa4499",
    "lazyllm": "#c4a000",
    "slicegpt": "#7f9a00",
    "width": "#44aa99",
    "random": "#8c8c8c",
    "attention": "#cc79a7",
    "hidden": "#882255",
    "uniform": "#56b4e9",
    "ftp_decode": "#ee8866",
    "rule": "#994455",
    "laco": "#661100",
    "transformers": "#6b7785",
}
ALIASES = {   # as rows were named for readers
    "late keys and values": "late",
    "first + recent": "static",
    "skip": "static",
    "at random": "random",
    "most attended": "attention",
    "hidden-state router": "hidden",
    "lazyllm-like": "lazyllm",
}
SPARE = ["#4477aa", "#228833", "#ee6677", "#bb8844", "#5b5ea6", "#a0785a"]

RULES = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.dpi": 120,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
plt.rcParams.update(RULES)


def method(name):
    """The method behind a series' name: "first + recent" -> static, "laco_last" -> laco."""
    name = name.lower()
    plain = name.removesuffix("_prompt").removesuffix(", prompt alone")
    plain = ALIASES.get(plain, plain)
    if plain in COLOURS:
        return plain
    # a bench row carries its level behind the name, an eval row its variant: "static 0.3"
    first = plain.replace(",", " ").replace("_", " ").split()[:1]
    return first[0] if first and first[0] in COLOURS else plain


def colour(name):
    """The colour of a series; of an unknown method one of the spare ones, always the same."""
    known = COLOURS.get(method(name))
    return known or SPARE[zlib.crc32(method(name).encode()) % len(SPARE)]


def dash(name):
    """Line style of a series: a method's plain form is solid, its variants are not."""
    if name.lower().endswith(("_prompt", ", prompt alone")):
        return "--"
    known = {*COLOURS, *ALIASES}
    return "-" if name.lower() in known else ":"


def labelled(names):
    """The at most LABELLED series that get a name: known methods first, plain forms first."""
    order = list(COLOURS)

    def importance(name):
        known = method(name)
        place = order.index(known) if known in order else len(order)
        return dash(name) != "-", place, name

    return set(sorted(names, key=importance)[:LABELLED])


def settle(figure):
    """Lay the figure out for good: labels are placed by where their lines are."""
    figure.canvas.draw()
    figure.set_layout_engine("none")


def label_lines(axis, ends, colours=None, size=8, column=True):
    """Write names beside the last points of lines, pushed apart so that none covers another.

    ends: [(name, x, y)] in the axis' units; colours: {name: colour}, by default the method's;
    column: names stand under one another, else each right of its own point. Call it when limits are
    final and the figure is settled.
    """
    if not ends:
        return
    dpi = axis.figure.dpi
    step = 1.25 * size * dpi / 72                    # height of a line of text, pixels
    points = [(*axis.transData.transform((x, y)), name) for name, x, y in ends]
    points.sort(key=lambda point: point[1])
    low, high = axis.get_window_extent().intervaly
    heights = spaced([y for _, y, _ in points], step, low, high)
    right = max(x for x, _, _ in points)
    for (x, y, name), height in zip(points, heights):
        ink = colours[name] if colours else colour(name)
        aside, side = (right - x if column else 0), 1
        if not column and covers(name, x, y, points, size * dpi / 72):
            side = -1
        axis.annotate(
            name, axis.transData.inverted().transform((x, y)),
            (side * (aside * 72 / dpi + 10), (height - y) * 72 / dpi), textcoords="offset points",
            color=ink, fontsize=size, va="center", ha="left" if side > 0 else "right",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.5, "alpha": 0.6, "shrinkB": 3})


def covers(name, x, y, points, letter):
    """Whether a name right of its point would cover another point; letter: its size in pixels."""
    width = 0.65 * letter * len(name)
    return any(0 < other_x - x < width + 3 * letter and abs(other_y - y) < 2 * letter
               for other_x, other_y, _ in points)


def spaced(heights, step, low, high):
    """Ascending numbers moved apart to at least `step`, within [low, high] where there is room."""
    moved = []
    for h in heights:                                # upwards, each a step above the last
        moved.append(max(h, moved[-1] + step) if moved else max(h, low))
    ceiling = high
    for i in reversed(range(len(moved))):            # and back down, where the top was passed
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - step
    return moved


def save(figure, path):
    """Write a figure; its folder is made where it is not there. Returns the path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
