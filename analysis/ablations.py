"""Ablations: one command fills the whole table; what has run is not run again.

    python analysis/ablations.py --seeds 0,1,2         # -> out/ablations/, a folder a cell and seed
    python analysis/ablations.py --seeds 0 --axes router,inputs                    # a part of it
    python analysis/ablations.py --train="--steps 400" --evaluate="--tasks arc_easy --floor"

In: a model and data. Out: ablations.json and ablations.md; the same command goes on after any
interruption.

The base: schedule of the genetic search (K/V dropped), a global router on the four factors, trained
with the symmetric sparsity loss, a guide that decays by half of the steps, scores of the last 16
queries, quotas, causal protocol, no stage 3. A cell changes one thing and is trained and measured
like the base; stages that it has in common with others run once, and where the guide can't differ
it takes the base's. Each figure is the mean over seeds +- standard deviation; so is the KL over the
base's of the same seed, of one seed alone +- the standard error over held-out samples.
"""
import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib.artefacts import FACTORS
from lib.evaluation import paired
from lib.files import check, load_json, save_json
from lib.numbers import shown, spread
from lib.stage import Parser, number, progress, run, whole, wholes, words

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "forecast": "fit_late_kv.py",
    "search": "search_scheduler.py",
    "train": "train_router.py",
    "finetune": "finetune_static.py",
    "evaluate": "evaluate.py",
}
# The guide's schedule and samples are the base's: a search for one would find the same.
GUIDE = "--guide {guide}"
FORECAST = "--kv keep --forecaster {forecaster}"


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("the table").add_argument
    add("--seeds", default=None, type=wholes("[0, inf)"),
        help="comma list of seeds, for mean and standard deviation; default --seed alone")
    add("--axes", default=None, type=words,
        help="comma list of axes to run beside the base; default all")
    add("--sizes", default="8,32", type=wholes("[1, inf)"),
        help="numbers of training samples to try, comma list")
    add("--steps", default="15,240", type=wholes("[1, inf)"),
        help="numbers of training steps to try, comma list: training tokens are in proportion")

    add = p.add_argument_group("every cell").add_argument
    add("--sparsity", default=0.30, type=number("[0, 1)"),
        help="target: mean share of tokens that skip a block")
    add("--data", default="self",
        help='calibration and held-out samples: "self", file, or datasets ids')
    for stage, script in STAGES.items():
        add(f"--{stage}", default="", type=quoted,
            help=f'more flags for {script}, in one string: --{stage}="..."')

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out/ablations", help="folder of the artefacts")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def quoted(text):
    """Type of flags in one string, as a shell reads it."""
    try:
        shlex.split(text)
    except ValueError as e:
        said = f"{text!r}: is not read ({e}); close its quotes"
        raise argparse.ArgumentTypeError(said) from None
    return text


# ------------------------------------------------------------------------------------------------
# what is to be run


