"""Quality against what was saved: all methods, over FLOPs saved and over measured speed.

    python analysis/pareto.py out/s22/eval.json out/s30/eval.json --bench out/s30/bench.json
    python analysis/pareto.py a/eval.json b/eval.json forecast=out/forecast/eval.json --cost total
    python analysis/pareto.py artifacts/pareto.json --show ftp,static,late     # drawn again

In: eval.json and bench.json files alone; or pareto.json. Out: pareto.png, and pareto.json.

Rows of one name whose savings lie within --join of each other are one method at one level under
several seeds: a point with the standard deviation as error bars. label=file puts the label before
the file's row names, in --bench the same. At most 8 methods get a colour and a name in a figure;
the others stand behind them in grey. --show picks them.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.style import (
    LABELLED,
    colour,
    dash,
    label_lines,
    labelled,
    method,
    plt,
    save,
    settle,
)
from lib.files import check, load_json, save_json
from lib.numbers import shown, spread
from lib.stage import Parser, number, run, whole, words

QUALITY = {
    "ppl": "perplexity, times dense",
    "kl": "KL to the dense model, nats per token",
    "retention_pooled": "retention of what is above chance, pooled",
    "retention_context_pooled": "the same, tasks that need their context",
}
QUESTIONS = {
    "ppl": "How much worse does it predict text?",
    "kl": "How far is it from the dense model?",
    "retention_pooled": "What does it still know?",
    "retention_context_pooled": "What does it still read in its prompt?",
}
SPEED = {"speed": "speedup_vs_dense", "ms": "median_ms", "bound": "flops_bound"}
# what must have been the same, for rows to be compared
SAME = ("protocol", "text", "context", "scored", "nwindows", "tasks", "limit", "data", "nsamples",
        "max_response", "dtype")
GREY = "#c4c4c4"


def get_args():
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", help="eval.json files, or label=file; or one pareto.json")

    add = p.add_argument_group("what is compared").add_argument
    add("--bench", nargs="*", default=[], help="bench.json files, or label=file")
    add("--text", default=None, help="text whose perplexity is shown; default: the first")
    add("--cost", default="prefill", choices=["prefill", "total"],
        help="FLOPs of the prompts, or of prompts and scored tokens together")
    add("--join", default=0.03, type=number("[0, 1]"),
        help="rows of one name this close in FLOPs saved are one point")
    add("--length", default=None, type=whole("[1, inf)"),
        help="prompt length of the speed-up; default: the longest measured")
    add("--near", default=0.05, type=number("[0, 1]"),
        help="a speed-up belongs to a point whose share of skips is this close")

    add = p.add_argument_group("figure").add_argument
    add("--show", default=None, type=words,
        help=f"at most {LABELLED} names or methods in colour; default: the best known")
    add("--out_dir", default="out", help="folder of the figure")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# points


def read(specs, kind, flag):
    """Of each file or label=file: rows, the label before their names; contents; path."""
    for spec in specs:
        label, _, path = spec.rpartition("=")
        content = load_json(path, kind, flag)
        rows = [row | {"name": f"{label} {row['name']}".strip()} for row in content["rows"]]
        yield rows, content, path


def collect(files, text):
    """All rows but the dense ones, "ppl" as a ratio to dense.

    FTPError unless all were made on the same data, by the same protocol.
    """
    points, first = [], None
    for (dense, *rows), content, path in read(files, "ftp-eval-1", "eval files"):
        made = {k: content["config"]["settings"].get(k) for k in SAME}
        made["model"] = content["config"]["fingerprint"]
        first = first or made
        odd = [k for k in made if first[k] != made[k]]
        check(not odd, f"eval files: {path} was made with another {', '.join(odd)} than "
                       f"{files[0]}; evaluate all in the same way")
        # the first text, where there is one beside the responses
        which = text or [*dense["ppl"], "responses"][1]
        check(which in dense["ppl"], f"--text {which}: not in {path}; choose from "
                                     f"{', '.join(dense['ppl'])}")
        for row in rows:
            points.append(row | {"ppl": row["ppl"][which] / dense["ppl"][which]})
    return points


def level(row):
    """What tells a method's levels apart at any prompt length.

    The share of tokens that skip; of a narrower model, where none does, the FLOPs saved.
    """
    return row["sparsity_prefill"] or row.get("flops_saved_prefill") or 0.0


def merge(points, cost, join):
    """Points of one name that lie within `join` of their neighbour in FLOPs saved become one.

    Its "level", "saved" and quality are spreads: mean, standard deviation and number.
    """
    check(points, "eval files: no row beside dense; evaluate some method first")
    groups, last = [], None
    for p in sorted(points, key=lambda p: (p["name"], p[cost])):
        apart = last is None or last["name"] != p["name"] or p[cost] - last[cost] > join
        if apart:
            groups.append([])
        groups[-1].append(p)
        last = p
    merged = []
    for group in groups:
        point = {"name": group[0]["name"], "level": spread([level(p) for p in group])}
        for name, key in (("saved", cost), *zip(QUALITY, QUALITY)):
            point[name] = spread([p[key] for p in group])
        merged.append(point)
    return merged


def add_speed(points, bench, length, near=0.05):
    """Give each point the prefill speed-ups (batch 1) measured at about its level.

    A bench row goes to the nearest point of its name, within `near`. Returns the prompt length
    taken, the longest one where `length` is None.
    """
    rows = [row for some, *_ in read(bench, "ftp-bench-1", "--bench") for row in some
            if row["phase"] == "prefill" and row["batch_size"] == 1 and level(row)]
    length = length or max((row["prompt_len"] for row in rows), default=0)

    def gap(row, point):
        return abs(level(row) - point["level"]["mean"])

    found = {id(point): [] for point in points}
    for row in rows:
        if row["prompt_len"] != length:
            continue
        # the bench row "static 0.3" is the method static
        names = row["name"], row["name"].rpartition(" ")[0]
        like = [p for p in points if p["name"] in names and gap(row, p) <= near]
        if like:
            nearest = min(like, key=lambda p: gap(row, p))
            found[id(nearest)].append(row)
    for point in points:
        for name, key in SPEED.items():
            point[name] = spread([row[key] for row in found[id(point)]])
    check(any(p["speed"]["n"] for p in points),
          f"--bench: no prefill of {length} tokens at batch 1 fits a method; give another --length "
          "or file")
    return length


def stored(path):
    """Points and axes of a pareto.json, None where the file is another one."""
    if not Path(path).exists():
        return None
    try:
        content = load_json(path, "ftp-pareto-1", "files", {"points": [dict], "axes": dict})
    except ValueError:
        return None
    return content["points"], content["axes"]


# ------------------------------------------------------------------------------------------------
# the figure


def named(names, show):
    """The names that get a colour: those of --show, by name or method; else the best known."""
    if show is None:
        return labelled(names)
    wanted = {s.lower() for s in show}
    chosen = {n for n in names if n.lower() in wanted or method(n) in wanted}
    check(chosen, f"--show {','.join(show)}: none of them is there; choose from {', '.join(names)}")
    check(len(chosen) <= LABELLED,
          f"--show: {len(chosen)} series ({', '.join(sorted(chosen))}); at most {LABELLED} can be "
          "told apart")
    return chosen


def line_of(points, name, x, y):
    """A series in ascending x: the points of one name that have both figures."""
    mine = [p for p in points if p["name"] == name and p[x]["n"] and p[y]["n"]]
    return sorted(mine, key=lambda p: p[x]["mean"])


def draw_panel(axis, points, x, y, chosen):
    """All series of one panel; returns where the names of those in colour go."""
    ends = []
    for name in dict.fromkeys(p["name"] for p in points):
        line = line_of(points, name, x, y)
        if not line:
            continue
        xs, ys = ([p[k]["mean"] for p in line] for k in (x, y))
        if name not in chosen:
            axis.plot(xs, ys, marker=".", ms=4, lw=0.8, color=GREY, zorder=1)
            continue
        x_error, y_error = ([p[k]["std"] or 0 for p in line] for k in (x, y))
        axis.errorbar(xs, ys, y_error, x_error, marker="o", ls=dash(name), capsize=2.5,
                      color=colour(name), elinewidth=0.9, zorder=3)
        ends.append((name, xs[-1], ys[-1]))
    # dense saves nothing, is 1.0 times as fast, and keeps all
    dense_y = {"kl": None}.get(y, 1.0)
    if dense_y is not None:
        axis.plot(1.0 if x == "speed" else 0.0, dense_y, "*", ms=9, color=colour("dense"))
        axis.annotate("dense", (1.0 if x == "speed" else 0.0, dense_y), (6, 6), fontsize=8,
                      textcoords="offset points", color=colour("dense"))
    return ends


def scale_of(points, y):
    """Whether the quality y spans more than a line's height can show."""
    largest = max(p[y]["mean"] for p in points if p[y]["n"])
    return "log" if y == "kl" or y == "ppl" and largest > 3 else "linear"


