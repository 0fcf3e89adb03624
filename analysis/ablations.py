"""Ablations: one command fills the whole table; what has run is not run again, so the same command goes on after any interruption.

    python analysis/ablations.py --seeds 0,1,2                       # -> out/ablations/ablations.json, ablations.md, a folder a cell and seed
    python analysis/ablations.py --seeds 0 --axes router,inputs      # a part of it
    python analysis/ablations.py --train="--steps 400 --lr 1e-3" --evaluate="--tasks arc_easy,piqa --limit 200 --text wiki.test.txt --floor"

The base: schedule of the genetic search (K/V dropped), a global router on the four factors, trained with the symmetric sparsity loss, a guide that
decays by half of the steps, scores of the last 16 queries, quotas, causal protocol, no stage 3. A cell changes one thing and is trained and
measured like the base; the stages that it has in common with others run once, and where the guide can't differ it takes the base's. Each figure is
the mean over seeds +- standard deviation; so is the KL over the base's of the same seed, of one seed alone +- the standard error over held-out samples.
"""
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Parser, bar, check, run
from data import shown, spread
from evaluate import paired
from files import FTPError, load_json, save_json
from router import FACTORS

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"forecast": "fit_forecaster.py", "search": "search_scheduler.py", "train": "train_router.py", "finetune": "finetune_static.py",
          "evaluate": "evaluate.py"}
GUIDE = "--guide {guide}"
FORECAST = "--kv keep --forecaster {forecaster}"


def cells(sizes, steps):
    """[(axis, variant, {stage: flags beyond the base's})]; "route" goes to every stage from the search on, "finetune" asks for stage 3. GUIDE: schedule
    and samples are the base's, so that the search for a guide would find the same."""
    inputs = [(f"no {f}", ",".join(g for g in FACTORS if g != f)) for f in FACTORS]
    inputs += [("hidden", "hidden"), ("four and hidden", ",".join((*FACTORS, "hidden")))]
    return [
        ("base", "", {}),
        ("schedule", "uniform", {"search": "--method uniform"}), ("schedule", "bi", {"search": "--method bi"}),
        ("schedule", "ga and stage 3", {"finetune": ""}),
        ("router", "local", {"train": f"--router_kind local {GUIDE}"}), ("router", "recurrent", {"train": f"--router_kind recurrent {GUIDE}"}),
        *(("inputs", name, {"train": f"--inputs {these} {GUIDE}"}) for name, these in inputs),
        ("sparsity_loss", "hinge", {"train": f"--hinge {GUIDE}"}),
        ("decay", "by the last step", {"train": f"--guide_until 1 {GUIDE}"}), ("decay", "never", {"train": f"--guide_until 1e9 {GUIDE}"}),
        ("guide", "static", {"train": "--guide static"}), ("guide", "none", {"train": "--guide static --warmup 0 --lambda_g 0"}),
        ("score", "mean", {"train": f"--score mean {GUIDE}"}),
        *(("group", str(n), {"train": f"--group {n}"}) for n in (3, 5)),
        ("passes", "one", {"train": "--one_pass", "evaluate": "--one_pass"}),
        ("decision", "argmax", {"train": f"--prefill argmax {GUIDE}", "evaluate": "--prefill argmax"}),
        ("protocol", "joint", {"evaluate": "--protocol joint"}),
        *(("samples", str(n), {"train": f"--nsamples {n}"}) for n in sizes), *(("steps", str(n), {"train": f"--steps {n} {GUIDE}"}) for n in steps),
        ("kv", "keep", {"route": "--kv keep"}), ("kv", "keep and forecast", {"route": FORECAST}),
        ("forecast_input", "with it", {"route": FORECAST, "train": f"--inputs {','.join(FACTORS)},forecast"})]  # beside kv, keep and forecast


