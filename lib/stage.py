"""How a stage begins and ends: flags, banner, seeds, dtype, the model; progress; and mistakes.

A mistake that a user can mend is an FTPError: one line that names the flag and the mend, code 2.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from lib.files import FTPError, check, digest, load_json, save_json
from lib.packing import pack as pack_weights
from lib.placement import PlacedModel
from lib.processes import gather, rank, world
from model_ftp import FTPModel

ROOT = Path(__file__).resolve().parent.parent

# These, and what lies in extras/ and analysis/, know no ranks.
ALONE = ("fit_late_kv.py", "benchmark.py", "sample.py")

# How data is parted, see lib/data.splits_of(); stored in each artefact.
SPLIT: dict = {"seed": 0, "of_four": ["train", "train", "watch", "heldout"]}

# {file: what it holds}: what a stage has saved so far, and the flag that goes on from it. They are
# for the line that Ctrl-C ends in, which run() prints from outside of the stage.
saved: dict = {}
go_on: list = []


# ------------------------------------------------------------------------------------------------
# flags

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A stage's docstring as it stands, and every flag's default."""


class Settings(argparse.Namespace):
    """Parsed flags, which vars() gives; in slots, which it does not, their defaults, and the set of
    those that were typed."""
    __slots__ = ("defaults", "typed")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are FTPErrors, whose help has defaults, and without abbreviations."""

    def __init__(self, doc, **kw):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **kw)
        # argparse knows -1 for a number; -1e-3 and -inf, taken for flags, would lose their interval
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def group(self, title):
        """A titled group of flags: group.add_argument(...)."""
        return self.add_argument_group(title)

    def error(self, message):
        # "argument --lr: 7: must ..." is read more easily as "--lr 7: must ..."
        raise FTPError(re.sub(r"^argument (\S+): (.*: must )", r"\1 \2", message, flags=re.DOTALL))

    def parse_args(self, args=None, namespace=None):
        """Settings: the flags as attributes."""
        settings = super().parse_args(args, namespace or Settings())
        settings.defaults = {a.dest: self.default_of(a) for a in self._actions}
        given = {word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)}
        settings.typed = {a.dest for a in self._actions if given & set(a.option_strings)}
        return settings

    def default_of(self, action):
        """A flag's default, as parse_args() gives it: the text of one goes through its type."""
        value = action.default
        return action.type(value) if action.type and isinstance(value, str) else value


def lies_in(interval):
    """A test for numbers from an interval's text: "(0, 1]", "[1, inf)".

    An infinite end must be open, so that inf lies in no interval; nan lies in none anyway.
    """
    low, high = map(float, interval[1:-1].split(","))  # once, not at every number
    with_low, with_high = interval[0] == "[", interval[-1] == "]"
    if with_low and low == -np.inf or with_high and high == np.inf:
        raise ValueError(f"{interval}: an infinite end must be open")

    def test(x):
        above = x > low or (with_low and x == low)
        below = x < high or (with_high and x == high)
        return above and below
    return test


def numeric(convert, kind, interval):
    """The argparse type of one number: `convert` reads it, and it must lie in the interval."""
    inside = lies_in(interval)

    def read(text):
        shown = text or "''"
        try:
            x = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown}: must be {kind} in {interval}") from None
        if not inside(x):
            raise argparse.ArgumentTypeError(f"{shown}: must lie in {interval}")
        return x
    return read


def listed(read):
    """The argparse type of a comma list, blanks allowed, from that of one item."""
    def read_all(text):
        return [read(item.strip()) for item in text.split(",")]
    return read_all


def number(interval):
    """argparse type: a finite number in the interval, "(0, 1]"."""
    return numeric(float, "a number", interval)


def whole(interval):
    """argparse type: a whole number in the interval, "[1, inf)"."""
    return numeric(int, "a whole number", interval)


def numbers(interval):
    """argparse type: numbers in the interval, with commas between."""
    return listed(number(interval))


def wholes(interval):
    """argparse type: whole numbers in the interval, with commas between."""
    return listed(whole(interval))


