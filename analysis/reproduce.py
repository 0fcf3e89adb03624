"""The long form of the demo: full budgets, every table of RESULTS.md that is made on this machine.

    make reproduce                                      # -> out/reproduce/; days on 2 cores
    python analysis/reproduce.py --list                 # what would run, and what is done
    python analysis/reproduce.py --only late-0.30       # one part, after the part prepare

A step is done when its command ended well; an interrupted run goes on behind the last one, stages
by their own --resume. Each step's output is in out/reproduce/log/. --wikitext, --tasks: local files
of the public data; without them the steps that need them ask the hub.
"""
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.files import FTPError, digest
from lib.stage import Parser, run, saved

LEVELS = (0.22, 0.30, 0.40)
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa", "lambada_openai")
WRITTEN = "artifacts/written/b03b55f8e6a6-text-seed0-320.jsonl"   # what the first model wrote
TUNE = {0.22: 300, 0.30: 400, 0.40: 500}        # steps of late keys and values


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("what is reproduced").add_argument
    add("--only", default=None, help="part whose steps run, as --list names it")
    add("--list", action="store_true", help="print the steps, run none")
    add("--wikitext", default="Salesforce/wikitext:wikitext-2-raw-v1:validation",
        help="WikiText-2 raw, validation: a .txt file or a datasets id")
    add("--tasks", default=None, help="folder of NAME.jsonl files of the tasks, instead of the hub")
    add("--calibration", default=WRITTEN,
        help="text that the second model is pruned on, .txt or .jsonl")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of all steps; auto: bfloat16 where the device computes in it, else float32")
    add("--out_dir", default="out/reproduce", help="folder of all that is made")
    return p.parse_args()


def task_list(folder):
    """--tasks of evaluate.py."""
    if folder is None:
        return ",".join(TASKS)
    return ",".join(f"{name}={Path(folder) / name}.jsonl" for name in TASKS)


def steps(args):
    """[(part, command)] in order: chat and text pipelines, late keys and values, rivals, tables."""
    out, dtype = args.out_dir, ["--dtype", args.dtype]
    quality = ["--tasks", task_list(args.tasks), "--text", args.wikitext, *dtype]
    made = []

    def add(part, *words):
        made.append((part, [str(w) for w in words]))

    add("prepare", "prepare.py")
    for s in LEVELS:
        # the paper's three stages, on the model's own texts
        ftp = f"{out}/ftp-{s:.2f}"
        stage = ["--data", "text", "--out_dir", ftp, "--resume", *dtype]
        schedule = ["--schedule", f"{ftp}/schedule.json"]
        router = ["--router", f"{ftp}/router.safetensors"]
        add(f"ftp-{s:.2f}", "search_scheduler.py", "--flops_saved", s, "--nsamples", 16,
            "--evaluations", 48, "--population", 8, *stage)
        add(f"ftp-{s:.2f}", "train_router.py", *schedule, *stage)
        add(f"ftp-{s:.2f}", "finetune_static.py", *schedule, *router, "--evaluations", 24, *stage)
        found = ["--schedule", f"{ftp}/schedule_ft.json", *router]
        add(f"ftp-{s:.2f}", "evaluate.py", *found, "--rows", "uniform,static,random,attention,ftp",
            "--data", "text", "--resume", "--out_dir", ftp, *quality)
        add(f"ftp-{s:.2f}", "benchmark.py", *found, "--lengths", "512,1024,2048", "--n_decode", 0,
            "--rounds", 7, "--out_dir", ftp, *dtype)

        # beyond the paper: late keys and values
        late = f"{out}/late-{s:.2f}"
        stage = ["--out_dir", late, "--resume", *dtype]
        add(f"late-{s:.2f}", "search_scheduler.py", "--method", "late", "--flops_saved", s,
            "--kv", "keep", *stage)
        add(f"late-{s:.2f}", "fit_late_kv.py", "--only_kv", "--keys", 0.5, "--data", "self,text",
            "--max_prompt", 256, "--schedule", f"{late}/schedule.json", "--tune", TUNE[s], *stage)
        found = ["--schedule", f"{late}/schedule.json", "--kv", "keep",
                 "--forecaster", f"{late}/forecaster.safetensors"]
        add(f"late-{s:.2f}", "evaluate.py", *found, "--rows", "static", "--resume",
            "--out_dir", late, *quality)
        add(f"late-{s:.2f}", "benchmark.py", *found, "--lengths", "512,1024,2048", "--n_decode", 0,
            "--rounds", 7, "--out_dir", late, *dtype)

    # the rivals, and what parts of the method matter
    rivals = f"{out}/rivals"
    add("rivals", "analysis/rivals/make.py", "--flops_saved", ",".join(map(str, LEVELS)),
        "--data", "text", "--out_dir", rivals, *dtype)
    # what is trained needs more than the samples that tell which blocks matter
    add("rivals", "analysis/rivals/make.py", "--methods", "swiftkv", "--flops_saved", 0.30,
        "--data", "text,cloze", "--nsamples", 500, "--max_prompt", 256, "--out_dir", rivals, *dtype)
    for s in LEVELS:
        peers = [word for name in ("shortgpt", "blockpruner") for word in
                 ("--peer", f"{name}={rivals}/{name}_{s:.2f}.json")]
        peers += [word for name in ("slicegpt", "width", "laco") for word in
                  ("--peer", f"{name}={rivals}/{name}_{s:.2f}")]
        peers += ["--peer", f"lazyllm={rivals}/lazyllm_{s:.2f}.json+progressive"]
        if s == 0.30:
            peers += ["--peer", f"swiftkv={rivals}/swiftkv_{s:.2f}.safetensors"]
        add("rivals", "analysis/rivals/evaluate.py", "--rows", "", *peers, "--data", "text",
            "--resume", "--out_dir", f"{rivals}/{s:.2f}", *quality)
    add("ablations", "analysis/ablations.py", "--sparsity", 0.30, "--seeds", "0,1,2",
        "--out_dir", f"{out}/ablations", *dtype)
    add("sweep", "analysis/sweep.py", "--nfit", 100, "--nsearch", 4, "--nwindows", 50,
        "--out_dir", out, *dtype)

    second_model(args, add, quality)
    return made


