"""Quality of the pruned model beside the dense one: choice tasks, perplexity, KL, agreement.

    python evaluate.py --schedule out/schedule_ft.json --router out/router.safetensors
    python evaluate.py --tasks arc_easy,hellaswag,mmlu --limit 500 --rows static,ftp,ftp_decode
    python evaluate.py --tasks mine=items.jsonl --text book.txt --protocol joint
    python evaluate.py --tasks lambada_openai --floor --text Salesforce/wikitext:wikitext-2-raw-v1
    python evaluate.py --model out/export                     # a folder that brings its own routing
    torchrun --nproc_per_node 8 evaluate.py --tasks hellaswag,mmlu       # the items over 8 GPUs

In: a model, a schedule, a router. Out: out/eval.json, and a table of these rows:

    dense       always
    cut         dense, of a prompt without its older tokens: as many go as the schedule's mean says
    uniform     static router (position alone), uniform schedule of the same mean
    static      static router, --schedule
    random      --schedule, tokens drawn at random
    attention   --schedule, tokens of the largest attention score
    ftp         --schedule, --router: the prompt is routed, decoding is dense
    ftp_decode  decoded tokens skip too, by threshold
    rule        decoded tokens skip too, by the paper's rule

Protocol causal: a context is routed as a prompt, the scored text runs as decoded tokens. joint (the
paper's): context and continuation are routed together, which no generation can reproduce.

Perplexity is the field's: WikiText-2 raw, its rows joined by blank lines, tokenised once without a
start token, cut in windows that do not overlap, exp of the mean loss of all scored tokens. A
window's first --context tokens are the prompt (routed), the --scored ones after it run as decoded
tokens. --context 1 --scored 2047 --nwindows 0 is the usual number of a dense model at length 2048;
nothing is routed then.

Retention is the mean over tasks of score / dense score; corrected, of what both have above chance.
Tasks that need their context (LAMBADA, documents, yes/no questions) have a mean of their own.
--floor scores every choice task without its question, too: what a model keeps that skips the whole
prompt.
"""
from dataclasses import replace
from functools import partial

import torch

from lib.artefacts import SELECTIONS, Schedule
from lib.calibration import calibrate_decode
from lib.checkpoint import exported_routing, find_model
from lib.data import load_samples, load_tokenizer
from lib.evaluation import (
    Data,
    Row,
    add_floor,
    add_gain,
    check_length,
    evaluate_rows,
    load_tasks,
    names_of,
    save_rows,
    table,
    text_names,
    text_windows,
)
from lib.files import check
from lib.routing import thresholds_of
from lib.skipped import Forecaster
from lib.stage import Parser, number, run, start, whole
from model_ftp import Router