def words(text):
    """argparse type: names with commas between, at least one."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise argparse.ArgumentTypeError(f"{text!r}: must be names with commas between, none empty")
    return items


def words_or_none(text):
    """argparse type: names with commas between; "" gives none."""
    return words(text) if text.strip() else []


# ------------------------------------------------------------------------------------------------
# how a stage runs and ends

def run(main):
    """Run a stage's main() to its end, on all ranks together; exits with a code unless all is well.

    An expected mistake ends in one line and code 2. Ctrl-C and SIGTERM end in one line that says
    what was saved and how to go on, and in the shell's codes 130 and 143. A rank with a mistake
    gives it to the gather() that the others are in or come to, at the latest the one behind main().
    """
    saved.clear()
    code = 0
    with signals_stop():
        try:
            join_ranks()
            run_together(main)
        except FTPError as e:
            first = share_mistake(e)
            code = complain(first) if first.rank == rank() else 2
        except KeyboardInterrupt as e:
            number = e.args[0] if e.args else signal.SIGINT
            code = 128 + number
            if rank() == 0:
                say_stopped()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if code:
        sys.exit(code)


@contextlib.contextmanager
def signals_stop():
    """SIGINT and SIGTERM raise KeyboardInterrupt(their number); the old handlers come back."""
    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one does not disturb the ending
        raise KeyboardInterrupt(number)

    old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def join_ranks():
    """Meet the other processes where torchrun started several; only rank 0 prints from then on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    script = Path(sys.argv[0])
    alone = {ROOT / "extras", ROOT / "analysis"} & set(script.resolve().parents)
    check(script.name not in ALONE and not alone,
          f"torchrun: {script.name} runs in one process; start it with python")
    # objects travel by gloo, gradients on GPUs by nccl
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # rank 0 may be long at work before the others meet it
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    if rank():
        sys.stdout = open(os.devnull, "w")


def run_together(main):
    """main(), and the wait for the ranks that are not through yet."""
    try:
        main()
        gather(None)
    except RuntimeError:
        if world() > 1:
            # another rank has ended amid an exchange: a signal meant for all comes here in time
            time.sleep(1)
        raise


def share_mistake(e):
    """Give this rank's FTPError to the others; returns the first of them, which all then know."""
    if e.rank >= 0:  # it came through a gather(): all have it
        return e
    try:
        gather(e)
    except FTPError as first:
        return first
    return e


def complain(e):
    """Print one line about a mistake; returns exit code 2."""
    text = str(e).encode("utf-8", "backslashreplace").decode()  # a file's name may be no UTF-8
    text = " ".join(text.split())
    if len(text) >= 700:
        text = f"{text[:350]} ... {text[-250:]}"
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    return 2


def say_stopped():
    """Print what is saved, and the command that goes on from it."""
    files = [f"{path} ({what})" for path, what in saved.items()]
    start = ["python"]
    if world() > 1:
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(world()))]
    more = [flag for flag in go_on if saved and flag not in sys.argv]
    again = shlex.join([*start, *sys.argv, *more])
    name, what = Path(sys.argv[0]).name, ", ".join(files) or "nothing, no step was complete"
    print(f"{name}: stopped. Kept: {what}. To go on: {again}", file=sys.stderr)


def save_progress(path, kind, state, what):
    """Write what a stage goes on from with --resume, on rank 0; `what` tells how far it is."""
    if rank() == 0:
        save_json(path, {"format": kind, **state, "digest": digest(state)})
        saved[path] = what


def load_progress(path, kind):
    """What save_progress() wrote, to the last bit. FTPError where it is damaged."""
    o = load_json(path, kind, "--resume", {"digest": str, "settings": dict})
    state = {k: v for k, v in o.items() if k not in ("format", "digest")}
    check(digest(state) == o["digest"],
          f"--resume: {path} is damaged; start again without --resume")
    return state


# ------------------------------------------------------------------------------------------------
# progress

class Every:
    """true() at most once in `seconds`: for progress lines in logs, where a bar is silent."""

    def __init__(self, seconds=20):
        self.seconds, self.last = seconds, time.time()

    def true(self):
        if time.time() - self.last < self.seconds:
            return False
        self.last = time.time()
        return True


class Progress:
    """A tqdm bar on a terminal, a line every 30 s in a log, on rank 0: see progress()."""

    def __init__(self, items, desc, unit, total, initial, leave):
        self.items, self.desc, self.unit = items, desc, unit
        self.n = self.first = initial
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.began, self.due = time.time(), Every(30)
        on_terminal = sys.stderr.isatty() and rank() == 0
        self.in_log = rank() == 0 and not on_terminal
        self.bar = tqdm(total=self.total, initial=initial, desc=desc, unit=unit, leave=leave,
                        disable=not on_terminal, dynamic_ncols=True)

    def __iter__(self):
        try:
            for item in self.items:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n=1):
        """n more are done."""
        self.n += n
        self.bar.update(n)
        if self.in_log and self.due.true():
            print(self.line(), file=sys.stderr, flush=True)

    def line(self):
        """"search: 40 of 150 evals, 12 s left"."""
        units = self.unit + ("es" if self.unit.endswith("ch") else "s")
        seconds = time.time() - self.began
        if not self.total:
            return f"{self.desc}: {self.n} {units}, {seconds:.0f} s"
        done = max(self.n - self.first, 1)  # a resumed run knows only its own speed
        left = seconds / done * (self.total - self.n)
        return f"{self.desc}: {self.n} of {self.total} {units}, {left:.0f} s left"

    def close(self):
        self.bar.close()


