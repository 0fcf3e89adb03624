"""Quality against what was saved, all methods in one plot: perplexity, KL and retention over realised FLOPs saved and measured speed-up.

    python analysis/pareto.py out/s22/eval.json out/s30/eval.json --bench out/s22/bench.json out/s30/bench.json    # -> out/pareto.png, out/pareto.json
    python analysis/pareto.py out/seed0/eval.json out/seed1/eval.json out/seed2/eval.json forecast=out/forecast/eval.json --cost total

Reads eval.json and bench.json files alone. Rows of one name whose savings lie within --join of each other are one method at one level under several
seeds: a point with the standard deviation as error bars. label=file puts the label before the file's row names, in --bench the same.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt

from common import Parser, check, run
from data import shown, spread
from files import load_json, save_json

QUALITY = {"ppl": "perplexity, times dense", "kl": "KL to the dense model, nats per token", "retention_pooled": "retention of what is above chance, pooled",
           "retention_context_pooled": "the same, tasks that need their context"}
SAME = ("protocol", "text", "context", "scored", "nwindows", "tasks", "limit", "data", "nsamples", "max_response", "dtype")


def read(specs, kind, flag):
    """Of each file or label=file: its rows, the label before their names, and its contents."""
    for spec in specs:
        label, _, path = spec.rpartition("=")
        o = load_json(path, kind, flag)
        yield [r | {"name": f"{label} {r['name']}".strip()} for r in o["rows"]], o, path


def collect(files, text):
    """All rows but the dense ones, "ppl" as a ratio to dense; FTPError unless all were made on the same data, by the same protocol."""
    points, first = [], None
    for (dense, *rows), o, path in read(files, "ftp-eval-1", "eval files"):
        made = {k: o["config"]["settings"].get(k) for k in SAME} | {"model": o["config"]["fingerprint"]}
        odd = [k for k in made if (first := first or made)[k] != made[k]]
        check(not odd, f"eval files: {path} was made with another {', '.join(odd)} than {files[0]}; evaluate all in the same way")
        check((which := text or (*dense["ppl"], "responses")[1]) in dense["ppl"], f"--text {which}: not in {path}; choose from {', '.join(dense['ppl'])}")
        points += [r | {"ppl": r["ppl"][which] / dense["ppl"][which]} for r in rows]
    return points


def level(row):
    """What tells a method's levels apart at any prompt length: the share of tokens that skip, or, of a narrower model, the FLOPs saved."""
    return row["sparsity_prefill"] or row.get("flops_saved_prefill") or 0.0


def merge(points, cost, join):
    """Points of one name that lie within `join` of their neighbour in FLOPs saved become one, "saved" and the quality with their spread."""
    check(points, "eval files: no row beside dense; evaluate some method first")
    points, groups = sorted(points, key=lambda p: (p["name"], p[cost])), []
    for last, p in zip([None, *points], points):
        if last is None or last["name"] != p["name"] or p[cost] - last[cost] > join:
            groups.append([])
        groups[-1].append(p)
    return [{"name": g[0]["name"], "level": spread([level(p) for p in g])}
            | {k: spread([p[f] for p in g]) for k, f in (("saved", cost), *zip(QUALITY, QUALITY))} for g in groups]


def add_speed(points, bench, length):
    """Give each point the prefill speed-ups measured under its name nearest to its level (within 0.05), batch 1; returns the prompt length taken."""
    rows = [r for some, *_ in read(bench, "ftp-bench-1", "--bench") for r in some if (r["phase"], r["batch_size"]) == ("prefill", 1) and level(r)]
    length = length or max((r["prompt_len"] for r in rows), default=0)
    gap = lambda r, p: abs(level(r) - p["level"]["mean"])
    for p in points:
        p["near"] = []
    for r in rows:  # the bench row "static 0.3" is the method static
        same = [p for p in points if p["name"] in (r["name"], r["name"].rpartition(" ")[0]) and gap(r, p) <= 0.05]
        if same and r["prompt_len"] == length:
            min(same, key=lambda p: gap(r, p))["near"].append(r)
    for p in points:
        near = p.pop("near")
        p |= {k: spread([r[f] for r in near]) for k, f in (("speed", "speedup_vs_dense"), ("ms", "median_ms"), ("bound", "flops_bound"))}
    check(any(p["speed"]["n"] for p in points), f"--bench: no prefill of {length} tokens at batch 1 fits a method; give another --length or file")
    return length


def main():
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", help="eval.json files, or label=file")
    p.add_argument("--bench", nargs="*", default=[], help="bench.json files, or label=file")
    p.add_argument("--text", default=None, help="text whose perplexity is shown; default: the first")
    p.add_argument("--cost", default="prefill", choices=["prefill", "total"], help="FLOPs of the prompts, or of prompts and scored tokens together")
    p.add_argument("--join", type=float, default=0.03, help="rows of one name this close in FLOPs saved are one point")
    p.add_argument("--length", type=int, default=None, help="prompt length of the speed-up; default: the longest measured")
    p.add_argument("--out_dir", default="out", help="folder of the figure")
    args = p.parse_args()
    points = merge(collect(args.files, args.text), f"flops_saved_{args.cost}", args.join)
    across = {"saved": f"{'prompt' if args.cost == 'prefill' else 'prompt and decode'} block FLOPs saved"}
    if args.bench:
        across["speed"] = f"measured prefill speed-up, {add_speed(points, args.bench, args.length)} tokens"
    down = [k for k in QUALITY if any(q[k]["n"] for q in points)]
    fig, axes = plt.subplots(len(down), len(across), figsize=(6.5 * len(across), 3.4 * len(down)), squeeze=False, layout="constrained")
    for y, line in zip(down, axes):
        for x, a in zip(across, line):
            a.plot(x == "speed", y != "kl", "k*", ms=10, label="dense")  # saves nothing, 1.0 times as fast; all of the quality
            for i, name in enumerate(dict.fromkeys(q["name"] for q in points)):
                mine = sorted((q[x]["mean"], q[y]["mean"], q[y]["std"] or 0, q[x]["std"] or 0) for q in points if q["name"] == name and q[x]["n"] and q[y]["n"])
                a.errorbar(*(zip(*mine) if mine else ((), ())), fmt="osD^vPX"[i % 7] + "-", ms=5, lw=1, capsize=3, color=f"C{i % 10}", label=name)
            wide = y == "kl" or y == "ppl" and max(q[y]["mean"] for q in points) > 3
            a.set(xlabel=across[x], ylabel=QUALITY[y], yscale="log" if wide else "linear")
            a.grid(alpha=0.3)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * len(across), fontsize=8)
    save_json(f"{args.out_dir}/pareto.json", {"format": "ftp-pareto-1", "settings": vars(args), "axes": across, "points": points})
    fig.savefig(f"{args.out_dir}/pareto.png", dpi=120)
    for q in points:
        print(f"{q['name']:20s} " + "  ".join(f"{k} {shown(q[k])}" for k in (*across, *down)) + f"  n {q['saved']['n']}")
    print(f"-> {args.out_dir}/pareto.png, {args.out_dir}/pareto.json")


if __name__ == "__main__":
    run(main)