def cells(sizes, steps):
    """[(axis, variant, {stage: flags beyond the base's})].

    "route" goes to every stage from the search on; "finetune", even if empty, asks for stage 3.
    """
    table = [("base", "", {})]

    def cell(axis, variant, **flags):
        table.append((axis, variant, flags))

    # stages 1 and 3
    cell("schedule", "uniform", search="--method uniform")
    cell("schedule", "bi", search="--method bi")
    cell("schedule", "ga and stage 3", finetune="")

    # the router
    for kind in ("local", "recurrent"):
        cell("router", kind, train=f"--router_kind {kind} {GUIDE}")
    for factor in FACTORS:
        others = ",".join(f for f in FACTORS if f != factor)
        cell("inputs", f"no {factor}", train=f"--inputs {others} {GUIDE}")
    cell("inputs", "hidden", train=f"--inputs hidden {GUIDE}")
    four = ",".join(FACTORS)
    cell("inputs", "four and hidden", train=f"--inputs {four},hidden {GUIDE}")

    # its training
    cell("sparsity_loss", "hinge", train=f"--hinge {GUIDE}")
    cell("decay", "by the last step", train=f"--guide_until 1 {GUIDE}")
    cell("decay", "never", train=f"--guide_until 1e9 {GUIDE}")
    cell("guide", "static", train="--guide static")
    cell("guide", "none", train="--guide static --warmup 0 --lambda_g 0")

    # what it decides, and from what
    cell("score", "mean", train=f"--score mean {GUIDE}")
    for n in (3, 5):
        cell("group", str(n), train=f"--group {n}")
    cell("passes", "one", train="--one_pass", evaluate="--one_pass")
    cell("decision", "argmax", train=f"--prefill argmax {GUIDE}", evaluate="--prefill argmax")
    cell("protocol", "joint", evaluate="--protocol joint")

    # how much it sees
    for n in sizes:
        cell("samples", str(n), train=f"--nsamples {n}")
    for n in steps:
        cell("steps", str(n), train=f"--steps {n} {GUIDE}")

    # what a skipped token leaves; the last one is to be read beside the one before it
    cell("kv", "keep", route="--kv keep")
    cell("kv", "keep and forecast", route=FORECAST)
    cell("forecast_input", "with it", route=FORECAST, train=f"--inputs {four},forecast")
    return table


class Plan:
    """Stages of every cell and seed. Equal stages share a folder, that of the first such cell."""

    def __init__(self, args):
        self.args = args
        self.homes = {}      # words of a stage -> its folder
        self.guides = {}     # seed -> the base's router, which holds its guide

    def cell(self, axis, variant, seed, flags):
        """[(script, its arguments, folder)] of one cell."""
        home = Path(self.args.out_dir) / cell_name(axis, variant) / f"seed{seed}"
        steps, route = [], shlex.split(flags.get("route", ""))

        def stage(name, artefact, *more):
            folder, script, typed = self.stage(name, home, seed, flags, route, more)
            steps.append((script, typed, folder))
            return str(folder / artefact)

        if "{forecaster}" in route:
            made = stage("forecast", "forecaster.safetensors")
            route = [word.format(forecaster=made) for word in route]
        schedule = stage("search", "schedule.json",
                         "--sparsity", str(self.args.sparsity), "--resume")
        router = stage("train", "router.safetensors", "--schedule", schedule, "--resume")
        self.guides.setdefault(seed, router)             # the base comes first
        if "finetune" in flags:
            schedule = stage("finetune", "schedule_ft.json",
                             "--schedule", schedule, "--router", router, "--resume")
        stage("evaluate", "eval.json", "--rows", "static,ftp",
              "--schedule", schedule, "--router", router, "--resume")
        return steps

    def stage(self, name, home, seed, flags, route, more):
        """Folder, script and arguments of one stage of a cell."""
        a = self.args
        shared = {"model": a.model, "data": a.data, "seed": seed, "device": a.device,
                  "dtype": a.dtype}
        typed = [STAGES[name]]
        for flag, value in shared.items():
            typed += [f"--{flag}", str(value)]
        typed += [*more, *shlex.split(getattr(a, name))]
        if name != "forecast":                           # it is what the others are routed with
            typed += route
        guide = self.guides.get(seed)
        typed += [word.format(guide=guide) for word in shlex.split(flags.get(name, ""))]
        folder = self.homes.setdefault(tuple(typed), home)
        return folder, STAGES[name], [*typed, "--out_dir", str(folder)]


def cell_name(axis, variant):
    return f"{axis}-{variant}".strip("-").replace(" ", "_")


def plan(table, seeds, args):
    """{(axis, variant, seed): [(script, its arguments, folder)]}."""
    todo, make = {}, Plan(args)
    for seed in seeds:
        for axis, variant, flags in table:
            todo[axis, variant, seed] = make.cell(axis, variant, seed, flags)
    return todo


# ------------------------------------------------------------------------------------------------
# running it