def progress(items=None, desc="", unit="step", total=None, initial=0, leave=True):
    """Progress of a loop over `items`; or without them, of `total` steps told by update().

    leave: whether a finished bar stays on the terminal.
    """
    return Progress(items, desc, unit, total, initial, leave)


bar = progress


# ------------------------------------------------------------------------------------------------
# the start of a stage

def start(args, build=None, pack=True):
    """Check the machine's flags, seed, print the banner, load the model.

    args: the flags --model, --out_dir, --seed, --device, --device_map, --dtype, --threads and the
    stage's own. build(dtype, device) makes the model instead of loading args.model. With pack its
    weights are laid out for inference on CPUs, see lib/packing.py; training needs them as they are.
    Returns the model and the dictionary that the stage's artefact stores.
    """
    go_on[:] = ["--resume"] if hasattr(args, "resume") else []
    check_out_dir(args.out_dir)  # now, not after hours of work
    device = pick_device(args.device)
    alone = build is None and world() == 1
    check(not args.device_map or alone, "--device_map: places one process's checkpoint; "
          "leave it out with torchrun or --synthetic")

    set_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()
    set_seed(args.seed)

    dtype, why = pick_dtype(args.dtype, device)
    info = versions(device, dtype, why)
    print("settings:", as_flags(args) or "all as by default", flush=True)  # the artefact has all

    if build:
        model = build(dtype, device)
    elif args.device_map:
        model = PlacedModel.from_pretrained(args.model, dtype, spec=args.device_map)
    else:
        model = FTPModel.from_pretrained(args.model, dtype, device)
    if pack:
        pack_weights(model)
    info |= {"settings": vars(args), "split": SPLIT, "model": model.name,
             "fingerprint": model.fingerprint}
    return model, info


def check_out_dir(path):
    """Make the folder of the artefacts; FTPError where nothing can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # rights alone don't tell: a file system may be read-only, or full
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as e:
        raise FTPError(f"--out_dir {path}: can't be written ({e}); give another folder") from None


def pick_device(name):
    """The torch.device of --device; with several ranks each has its own GPU."""
    parts = re.fullmatch(r"cpu|cuda(?::(\d{1,2}))?", name)
    check(parts, f"--device {name}: no such device; give cpu, cuda or cuda:1")
    if name == "cpu":
        return torch.device(name)
    check(torch.cuda.is_available(), f"--device {name}: no CUDA here; give --device cpu")
    there = torch.cuda.device_count()
    if world() > 1:
        # torchrun numbers the processes of each node from 0
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        check(device.index < there, f"--device {name}: {there} GPUs are too few for the ranks of "
              "this node; lower --nproc_per_node")
        torch.cuda.set_device(device)
        return device
    check(int(parts[1] or 0) < there, f"--device {name}: there are {there} GPUs, counted from 0")
    return torch.device("cuda", int(parts[1])) if parts[1] else torch.device("cuda")


def set_threads(n):
    """n CPU threads; 0: all cores, or what OMP_NUM_THREADS says."""
    most = os.cpu_count() or 1
    check(0 <= n <= most, f"--threads {n}: must lie in [0, {most}], the cores here; 0 takes all")
    if n:
        torch.set_num_threads(n)


def set_seed(seed):
    """Seed everything random."""
    check(0 <= seed < 2 ** 32, f"--seed {seed}: must lie in [0, {2 ** 32})")  # numpy takes no more
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_dtype(name, device):
    """The dtype of --dtype and the reason for it."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if torch.device(device).type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        return dtype, f"{torch.cuda.get_device_name(device)} computes in it"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has bfloat16 instructions"
    return torch.float32, "this CPU has no bfloat16 instructions"


def keep_freed_memory():
    """Let glibc keep freed buffers instead of handing each back to the kernel.

    Zeroing fresh pages for every layer's activations takes a tenth of a prefill on CPUs. Without
    glibc nothing happens.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def versions(device, dtype, why="asked for"):
    """What produces an artefact, as a dictionary, printed as a banner."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    info = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": name,
        "ranks": world(),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": why,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(" | ".join(f"{k} {v}" for k, v in info.items()))
    return info


def as_flags(args):
    """The settings that differ from the defaults, as they would be typed."""
    defaults = getattr(args, "defaults", {})
    typed = []
    for name, value in vars(args).items():
        if name in defaults and defaults[name] == value:
            continue
        typed.append(f"--{name}")
        if value is not True:  # else a switch
            value = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            typed.append(value)
    return shlex.join(typed)


@functools.lru_cache
def commit():
    """The commit of this checkout, "-dirty" where files differ from it, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return got.stdout.strip()


def cpu_name():
    """The CPU's model name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
