"""The sparsity of each block, of one or more schedules, beside the Block Influence that the search recorded.

    python analysis/schedules.py out/schedule.json out/schedule_ft.json       # -> out/schedules.png, out/schedules_figure.json
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import numpy as np

from common import Parser, run
from files import save_json
from router import Schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    p = Parser(__doc__)
    p.add_argument("schedules", nargs="+", help="schedule files")
    p.add_argument("--out_dir", default="out", help="folder of the figure")
    args = p.parse_args()
    found = {path: Schedule.load(path) for path in args.schedules}
    fig, a = plt.subplots(figsize=(9, 3.6))
    width = 0.8 / len(found)
    for i, (path, s) in enumerate(found.items()):
        a.bar(np.arange(len(s.sparsity)) + (i - (len(found) - 1) / 2) * width, s.sparsity, width, label=f"{Path(path).name} (mean {s.mean:.3f})")
    a.set(xlabel="block", ylabel="sparsity", ylim=(0, 1))
    influence = next((s.meta["block_influence"] for s in found.values() if "block_influence" in s.meta), None)
    if influence:
        b = a.twinx()
        b.plot(influence, "k.--", lw=0.8, label="Block Influence")
        b.set(ylabel="1 - mean cosine(in, out)", yscale="log")
        b.legend(loc="upper right")
    a.legend(loc="upper left")
    fig.tight_layout()
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    fig.savefig(f"{args.out_dir}/schedules.png", dpi=120)
    save_json(f"{args.out_dir}/schedules_figure.json", {"format": "ftp-figure-1", "schedules": {k: s.sparsity for k, s in found.items()},
                                                        "block_influence": influence})
    print(f"-> {args.out_dir}/schedules.png")


if __name__ == "__main__":
    run(main)
