"""How long a prefill and a decoded token take, and in how much memory: ours and transformers'.

    model = synthetic("llama2-7b", torch.bfloat16, "cuda")     # random weights of a known shape
    variants = {"dense": Ours(model), "static": Ours(model, Schedule.uniform(model, 0.3))}
    timings = measure(variants, [1024], n_decode=16, rounds=7, vocab=32000, device=model.device)
    rows = bench_rows(timings, [1024], model.dtype)

All variants run in one process, in turns, so that a slow minute of the machine hits them alike.
"""
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib import reference
from lib.checkpoint import hf_parts
from lib.config import Config
from lib.files import check, save_json
from lib.flops import Meter, head_flops, memory
from model_ftp import FTPModel, Router

# ------------------------------------------------------------------------------------------------
# models of known shapes: speed and memory need no trained weights

SHAPE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, True),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128, False),
    "qwen1.5-7b": (151936, 4096, 11008, 32, 32, 32, 128, False),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, 128, False),
    "llama2-13b": (32000, 5120, 13824, 40, 40, 40, 128, False),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama2-70b": (32000, 8192, 28672, 80, 64, 8, 128, False),
}


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def shape_config(shape):
    """config.json of a known shape, as a dict."""
    return {
        "model_type": "qwen2" if shape.startswith("qwen") else "llama",
        **dict(zip(SHAPE_FIELDS, SHAPES[shape])),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1 << 17,
    }


def empty_model(shape):
    """The model of a known shape, without storage."""
    with torch.device("meta"):
        return FTPModel(Config.from_hf(shape_config(shape)))


def synthetic(shape, dtype, device):
    """A randomly initialised model of a known shape."""
    model = empty_model(shape).to_empty(device=device).to(dtype)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() > 1:
            p.data.normal_(0, 0.02)
        else:
            p.data.fill_(1.0)
    model.name = shape                                # it came from no folder
    return model.eval()


def random_shards(model, dtype, size):
    """Random weights under their names in a checkpoint: yields dicts of about `size` bytes."""
    shard, held = {}, 0
    for ours, tensor in model.state_dict().items():
        if model.config.tied and ours == "head.weight":
            continue
        for name, rows in hf_parts(ours, model.config):
            shape = tensor[rows].shape
            if len(shape) > 1:
                shard[name] = torch.empty(shape, dtype=dtype).normal_(0, 0.02)
            else:
                shard[name] = torch.ones(shape, dtype=dtype)
            held += shard[name].nbytes
            if held > size:
                yield shard
                shard, held = {}, 0
    if shard:
        yield shard


def write_synthetic(shape, dtype, folder, shard_mb):
    """A checkpoint of random weights of a known shape; no more than one shard is ever held."""
    folder = Path(folder)
    check(not folder.exists(), f"--save {folder}: exists already; give a new folder")
    folder.mkdir(parents=True)
    where = {}                                        # name of a tensor -> its file
    shards = random_shards(empty_model(shape), dtype, shard_mb * 1e6)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    save_json(folder / "model.safetensors.index.json", index)
    save_json(folder / "config.json", shape_config(shape) | {"dtype": dtype_name(dtype)})


def memory_table(lengths, batch_sizes, sparsities, dtype, kv):
    """Memory of a prefill of the known shapes: lines of a table in GB of 10^9 bytes."""
    lines = [
        "| model | batch | prompt | sparsity | weights | KV | activations | total |",
        "| --- " * 8 + "|",
    ]
    for shape in SHAPES:
        c = Config.from_hf(shape_config(shape))
        cases = [(b, t, s) for b in batch_sizes for t in lengths for s in (0.0, *sparsities)]
        for b, t, s in cases:
            # uniform, but for block 0, which has no scores to be routed by
            each = [0.0] + [min(1.0, s * c.n_layer / (c.n_layer - 1))] * (c.n_layer - 1)
            needed = memory(c, b, t, each, dtype.itemsize, kv).values()
            in_gb = " | ".join(f"{v / 1e9:.2f}" for v in needed)
            lines.append(f"| {shape} | {b} | {t} | {s:g} | {in_gb} |")
    return lines


