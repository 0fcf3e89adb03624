"""Export a routed model: a folder that FTPModel.from_pretrained reads in one call and routes at once, with a model card.

    python export.py --schedule out/schedule_ft.json --router out/router.safetensors --out_dir out/export
    python export.py --eval out/eval.json --bench out/bench.json --base_model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0
    python -c "from model_ftp import FTPModel; m = FTPModel.from_pretrained('out/export'); print(m.schedule.mean)"
    hf upload owner/name out/export                                # push it; then from_pretrained("owner/name") does the same

The folder: config.json, safetensors and tokenizer of the model as they are (hard links where the disk allows, so they take no space), in ftp/
the schedule, router, forecaster and the settings they go with, and README.md, whose every figure is read from the artefacts. transformers
loads the folder too, as the dense model.
"""
import os
import shutil
from pathlib import Path

from common import Parser, check, routing_of, run, start
from files import check_fingerprint, find_model, load_json, save_json, weight_files
from router import Router, Schedule

CARD = """---
{front}---

# {name}, routed by FTP: {share} of the tokens skip each block on average

{router} decides before every block, token by token, *compute* or *skip*; the weights of {base} are unchanged.
Method: "FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing" (arXiv 2412.11494), an independent implementation.

```python
from data import load_tokenizer, render  # of the implementation's repository
from model_ftp import FTPModel

here = "FOLDER OR HUB ID OF THIS MODEL"
model, tokenizer = FTPModel.from_pretrained(here), load_tokenizer(here)  # routed at once; model.use() makes it dense
print(tokenizer.decode(model.generate([render(tokenizer, "Why is the sky blue?")])[0]))
```

## What was made

{facts}

Sparsity of each block (share of prompt tokens that skip it): {sparsity}

{results}## Limits

The router, schedule and any forecaster were fitted to their data: on text of another kind they lose more. Routing needs the whole prompt. {decode}
"""
DECODE = {"dense": "Decoded tokens are not pruned.", "rule": "Decoded tokens skip the blocks of sparsity above 0.5.",
          "threshold": "Decoded tokens are pruned by calibrated thresholds, which harms the text more than pruning the prompt."}


def markdown(head, rows):
    """A table; None is shown as a dash."""
    return "\n".join("| " + " | ".join("-" if v is None else str(v) for v in row) + " |" for row in (head, ["---"] * len(head), *rows))


def origin(meta):
    """Where an artefact came from, as its metadata tell."""
    s, work = meta.get("settings", {}), meta.get("work", {})
    said = [f"{k} {v}" for k, v in (("data", ", ".join(Path(d).name for d in str(s["data"]).split(",")) if "data" in s else None),
                                   ("seed", s.get("seed")), ("steps", work.get("steps")), ("evaluations", work.get("evaluations")),
                                   ("commit", meta.get("commit")), ("torch", meta.get("torch")), ("device", meta.get("device")),
                                   ("dtype", meta.get("dtype")), ("date", meta.get("date"))) if v is not None]
    return ", ".join(said) or "no metadata"


def quality(path, schedule, router, routing):
    """The section of eval.json. FTPError if it measured another schedule, router or setting than is exported."""
    o = load_json(path, "ftp-eval-1", "--eval")
    check_fingerprint(o["config"]["fingerprint"], schedule.fingerprint, "--eval: it")
    want, s = [schedule.id, router.id if isinstance(router, Router) else None], o["config"]["settings"]
    mine, f = [r["artefacts"] for r in o["rows"] if r.get("artefacts", [])[:2] == want], routing["forecaster"]
    check(mine, f"--eval: no row of {path} was measured with this schedule and router; evaluate them first")
    differ = [k for k in ("prefill", "kv", "one_pass") if s[k] != routing[k]]
    if bool(s.get("forecaster")) != bool(f) or mine[0][2:] not in ([], [f and f.id]):  # rows once held no forecaster's id
        differ.append("forecaster")
    check(not differ, f"--eval: {path} was measured with another --{' --'.join(differ)}; evaluate with the exported one")
    percent = lambda v: None if v is None else f"{100 * v:.1f} %"
    texts, tasks = list(o["rows"][0]["ppl"]), list(o["rows"][0]["tasks"])
    rows = [[r["name"], *(percent(r[k]) for k in ("sparsity_prefill", "sparsity_decode", "flops_saved_prefill")), f"{r['kl']:.4f} +- {r['kl_stderr']:.4f}",
             percent(r["top1_agreement"]), *(f"{r['ppl'][t]:.2f}" for t in texts), *(percent(r["tasks"][t]["acc"]) for t in tasks), percent(r["retention"])]
            for r in o["rows"]]
    head = ["row", "skip prefill", "skip decode", "prompt FLOPs saved", "KL to dense, nats", "top-1 agreement", *(f"perplexity {t}" for t in texts), *tasks,
            "retention"]
    return f"## Quality\n\nProtocol {s['protocol']}; {origin(o['config'])}.\n\n{markdown(head, rows)}\n\n"


