"""What every stage shares: flags, the banner, seeds, dtype choice, progress, and how mistakes end."""
import argparse
import ctypes
import datetime
import functools
import hashlib
import json
import os
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
import torch.distributed as dist
import transformers
from tqdm import tqdm

from files import FTPError, check_fingerprint, load_json, save_json
from model_ftp import FTPModel, batches
from router import SELECTIONS, Forecaster, Router, Schedule


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, whose help shows defaults, and which takes no abbreviations."""
    def __init__(self, doc, **kw):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **kw)

    def error(self, message):
        raise FTPError(message)

    def common(self, out_dir="out", dtype="auto"):
        """The flags that mean the same in every script."""
        self.add_argument("--model", default="smollm2", help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
        self.add_argument("--out_dir", default=out_dir, help="folder of the artefacts")
        self.add_argument("--seed", type=int, default=0, help="seed of everything random")
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
        self.add_argument("--device_map", default=None, help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
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
        self.add_argument("--removal", default="whole", choices=["whole", "prompt"],
                          help="blocks and sub-blocks that a schedule removes: absent for all tokens, or for prompts alone")
        return self

    def peers(self):
        """Pruned models to compare with, as made by analysis/baselines.py."""
        self.add_argument("--peer", action="append", default=[], metavar="NAME=PATH[+ROUTER]",
                          help="another pruned model: a schedule (and a router file, random, attention or progressive), or a model folder; may be "
                               "repeated. A schedule that removes blocks gives NAME, and NAME_prompt where they are removed for prompts alone")
        return self


@functools.lru_cache
def load_forecaster(path):
    return Forecaster.load(path) if path else None


def routing_of(args, learned=True):
    """The routing() flags as keywords of FTPModel.use(); only a trained router can decide by argmax."""
    return dict(prefill=args.prefill if learned else "topk", kv=args.kv, one_pass=args.one_pass, forecaster=load_forecaster(args.forecaster),
                removal=args.removal, mismatch=args.mismatch)


def load_peers(args):
    """--peer flags -> {name: (folder or None, Schedule or None, router, keywords of FTPModel.use())}."""
    peers = {}
    for spec in args.peer:
        name, _, path = spec.partition("=")
        path, _, router = path.partition("+")
        check(name and path and Path(path).exists(), f"--peer {spec}: give NAME=PATH, of a schedule or a model folder that exists")
        if Path(path).is_dir():
            peers[name] = path, None, "static", {}
            continue
        schedule, router = Schedule.load(path), router or "static"
        router = router if router in SELECTIONS else Router.load(router)
        for removal in ("whole", "prompt") if schedule.removes else ("whole",):
            peers[name + "_prompt" * (removal == "prompt")] = None, schedule, router, routing_of(args, isinstance(router, Router)) | {"removal": removal}
    return peers


def peer_model(folder, model):
    """The pruned model in a folder, its saved FLOPs counted against those of `model`; `model` itself without a folder."""
    if folder is None:
        return model
    pruned = FTPModel.from_pretrained(folder, dtype=model.dtype, device=model.device)
    made = load_json(Path(folder) / "pruned.json", "ftp-pruned-1", "--peer")
    check_fingerprint(made.get("fingerprint"), model.fingerprint, f"--peer: {folder}")
    pruned.base = model.config
    return pruned.pack() if model.some else pruned


def peer_id(folder, schedule, router, routing):
    """What tells a peer's artefacts from others."""
    if folder is None:
        return [schedule.id, router.id if isinstance(router, Router) else router, routing["removal"]]
    h = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with open(file, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return [h.hexdigest()[:12]]


# ------------------------------------------------------------------------------------------------
# several processes (torchrun): every rank runs the whole script on its share of the work and learns the results of the others, so
# that all of them decide alike; rank 0 alone prints and writes

ALONE = ("fit_forecaster.py", "benchmark.py", "convert.py", "export.py")  # these, and analysis/, know no ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank; x is anything that pickles and lies on the CPU. All ranks must call it.

    The FTPError that a rank gives (see run) is raised on all of them.
    """
    parts = [x] * world()
    if world() > 1:
        dist.all_gather_object(parts, x)
    for r, e in enumerate(parts):
        if isinstance(e, FTPError):
            e.rank = r
            raise e
    return parts


def shard(items):
    """This rank's share of a list: every world-th item."""
    return items[rank()::world()]


def unshard(mine):
    """The whole list on every rank, from what each rank made of its shard()."""
    parts = gather(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def total(x):
    """Sum over the ranks of a small tensor x; the gradient is that of the own part alone, so that the ranks' gradients add up to the whole."""
    return x + (torch.stack(gather(x.detach().cpu())).sum(0).to(x.device) - x.detach())


def share_stats(model):
    """Make model.stats what all ranks have counted."""
    model.stats.late = {ph: float(v) for ph, v in model.stats.late.items()}  # off the device
    first, *others = gather(model.stats)
    for s in others:
        first.add(s)
    model.stats = first


def spread_states(model, samples, joint=False):
    """FTPModel.response_states of this rank's share of the samples: a list of (group of samples, states (R, d), owner (R,)).

    The groups are the same whatever the number of ranks, and with them every rounding.
    """
    return [(g, *model.response_states(g, joint=joint)) for g in shard([g for _, g in batches(samples, 2048)])]


def complain(e):
    """Print one line about a mistake; returns exit code 2."""
    text = " ".join(str(e).encode("utf-8", "backslashreplace").decode().split())
    print(f"{Path(sys.argv[0]).name}: error: {text if len(text) < 700 else text[:350] + ' ... ' + text[-250:]}", file=sys.stderr)
    return 2


kept, go_on = {}, []  # file: what it holds, as stages save what they can go on from; and the flag that then goes on


def run(main):
    """Run a stage's main() so that expected mistakes end in one line and code 2, Ctrl-C and SIGTERM in one line that says what was kept
    and how to go on, and the shell's codes 130 and 143; on all ranks together.

    A rank with a mistake gives it to the gather() that the others are in or come to, at the latest to the one behind main().
    """
    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one does not disturb the ending
        raise KeyboardInterrupt(number)

    kept.clear()
    old, code = [(n, signal.signal(n, stop)) for n in (signal.SIGINT, signal.SIGTERM)], 0
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            script = Path(sys.argv[0])
            check(script.name not in ALONE and script.parent.name != "analysis", f"torchrun: {script.name} runs in one process; start it with python")
            # objects travel by gloo, gradients on GPUs by nccl; rank 0 may be long at work before the others meet it
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=12))
            if rank():
                sys.stdout = open(os.devnull, "w")
        try:
            main()
            gather(None)
        except RuntimeError:
            if world() > 1:
                time.sleep(1)  # another rank has ended amid an exchange: a signal that was meant for all has its say here
            raise
    except FTPError as e:
        if e.rank < 0:
            try:
                gather(e)
            except FTPError as first:
                e = first
        code = complain(e) if e.rank == rank() else 2
    except KeyboardInterrupt as e:
        code = 128 + (e.args or (signal.SIGINT,))[0]
        held = ", ".join(f"{path} ({what})" for path, what in kept.items()) or "nothing, no step was complete"
        start = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(world()))] if world() > 1 else ["python"]
        again = shlex.join([*start, *sys.argv, *(f for f in go_on if kept and f not in sys.argv)])
        if rank() == 0:
            print(f"{Path(sys.argv[0]).name}: stopped. Kept: {held}. To go on: {again}", file=sys.stderr)
    finally:
        for n, handler in old:
            signal.signal(n, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        sys.exit(code)


def digest(o):
    """Short hash of a JSON value: whether a resumed run sees the same data, and whether its state is undamaged."""
    return hashlib.sha256(json.dumps(o, sort_keys=True).encode()).hexdigest()[:12]


def save_progress(path, kind, state, what):
    """Write what a stage goes on from with --resume, on rank 0; `what` tells the user how far it is."""
    if rank() == 0:
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
            "ranks": world(), "dtype": str(dtype).removeprefix("torch."), "dtype_reason": why, "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    print(" | ".join(f"{k} {v}" for k, v in info.items()))
    return info


def keep_freed_memory():
    """Let glibc keep freed buffers instead of handing each back to the kernel: zeroing fresh pages for every layer's activations
    takes a tenth of a prefill on CPUs. Without glibc nothing happens."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, size in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (malloc.h)
            libc.mallopt(option, size)
    except (OSError, AttributeError):
        pass


def start(args, build=None, pack=True):
    """Seeds, threads, banner, and the model: loaded from args.model, or build(dtype, device); with pack as inference on CPUs has it, see
    FTPModel.pack(). Returns it with the config to store."""
    go_on[:] = ["--resume"] if hasattr(args, "resume") else []
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise FTPError(f"--device {args.device}: no such device; give cpu, cuda or cuda:1") from None
    check(device.type != "cuda" or torch.cuda.is_available(), f"--device {args.device}: no CUDA here; give --device cpu")
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        check(device.index < torch.cuda.device_count(), f"--device {args.device}: {torch.cuda.device_count()} GPUs are too few for "
              f"the ranks of this node; lower --nproc_per_node")
        torch.cuda.set_device(device)
    check(not args.device_map or not build and world() == 1, "--device_map: places one process's checkpoint; leave it out with torchrun or --synthetic")
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    dtype, why = pick_dtype(args.dtype, device)
    info = versions(device, dtype, why)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    model = build(dtype, device) if build else FTPModel.from_pretrained(args.model, dtype, device, args.device_map)
    if pack:
        model.pack()
    return model, {**info, "settings": vars(args), "model": model.name, "fingerprint": model.fingerprint}


def bar(it=None, **kw):
    """A tqdm bar with rate and ETA on a terminal; silent in a log."""
    return tqdm(it, disable=not sys.stderr.isatty() or rank() > 0, dynamic_ncols=True, **kw)


class Every:
    """true() at most once in `seconds`: for progress lines in logs, where a bar is silent."""
    def __init__(self, seconds=20):
        self.seconds, self.last = seconds, time.time()

    def true(self):
        if time.time() - self.last < self.seconds:
            return False
        self.last = time.time()
        return True
