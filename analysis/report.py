"""One page that shows a pruned model at work: what was skipped, what it answers, what was saved.

    python analysis/report.py --pruned late-0.30 --prompt "Why is the sky blue?"
    python analysis/report.py --schedule out/schedule_ft.json --router out/router.safetensors \\
        --eval out/eval.json --bench out/bench.json
    python analysis/report.py --pruned late-0.30 --eval out/eval.json --eval late=out/kv/eval.json
    python analysis/report.py --from_json --bench out/bench.json      # again, without the model

In: a model with its schedule and router, a prompt; eval.json and bench.json files, if any. Out:
report.html, one file that needs no network, and report.json, from which it is drawn again.

label=file names the rows of a file: by the label alone where it has one row beside the dense ones,
else by the label before the row's name. All --eval files must be made on the same data.
"""
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from analysis.report_page import page
from analysis.style import method
from lib.data import PROMPTS, load_tokenizer, read_rows, read_text, render, splits_of
from lib.evaluation import nll
from lib.files import check, load_json, save_files, save_json
from lib.flops import Meter, head_flops
from lib.scoring import response_kl, response_states
from lib.search import block_influence
from lib.shipped import names, shipped
from lib.skipped import is_kv_only
from lib.skips import prefill_with_map
from lib.stage import Parser, run, start, whole
from lib.timing import timed
from lib.worth import span_worth, spans_of

LARGEST = 1_000_000       # bytes of the page
SPAN = 8                  # tokens of a span whose worth is measured, at least
# what must have been the same, for rows of several eval.json to stand in one table
SAME = ("protocol", "text", "context", "scored", "nwindows", "tasks", "limit", "data", "nsamples",
        "max_response")

RESULT_FORM = {"config": {"settings": dict, "model": str}, "rows": [{"name": str}]}
ANSWER_FORM = {"text": str, "ids": [int]}
REPORT_FORM = {
    "worth": {"size": (int, None), "values": [float]},
    "config": dict,
    "what": str,
    "method": str,
    "artefacts": list,
    "tokens": [str],
    "special": [int],
    "kept": [str],
    "skipped": float,
    "flops_saved": float,
    "quality": {"kl": float, "ppl_ratio": float},
    "speed": {"dense_ms": float, "pruned_ms": float, "n": int, "bound": float},
    "answers": {"dense": ANSWER_FORM, "pruned": ANSWER_FORM},
    "schedule": {"sparsity": [float], "block_influence": [float]},
}


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("pruned model").add_argument
    add("--pruned", default=None,
        help=f"shipped for smollm2, late-0.30 if nothing else is given: {', '.join(names())}")
    add("--schedule", default=None, help="your own schedule, instead of --pruned")
    add("--router", default="static",
        help="its router, or static, random, attention")
    add("--forecaster", default=None, help="its late keys and values (fit_late_kv.py)")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")

    add = p.add_argument_group("prompt and answers").add_argument
    add("--prompt", default=None,
        help="an instruction; without it and --file the longest held-out one of prompts.jsonl")
    add("--file", default=None, help="text file that is the prompt, or stands behind --prompt")
    add("--longest", type=whole("[1, inf)"), default=400,
        help="longest held-out prompt taken, tokens")
    add("--bare", action="store_true",
        help="without the system prompt that the model's chat template puts first")
    add("--spans", type=whole("[0, inf)"), default=48,
        help="parts of the prompt, of 8 tokens or more, whose worth is measured; 0: none")
    add("--max_new_tokens", type=whole("[1, inf)"), default=96, help="longest answer, tokens")
    add("--rounds", type=whole("[1, inf)"), default=5,
        help="how often the prompt is read by the clock, dense and pruned in turns")

    add = p.add_argument_group("what was measured").add_argument
    add("--eval", action="append", default=[],
        help="eval.json, or label=file; may be repeated; without one its table is left out")
    add("--bench", action="append", default=[], help="bench.json, likewise")
    add("--from_json", action="store_true",
        help="draw the page from report.json in --out_dir, without the model")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of report.html and report.json")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of a random selection")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


def check_args(args):
    """Refuse what contradicts itself, before any work."""
    check(not (args.pruned and args.schedule),
          "--pruned: beside --schedule it would change nothing; give one of the two")
    if not args.schedule:
        given = [k for k in ("router", "forecaster", "kv") if k in args.typed]
        check(not given, f"--{', --'.join(given)}: it needs the --schedule it was made for")
    check(args.prompt is None or args.prompt.strip(), "--prompt: it is empty; give an instruction")


# ------------------------------------------------------------------------------------------------
# what was measured before


