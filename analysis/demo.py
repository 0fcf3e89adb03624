"""What `make demo` runs: a pruned model answers, then the pipeline prunes it before your eyes.

    python analysis/demo.py          # -> out/demo/, 5 minutes on 2 cores with bfloat16, 11 without
    python analysis/demo.py --sparsity 0.40     # another target; --out_dir to keep both

Each step says what it does and why, how long it took on the authors' 2 cores, and ends in a line of
result. What a step prints in full is in out/demo/log.txt. The budgets are small; `make reproduce`
has the full ones.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.files import FTPError, check, load_json
from lib.stage import Parser, number, run

PROMPT = "Summarise the text in three sentences."
TEXT = ROOT / "artifacts" / "smollm2" / "demo_prompt.txt"
QUIET = 9            # no step is silent for longer, seconds


@dataclass
class Step:
    """title, why: what is told before; seconds: what it took on the authors' machine; words: the
    command; result: a function that gives the line that ends it; shown: whether its own output is
    for the reader."""
    title: str
    why: str
    seconds: int
    words: list
    result: object = None
    shown: bool = False


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("demo").add_argument
    add("--sparsity", type=number("(0, 0.6]"), default=0.30, help="share of tokens that skip")
    add("--out_dir", default="out/demo", help="folder of all that is made")
    return p.parse_args()


def steps(out, sparsity):
    """The steps in order; each stage reads the files of those before it."""
    late = ["--kv", "keep", "--schedule", f"{out}/kv/schedule.json",
            "--forecaster", f"{out}/kv/forecaster.safetensors"]
    ftp = ["--schedule", f"{out}/schedule_ft.json", "--router", f"{out}/router.safetensors"]
    s = f"{sparsity:g}"
    # chats without a system prompt: a constant one would be dropped first, a gain for nothing
    data = ["--data", "bare"]
    return [
        Step("a pruned model answers, beside the dense one",
             "the shipped late keys and values skip 30 % of a long prompt's work: the first token "
             "comes sooner, the answer stays", 20,
             ["sample.py", "--pruned", "late-0.30", "--prompt", PROMPT, "--file", str(TEXT),
              "--compare", "--max_new_tokens", "48"], shown=True),
        Step("stage 1: search a schedule",
             "how many tokens may skip each block? A genetic search, tokens chosen by position "
             "alone, judged by KL to the dense model", 60,
             ["search_scheduler.py", "--sparsity", s, *data, "--nsamples", "6", "--nwatch", "12",
              "--evaluations", "16", "--population", "8", "--patience", "2", "--out_dir", out],
             lambda: search_result(f"{out}/schedule.json")),
        Step("stage 2: train the router",
             "which tokens? A 2-layer MLP on four cheap factors learns it, the LLM stays frozen",
             95, ["train_router.py", "--schedule", f"{out}/schedule.json", *data, "--steps", "6",
                  "--eval_every", "6", "--nwatch", "12", "--guide_evals", "16",
                  "--guide_samples", "8", "--warmup", "600", "--calibration_samples", "16",
                  "--out_dir", out],
             lambda: router_result(f"{out}/router.json")),
        Step("stage 3: search again around the schedule found",
             "with the trained router in place, small moves", 40,
             ["finetune_static.py", "--schedule", f"{out}/schedule.json",
              "--router", f"{out}/router.safetensors", *data, "--nsamples", "8", "--nwatch", "12",
              "--evaluations", "6", "--population", "4", "--elite", "2",
              "--calibration_samples", "16", "--out_dir", out],
             lambda: finetune_result(f"{out}/schedule_ft.json")),
        Step("late keys and values: the schedule",
             "beyond the paper: skip the last blocks whole, for all prompt tokens but two", 20,
             ["search_scheduler.py", "--method", "late", "--flops_saved", s, "--kv", "keep",
              *data, "--nsamples", "4", "--nwatch", "8", "--out_dir", f"{out}/kv"]),
        Step("late keys and values: the maps",
             "one linear map a block stands for the keys and values that would be missing", 100,
             ["fit_late_kv.py", "--only_kv", "--keys", "0.5", "--data", "bare,text",
              "--nsamples", "60", "--schedule", f"{out}/kv/schedule.json", "--tune", "30",
              "--tune_samples", "40", "--nwatch", "12", "--eval_every", "15",
              "--out_dir", f"{out}/kv"],
             lambda: late_result(f"{out}/kv/forecaster.json")),
        Step("measure quality", "on prompts that none of the stages saw", 60,
             ["evaluate.py", *ftp, "--rows", "static,ftp", *data, "--nsamples", "24",
              "--nwindows", "16", "--out_dir", out]),
        Step("measure quality of late keys and values", "on the same prompts", 40,
             ["evaluate.py", *late, "--rows", "static", *data, "--nsamples", "24",
              "--nwindows", "16", "--out_dir", f"{out}/kv"]),
        Step("measure speed", "wall-clock of prefill and decoding, in turns with the dense model "
             "and with transformers", 55,
             ["benchmark.py", *ftp, "--lengths", "256,1024", "--rounds", "3", "--n_decode", "4",
              "--out_dir", out]),
        Step("measure speed of late keys and values", "likewise", 25,
             ["benchmark.py", *late, "--lengths", "256,1024", "--rounds", "3", "--n_decode", "4",
              "--no_hf", "--out_dir", f"{out}/kv"]),
        Step("the page", "what was skipped, token by token, what the answer needed, what was "
             "answered, and all tables", 45,
             ["analysis/report.py", *ftp, "--bare", "--eval", f"{out}/eval.json",
              "--eval", f"late={out}/kv/eval.json", "--bench", f"{out}/bench.json",
              "--bench", f"late={out}/kv/bench.json", "--out_dir", out]),
    ]


# ------------------------------------------------------------------------------------------------
# a step's line of result, in words: what it found, or that it found nothing

def meta_of(path, kind):
    return load_json(path, kind, "--out_dir")["meta"]


def search_result(path):
    m = meta_of(path, "ftp-schedule-1")
    gain = m["kl_watch_uniform"] - m["kl_watch"]
    if gain <= 0:
        return (f"nothing better than the uniform schedule was found (its watched KL is "
                f"{m['kl_watch_uniform']:.3f}): it is kept")
    return f"watched KL {m['kl_watch_uniform']:.3f} (uniform) -> {m['kl_watch']:.3f}"


def router_result(path):
    m = meta_of(path, "ftp-router-1")
    by = f"watched KL {m['kl_watch_static']:.3f} (position alone) -> {m['kl_watch']:.3f}"
    if m["best_step"] == 0:
        return by + "; all of it by the guide's imitation, distillation added nothing"
    return by + f", best at step {m['best_step']} of distillation"


def finetune_result(path):
    m = meta_of(path, "ftp-schedule-1")
    if m["kl_watch"] >= m["kl_watch_before"]:
        return f"no move helped: watched KL stays {m['kl_watch_before']:.3f}"
    return f"watched KL {m['kl_watch_before']:.3f} -> {m['kl_watch']:.3f}"


def late_result(path):
    history = meta_of(path, "ftp-forecaster-3")["tuning"]
    return f"watched KL {history[0][1]:.3f} as fitted, {min(k for _, k in history):.3f} tuned"


def closing_table(out):
    """The table that ends the demo: a line a method."""
    lines = [["method", "FLOPs saved", "KL", "perplexity", "prefill 1024", "speed-up"]]
    for folder, names in ((out, {"dense": "dense", "static": "first + recent", "ftp": "FTP"}),
                          (f"{out}/kv", {"static": "late keys and values"})):
        rows = {r["name"]: r for r in load_json(f"{folder}/eval.json", "ftp-eval-1", "-")["rows"]}
        bench = load_json(f"{folder}/bench.json", "ftp-bench-1", "--out_dir")["rows"]
        timed = {r["name"]: r for r in bench
                 if r["phase"] == "prefill" and r["prompt_len"] == 1024}
        for name, shown in names.items():
            row, ms = rows[name], timed[name]
            lines.append([shown, f"{100 * (row['flops_saved_prefill'] or 0):.1f} %",
                          f"{row['kl']:.4f}", f"{row['ppl']['responses']:.2f}",
                          f"{ms['median_ms']:.0f} ms", f"{ms['speedup_vs_dense']:.2f}x"])
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(width[0]),
                                *(v.rjust(w) for v, w in zip(line[1:], width[1:]))])
                     for line in lines)


# ------------------------------------------------------------------------------------------------

def run_step(number_, of, step, log):
    """Run one step: what it does, its progress, its result. FTPError with its complaint."""
    print(f"\n[{number_}/{of}] {step.title}: {step.why}. About {step.seconds} s.", flush=True)
    began, last = time.time(), [""]
    process = subprocess.Popen([sys.executable, str(ROOT / step.words[0]), *step.words[1:]],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read():
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(("torch ", "settings: ")):     # in the log, not on the screen
                continue
            last[0] = line.strip() or last[0]
            if step.shown:
                print(f"    {line}", end="", flush=True)

    reader = Thread(target=read)
    reader.start()
    while reader.is_alive():
        reader.join(QUIET)
        if reader.is_alive() and not step.shown:
            print(f"    {time.time() - began:4.0f} s  {last[0][:110]}", flush=True)
    if process.wait():
        raise FTPError(f"{step.words[0]} ended with code {process.returncode}: {last[0]}")
    result = step.result() if step.result else last[0] if not step.shown else "done"
    print(f"    -> {result.removeprefix('-> ')} ({time.time() - began:.0f} s)", flush=True)


def main():
    args = get_args()
    out = Path(args.out_dir)
    (out / "kv").mkdir(parents=True, exist_ok=True)
    check(TEXT.exists(), f"{TEXT} is missing; fetch the whole repository")
    todo, began = steps(args.out_dir, args.sparsity), time.time()
    with open(out / "log.txt", "w") as log:
        for i, step in enumerate(todo, 1):
            log.write(f"\n$ {' '.join(map(str, step.words))}\n")
            run_step(i, len(todo), step, log)

    print(f"\n{closing_table(args.out_dir)}\n")
    print("KL and perplexity of held-out answers, prompt pruned, answer decoded densely; speed-up "
          "of the prompt's pass, by the clock.")
    print(f"page: {out}/report.html   tables: {out}/eval.json, {out}/bench.json   "
          f"full log: {out}/log.txt   {time.time() - began:.0f} s in all")
    print('next: source .venv/bin/activate, then: python sample.py --system "" --schedule '
          f"{out}/schedule_ft.json --router {out}/router.safetensors")
    (out / "demo.json").write_text(json.dumps({"seconds": round(time.time() - began)}) + "\n")


if __name__ == "__main__":
    run(main)