def speed(path, fingerprint, args):
    """The section of bench.json. FTPError if it measured other files than are exported."""
    o = load_json(path, "ftp-bench-1", "--bench")
    check_fingerprint(o["config"]["fingerprint"], fingerprint, "--bench: it")
    same = lambda k: (v := o["config"]["settings"].get(k)) and getattr(args, k) and Path(v).resolve() == Path(getattr(args, k)).resolve()
    check(same("schedule") and (args.router == "static" or same("router")), f"--bench: {path} measured another schedule or router; run benchmark.py with these")
    rows = [[r["batch_size"], r["prompt_len"], r["phase"], r["name"], f"{r['median_ms']:.1f} ({r['p10_ms']:.1f} - {r['p90_ms']:.1f})",
             f"{r['speedup_vs_dense']:.3f}", f"{r['flops_bound']:.3f}", f"{r['peak_mb']:.0f}", f"{r['kv_bytes'] / 2**20:.1f}"] for r in o["rows"]]
    head = ["batch", "prompt", "phase", "variant", "median ms (p10 - p90)", "speed-up", "bound by FLOPs", "peak MB", "KV MB"]
    return f"## Speed\n\n{origin(o['config'])}.\n\n{markdown(head, rows)}\n\n"


def card(model, schedule, router, forecaster, routing, args):
    """Text of README.md."""
    base = args.base_model or (args.model if "/" in args.model and not Path(args.model).exists() else None)
    name, learned = Path(base or find_model(args.model)).name, isinstance(router, Router)
    front = {"base_model": base, "license": args.license, "pipeline_tag": "text-generation", "tags": ["ftp", "token-pruning", "dynamic-inference"]}
    decisions = {"topk": "quota: each block keeps the tokens of the largest margin", "argmax": "the router's own (argmax)"}[routing["prefill"]]
    facts = [["model", f"{name}: {model.config.n_layer} blocks, {model.config.parameters:,} parameters"],
             ["sparsity asked for", f"{100 * schedule.mean:.2f} %"],
             ["prompt decisions", decisions + ", all blocks at once after block 0" * routing["one_pass"]],
             ["keys and values of skipped tokens", {"drop": "dropped", "keep": "kept"}[routing["kv"]]], ["decoded tokens", routing["decode"]],
             ["schedule", origin(schedule.meta)]]
    if learned:
        m = router.meta
        measured = [f"{k} {m[key]:.4f}" for k, key in (("KL to dense on watched samples", "kl_watch"), ("static router's", "kl_watch_static"),
                                                      ("realised prompt sparsity", "realised_sparsity")) if key in m]
        facts += [["router", f"{router.kind}, inputs {', '.join(router.inputs)}; {origin(m)}"],
                  ["router as measured in training", "; ".join(measured) or "not measured"]]
    else:
        facts += [["router", f"{router}: no trained weights"]]
    if forecaster:
        facts += [["forecaster", f"rank {forecaster.rank}; {origin(forecaster.meta)}"]]
    decides = f"A router of {sum(p.numel() for p in router.parameters())} parameters" if learned else "The token's position (no trained router)"
    front = "".join(f"{k}: {v if isinstance(v, str) else '[' + ', '.join(v) + ']'}\n" for k, v in front.items() if v)
    return CARD.format(front=front, name=name, base=base or name, share=f"{100 * schedule.mean:.0f} %", router=decides,
                       facts=markdown(["what", "value"], facts), sparsity=", ".join(f"{s:.2f}" for s in schedule.sparsity), decode=DECODE[routing["decode"]],
                       results=(quality(args.eval, schedule, router, routing) if args.eval else "")
                       + (speed(args.bench, model.fingerprint, args) if args.bench else ""))


def main():
    p = Parser(__doc__).common(out_dir="out/export").routing()
    p.add_argument("--schedule", default="out/schedule_ft.json", help="schedule of stage 1 or 3")
    p.add_argument("--router", default="out/router.safetensors", help="router of stage 2, or static")
    p.add_argument("--decode", default="dense", choices=list(DECODE), help="how decoded tokens are routed")
    p.add_argument("--eval", default=None, help="eval.json of this schedule and router, for the card")
    p.add_argument("--bench", default=None, help="bench.json of this schedule and router, for the card")
    p.add_argument("--base_model", default=None, help="hub id of the model, for the card; default: --model where it is one")
    p.add_argument("--license", default=None, help="licence of the model, for the card")
    args = p.parse_args()
    out = Path(args.out_dir)
    check(not out.exists(), f"--out_dir {out}: exists already; give a new folder")
    schedule, router = Schedule.load(args.schedule), args.router if args.router == "static" else Router.load(args.router)
    model, _ = start(args, pack=False)
    routing = routing_of(args, isinstance(router, Router)) | {"decode": args.decode}
    model.use(schedule, router, **routing)  # refuses what does not belong together
    readme, source, part = card(model, schedule, router, routing["forecaster"], routing, args), find_model(args.model), out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "ftp").mkdir(parents=True)
    kept = [f for pattern in ("*.json", "*.jinja", "tokenizer.model", "LICENSE*") for f in source.glob(pattern)]
    for file in {*weight_files(source), *kept}:
        try:
            os.link(file.resolve(), part / file.name)
        except OSError:  # another disk, or one without links
            shutil.copy2(file, part / file.name)
    schedule.save(part / "ftp" / "schedule.json")
    made = {"router": router, "forecaster": routing.pop("forecaster")}
    for name, obj in made.items():
        if obj not in (None, "static"):
            obj.save(part / "ftp" / f"{name}.safetensors")
    save_json(part / "ftp" / "ftp.json", {"format": "ftp-export-1", "fingerprint": model.fingerprint, "routing": routing,
                                          **{k: v if v in (None, "static") else f"{k}.safetensors" for k, v in made.items()}})
    (part / "README.md").write_text(readme)
    part.rename(out)
    print(f"-> {out}: {len(list(out.iterdir()))} entries; try FTPModel.from_pretrained({str(out)!r}), push with: hf upload owner/name {out}")


if __name__ == "__main__":
    run(main)