def read_results(specs, kind, flag):
    """Contents of files or label=file, each with its "label" ("" where there is none)."""
    found = []
    for spec in specs:
        label, _, path = spec.rpartition("=")
        found.append(load_json(path, kind, flag, RESULT_FORM) | {"label": label})
        check(found[-1]["rows"], f"{flag}: {path} has no rows; make it again")
    return found


def check_same(evals, paths):
    """FTPError unless all eval files were made on the same data, by the same protocol."""
    made = [{k: e["config"]["settings"].get(k) for k in SAME} | {"model": e["config"]["model"]}
            for e in evals]
    for one, path in zip(made, paths):
        odd = [k for k in one if one[k] != made[0][k]]
        check(not odd, f"--eval: {path} was made with another {', '.join(odd)} than {paths[0]}; "
                       "evaluate all in the same way")


# ------------------------------------------------------------------------------------------------
# the first step: run the model


def use_pruned(args, model):
    """Route the model: by --schedule, as its folder says, or as shipped. Returns what was taken."""
    if args.schedule:
        model.use(args.schedule, args.router, kv=args.kv, forecaster=args.forecaster,
                  seed=args.seed)
        return args.schedule
    if model.routing.schedule is not None and not args.pruned:
        return model.name
    name = args.pruned or "late-0.30"
    model.use(**shipped(name, args.model))
    return name


def method_of(routing):
    """The method of analysis/style.COLOURS that a Routing is."""
    known = method(routing.schedule.meta.get("method", ""))
    if routing.schedule.removes:                       # ShortGPT and its like
        return known
    if routing.learned:
        return "ftp"
    if routing.forecaster:
        return "late" if is_kv_only(routing.forecaster) else "forecast"
    return routing.router if isinstance(routing.router, str) else "rule"


def made_from(routing):
    """Ids of schedule, router and forecaster, as the rows of eval.json carry them."""
    return [routing.schedule.id,
            routing.router.id if routing.learned else None,
            routing.forecaster.id if routing.forecaster else None]


def pick_prompt(args, tokenizer):
    """The prompt's ids: what was asked for, else the longest held-out one that fits."""
    text = args.prompt
    if args.file:
        found = read_text(Path(args.file), "--file").strip()
        check(found, f"--file {args.file}: it is empty; give a text")
        text = f"{text}\n\n{found}" if text else found
    if text:
        return render(tokenizer, text, bare=args.bare)
    rows = read_rows(PROMPTS)
    heldout = [r for r, split in zip(rows, splits_of(len(rows))) if split == "heldout"]
    prompts = [render(tokenizer, row["instruction"], row["input"], args.bare) for row in heldout]
    short = [ids for ids in prompts if len(ids) <= args.longest]
    check(short, f"--longest {args.longest}: no held-out prompt is that short; give a larger one")
    return max(short, key=len)


def token_texts(tokenizer, ids):
    """What each token adds to the text; "" for one that only begins a character, such as an emoji.

    Each is decoded behind the one before it: alone, some tokenizers drop its leading blank.
    """
    texts, before, pending = [], [], []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(before + pending)[len(tokenizer.decode(before)):]
        # no character has more than four bytes: then it is the replacement character itself
        if text.endswith("\ufffd") and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    return texts


def prefill_times(model, routing, prompt, rounds):
    """Median ms of reading the prompt, dense and routed in turns: {"dense_ms", "pruned_ms", "n"}.

    Both have run before: a CPU's kernels are made at the first use.
    """
    seconds = {"dense_ms": [], "pruned_ms": []}
    for _ in range(rounds):
        for name in seconds:
            if name == "dense_ms":
                model.use()
            else:
                model.routing = routing
            _, took = timed(model.device, model.prefill, [prompt])
            seconds[name].append(took)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {**ms, "n": rounds}


def flops_bound(model, meter):
    """The speed-up of the prefill that its FLOPs allow, head and router counted."""
    head = head_flops(model.config, 1)
    return (meter.dense["prefill"] + head) / (meter.used("prefill") + head)


def influence(model, schedule, prompt, answer):
    """Block Influence: as the search recorded it, else on this prompt with the dense answer."""
    recorded = schedule.meta.get("block_influence")
    if recorded and len(recorded) == model.config.n_layer:
        return recorded
    return block_influence(model, [(prompt, answer)])


