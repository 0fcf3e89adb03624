"""The sparsity of each block, of one or more schedules, and the Block Influence of the search.

    python analysis/schedules.py out/schedule.json out/schedule_ft.json     # -> out/schedules.png

In: schedule files. Out: a figure, and its numbers in schedules_figure.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from analysis.style import LABELLED, plt, save
from lib.artefacts import Schedule
from lib.files import check, save_json
from lib.stage import Parser, run


def get_args():
    p = Parser(__doc__)
    p.add_argument("schedules", nargs="+", help="schedule files")
    p.add_argument("--out_dir", default="out", help="folder of the figure")
    return p.parse_args()


def draw(path, schedules, influence):
    """schedules: {name: Schedule}; influence: a list over blocks, or None."""
    rows = 2 if influence else 1
    figure, axes = plt.subplots(rows, 1, figsize=(9, 2.2 + 1.6 * rows), squeeze=False, sharex=True,
                                height_ratios=(2, 1)[:rows], layout="constrained")
    top = axes[0][0]
    width = 0.8 / len(schedules)
    for i, (name, s) in enumerate(schedules.items()):
        place = np.arange(len(s.sparsity)) + (i - (len(schedules) - 1) / 2) * width
        top.bar(place, s.sparsity, width, label=f"{name} (mean {s.mean:.3f})")
    top.set(ylabel="sparsity", ylim=(0, 1), title="How many tokens skip each block?")
    top.legend(loc="upper left", fontsize=8)
    if influence:
        # in a panel of its own: two scales in one mislead
        below = axes[1][0]
        below.plot(influence, "k.-", lw=0.8)
        below.set(ylabel="1 - cosine", yscale="log",
                  title="How much does each block change its tokens? (Block Influence)")
    axes[-1][0].set_xlabel("block")
    return save(figure, path)


def main():
    args = get_args()
    check(len(args.schedules) <= LABELLED,
          f"schedules: {len(args.schedules)} can't be told apart; give at most {LABELLED}")
    schedules = {path: Schedule.load(path) for path in args.schedules}
    recorded = [s.meta["block_influence"] for s in schedules.values()
                if "block_influence" in s.meta]
    influence = recorded[0] if recorded else None

    names = {short(path, args.schedules): s for path, s in schedules.items()}
    path = draw(f"{args.out_dir}/schedules.png", names, influence)
    save_json(f"{args.out_dir}/schedules_figure.json", {
        "format": "ftp-figure-1",
        "schedules": {k: s.sparsity for k, s in schedules.items()},
        "block_influence": influence,
    })
    print(f"-> {path}")


def short(path, paths):
    """A file's name, with its folder where two files have the same name."""
    names = [Path(p).name for p in paths]
    name = Path(path).name
    return name if names.count(name) == 1 else f"{Path(path).parent.name}/{name}"


if __name__ == "__main__":
    run(main)