ROWS = {  # name: (schedule, router, how decoded tokens are routed)
    "dense": (None, "static", "dense"),
    "cut": ("cut", "static", "dense"),
    "uniform": ("uniform", "static", "dense"),
    "static": ("given", "static", "dense"),
    "random": ("given", "random", "dense"),
    "attention": ("given", "attention", "dense"),
    "ftp": ("given", "given", "given"),
    "ftp_decode": ("given", "given", "threshold"),
    "rule": ("given", "given", "rule"),
}


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("rows, and how they are routed").add_argument
    add("--rows", default=None,
        help=f"comma list of {','.join(ROWS)}; default uniform,static,ftp,ftp_decode, or for a "
             "model folder that brings its routing (extras/export.py) ftp")
    add("--protocol", default="causal", choices=["causal", "joint"], help="see above")
    # where neither of these two is given, a model folder that brings its routing decides them and
    # the four after them
    add("--schedule", default=None,
        help="schedule of stage 1 or 3; default out/schedule_ft.json, or the model folder's")
    add("--router", default=None,
        help=f"router of stage 2, or one of {', '.join(SELECTIONS)}; default "
             "out/router.safetensors, or the model folder's")
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or the router's own decision")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was trained with")
    # row ftp_decode: thresholds of the router's margin, by which decoded tokens skip
    add("--decode_sparsity", type=number("[0, 1)"), default=None,
        help="calibrate thresholds to this mean sparsity of decoded tokens, not the schedule's")
    add("--calibration_samples", type=whole("[1, inf)"), default=64,
        help="training samples that this calibration runs on")

    # how far from the dense model, token by token
    add = p.add_argument_group("KL, agreement and perplexity of responses").add_argument
    add("--data", default="self",
        help="samples, of which the held-out part is taken: "
             '"self" (own answers), .json/.jsonl or datasets ids, commas between')
    add("--nsamples", type=whole("[1, inf)"), default=None, help="samples, default all")
    add("--max_response", type=whole("[1, inf)"), default=64, help="response tokens used")

    # 256 routed tokens before 64 scored ones: as long as a prompt with its answer
    add = p.add_argument_group("perplexity of texts").add_argument
    add("--text", default="passages",
        help='comma list of "passages" (of the held-out prompts), .txt, .jsonl, or datasets '
             "id[:config[:split]]")
    add("--context", type=whole("[1, inf)"), default=256, help="routed tokens of a window")
    add("--scored", type=whole("[1, inf)"), default=64, help="scored tokens of a window")
    add("--nwindows", type=whole("[0, inf)"), default=100, help="windows at most, 0: all")

    add = p.add_argument_group("tasks").add_argument
    add("--tasks", default="",
        help="comma list of task names (by datasets id) or name=file.jsonl")
    add("--limit", type=whole("[1, inf)"), default=None, help="items a task, default all")
    add("--floor", action="store_true",
        help="score each choice task with its question removed, too")
    add("--truncate", action="store_true",
        help="cut the context of an item that exceeds the model's length at its left, instead of "
             "refusing it")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--resume", action="store_true",
        help="keep the rows that eval_state.json holds from the same settings, data and commit")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# which rows, and how each is routed


def brought_routing(args):
    """Keywords of FTPModel.use() that the model folder brings, None where the flags decide."""
    if args.schedule or args.router:
        return None
    brought = exported_routing(find_model(args.model))
    if brought is None:
        return None
    own = [name for name in ("prefill", "kv", "one_pass", "forecaster") if name in args.typed]
    check(not own, f"--{', --'.join(own)}: {args.model} brings its own routing, which this does "
                   "not change; give --schedule and --router too")
    return brought


def row_names(args, brought):
    """The rows to measure beside the dense one. FTPError on an unknown name."""
    default = "uniform,static,ftp,ftp_decode" if brought is None else "ftp"
    # an empty --rows that is typed asks for the dense row alone
    names = names_of(default if args.rows is None else args.rows)
    unknown = [name for name in names if name not in ROWS]
    check(not unknown, f"--rows {args.rows}: unknown row {', '.join(unknown)}; choose from "
                       f"{','.join(ROWS)}")
    return [name for name in names if name != "dense"]


def load_routing(args, brought, names):
    """Keywords of FTPModel.use(), with the artefacts loaded that the rows need."""
    how = brought or {
        "schedule": args.schedule or "out/schedule_ft.json",
        "router": args.router or "out/router.safetensors",
        "forecaster": args.forecaster,
        "prefill": args.prefill,
        "decode": "dense",
        "kv": args.kv,
        "one_pass": args.one_pass,
        "mismatch": args.mismatch}
    # eval.json and --resume tell what ran, wherever it came from
    for name in ("prefill", "kv", "one_pass"):
        setattr(args, name, how[name])
    for name in ("schedule", "router", "forecaster"):
        setattr(args, name, how[name] and str(how[name]))

    # once for all rows, and only what one of them needs: --rows "" runs without artefacts
    loaded = dict(how, schedule=None, router="static", forecaster=None)
    if any(ROWS[name][0] for name in names):
        loaded["schedule"] = Schedule.load(how["schedule"])
    if any(ROWS[name][1] == "given" for name in names):
        trained = str(how["router"]) not in SELECTIONS
        loaded["router"] = Router.load(how["router"]) if trained else str(how["router"])
    if how["forecaster"]:
        loaded["forecaster"] = Forecaster.load(how["forecaster"])
    return loaded


