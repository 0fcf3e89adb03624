"""Rival methods, from the same calibration samples at the same share of prompt FLOPs saved.

    python analysis/rivals/make.py --flops_saved 0.22,0.30,0.40   # but swiftkv -> out/baselines/
    python analysis/rivals/make.py --methods blockpruner --nsamples 64 --resume
    python analysis/rivals/make.py --methods swiftkv --nsamples 500 --max_prompt 256
    python analysis/rivals/evaluate.py --rows "" --peer shortgpt=out/baselines/shortgpt_0.30.json
    python analysis/rivals/evaluate.py --peer slicegpt=out/baselines/slicegpt_0.30
    python analysis/rivals/benchmark.py --peer lazyllm=out/baselines/lazyllm_0.30.json+progressive

In: a model and calibration text. Out: a schedule or a model folder for each method and share:

    shortgpt     ShortGPT (arXiv 2403.03853): the blocks of lowest Block Influence go   schedule
    blockpruner  BlockPruner (2406.10594): sub-blocks go one by one, each time the one
                 whose absence leaves the best perplexity                               schedule
    lazyllm      LazyLLM-like (2407.14057): prompt tokens drop out for good, in three
                 steps, by the last token's attention                                   schedule
    laco         LaCo (2402.11187): groups of blocks merged from the top; the paper's
                 sum of differences                                                     folder
    laco_last    LaCo as its notebook runs it: updated in place the sum telescopes, and
                 the last block of the group stands for all                             folder
    slicegpt     SliceGPT (2401.15024): each sub-block in its own principal components,
                 of which the first stay                                                folder
    width        structured width pruning, LLM-Pruner-like (2305.11627): MLP channels
                 (and K/V heads) by |gradient x weight|                                 folder
    swiftkv      SwiftKV (2410.03960): late keys and values of one earlier state, by
                 W_Q, W_K, W_V and a norm that --swift_steps of distillation train      weights

None but swiftkv is trained. Each takes the size nearest to the target; the share that it realises
on the calibration prompts is stored. Folders but slicegpt's load in transformers too.

Others need no script: first + recent under a uniform or BI schedule (search_scheduler.py --method
uniform or bi --flops_saved), random and attention selection (--peer NAME=SCHEDULE+random), and a
Mixture-of-Depths-like router that reads the hidden state (train_router.py --inputs hidden, then
--peer NAME=SCHEDULE+ROUTER).
"""
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from analysis.rivals.common import Pruned, read_tensors, realised, write_folder
from analysis.rivals.laco import laco
from analysis.rivals.lazyllm import LazyModel, lazyllm
from analysis.rivals.removal import PartModel, blockpruner, shortgpt
from analysis.rivals.slicegpt import slicegpt
from analysis.rivals.swiftkv import TRAINED, Swift, SwiftModel, swiftkv
from analysis.rivals.width import width
from lib.checkpoint import find_model
from lib.data import load_samples, load_tokenizer
from lib.files import check
from lib.forecast import Tuning
from lib.stage import Parser, number, numbers, run, start, whole, words