def worth_of(args, model, prompt, answer):
    """What each span of the prompt is worth to the dense answer: "size", "values", nats a token.

    The size is None, and nothing measured, where --spans says so.
    """
    if not args.spans or not answer:
        return {"size": None, "values": []}
    size = max(SPAN, -(-len(prompt) // args.spans))
    print(f"worth of spans of {size} tokens", flush=True)
    return {"size": size, "values": span_worth(model, prompt, answer, size).tolist()}


def collect(args, model, tokenizer):
    """Run the prompt, pruned and dense -> what report.json tells. The model is routed before."""
    routing = model.routing
    prompt = pick_prompt(args, tokenizer)
    print(f"prompt: {len(prompt)} tokens", flush=True)

    # the prompt's pass, and who computed what in it
    meter = Meter(model)
    _, computed = prefill_with_map(model, prompt, meter=meter)

    # greedy answers; the dense one is what both are then compared along
    answers, states = {}, {}
    for name in ("pruned", "dense"):
        model.routing = routing
        if name == "dense":
            model.use()
        ids = model.generate([prompt], args.max_new_tokens)[0]
        answers[name] = {"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids}
        print(f"{name} answer: {len(ids)} tokens", flush=True)
    sample = [(prompt, answers["dense"]["ids"])]
    states["dense"] = response_states(model, sample)[0]
    blocks = influence(model, routing.schedule, prompt, answers["dense"]["ids"])
    speed = prefill_times(model, routing, prompt, args.rounds)
    model.routing = routing
    states["pruned"] = response_states(model, sample)[0]
    with torch.inference_mode():
        kl = float(response_kl(model, states["dense"], states["pruned"]).mean())
        worse = nll(model, states["pruned"], sample) - nll(model, states["dense"], sample)

    worth = worth_of(args, model, prompt, answers["dense"]["ids"])

    special = set(tokenizer.all_special_ids)
    return {
        "method": method_of(routing),
        "artefacts": made_from(routing),
        "tokens": token_texts(tokenizer, prompt),
        "special": [i for i, token in enumerate(prompt) if token in special],
        # a string a block, a letter a token: 1 where it computes the block
        "kept": ["".join(map(str, row)) for row in computed.int().tolist()],
        "worth": worth,
        "skipped": meter.mean("prefill"),
        "flops_saved": meter.saved("prefill"),
        "quality": {"kl": kl, "ppl_ratio": math.exp(worse)},
        "speed": {**speed, "bound": flops_bound(model, meter)},
        "answers": answers,
        "schedule": {"sparsity": routing.schedule.sparsity, "block_influence": blocks},
    }


# ------------------------------------------------------------------------------------------------


def load_report(path):
    """The content of a report.json. FTPError where its parts do not fit each other."""
    report = load_json(path, "ftp-report-1", "--from_json", REPORT_FORM)
    tokens, blocks = len(report["tokens"]), len(report["kept"])
    fits = all(len(row) == tokens and set(row) <= {"0", "1"} for row in report["kept"])
    schedule = report["schedule"]
    per_block = {blocks, len(schedule["sparsity"]), len(schedule["block_influence"])}
    worth = report["worth"]
    spans = len(spans_of(tokens, worth["size"])) if worth["size"] else 0
    check(tokens and blocks and fits and len(per_block) == 1 and len(worth["values"]) == spans,
          f"--from_json: {path} is damaged (its map, tokens, worth and schedule differ in size); "
          "make it again without --from_json")
    return report


def write_page(path, html):
    """Write report.html atomically; FTPError where it is too large to be opened with ease."""
    data = html.encode("utf-8", "replace")
    check(len(data) < LARGEST, f"--file: the page would have {len(data) / 1e6:.1f} MB; "
                               "give a shorter prompt, or fewer --eval and --bench files")
    save_files({path: lambda part: part.write_bytes(data)})
    return len(data)


def main():
    args = get_args()
    check_args(args)

    # what was measured is read first: a mistake there shall not wait for the model
    evals = read_results(args.eval, "ftp-eval-1", "--eval")
    benches = read_results(args.bench, "ftp-bench-1", "--bench")
    check_same(evals, args.eval)

    # the first step needs the model, the second one its traces alone
    path = Path(args.out_dir) / "report.json"
    if args.from_json:
        report = load_report(path)
    else:
        model, config = start(args)
        what = use_pruned(args, model)
        report = {"format": "ftp-report-1", "config": config, "what": what,
                  **collect(args, model, load_tokenizer(args.model))}
        save_json(path, report)

    size = write_page(path.with_suffix(".html"), page(report, evals, benches))
    print(f"{len(report['tokens'])} tokens, {100 * report['skipped']:.1f} % of tokens and blocks "
          f"skip, {100 * report['flops_saved']:.1f} % of the prompt's FLOPs saved")
    print(f"-> {path.with_suffix('.html')} ({size / 1e3:.0f} kB), {path}")


if __name__ == "__main__":
    run(main)