def plan(table, seeds, args):
    """{(axis, variant, seed): [(script, its arguments, folder)]}: equal stages have one folder, that of the first cell with them."""
    homes, todo, guides = {}, {}, {}
    for seed in seeds:
        for axis, variant, flags in table:
            mine, steps = Path(args.out_dir) / f"{axis}-{variant}".strip("-").replace(" ", "_") / f"seed{seed}", []
            same = {"model": args.model, "data": args.data, "seed": seed, "device": args.device, "dtype": args.dtype}

            def stage(name, artefact, *more):
                special = route * (name != "forecast") + [w.format(guide=guides.get(seed)) for w in shlex.split(flags.get(name, ""))]
                words = [STAGES[name], *(str(w) for k, v in same.items() for w in (f"--{k}", v)), *more, *shlex.split(getattr(args, name)), *special]
                folder = homes.setdefault(tuple(words), mine)
                steps.append((words[0], [*words, "--out_dir", str(folder)], folder))
                return str(folder / artefact)

            route = shlex.split(flags.get("route", ""))
            if "{forecaster}" in route:
                forecaster = stage("forecast", "forecaster.safetensors")
                route = [w.format(forecaster=forecaster) for w in route]
            schedule = stage("search", "schedule.json", "--sparsity", str(args.sparsity), "--resume")
            router = stage("train", "router.safetensors", "--schedule", schedule, "--resume")
            guides.setdefault(seed, router)  # the base comes first
            if "finetune" in flags:
                schedule = stage("finetune", "schedule_ft.json", "--schedule", schedule, "--router", router, "--resume")
            stage("evaluate", "eval.json", "--rows", "static,ftp", "--schedule", schedule, "--router", router, "--resume")
            todo[axis, variant, seed] = steps
    return todo


def ran(script, words, folder):
    """Seconds that this stage took when it ran, None if it has not; FTPError if its folder holds a run with other arguments."""
    if not (folder / "stages.json").exists():
        return None
    known = load_json(folder / "stages.json", "ftp-stages-1", "--out_dir")["stages"].get(script)
    check(known is None or known["words"] == words, f"--out_dir: {folder} holds {script} run with other flags; give these again, or another --out_dir")
    return known and known["seconds"]


def execute(script, words, folder, threads):
    """Run a stage with this Python, its output to log.txt; None, or the last line it complained with."""
    folder.mkdir(parents=True, exist_ok=True)
    t = time.time()
    got = subprocess.run([sys.executable, ROOT / script, *words[1:], "--threads", str(threads)], capture_output=True, text=True)
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ {shlex.join(words)}\n{got.stdout}{got.stderr}")
    if got.returncode:
        return (got.stderr.strip().splitlines() or [f"exit code {got.returncode}"])[-1]
    path = folder / "stages.json"
    stages = load_json(path, "ftp-stages-1", "--out_dir")["stages"] if path.exists() else {}
    save_json(path, {"format": "ftp-stages-1", "stages": stages | {script: {"words": words, "seconds": round(time.time() - t, 1)}}})


def figures(folder):
    """The figures of one evaluated cell that the table shows, and what its router was trained on."""
    o = load_json(folder / "eval.json", "ftp-eval-1", "--out_dir")
    rows, router = {r["name"]: r for r in o["rows"]}, o["config"]["settings"].get("router")
    row = rows.get("ftp") or list(rows.values())[-1]
    got = {"skipped": row["sparsity_prefill"], "FLOPs saved": row["flops_saved_prefill"], "KL": row["kl"], "KL static": rows.get("static", {}).get("kl")}
    got |= {f"ppl {t}": v for t, v in row["ppl"].items()} | {"retention, pooled": row["retention_pooled"],
                                                             "with context, pooled": row["retention_context_pooled"]}
    got["KL items"] = row["kl_items"]
    work = load_json(Path(router).with_suffix(".json"), "ftp-router-1", "--out_dir")["meta"]["work"] if router else {}
    return got | {"training tokens": work.get("tokens")}


def write(out_dir, done, settings):
    """ablations.json and ablations.md from the cells evaluated so far {(axis, variant): {seed: folder}}; returns the table as lines."""
    rows, items, over_text = [], {}, []
    for (axis, variant), folders in done.items():
        each = {seed: figures(f) for seed, f in folders.items()}
        items[axis, variant] = {seed: e.pop("KL items") for seed, e in each.items()}
        names = dict.fromkeys(k for e in each.values() for k in e)
        rows.append({"axis": axis, "variant": variant, "each": each, "over_seeds": {k: spread([e.get(k) for e in each.values()]) for k in names}})
        base = items.get(("base", ""), {})  # comes first, or failed
        more = {seed: paired(kl, base[seed]) for seed, kl in items[axis, variant].items() if seed in base}
        over = spread([m for m, _ in more.values()])
        rows[-1]["KL over the base's"] = over | {"each": {seed: {"mean": m, "se": e} for seed, (m, e) in more.items()}}
        noise = over["std"] if len(more) > 1 else sum(e for _, e in more.values())
        over_text.append(f"{over['mean']:+.4f} ± {noise:.4f}" if more else "-")
    columns = list(dict.fromkeys(k for r in rows for k, s in r["over_seeds"].items() if s["n"]))
    lines = ["| " + " | ".join(("what changes", "to", *columns, "KL over the base's, paired", "seeds")) + " |", "| --- " * (len(columns) + 4) + "|"]
    lines += ["| " + " | ".join((r["axis"], r["variant"], *(shown(r["over_seeds"][k]) for k in columns),
                                 text, str(len(r["each"])))) + " |" for r, text in zip(rows, over_text)]
    (Path(out_dir) / "ablations.md").write_text("\n".join(lines) + "\n")
    save_json(Path(out_dir) / "ablations.json", {"format": "ftp-ablations-1", "settings": settings, "rows": rows})
    return lines


