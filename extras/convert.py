"""A GGUF file (llama.cpp's format, quantised or not) as a Hugging Face folder, dequantised.

    python extras/convert.py Llama-3.2-1B-Instruct-Q4_K_M.gguf my/folder
    python search_scheduler.py --model Llama-3.2-1B-Instruct-Q4_K_M.gguf   # the same, once

In: a GGUF file. Out: a folder to give as --model, or to any program that reads Hugging Face's.
It takes a minute, and the size of the dequantised weights in memory and on disk.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib.files import check
from lib.gguf import from_gguf
from lib.stage import Parser, run


def get_args():
    p = Parser(__doc__)
    p.add_argument("gguf", help="GGUF file")
    p.add_argument("folder", help="new folder to write")
    # float16 loses nothing that matters: the scales of GGUF's blocks are float16 themselves
    p.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"],
                   help="dtype of the written weights")
    return p.parse_args()


def main():
    args = get_args()
    check(Path(args.gguf).is_file(), f"{args.gguf}: no such file; give a .gguf file")
    check(not Path(args.folder).exists(), f"{args.folder}: exists already; give a new folder")
    from_gguf(args.gguf, args.folder, getattr(torch, args.dtype))
    print(f"{args.folder} is ready: give it as --model")


if __name__ == "__main__":
    run(main)
