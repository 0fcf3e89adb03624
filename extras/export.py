"""Export a routed model: a folder that FTPModel.from_pretrained reads and routes at once.

    python extras/export.py --schedule out/schedule_ft.json --router out/router.safetensors
    python extras/export.py --eval out/eval.json --bench out/bench.json --license apache-2.0
    python -c "from model_ftp import FTPModel; print(FTPModel.from_pretrained('out/export').name)"
    hf upload owner/name out/export          # then from_pretrained("owner/name") does the same

In: a model, its schedule and router. Out: a folder with config.json, tokenizer and weights of the
model as they are, the artefacts and the settings they go with in ftp/, model_ftp.py with what it
reads, and README.md, whose every figure is read from the artefacts. transformers loads the folder
too: routed with trust_remote_code=True, without it as the plain dense model.
"""
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib.artefacts import Schedule
from lib.checkpoint import check_fingerprint, find_model, weight_files
from lib.files import check, load_json, save_json
from lib.skipped import Forecaster
from lib.stage import Parser, run, start, whole
from model_ftp import Router

CARD = """---
{front}---

# {name}, routed by FTP: {share} of the tokens skip each block on average

{router} decides before every block, token by token, *compute* or *skip*; the weights of {base} \
are unchanged.
Method: "FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing" \
(arXiv 2412.11494), an independent implementation.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

here = "FOLDER OR HUB ID OF THIS MODEL"
model = AutoModelForCausalLM.from_pretrained(here, trust_remote_code=True)  # routed at once
tokenizer = AutoTokenizer.from_pretrained(here)
inputs = tokenizer("The sky is blue because", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
model.ftp.use()  # dense from here on; without trust_remote_code it is the plain dense model
```

In the implementation's repository, `FTPModel.from_pretrained(here)` gives the same model.

## What was made

{facts}

Sparsity of each block (share of prompt tokens that skip it): {sparsity}

{results}## Limits

The router, schedule and any forecaster were fitted to their data: on text of another kind they \
lose more. Routing needs the whole prompt. {decode}
"""
DECODE = {
    "dense": "Decoded tokens are not pruned.",
    "rule": "Decoded tokens skip the blocks of sparsity above 0.5.",
    "threshold": "Decoded tokens are pruned by calibrated thresholds, which harms the text more "
                 "than pruning the prompt.",
}
PREFILL = {
    "topk": "quota: each block keeps the tokens of the largest margin",
    "argmax": "the router's own (argmax)",
}
KEYS_AND_VALUES = {"drop": "dropped", "keep": "kept"}
ROOT = Path(__file__).resolve().parent.parent
REMOTE = ROOT / "extras" / "modeling_ftp.py"        # what transformers loads
OURS = re.compile(r"^from (?:lib\.(\w+)|(model_ftp)) import ", re.MULTILINE)
BESIDE_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")   # what a model folder needs


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("what is exported").add_argument
    add("--schedule", default="out/schedule_ft.json", help="schedule of stage 1 or 3")
    add("--router", default="out/router.safetensors", help="router of stage 2, or static")
    add("--prefill", default="topk", choices=list(PREFILL),
        help="prompt: quota, or the router's own decision")
    add("--decode", default="dense", choices=list(DECODE),
        help="how decoded tokens are routed")
    add("--kv", default="drop", choices=list(KEYS_AND_VALUES),
        help="K/V of skipped tokens")
    add("--one_pass", action="store_true",
        help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was "
             "trained with")

    add = p.add_argument_group("what its card tells").add_argument
    add("--eval", default=None, help="eval.json of this schedule and router")
    add("--bench", default=None, help="bench.json of this schedule and router")
    add("--base_model", default=None,
        help="hub id of the model; default: --model where it is one")
    add("--license", default=None, help="licence of the model")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out/export", help="new folder to write")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# the card