# ------------------------------------------------------------------------------------------------
# clock and memory


def sync(device):
    """Wait for the device: its kernels run behind the host's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device):
    """Start measuring peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: the resident peak falls back to the present size
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_mb(device):
    """Peak memory since reset_peak(), MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(s for s in status if s.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------
# who is measured


class Ours:
    """Our model under one routing; as use() has it: schedule, router and the settings `how`.

    routing: one that was made before (a folder's own), instead of these. base: the Config whose
    FLOPs the savings are counted against, of a pruned model the original's.
    """

    def __init__(self, model, schedule=None, router="static", routing=None, base=None, **how):
        self.model, self.base = model, base
        self.routing = routing or model.use(schedule, router, **how).routing
        self.cache = None

    @property
    def routed(self):
        return self.routing.schedule is not None

    @property
    def learned(self):
        return self.routed and isinstance(self.routing.router, Router)

    def ready(self):
        """Before every prefill: variants share one model."""
        self.model.routing = self.routing

    def meter(self):
        return Meter(self.model, self.base)

    def prefill(self, prompts, meter=None):
        """Lists of ids -> logits (B, vocab) of the last tokens."""
        self.cache = self.model.new_cache(len(prompts))
        return self.model.prefill(prompts, self.cache, meter)

    def decode(self, tokens, meter=None):
        """One new token a prompt, ids -> logits (B, vocab)."""
        return self.model.extend([[t] for t in tokens], self.cache, meter=meter)

    def kv_bytes(self):
        return self.cache.bytes()[0]

    def forget(self):
        self.cache = None


class Transformers:
    """Hugging Face's own model, with SDPA attention and its cache: same weights, same prompts.

    Prompts of unequal length are padded on the left.
    """

    def __init__(self, model):
        self.model = model.eval()
        self.mask = self.past = None

    @classmethod
    def from_pretrained(cls, folder, dtype, device):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
        logging.disable_progress_bar()             # of its loading
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype,
                                                     attn_implementation="sdpa")
        return cls(model.to(device))

    @classmethod
    def synthetic(cls, shape, dtype, device):
        """Random weights of a known shape, its own: a second copy beside ours."""
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.for_model(**shape_config(shape))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                     attn_implementation="sdpa")
        return cls(model)

    def ready(self):
        pass

    def meter(self):
        return None

    @torch.inference_mode()
    def prefill(self, prompts, meter=None):
        """Lists of ids -> logits (B, vocab) of the last tokens."""
        longest = max(map(len, prompts))
        pads = [longest - len(s) for s in prompts]
        real = [[0] * n + [1] * len(s) for n, s in zip(pads, prompts)]
        self.mask = torch.tensor(real, device=self.model.device)
        return self.run([[0] * n + s for n, s in zip(pads, prompts)])

    @torch.inference_mode()
    def decode(self, tokens, meter=None):
        """One new token a prompt, ids -> logits (B, vocab)."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.run([[t] for t in tokens], past_key_values=self.past)

    def run(self, ids, **past):
        ids = torch.tensor(ids, device=self.model.device)
        pads = {}
        if not self.mask.all():   # without pads and mask, its attention is the fused causal one
            place = (self.mask.cumsum(1) - 1).clamp(min=0)
            pads = {"attention_mask": self.mask, "position_ids": place[:, -ids.shape[1]:]}
        out = self.model(ids, use_cache=True, logits_to_keep=1, **pads, **past)
        self.past = out.past_key_values
        return out.logits[:, -1]

    def kv_bytes(self):
        tensors = [t for layer in self.past.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def forget(self):
        self.mask = self.past = None


# ------------------------------------------------------------------------------------------------
# measuring


@dataclass
class Timing:
    """What one variant took for one batch of prompts."""
    prefill: list = field(default_factory=list)    # seconds, one a round
    decode: list = field(default_factory=list)     # seconds, one a token
    peak_mb: float = 0.0                           # of the last round
    kv_bytes: int = 0                              # keys and values after the prefill
    meter: Meter | None = None                     # what the warm-up realised; None: not ours

    def skipped(self, phase):
        """Mean share of tokens that skipped a block, None where nothing was counted."""
        return self.meter and self.meter.mean(phase)

    def saved(self):
        """Share of the prompts' block FLOPs saved, None where nothing was counted."""
        return self.meter and self.meter.saved("prefill")

    def bound(self, phase, prompts):
        """The speed-up that the FLOPs allow: dense over this one's, head and router counted."""
        m = self.meter
        if m is None:
            return 1.0
        # a prefill gives logits of each prompt's last token, decoding of every token
        positions = prompts if phase == "prefill" else m.total[phase]
        dense = m.dense[phase] + head_flops(m.base, positions)
        return dense / (m.used(phase) + head_flops(m.config, positions))


def random_prompts(sizes, vocab):
    """Prompts of these lengths, lists of ids; the same ones for the same lengths."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in sizes]


def measure(variants, sizes, n_decode, rounds, vocab, device, vary=False):
    """Time every variant in turns on one batch of prompts of these sizes -> {name: Timing}.

    vary: one token less in each round, so that no length is met twice.
    """
    timings = {name: Timing() for name in variants}
    for turn in range(rounds + 1):                 # the first is the warm-up, and is counted
        prompts = random_prompts([n - turn * vary for n in sizes], vocab)
        order = list(variants)
        if turn % 2:                               # so that no variant always follows the same one
            order.reverse()
        for name in order:
            one_round(variants[name], prompts, n_decode, timings[name], device, turn == 0)
    return timings


def one_round(variant, prompts, n_decode, timing, device, warm_up):
    """Prefill and decode once; times go to `timing`, in the warm-up what is realised does."""
    meter = None                                   # counting takes time: not while the clock runs
    if warm_up:
        meter = timing.meter = variant.meter()
    variant.ready()
    reset_peak(device)
    logits, seconds = timed(device, variant.prefill, prompts, meter)
    if not warm_up:
        timing.prefill.append(seconds)
    timing.kv_bytes = variant.kv_bytes()
    for i in range(n_decode):
        tokens = logits.argmax(-1).tolist()
        logits, seconds = timed(device, variant.decode, tokens, meter)
        if i and not warm_up:                      # the first one also makes room in the cache
            timing.decode.append(seconds)
    timing.peak_mb = peak_mb(device)
    variant.forget()                               # no other variant shall see it in its peak


def timed(device, run: Callable, *args):
    """run(*args) and the seconds it took, to the end of its work on the device."""
    sync(device)
    began = time.perf_counter()
    result = run(*args)
    sync(device)
    return result, time.perf_counter() - began


def router_share(variant, length, vocab):
    """Share of a routed prefill's time spent in routing and scores, by the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")    # else it tells each of its starts on stderr
    prompts = random_prompts([length], vocab)
    variant.ready()
    variant.prefill(prompts)                       # warm-up
    everything = list(torch.profiler.supported_activities())
    with (torch.profiler.profile(activities=everything) as profile,
          torch.profiler.record_function("whole")):
        variant.prefill(prompts)
    variant.forget()
    # of the host or the device, whichever was busy longer
    took = {e.key: max(e.cpu_time_total, e.device_time_total) for e in profile.key_averages()}
    # the model marks its decisions, see routing_span()
    return took.get("ftp_routing", 0.0) / took["whole"]


@torch.inference_mode()
def masked_difference(variant, sizes, vocab):
    """The routed prefill of a batch against the masked reference, which skips nothing.

    logits: largest difference at the last tokens, as a share of the largest logit. decisions:
    share of tokens and skipping blocks in which the two decided otherwise: rounding may break a
    near tie of margins, and then the logits differ by more than rounding.
    """
    variant.ready()
    model, sparsity = variant.model, variant.routing.sparsity
    batch = model.batch(random_prompts(sizes, vocab))
    routed = masked = model.begin(batch)
    otherwise = decisions = 0
    for l in range(model.config.n_layer):
        routed = model.prefill_step(l, batch, routed)
        masked, *_ = reference.prefill_step(model, l, batch, masked)
        if 0 < sparsity[l] < 1:
            otherwise += int((routed.kept.mask != masked.kept.mask).sum())
            decisions += sum(sizes)
    got = model.logits(routed.x[batch.last]).float()
    want = model.logits(masked.x[batch.last]).float()
    return {
        "logits": float((got - want).abs().max() / want.abs().max()),
        "decisions": otherwise / max(decisions, 1),
    }


# ------------------------------------------------------------------------------------------------
# rows and the table


def bench_rows(timings, sizes, dtype):
    """Rows of bench.json of one batch of prompts: one a variant and phase, in ms and MiB.

    timings: as measure() gives them, "dense" among them; sizes: lengths of the prompts.
    """
    rows = []
    for name, timing in timings.items():
        for phase in ("prefill", "decode"):
            seconds = getattr(timing, phase)
            if not seconds:
                continue
            ms = np.array(seconds) * 1e3
            dense_ms = np.median(getattr(timings["dense"], phase)) * 1e3
            tokens = sum(sizes) if phase == "prefill" else len(sizes)
            rows.append({
                "name": name,
                "phase": phase,
                "batch_size": len(sizes),
                "prompt_len": max(sizes),
                "prompt_lens": sizes,
                "dtype": dtype_name(dtype),
                "median_ms": float(np.median(ms)),
                "p10_ms": float(np.percentile(ms, 10)),
                "p90_ms": float(np.percentile(ms, 90)),
                "n": len(ms),
                "speedup_vs_dense": float(dense_ms / np.median(ms)),
                "flops_bound": timing.bound(phase, len(sizes)),
                "peak_mb": timing.peak_mb,
                "kv_bytes": timing.kv_bytes,
                "tokens_per_s": float(tokens / np.median(ms) * 1e3),
                "sparsity_prefill": timing.skipped("prefill"),
                "flops_saved_prefill": timing.saved(),
                "sparsity_decode": timing.skipped("decode"),
            })
    return rows


HEAD = ("batch", "prompt", "phase", "variant", "median ms (p10 - p90)", "tokens/s", "speed-up",
        "bound", "skipped", "peak MB", "KV MB")


def bench_table(rows):
    """Lines of a table of bench_rows(), its columns aligned; what belongs together is together."""
    cells = [HEAD]
    for r in sorted(rows, key=lambda r: (r["batch_size"], r["prompt_len"], r["phase"] == "decode")):
        skipped = r[f"sparsity_{r['phase']}"]
        cells.append((
            str(r["batch_size"]),
            str(r["prompt_len"]),
            r["phase"],
            r["name"],
            f"{r['median_ms']:.2f} ({r['p10_ms']:.2f} - {r['p90_ms']:.2f})",
            f"{r['tokens_per_s']:.0f}",
            f"{r['speedup_vs_dense']:.3f}",
            f"{r['flops_bound']:.3f}",
            "-" if skipped is None else f"{100 * skipped:.1f} %",
            f"{r['peak_mb']:.0f}",
            f"{r['kv_bytes'] / 2**20:.1f}",
        ))
    widths = [max(map(len, column)) for column in zip(*cells)]
    words = ("phase", "variant")                   # to the left; numbers stand under one another
    return ["  ".join(c.ljust(w) if h in words else c.rjust(w)
                      for h, c, w in zip(HEAD, line, widths)).rstrip() for line in cells]