def second_model(args, add, quality):
    """Steps of Qwen2.5-Coder-1.5B, ten times larger: budgets that 2 cores can bear."""
    out, model = f"{args.out_dir}/qwen-0.30", ["--model", "qwen2.5-coder-1.5b"]
    text = ["--data", args.calibration, "--max_prompt", 256, "--max_response", 64]
    common = [*model, *text, "--out_dir", out, "--resume"]
    stage = [*common, "--nwatch", 12]
    schedule = ["--schedule", f"{out}/schedule.json"]
    router = ["--router", f"{out}/router.safetensors", "--one_pass"]
    part = "qwen-0.30"

    add(part, "prepare.py", *model, "--fetch_only")
    add(part, "search_scheduler.py", "--flops_saved", 0.30, "--nsamples", 12, "--evaluations", 24,
        "--population", 8, "--patience", 2, "--max_states", 300, *stage)
    add(part, "train_router.py", *schedule, "--one_pass", "--span", 8, "--guide", "attended",
        "--nsamples", 24, "--warmup_samples", 24, "--steps", 8, "--eval_every", 8,
        "--calibration_samples", 4, "--nwatch", 48, *common)   # of fewer, noise decides
    add(part, "finetune_static.py", *schedule, *router, "--nsamples", 12, "--evaluations", 14,
        "--population", 6, "--elite", 2, "--max_states", 200, "--calibration_samples", 4, *stage)
    add(part, "search_scheduler.py", *model, *text, "--method", "late", "--flops_saved", 0.30,
        "--kv", "keep", "--nsamples", 12, "--nwatch", 2, "--out_dir", f"{out}/late")
    late = ["--schedule", f"{out}/late/schedule.json", "--kv", "keep",
            "--forecaster", f"{out}/late/forecaster.safetensors"]
    add(part, "fit_late_kv.py", *model, *text, "--nwatch", 12, "--only_kv", "--keys", 0.5,
        "--schedule", f"{out}/late/schedule.json", "--nsamples", 64, "--tune", 190,
        "--tune_samples", 260, "--eval_every", 20, "--out_dir", f"{out}/late", "--resume")

    # quality and speed of both
    ftp = ["--schedule", f"{out}/schedule_ft.json", *router]
    for found, rows, folder in ((ftp, "cut,uniform,static,ftp", out),
                                (late, "static", f"{out}/late")):
        add(part, "evaluate.py", *model, *found, "--rows", rows, "--data", args.calibration,
            "--resume", "--out_dir", folder, *quality)
        add(part, "benchmark.py", *model, *found, "--lengths", "256,1024,2048", "--n_decode", 0,
            "--rounds", 3, "--out_dir", folder)
    add(part, "analysis/redundancy.py", *model, "--text", args.wikitext, "--nsamples", 500,
        "--seqlen", 128, "--ntest", 16, "--out_dir", out)


def main():
    args = get_args()
    log = Path(args.out_dir) / "log"
    log.mkdir(parents=True, exist_ok=True)
    state = log / "done.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    todo = [(part, words) for part, words in steps(args) if args.only in (None, part)]
    if not todo:
        raise FTPError(f"--only {args.only}: no such part; see --list")
    for i, (part, words) in enumerate(todo, 1):
        name, line = digest(words), shlex.join(["python", *words])
        seconds = f"done in {done[name]} s" if name in done else "to do"
        print(f"[{i}/{len(todo)}] {part}, {seconds}: {line}", flush=True)
        if args.list or name in done:
            continue
        if done:
            saved[state] = f"{len(done)} steps done"       # what an interruption says is kept
        began = time.time()
        with open(log / f"{part}.txt", "a") as file:
            file.write(f"\n$ {line}\n")
            file.flush()
            code = subprocess.call([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
        if code:
            raise FTPError(f"{words[0]} ended with code {code}: see {log / part}.txt; the same "
                           "command goes on from here")
        done[name] = round(time.time() - began)
        state.write_text(json.dumps(done) + "\n")
    if not args.list:
        print(f"all done -> {args.out_dir}")


if __name__ == "__main__":
    run(main)