def table(head, rows):
    """A table in Markdown; None is shown as a dash."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = ["-" if v is None else str(v) for v in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def origin(meta):
    """Where an artefact came from, as its metadata tell; of paths the last name alone."""
    settings, work = meta.get("settings", {}), meta.get("work", {})
    data = settings.get("data")
    if data is not None:
        data = ", ".join(Path(d).name for d in str(data).split(","))
    told = {
        "data": data,
        "seed": settings.get("seed"),
        "steps": work.get("steps"),
        "evaluations": work.get("evaluations"),
        **{k: meta.get(k) for k in ("commit", "torch", "device", "dtype", "date")},
    }
    return ", ".join(f"{k} {v}" for k, v in told.items() if v is not None) or "no metadata"


def percent(v):
    return None if v is None else f"{100 * v:.1f} %"


def check_same_routing(path, result, schedule, router, routing):
    """FTPError unless eval.json measured the schedule, router and settings that are exported."""
    wanted = [schedule.id, router.id if isinstance(router, Router) else None]
    mine = [r["artefacts"] for r in result["rows"] if r.get("artefacts", [])[:2] == wanted]
    check(mine, f"--eval: no row of {path} was measured with this schedule and router; "
                "evaluate them first")
    settings, forecaster = result["config"]["settings"], routing["forecaster"]
    differ = [k for k in ("prefill", "kv", "one_pass") if settings[k] != routing[k]]
    ids = mine[0][2:]                                # rows once held no forecaster's id
    another = ids not in ([], [forecaster and forecaster.id])
    if another or bool(settings.get("forecaster")) != bool(forecaster):
        differ.append("forecaster")
    check(not differ, f"--eval: {path} was measured with another --{' --'.join(differ)}; "
                      "evaluate with the exported one")


def quality(path, schedule, router, routing):
    """The card's section of eval.json. FTPError if it measured something else."""
    result = load_json(path, "ftp-eval-1", "--eval")
    check_fingerprint(result["config"]["fingerprint"], schedule.fingerprint, "--eval: it")
    check_same_routing(path, result, schedule, router, routing)
    texts, tasks = (list(result["rows"][0][k]) for k in ("ppl", "tasks"))
    head = ["row", "skip prefill", "skip decode", "prompt FLOPs saved", "KL to dense, nats",
            "top-1 agreement", *(f"perplexity {t}" for t in texts), *tasks, "retention"]
    rows = []
    for r in result["rows"]:
        rows.append([
            r["name"],
            percent(r["sparsity_prefill"]),
            percent(r["sparsity_decode"]),
            percent(r["flops_saved_prefill"]),
            f"{r['kl']:.4f} +- {r['kl_stderr']:.4f}",
            percent(r["top1_agreement"]),
            *(f"{r['ppl'][t]:.2f}" for t in texts),
            *(percent(r["tasks"][t]["acc"]) for t in tasks),
            percent(r["retention"]),
        ])
    protocol = result["config"]["settings"]["protocol"]
    about = f"Protocol {protocol}; {origin(result['config'])}."
    return f"## Quality\n\n{about}\n\n{table(head, rows)}\n\n"


def measured_file(result, args, flag):
    """Whether bench.json was made with the file that the flag names here."""
    theirs, ours = result["config"]["settings"].get(flag), getattr(args, flag)
    return bool(theirs and ours) and Path(theirs).resolve() == Path(ours).resolve()


def speed(path, made_for, args):
    """The card's section of bench.json. FTPError if it measured other files."""
    result = load_json(path, "ftp-bench-1", "--bench")
    check_fingerprint(result["config"]["fingerprint"], made_for, "--bench: it")
    same_router = args.router == "static" or measured_file(result, args, "router")
    check(measured_file(result, args, "schedule") and same_router,
          f"--bench: {path} measured another schedule or router; run benchmark.py with these")
    head = ["batch", "prompt", "phase", "variant", "median ms (p10 - p90)", "speed-up",
            "bound by FLOPs", "peak MB", "KV MB"]
    rows = []
    for r in result["rows"]:
        rows.append([
            r["batch_size"],
            r["prompt_len"],
            r["phase"],
            r["name"],
            f"{r['median_ms']:.1f} ({r['p10_ms']:.1f} - {r['p90_ms']:.1f})",
            f"{r['speedup_vs_dense']:.3f}",
            f"{r['flops_bound']:.3f}",
            f"{r['peak_mb']:.0f}",
            f"{r['kv_bytes'] / 2**20:.1f}",
        ])
    return f"## Speed\n\n{origin(result['config'])}.\n\n{table(head, rows)}\n\n"


def router_facts(router):
    """Rows of the card's first table about the router."""
    if not isinstance(router, Router):
        return [["router", f"{router}: no trained weights"]]
    measures = (("KL to dense on watched samples", "kl_watch"),
                ("static router's", "kl_watch_static"),
                ("realised prompt sparsity", "realised_sparsity"))
    measured = [f"{k} {router.meta[key]:.4f}" for k, key in measures if key in router.meta]
    inputs = ", ".join(router.inputs)
    return [["router", f"{router.kind}, inputs {inputs}; {origin(router.meta)}"],
            ["router as measured in training", "; ".join(measured) or "not measured"]]


def front_matter(base, license):
    """The lines that the hub reads."""
    fields = {
        "base_model": base,
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": "[ftp, token-pruning, dynamic-inference]",
    }
    return "".join(f"{k}: {v}\n" for k, v in fields.items() if v)