def ran(script, typed, folder):
    """Seconds that this stage took when it ran, None if it has not.

    FTPError if its folder holds a run with other arguments.
    """
    if not (folder / "stages.json").exists():
        return None
    known = load_json(folder / "stages.json", "ftp-stages-1", "--out_dir")["stages"].get(script)
    check(known is None or known["words"] == typed,
          f"--out_dir: {folder} holds {script} run with other flags; give these again, or another "
          "--out_dir")
    return known and known["seconds"]


def execute(script, typed, folder, threads):
    """Run a stage with this Python, its output to log.txt; None, or its last line of complaint."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    command = [sys.executable, ROOT / script, *typed[1:], "--threads", str(threads)]
    got = subprocess.run(command, capture_output=True, text=True)
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ {shlex.join(typed)}\n{got.stdout}{got.stderr}")
    if got.returncode:
        complaint = got.stderr.strip().splitlines()
        return complaint[-1] if complaint else f"exit code {got.returncode}"
    path, stages = folder / "stages.json", {}
    if path.exists():
        stages = load_json(path, "ftp-stages-1", "--out_dir")["stages"]
    stages[script] = {"words": typed, "seconds": round(time.time() - began, 1)}
    save_json(path, {"format": "ftp-stages-1", "stages": stages})
    return None


class Runner:
    """Runs stages that have not run, one at a time; knows what is left and how long it takes."""

    def __init__(self, todo, threads):
        self.threads, self.failed = threads, {}
        stages = {(script, folder): typed
                  for steps in todo.values() for script, typed, folder in steps}
        self.took = {key: ran(key[0], typed, key[1]) for key, typed in stages.items()}
        self.left = [key for key, seconds in self.took.items() if seconds is None]
        self.total = len(self.left)
        print(f"{len(todo)} cells, {len(stages)} stages, {self.total} of them to run", flush=True)
        self.progress = progress(total=self.total, desc="ablations", unit="stage")

    def cell(self, name, steps):
        """Run a cell's stages; whether it is evaluated then."""
        for script, typed, folder in steps:
            key = script, folder
            if self.took[key] is None and key not in self.failed:
                self.stage(name, key, typed)
            if key in self.failed:
                return False
        return True

    def stage(self, name, key, typed):
        script, folder = key
        self.left.remove(key)
        began = time.time()
        error = execute(script, typed, folder, self.threads)
        if error:
            self.failed[key] = error
        else:
            self.took[key] = time.time() - began
        self.progress.update()
        done = self.total - len(self.left)
        print(f"[{done}/{self.total}] {name}: {script} {error or f'{self.took[key]:.0f} s'}, "
              f"ETA {self.eta():.0f} min", flush=True)

    def eta(self):
        """Minutes that the stages left will take: each as long as its like did on average."""
        known = [(key[0], seconds) for key, seconds in self.took.items() if seconds is not None]
        everything = [seconds for _, seconds in known] or [0]
        seconds = 0.0
        for script, _ in self.left:
            like = [took for other, took in known if other == script]
            seconds += statistics.mean(like or everything)
        return seconds / 60


# ------------------------------------------------------------------------------------------------
# the table


def figures(folder):
    """The figures of one evaluated cell that the table shows, and its KL of every sample."""
    result = load_json(folder / "eval.json", "ftp-eval-1", "--out_dir")
    rows = {row["name"]: row for row in result["rows"]}
    row = rows.get("ftp") or result["rows"][-1]
    got = {
        "skipped": row["sparsity_prefill"],
        "FLOPs saved": row["flops_saved_prefill"],
        "KL": row["kl"],
        "KL static": rows.get("static", {}).get("kl"),
        **{f"ppl {text}": value for text, value in row["ppl"].items()},
        "retention, pooled": row["retention_pooled"],
        "with context, pooled": row["retention_context_pooled"],
        "KL items": row["kl_items"],
    }
    router = result["config"]["settings"].get("router")
    work = {}
    if router:
        twin = load_json(Path(router).with_suffix(".json"), "ftp-router-1", "--out_dir")
        work = twin["meta"]["work"]
    return got | {"training tokens": work.get("tokens")}


