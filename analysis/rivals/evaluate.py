"""Quality of rival methods beside the dense model and our rows: as evaluate.py, with --peer.

    python analysis/rivals/evaluate.py --rows static,ftp --peer laco=out/baselines/laco_0.30
    python analysis/rivals/evaluate.py --rows "" --peer shortgpt=artifacts/rivals/shortgpt_0.30.json
    python analysis/rivals/evaluate.py --peer lazyllm=out/baselines/lazyllm_0.30.json+progressive
    python analysis/rivals/evaluate.py --rows "" --peer mod=out/schedule.json+out/router.safetensors

In: what make.py wrote, or any schedule with a router file, random, attention or progressive.
Out: eval.json and a table, rows and protocol as in evaluate.py, whose flags these are.

A schedule that removes blocks or sub-blocks gives two rows: NAME, where they are gone for every
token, and NAME_prompt, where they are gone for prompts alone. What a pruned folder saves is counted
against the original model.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from analysis.rivals.peers import PEER, check_names, load_peers
from evaluate import (
    ROWS,
    brought_routing,
    load_routing,
    made_from,
    row_names,
    say_routing,
    use_row,
)
from lib.artefacts import SELECTIONS
from lib.data import load_samples, load_tokenizer
from lib.evaluation import (
    Data,
    Row,
    add_floor,
    add_gain,
    check_length,
    evaluate_rows,
    load_tasks,
    save_rows,
    table,
    text_names,
    text_windows,
)
from lib.files import check
from lib.stage import Parser, number, run, start, whole


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("rivals").add_argument
    add("--peer", action="append", default=[], metavar=PEER,
        help="a pruned model: a schedule (and a router file, random, attention or progressive), "
             "or a model folder of make.py; may be repeated")

    add = p.add_argument_group("rows beside them, and how tokens are routed").add_argument
    add("--rows", default=None,
        help=f"comma list of {','.join(ROWS)}; default uniform,static,ftp,ftp_decode, or for a "
             "model folder that brings its routing (extras/export.py) ftp")
    add("--protocol", default="causal", choices=["causal", "joint"], help="see evaluate.py")
    add("--schedule", default=None,
        help="schedule of stage 1 or 3; default out/schedule_ft.json, or the model folder's")
    add("--router", default=None,
        help=f"router of stage 2, or one of {', '.join(SELECTIONS)}; default "
             "out/router.safetensors, or the model folder's")
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or a trained router's own decision")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was trained with")
    add("--decode_sparsity", type=number("[0, 1)"), default=None,
        help="calibrate ftp_decode to this mean sparsity instead of the schedule's")
    add("--calibration_samples", type=whole("[1, inf)"), default=64,
        help="training samples that this calibration runs on")

    add = p.add_argument_group("KL, agreement and perplexity of responses").add_argument
    add("--data", default="self",
        help="samples, of which the held-out part is taken: "
             '"self" (own answers), .json/.jsonl or datasets ids, commas between')
    add("--nsamples", type=whole("[1, inf)"), default=None, help="samples, default all")
    add("--max_response", type=whole("[1, inf)"), default=64, help="response tokens used")

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
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--resume", action="store_true",
        help="keep the rows that eval_state.json holds from the same settings, data and commit")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None, help="not here: rivals run on one device")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


def settings_of(how, args):
    """Keywords of FTPModel.use() that rivals run under, from those of our own rows."""
    names = ("prefill", "kv", "one_pass", "forecaster", "mismatch")
    return {name: how[name] for name in names} | {"seed": args.seed}


def our_rows(names, model, how, args, tokenizer):
    """Rows of the model itself, as evaluate.py has them."""
    return [Row(name, made_from(name, how), partial(use_row, model, name, how, args, tokenizer))
            for name in names]


def rival_rows(peers, model, how, args):
    """Rows of the rivals; a folder's weights are loaded when its turn comes."""
    settings, forecaster, rows = settings_of(how, args), how["forecaster"], []
    for peer in peers:
        # what a folder saves is counted against the original's shape
        base = model.config if peer.folder is not None else None
        artefacts = [*peer.artefacts, forecaster and forecaster.id]
        rows.append(Row(peer.name, artefacts, partial(peer.ready, model, settings), base))
    return rows


def without_peers(args):
    """The flags that a resumed run must share: it may add rivals, and leave some out."""
    flags = {flag: value for flag, value in vars(args).items() if flag != "peer"}
    return argparse.Namespace(**flags)


def main():
    args = get_args()

    # what can be refused before the model is there: unknown names, artefacts that are not whole
    check(not args.device_map, "--device_map: rivals run on one device; leave it out")
    brought = brought_routing(args)
    names, peers = row_names(args, brought), load_peers(args.peer)
    check_names(peers, ROWS, "a row's name")
    tasks, texts = load_tasks(args.tasks, args.limit), text_names(args.text)
    how = load_routing(args, brought, names)

    # artefacts of another model
    model, config = start(args)
    if names:
        say_routing(args, how)
    for name in names:
        use_row(model, name, how, args)
    for peer in peers:
        peer.check(model, settings_of(how, args))

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
    todo = our_rows(names, model, how, args, tokenizer) + rival_rows(peers, model, how, args)
    data = Data(tasks, texts, samples)
    rows = evaluate_rows(todo, model, tokenizer, without_peers(args), data, config["commit"])

    # the table, and what it does not show: differences of rows on the same samples
    print(table(rows, tasks, texts))
    if args.floor and tasks:
        add_floor(rows)
    add_gain(rows, "ftp", ("uniform", "static"))
    save_rows(f"{args.out_dir}/eval.json", config, rows)


if __name__ == "__main__":
    run(main)