def card(model, schedule, router, routing, args):
    """Text of README.md. FTPError where --eval or --bench measured something else."""
    hub_id = args.model if "/" in args.model and not Path(args.model).exists() else None
    base = args.base_model or hub_id
    name = Path(base or find_model(args.model)).name
    forecaster = routing["forecaster"]
    decisions = PREFILL[routing["prefill"]]
    if routing["one_pass"]:
        decisions += ", all blocks by the scores of the first that decides"
    size = f"{model.config.n_layer} blocks, {model.config.parameters:,} parameters"
    facts = [
        ["model", f"{name}: {size}"],
        ["sparsity asked for", f"{100 * schedule.mean:.2f} %"],
        ["prompt decisions", decisions],
        ["keys and values of skipped tokens", KEYS_AND_VALUES[routing["kv"]]],
        ["decoded tokens", routing["decode"]],
        ["schedule", origin(schedule.meta)],
        *router_facts(router),
    ]
    if forecaster:
        facts.append(["forecaster", f"rank {forecaster.rank}; {origin(forecaster.meta)}"])
    decides = "The token's position (no trained router)"
    if isinstance(router, Router):
        parameters = sum(p.numel() for p in router.parameters())
        decides = f"A router of {parameters} parameters"
    results = ""
    if args.eval:
        results += quality(args.eval, schedule, router, routing)
    if args.bench:
        results += speed(args.bench, model.fingerprint, args)
    return CARD.format(
        front=front_matter(base, args.license),
        name=name,
        base=base or name,
        share=f"{100 * schedule.mean:.0f} %",
        router=decides,
        facts=table(["what", "value"], facts),
        sparsity=", ".join(f"{s:.2f}" for s in schedule.sparsity),
        results=results,
        decode=DECODE[routing["decode"]],
    )


# ------------------------------------------------------------------------------------------------
# the folder


def copy_model(source, folder):
    """The model's files: weights as hard links, so that they take no space; the others copied."""
    for file in weight_files(source):
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:                              # another disk, or one without links
            shutil.copy2(file, folder / file.name)
    # a link here would let an edit of the export change the model that it came from
    small = {f for pattern in BESIDE_WEIGHTS for f in source.glob(pattern)}
    for file in small:
        shutil.copy2(file, folder / file.name)


def copy_code(folder):
    """Our code that a routed model needs, side by side in the folder, and where config.json says
    so. Imports become relative: transformers looks after such files alone."""
    todo, done = [REMOTE], set()
    while todo:
        source = todo.pop()
        done.add(source)
        text = source.read_text()
        for m in OURS.finditer(text):
            file = ROOT / "lib" / f"{m[1]}.py" if m[1] else ROOT / "model_ftp.py"
            if file not in done:
                todo.append(file)
        relative = OURS.sub(lambda m: f"from .{m[1] or m[2]} import ", text)
        (folder / source.name).write_text(relative)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE.stem}.FTPForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_artefacts(folder, schedule, router, routing, made_for):
    """Schedule, router and forecaster, and ftp.json: how from_pretrained puts them together."""
    folder.mkdir()
    schedule.save(folder / "schedule.json")
    settings = {k: v for k, v in routing.items() if k != "forecaster"}
    about = {"format": "ftp-export-1", "fingerprint": made_for, "routing": settings}
    for name, artefact in (("router", router), ("forecaster", routing["forecaster"])):
        about[name] = artefact                       # "static", or no forecaster
        if artefact not in (None, "static"):
            about[name] = f"{name}.safetensors"
            artefact.save(folder / about[name])
    save_json(folder / "ftp.json", about)


def main():
    args = get_args()
    out = Path(args.out_dir)
    check(not out.exists(), f"--out_dir {out}: exists already; give a new folder")

    # what is exported; use() refuses what does not belong together
    schedule = Schedule.load(args.schedule)
    router = "static" if args.router == "static" else Router.load(args.router)
    routing = {
        "prefill": args.prefill,
        "decode": args.decode,
        "kv": args.kv,
        "one_pass": args.one_pass,
        "mismatch": args.mismatch,
        "forecaster": Forecaster.load(args.forecaster) if args.forecaster else None,
    }
    args.out_dir = str(out.parent)                   # start() makes it; `out` appears whole
    model, _ = start(args, pack=False)
    model.use(schedule, router, **routing)
    readme = card(model, schedule, router, routing, args)

    # written beside and renamed: the folder is whole, or not there
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    copy_model(find_model(args.model), part)
    copy_code(part)
    save_artefacts(part / "ftp", schedule, router, routing, model.fingerprint)
    (part / "README.md").write_text(readme)
    part.rename(out)

    entries = len(list(out.iterdir()))
    print(f"-> {out}: {entries} entries; try FTPModel.from_pretrained({str(out)!r}), or "
          "transformers' AutoModelForCausalLM with trust_remote_code=True; "
          f"push with: hf upload owner/name {out}")


if __name__ == "__main__":
    run(main)