def use_row(model, name, how, args, tokenizer=None):
    """The model, routed as row `name` is; without a tokenizer its decoding stays dense."""
    which, router, decode = ROWS[name]
    schedule = how["schedule"]
    if which == "cut":
        return cut(model, schedule)
    if which == "uniform":
        schedule = Schedule.uniform(model, schedule.mean, schedule.first)
    if router == "given":
        router = how["router"]
    if decode == "given":
        decode = how["decode"]

    trained = isinstance(router, Router)
    check(decode != "threshold" or trained,
          f"--rows {name}: only a trained router has thresholds; give one, or leave the row out")
    settings = {key: how[key] for key in ("kv", "one_pass", "forecaster", "mismatch")}
    settings["prefill"] = how["prefill"] if trained else "topk"   # argmax is a trained one's
    settings["seed"] = args.seed
    if tokenizer is None:                     # do the artefacts belong to the model at all?
        return model.use(schedule, router, **settings)
    if decode != "threshold" or stored_thresholds(schedule, router, args):
        return model.use(schedule, router, decode=decode, **settings)
    samples = load_samples(args.data, model, tokenizer, "train", args.calibration_samples,
                           max_response=args.max_response)
    model.use(schedule, router, **settings)    # after them: a model that writes samples is dense
    calibrate_decode(model, samples, args.decode_sparsity)
    return model


def cut(model, schedule):
    """The model that never sees a prompt's older tokens, but for the first ones: what a shorter
    prompt costs. Positions stay, so that this is a schedule that skips block 0 too."""
    model.use(Schedule.uniform(model, schedule.mean, schedule.first))
    n = model.config.n_layer
    model.routing = replace(model.routing, sparsity=(schedule.mean,) * n, leader=tuple(range(n)))
    return model


def stored_thresholds(schedule, router, args):
    """Whether the artefacts hold the thresholds that are asked for."""
    return args.decode_sparsity is None and thresholds_of(schedule, router) is not None


def made_from(name, how):
    """Ids of the artefacts of a row: schedule, router, forecaster."""
    # a selection without training has no id: the row's name tells which it is
    given = ROWS[name][1] == "given" and isinstance(how["router"], Router)
    forecaster = how["forecaster"]
    return [how["schedule"].id, how["router"].id if given else None,
            forecaster and forecaster.id]


def say_routing(args, how):
    """Print what is in use."""
    if how["schedule"] is None:
        print("routing: none, the dense row alone")
        return
    print(f"routing: schedule {args.schedule} (mean sparsity {how['schedule'].mean:.4f}), "
          f"router {args.router}, forecaster {args.forecaster}, prefill {how['prefill']}, "
          f"decode {how['decode']}, kv {how['kv']}, one_pass {how['one_pass']}", flush=True)


# ------------------------------------------------------------------------------------------------


def main():
    args = get_args()

    # what can be refused before the model is there: unknown names, artefacts that are not whole
    brought = brought_routing(args)
    names = row_names(args, brought)
    tasks, texts = load_tasks(args.tasks, args.limit), text_names(args.text)
    how = load_routing(args, brought, names)

    # artefacts of another model: minutes of the dense row come first, and would be lost
    model, config = start(args)
    say_routing(args, how)
    for name in names:
        use_row(model, name, how, args)

    # what is measured on: held-out samples, windows of texts, items that fit the model
    tokenizer = load_tokenizer(args.model)
    samples = load_samples(args.data, model, tokenizer, "heldout", args.nsamples,
                           max_response=args.max_response)
    for task, items in tasks.items():
        check_length(model, tokenizer, task, items, args.truncate)
    check(args.context + args.scored <= model.config.max_len,
          f"--context {args.context} and --scored {args.scored}: the model takes "
          f"{model.config.max_len} tokens; lower them")
    texts = text_windows(texts, tokenizer, args.context, args.scored, args.nwindows)

    # one row after the other, each saved when it is there
    todo = [Row(name, made_from(name, how), partial(use_row, model, name, how, args, tokenizer))
            for name in names]
    data = Data(tasks, texts, samples)
    rows = evaluate_rows(todo, model, tokenizer, args, data, config["commit"])

    # the table, and what it does not show: differences of rows on the same samples
    print(table(rows, tasks, texts))
    if args.floor and tasks:
        add_floor(rows)
    add_gain(rows, "ftp", ("uniform", "static"))
    save_rows(f"{args.out_dir}/eval.json", config, rows)


if __name__ == "__main__":
    run(main)