def main():
    p = Parser(__doc__).common(out_dir="out/ablations")
    p.add_argument("--seeds", default=None, help="comma list of seeds, for mean and standard deviation; default --seed alone")
    p.add_argument("--axes", default=None, help="comma list of axes to run beside the base; default all")
    p.add_argument("--sparsity", type=float, default=0.30, help="target: mean share of tokens that skip a block")
    p.add_argument("--data", default="self", help='calibration and held-out samples: "self", file, or datasets ids')
    p.add_argument("--sizes", default="8,32", help="numbers of training samples to try, comma list")
    p.add_argument("--steps", default="15,240", help="numbers of training steps to try, comma list: training tokens are in proportion")
    for stage, script in STAGES.items():
        p.add_argument(f"--{stage}", default="", help=f'more flags for {script}, in one string: --{stage}="..."')
    args = p.parse_args()
    try:
        seeds, sizes, steps = ([int(v) for v in s.split(",") if v] for s in (args.seeds or str(args.seed), args.sizes, args.steps))
    except ValueError:
        raise FTPError(f"--seeds {args.seeds} --sizes {args.sizes} --steps {args.steps}: give whole numbers parted by commas") from None
    check(seeds, f"--seeds {args.seeds}: give at least one")
    table = cells(sizes, steps)
    axes = list(dict.fromkeys(axis for axis, _, _ in table))
    wanted = axes if args.axes is None else ["base", *args.axes.split(",")]
    check(set(wanted) <= set(axes), f"--axes {args.axes}: unknown; choose from {','.join(axes[1:])}")
    todo = {k: v for k, v in plan(table, seeds, args).items() if k[0] in wanted}
    stages = {(script, folder): words for v in todo.values() for script, words, folder in v}
    took = {k: ran(k[0], words, k[1]) for k, words in stages.items()}
    left, failed, done = [k for k, t in took.items() if t is None], {}, {}
    print(f"{len(todo)} cells, {len(stages)} stages, {len(left)} of them to run", flush=True)
    progress, total = bar(total=len(left), desc="ablations", unit="stage"), len(left)
    settings = {k: v for k, v in vars(args).items() if k != "threads"}
    for (axis, variant, seed), mine in todo.items():
        for script, words, folder in mine:
            key = script, folder
            if took[key] is None and key not in failed:
                left.remove(key)
                t = time.time()
                error = execute(script, words, folder, args.threads)
                took[key] = None if error else time.time() - t
                failed |= {key: error} if error else {}
                progress.update()
                known = [(k[0], v) for k, v in took.items() if v is not None]
                mean = lambda s: statistics.mean([v for k, v in known if k == s] or [v for _, v in known] or [0])
                print(f"[{total - len(left)}/{total}] {axis} {variant} seed {seed}: {script} {error or f'{took[key]:.0f} s'}, "
                      f"ETA {sum(mean(s) for s, _ in left) / 60:.0f} min", flush=True)
            if key in failed:
                break
        else:
            done.setdefault((axis, variant), {})[seed] = mine[-1][2]
            lines = write(args.out_dir, done, settings)
    progress.close()
    if done:
        print("\n".join(lines), f"-> {args.out_dir}/ablations.json, {args.out_dir}/ablations.md", sep="\n")
    check(not failed, f"{len(failed)} stages failed, the first: {next(iter(failed.values()), '')}; mend that, the same command goes on")


if __name__ == "__main__":
    run(main)
