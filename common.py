"""What every stage shares: flags, the banner, seeds, dtype choice, progress, and how mistakes end."""
import argparse
import datetime
import functools
import hashlib
import json
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from model_ftp import Forecaster, FTPError, FTPModel, load_json, save_json


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, whose help shows defaults, and which takes no abbreviations."""
    def __init__(self, doc, **kw):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **kw)

    def error(self, message):
        sys.exit(complain(message))

    def common(self, out_dir="out", dtype="auto"):
        """The flags that mean the same in every script."""
        self.add_argument("--model", default="smollm2", help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
        self.add_argument("--out_dir", default=out_dir, help="folder of the artefacts")
        self.add_argument("--seed", type=int, default=0, help="seed of everything random")
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
        self.add_argument("--dtype", default=dtype, choices=["auto", "float32", "bfloat16", "float16"],
                          help="auto: bfloat16 where the device computes in it, else float32")
        self.add_argument("--threads", type=int, default=0, help="CPU threads, 0: all cores")
        return self

    def routing(self):
        """How a schedule and router are applied; defaults as FTPModel.use()."""
        self.add_argument("--prefill", default="topk", choices=["topk", "argmax"], help="prompt: quota, or the router's own decision")
        self.add_argument("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
        self.add_argument("--one_pass", action="store_true", help="decide all blocks from the scores of block 0")
        self.add_argument("--mismatch", action="store_true", help="run a router under another --kv, --one_pass or forecast than it was trained with")
        self.add_argument("--forecaster", default=None, help="forecast of skipped tokens (fit_forecaster.py), best with --kv keep")
        return self


@functools.lru_cache
def load_forecaster(path):
    return Forecaster.load(path) if path else None


def routing_of(args, learned=True):
    """The routing() flags as keywords of FTPModel.use(); only a trained router can decide by argmax."""
    return dict(prefill=args.prefill if learned else "topk", kv=args.kv, one_pass=args.one_pass, forecaster=load_forecaster(args.forecaster),
                mismatch=args.mismatch)


def complain(e):
    """Print one line about a mistake; returns exit code 2."""
    text = " ".join(str(e).encode("utf-8", "backslashreplace").decode().split())
    print(f"{Path(sys.argv[0]).name}: error: {text if len(text) < 700 else text[:350] + ' ... ' + text[-250:]}", file=sys.stderr)
    return 2


kept, go_on = {}, []  # file: what it holds, as stages save what they can go on from; and the flag that then goes on


def run(main):
    """Run a stage's main() so that expected mistakes end in one line and code 2, Ctrl-C and SIGTERM in one line that says what was kept
    and how to go on, and the shell's codes 130 and 143."""
    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one does not disturb the ending
        raise KeyboardInterrupt(number)

    kept.clear()
    old, code = [(n, signal.signal(n, stop)) for n in (signal.SIGINT, signal.SIGTERM)], 0
    try:
        main()
    except FTPError as e:
        code = complain(e)
    except KeyboardInterrupt as e:
        code = 128 + (e.args or (signal.SIGINT,))[0]
        held = ", ".join(f"{path} ({what})" for path, what in kept.items()) or "nothing, no step was complete"
        again = shlex.join(["python", *sys.argv, *(f for f in go_on if kept and f not in sys.argv)])
        print(f"{Path(sys.argv[0]).name}: stopped. Kept: {held}. To go on: {again}", file=sys.stderr)
    finally:
        for n, handler in old:
            signal.signal(n, handler)
    if code:
        sys.exit(code)


def digest(o):
    """Short hash of a JSON value: whether a resumed run sees the same data, and whether its state is undamaged."""
    return hashlib.sha256(json.dumps(o, sort_keys=True).encode()).hexdigest()[:12]


def save_progress(path, kind, state, what):
    """Write what a stage goes on from with --resume; `what` tells the user how far it is."""
    save_json(path, {"format": kind, **state, "digest": digest(state)})
    kept[path] = what


def load_progress(path, kind):
    """What save_progress() wrote, to the last bit."""
    o = load_json(path, kind, "--resume", {"digest": str, "settings": dict})
    state = {k: v for k, v in o.items() if k not in ("format", "digest")}
    check(digest(state) == o["digest"], f"--resume: {path} is damaged; start again without --resume")
    return state


def check(ok, message):
    """FTPError with `message` unless ok."""
    if not ok:
        raise FTPError(message)


def pick_dtype(name, device):
    """dtype and the reason for it."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if torch.device(device).type == "cuda":
        ok = torch.cuda.is_bf16_supported()
        return (torch.bfloat16 if ok else torch.float16), f"{torch.cuda.get_device_name(device)} computes in it"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has bfloat16 instructions"
    return torch.float32, "this CPU has no bfloat16 instructions"


def commit():
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=here, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name():
    try:
        line = next(s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name"))
        return line.split(":")[1].strip()
    except (OSError, StopIteration):
        return platform.processor()


def versions(device, dtype, why="asked for"):
    """What produced an artefact, printed as a banner."""
    info = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads",
            "dtype": str(dtype).removeprefix("torch."), "dtype_reason": why, "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    print(" | ".join(f"{k} {v}" for k, v in info.items()))
    return info


def start(args, build=None):
    """Seeds, threads, banner, and the model: loaded from args.model, or build(dtype, device). Returns it with the config to store."""
    go_on[:] = ["--resume"] if hasattr(args, "resume") else []
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise FTPError(f"--device {args.device}: no such device; give cpu, cuda or cuda:1") from None
    check(device.type != "cuda" or torch.cuda.is_available(), f"--device {args.device}: no CUDA here; give --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    dtype, why = pick_dtype(args.dtype, device)
    info = versions(device, dtype, why)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    model = build(dtype, device) if build else FTPModel.from_pretrained(args.model, dtype=dtype, device=device)
    return model, {**info, "settings": vars(args), "model": model.name, "fingerprint": model.fingerprint}


def bar(it=None, **kw):
    """A tqdm bar with rate and ETA on a terminal; silent in a log."""
    return tqdm(it, disable=not sys.stderr.isatty(), dynamic_ncols=True, **kw)


class Every:
    """true() at most once in `seconds`: for progress lines in logs, where a bar is silent."""
    def __init__(self, seconds=20):
        self.seconds, self.last = seconds, time.time()

    def true(self):
        if time.time() - self.last < self.seconds:
            return False
        self.last = time.time()
        return True