UNTRAINED = ("shortgpt", "blockpruner", "lazyllm", "laco", "laco_last", "slicegpt", "width")
METHODS = (*UNTRAINED, "swiftkv")
FOLDERS = ("laco", "laco_last", "slicegpt", "width")    # methods that change weights


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("what is made").add_argument
    add("--methods", default=",".join(UNTRAINED), type=words,
        help="comma list of the methods above; swiftkv is asked for alone, with more samples")
    # up to a share at which every method can follow
    add("--flops_saved", default="0.30", type=numbers("(0, 0.45]"),
        help="comma list of targets: share of the prompts' block FLOPs saved")
    add("--kv_heads", default=0, type=whole("[0, inf)"),
        help="K/V heads (with their queries) that width takes from a block beside the channels")
    add("--resume", action="store_true", help="go on with an interrupted blockpruner")

    add = p.add_argument_group("training of swiftkv").add_argument
    add("--swift_steps", default=400, type=whole("[0, inf)"), help="steps of distillation")
    add("--swift_lr", default=3e-4, type=number("(0, inf)"), help="largest learning rate")
    add("--swift_batch", default=4, type=whole("[1, inf)"), help="samples a step")
    add("--swift_trained", default=",".join(TRAINED), type=words,
        help=f"comma list of what is trained, of {', '.join(TRAINED)}")
    add("--swift_temperature", default=2.0, type=number("(0, inf)"), help="temperature of the KL")
    add("--swift_mse", default=1.0, type=number("[0, inf)"),
        help="weight of the squared error of the states before the last block")

    add = p.add_argument_group("calibration data").add_argument
    add("--data", default="self",
        help='"self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, '
             "commas between")
    add("--nsamples", default=32, type=whole("[1, inf)"), help="calibration samples")
    add("--max_prompt", default=512, type=whole("[1, inf)"), help="longest prompt taken, tokens")
    add("--max_response", default=64, type=whole("[1, inf)"), help="response tokens used")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out/baselines", help="folder of the artefacts")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None, help="not here: rivals are made on one device")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def generators(args, source):
    """{method: function (model, samples, levels) that yields level, artefact, notes}."""
    # what a resumed blockpruner must have in common with the interrupted one
    free = ("resume", "threads", "out_dir", "methods", "flops_saved")
    settings = {flag: value for flag, value in vars(args).items()
                if flag not in free and not flag.startswith("swift_")}
    state = Path(args.out_dir) / "blockpruner_state.json"
    changes_weights = set(args.methods) & set(FOLDERS)
    tensors = read_tensors(source) if changes_weights else None
    return {
        "shortgpt": shortgpt,
        "blockpruner": partial(blockpruner, state_path=state, resume=args.resume,
                               settings=settings),
        "lazyllm": lazyllm,
        "laco": partial(laco, tensors=tensors),
        "laco_last": partial(laco, tensors=tensors, last=True),
        "slicegpt": partial(slicegpt, tensors=tensors),
        "width": partial(width, tensors=tensors, folder=source, kv_heads=args.kv_heads),
        "swiftkv": partial(swiftkv, how=Tuning(args.swift_steps, args.swift_lr, args.swift_batch,
                                               seed=args.seed),
                           temperature=args.swift_temperature, mse=args.swift_mse,
                           trained=args.swift_trained),
    }


def save(made, path, meta, model, samples, source):
    """Write a method's artefact to `path` -> where it is, and the share of FLOPs it saves."""
    if isinstance(made, Pruned):
        return path, write_folder(source, path, made, meta, model, samples)
    if isinstance(made, Swift):
        runner, path = SwiftModel.of(model, made), f"{path}.safetensors"
    else:
        kind = LazyModel if meta["method"] == "lazyllm" else PartModel
        runner, path = kind.of(model).use(made), f"{path}.json"
    saved = realised(runner, samples)
    made.meta = meta | {"flops_saved": saved}
    made.save(path)
    return path, saved


def main():
    args = get_args()
    check(set(args.methods) <= set(METHODS),
          f"--methods {','.join(args.methods)}: of {', '.join(METHODS)}")
    check(set(args.swift_trained) <= set(TRAINED),
          f"--swift_trained {','.join(args.swift_trained)}: of {', '.join(TRAINED)}")
    check(not args.device_map, "--device_map: rivals are made on one device; leave it out")

    # the model as it is: its weights are read, and some methods change them
    model, config = start(args, pack=False)
    source = find_model(args.model)
    samples = load_samples(args.data, model, load_tokenizer(args.model), "train", args.nsamples,
                           max_prompt=args.max_prompt, max_response=args.max_response,
                           seed=args.seed)

    # one method after the other, each artefact saved when it is there
    methods = generators(args, source)
    for method in args.methods:
        began = time.time()
        for level, made, notes in methods[method](model, samples, args.flops_saved):
            seconds = round(time.time() - began, 1)
            meta = {**config, "method": method, "flops_saved_target": level, **notes,
                    "seconds": seconds}
            path = Path(args.out_dir) / f"{method}_{level:.2f}"
            path, saved = save(made, path, meta, model, samples, source)
            brief = {key: value for key, value in notes.items()
                     if not isinstance(value, (list, tuple))}
            print(f"{method:12s} target {level:.2f}, {saved:.4f} of the prompts' block FLOPs "
                  f"saved, {seconds} s {brief or ''} -> {path}", flush=True)
            began = time.time()


if __name__ == "__main__":
    run(main)