def draw(path, points, across, show):
    """A row of panels a quality, a column a cost; names beside the lines."""
    down = [key for key in QUALITY if any(p[key]["n"] for p in points)]
    names = list(dict.fromkeys(p["name"] for p in points))
    chosen = named(names, show)
    figure, axes = plt.subplots(len(down), len(across), squeeze=False, layout="constrained",
                                figsize=(6.6 * len(across), 3.5 * len(down)))
    labels = []
    for y, row in zip(down, axes):
        for x, axis in zip(across, row):
            ends = draw_panel(axis, points, x, y, chosen)
            axis.set(xlabel=across[x], ylabel=QUALITY[y], yscale=scale_of(points, y),
                     title=QUESTIONS[y])
            low, high = axis.get_xlim()
            axis.set_xlim(low, high + 0.42 * (high - low))     # room for the names
            labels.append((axis, ends, x == "saved"))      # of speeds there is one a method
    grey = [name for name in names if name not in chosen]
    if grey:
        figure.supxlabel(f"grey: {' · '.join(grey)}", fontsize=8, color="#707070", wrap=True)
    settle(figure)
    for axis, ends, column in labels:
        label_lines(axis, ends, column=column)
    return save(figure, path)


def main():
    args = get_args()

    # points: drawn again, or made from what was measured
    again = stored(args.files[0]) if len(args.files) == 1 else None
    if again:
        points, across = again
    else:
        points = merge(collect(args.files, args.text), f"flops_saved_{args.cost}", args.join)
        what = {"prefill": "prompt", "total": "prompt and decode"}[args.cost]
        across = {"saved": f"{what} block FLOPs saved"}
        if args.bench:
            length = add_speed(points, args.bench, args.length, args.near)
            across["speed"] = f"measured prefill speed-up, {length} tokens"
        save_json(f"{args.out_dir}/pareto.json", {"format": "ftp-pareto-1", "settings": vars(args),
                                                  "axes": across, "points": points})

    path = draw(f"{args.out_dir}/pareto.png", points, across, args.show)
    down = [key for key in QUALITY if any(p[key]["n"] for p in points)]
    for p in points:
        said = "  ".join(f"{key} {shown(p[key])}" for key in (*across, *down))
        print(f"{p['name']:20s} {said}  n {p['saved']['n']}")
    made = "" if again else f", {args.out_dir}/pareto.json"
    print(f"-> {path}{made}")


if __name__ == "__main__":
    run(main)