def over_base(items, base):
    """KL over the base's of the same seed: a spread over seeds, and its text for the table.

    items, base: {seed: KL of every sample}.
    """
    gains = {seed: paired(kl, base[seed]) for seed, kl in items.items() if seed in base}
    over = spread([mean for mean, _ in gains.values()])
    each = {seed: {"mean": mean, "se": error} for seed, (mean, error) in gains.items()}
    if not gains:
        return over | {"each": each}, "-"
    # several seeds tell their own noise; of one, the samples do
    noise = over["std"] if len(gains) > 1 else sum(error for _, error in gains.values())
    return over | {"each": each}, f"{over['mean']:+.4f} ± {noise:.4f}"


def table_rows(done):
    """Rows of ablations.json, and for each the text of its KL over the base's."""
    rows, texts, base = [], [], {}
    for (axis, variant), folders in done.items():
        each = {seed: figures(folder) for seed, folder in folders.items()}
        items = {seed: got.pop("KL items") for seed, got in each.items()}
        if axis == "base":                           # comes first, or has failed
            base = items
        over, text = over_base(items, base)
        names = dict.fromkeys(name for got in each.values() for name in got)
        over_seeds = {name: spread([got.get(name) for got in each.values()]) for name in names}
        rows.append({"axis": axis, "variant": variant, "each": each, "over_seeds": over_seeds,
                     "KL over the base's": over})
        texts.append(text)
    return rows, texts


def write(out_dir, done, settings):
    """ablations.json and ablations.md from the cells evaluated so far; the table as lines.

    done: {(axis, variant): {seed: folder}}.
    """
    rows, texts = table_rows(done)
    columns = [name for row in rows for name, s in row["over_seeds"].items() if s["n"]]
    columns = list(dict.fromkeys(columns))
    head = ["what changes", "to", *columns, "KL over the base's, paired", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row, text in zip(rows, texts):
        values = [shown(row["over_seeds"][name]) for name in columns]
        line = [row["axis"], row["variant"], *values, text, str(len(row["each"]))]
        lines.append("| " + " | ".join(line) + " |")
    out_dir = Path(out_dir)
    (out_dir / "ablations.md").write_text("\n".join(lines) + "\n")
    save_json(out_dir / "ablations.json",
              {"format": "ftp-ablations-1", "settings": settings, "rows": rows})
    return lines


def main():
    args = get_args()
    seeds = [args.seed] if args.seeds is None else args.seeds

    # which cells
    table = cells(args.sizes, args.steps)
    axes = list(dict.fromkeys(axis for axis, _, _ in table))
    wanted = axes if args.axes is None else ["base", *args.axes]
    check(set(wanted) <= set(axes),
          f"--axes {','.join(wanted[1:])}: unknown; choose from {','.join(axes[1:])}")
    todo = plan(table, seeds, args)      # all of them: who shares a stage decides where it lies
    todo = {key: steps for key, steps in todo.items() if key[0] in wanted}

    # run them; the table grows with every cell
    settings = {k: v for k, v in vars(args).items() if k != "threads"}
    runner, done, lines = Runner(todo, args.threads), {}, []
    for (axis, variant, seed), steps in todo.items():
        if runner.cell(f"{axis} {variant} seed {seed}", steps):
            done.setdefault((axis, variant), {})[seed] = steps[-1][2]
            lines = write(args.out_dir, done, settings)
    runner.progress.close()

    if done:
        print("\n".join(lines))
        print(f"-> {args.out_dir}/ablations.json, {args.out_dir}/ablations.md")
    failed = list(runner.failed.values())
    check(not failed, f"{len(failed)} stages failed, the first: {''.join(failed[:1])}; mend that, "
                      "the same command goes on")


if __name__ == "__main__":
    run(main)
