"""Speed and memory: prefill (TTFT) and decode (TPOT) apart, dense / routed / Hugging Face transformers interleaved.

    python benchmark.py --schedule out/schedule_ft.json --router out/router.safetensors    # -> out/bench.json, a table
    python benchmark.py --lengths 512,1024,2048,4096 --batch_sizes 1,8 --dtype bfloat16 --peers --peer laco=out/baselines/laco_0.30
    python benchmark.py --lengths 1024 --batch_sizes 8 --ragged                            # prompts of 128, 256, ... 1024 tokens in one batch
    python benchmark.py --lengths 512 --vary                                               # each prompt of a length not met before
    python benchmark.py --synthetic llama2-7b --sparsity 0.30 --device cuda                # random weights of that shape
    python benchmark.py --memory --dtype bfloat16 --lengths 4096 --sparsity 0.30           # what 7B, 13B and 70B models need
    python benchmark.py --synthetic llama2-7b --dtype bfloat16 --save out/llama2-7b        # the same as a sharded checkpoint, 13.5 GB

Prefill is bound by arithmetic, so skipped tokens save time in proportion to FLOPs: flops_bound is the speed-up that the FLOPs
allow (head, router and scores counted) and stands beside the measured one. Decode at small batches is bound by reading weights:
a skipped block saves its weights only when no row of the batch needs it. All variants run in one process, in turns, after a
warm-up; figures are medians over the rounds. The last line on stdout is one JSON document.
"""
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import Parser, check, load_peers, peer_model, pick_dtype, routing_of, run, start
from config import Config, hf_parts
from files import find_model, save_json
from model_ftp import FTPModel
from router import Router, Schedule

SHAPES = {  # vocab, hidden, intermediate, blocks, heads, kv heads, head_dim, tied
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, True), "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128, False),
    "qwen1.5-7b": (151936, 4096, 11008, 32, 32, 32, 128, False), "llama2-7b": (32000, 4096, 11008, 32, 32, 32, 128, False),
    "llama2-13b": (32000, 5120, 13824, 40, 40, 40, 128, False), "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama2-70b": (32000, 8192, 28672, 80, 64, 8, 128, False)}


def shape_config(shape):
    """config.json of a known shape, as a dict."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "tie_word_embeddings")
    return {"model_type": "qwen2" if shape.startswith("qwen") else "llama", **dict(zip(names, SHAPES[shape])), "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1 << 17}


def write_synthetic(shape, dtype, folder, shard_mb):
    """A checkpoint of random weights of a known shape, with config.json and an index; no more than one shard is ever held."""
    folder, config, shard, size, where = Path(folder), shape_config(shape), {}, 0, {}
    check(not folder.exists(), f"--save {folder}: exists already; give a new folder")
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = FTPModel(Config.from_hf(config))
    parts = [(name, t[rows].shape) for ours, t in model.state_dict().items() for name, rows in hf_parts(ours, model.config)
             if not (model.config.tied and ours == "head.weight")]
    for i, (name, dims) in enumerate(parts):
        shard[name] = torch.empty(dims, dtype=dtype).normal_(0, 0.02) if len(dims) > 1 else torch.ones(dims, dtype=dtype)
        size += shard[name].nbytes
        if size > shard_mb * 1e6 or i + 1 == len(parts):
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where, shard, size = where | dict.fromkeys(shard, file), {}, 0
    save_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    save_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def print_memory(lengths, batch_sizes, sparsities, dtype, kv):
    """Memory of a prefill for the known shapes, by Config.memory(): a table in GB of 10^9 bytes."""
    print(f"prefill in {str(dtype).removeprefix('torch.')}, uniform schedules, K/V of skipped tokens: {kv}; GB = 10^9 bytes\n\n"
          "| model | batch | prompt | sparsity | weights | KV | activations | total |\n" + "| --- " * 8 + "|")
    for shape in SHAPES:
        c = Config.from_hf(shape_config(shape))
        for B in batch_sizes:
            for T in lengths:
                for s in (0.0, *sparsities):
                    each = [0.0] + [min(1.0, s * c.n_layer / (c.n_layer - 1))] * (c.n_layer - 1)
                    print(f"| {shape} | {B} | {T} | {s:g} | " + " | ".join(f"{v / 1e9:.2f}" for v in c.memory(B, T, each, dtype.itemsize, kv).values()) + " |")


def synthetic(shape, dtype, device):
    """A randomly initialised model of a known shape: speed needs no trained weights."""
    with torch.device("meta"):
        model = FTPModel(Config.from_hf(shape_config(shape)))
    model.to_empty(device=device).to(dtype)
    for p in model.parameters():
        p.requires_grad_(False)
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1.0)
    model.name = shape
    return model.eval()


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device):
    """Start measuring peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak falls back to the present size
        except OSError:
            pass


def peak_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Ours:
    """The routed model under one setting."""
    def __init__(self, model, schedule=None, router="static", **routing):
        self.model, self.ready = model, lambda: model.use(schedule, router, **routing)
        self.schedule, self.router, self.routing = schedule, router if isinstance(router, Router) else None, routing

    def prefill(self, ids):
        self.cache = self.model.new_cache(len(ids))
        return self.model.extend(ids, self.cache, prompt=True, last_only=True)

    def decode(self, token):
        return self.model.extend([[t] for t in token], self.cache, last_only=True)

    def kv_bytes(self):
        return self.cache.bytes()[0]

    def bounds(self, sizes, decoded):
        """FLOPs of dense over FLOPs of this setting, for a prefill of prompts of these sizes and for one decoded token at its realised sparsity."""
        c, n, base = self.model.config, self.model.config.n_layer, self.model.base
        s = self.model.schedule.sparsity if self.schedule else [0.0] * n
        prefill = sum(base.prefill_flops(T, [0.0] * base.n_layer) for T in sizes) / sum(
            c.prefill_flops(T, s, self.routing.get("kv", "drop"), self.router, self.model.score_window, forecaster=self.routing.get("forecaster"),
                            parts=self.schedule and self.schedule.parts) for T in sizes)
        st = self.model.stats
        if not decoded:
            return prefill, None
        tokens = st.total["decode"]
        return prefill, (st.dense_flops["decode"] + base.head_flops(tokens)) / (st.used("decode") + c.head_flops(tokens))


class Transformers:
    """Hugging Face's own model with its SDPA attention and cache, the same weights and inputs; prompts of unequal length are padded on the left."""
    def __init__(self, folder, dtype, device):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()

    def ready(self):
        pass

    @torch.inference_mode()
    def prefill(self, ids):
        longest = max(map(len, ids))
        self.mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in ids], device=self.model.device)
        return self.run([[0] * (longest - len(s)) + s for s in ids])

    @torch.inference_mode()
    def decode(self, token):
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.run([[t] for t in token], past_key_values=self.past)

    def run(self, ids, **past):
        ids, pads = torch.tensor(ids, device=self.model.device), {}
        if not self.mask.all():     # without pads it needs no mask, and its attention is the fused causal one
            pads = {"attention_mask": self.mask, "position_ids": (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]}
        out = self.model(ids, use_cache=True, logits_to_keep=1, **pads, **past)
        self.past = out.past_key_values
        return out.logits[:, -1]

    def kv_bytes(self):
        return sum(t.numel() * t.element_size() for layer in self.past.layers for t in (layer.keys, layer.values))

    def bounds(self, sizes, decoded):
        return 1.0, 1.0 if decoded else None


def random_prompts(sizes, vocab):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in sizes]


def measure(variants, sizes, n_decode, rounds, vocab, device, vary=False):
    """Times of every variant in turns, for one batch of prompts of these sizes (vary: one token less in each round):
    {name: {"prefill": [s], "decode": [s per token], "peak": MB,
    "kv": bytes, "sparsity": ...}}."""
    got = {name: {"prefill": [], "decode": []} for name in variants}
    for turn in range(rounds + 1):  # the first is the warm-up; every other round backwards, so that no variant always follows the same one
        ids = random_prompts([n - turn * vary for n in sizes], vocab)
        for name, v in list(variants.items())[::1 - 2 * (turn % 2)]:
            v.ready()
            reset_peak(device)
            sync(device)
            t = time.perf_counter()
            logits = v.prefill(ids)
            sync(device)
            if turn:
                got[name]["prefill"].append(time.perf_counter() - t)
            got[name]["kv"] = v.kv_bytes()
            if isinstance(v, Ours):
                got[name]["sparsity"] = v.model.stats.mean("prefill"), v.model.stats.saved("prefill")
            for i in range(n_decode):
                token = logits.argmax(-1).tolist()
                t = time.perf_counter()
                logits = v.decode(token)
                sync(device)
                if turn and i:
                    got[name]["decode"].append(time.perf_counter() - t)
            got[name]["peak"] = peak_mb(device)
            if isinstance(v, Ours):
                got[name]["decode_sparsity"] = v.model.stats.mean("decode")
            got[name]["bounds"] = v.bounds(sizes, n_decode)
            v.cache = v.past = v.mask = None
    return got


def router_share(variant, T, vocab):
    """Share of a routed prefill's time spent in routing and scores, by the profiler."""
    ids = random_prompts([T], vocab)
    variant.ready()
    variant.prefill(ids)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as prof, torch.profiler.record_function("whole"):
        variant.prefill(ids)
    t = {e.key: max(e.cpu_time_total, e.device_time_total) for e in prof.key_averages()}
    return t.get("ftp_routing", 0.0) / t["whole"]


@torch.inference_mode()
def masked_difference(variant, sizes, vocab):
    """The routed pass of a batch against the masked reference, which skips nothing: largest difference of the last positions' logits, as a
    share of the largest logit; and the share of tokens and skipping blocks in which the two decided otherwise, as rounding may break a
    near tie of margins (then the logits differ by more than rounding)."""
    variant.ready()
    model, ids, otherwise, decisions = variant.model, random_prompts(sizes, vocab), 0, 0
    p, q = model.begin(ids, sizes), model.begin(ids, sizes)
    for l in range(model.config.n_layer):
        p, q = model.step(l, p), model.step(l, q, masked=True)
        if 0 < model.schedule.sparsity[l] < 1:
            otherwise, decisions = otherwise + int((p.kept[1].mask != q.kept[1].mask).sum()), decisions + sum(sizes)
    got, want = (model.logits(t.x[np.cumsum(sizes) - 1]).float() for t in (p, q))
    return {"logits": float((got - want).abs().max() / want.abs().max()), "decisions": otherwise / max(decisions, 1)}


def main():
    p = Parser(__doc__).common(dtype="float32").routing().peers()
    p.add_argument("--schedule", default=None, help="schedule; without one, a uniform schedule of --sparsity")
    p.add_argument("--router", default=None, help="trained router; without one, the static router")
    p.add_argument("--sparsity", default="0.30", help="comma list of uniform sparsities where no --schedule is given")
    p.add_argument("--decode", default="dense", choices=["dense", "threshold", "rule"], help="how decoded tokens are routed")
    p.add_argument("--lengths", default="256,1024,2048", help="prompt lengths, tokens")
    p.add_argument("--batch_sizes", default="1", help="batch sizes")
    p.add_argument("--ragged", action="store_true", help="prompts of a batch of B have T/B, 2T/B, ... T tokens; ours are packed, transformers pads them")
    p.add_argument("--vary", action="store_true", help="each round's prompts are a token shorter than the last's: a CPU's kernels are made anew for "
                                                       "each number of rows, and in use lengths seldom repeat")
    p.add_argument("--n_decode", type=int, default=16, help="tokens decoded after each prefill, 0: prefill only")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds after the warm-up")
    p.add_argument("--untrained", action="store_true", help="beside each --sparsity also a router of random weights (always with --synthetic)")
    p.add_argument("--verify", action="store_true", help="also compare each routed variant's logits with the masked reference (slow, much memory)")
    p.add_argument("--no_hf", action="store_true", help="leave transformers out")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks of all variants but transformers (warm-up: a minute)")
    p.add_argument("--peers", action="store_true", help="also block removal (ShortGPT-like: the last blocks but one) at about equal FLOPs")
    p.add_argument("--synthetic", default=None, choices=list(SHAPES), help="random weights of this shape instead of --model")
    p.add_argument("--memory", action="store_true", help="print what a prefill of the known shapes needs, and measure nothing")
    p.add_argument("--save", default=None, help="write the --synthetic weights to this new folder, as a sharded checkpoint, and measure nothing")
    p.add_argument("--shard_mb", type=int, default=5000, help="size of a shard of --save, MB")
    args = p.parse_args()
    if args.save:
        check(args.synthetic, "--save: nothing to write; give --synthetic")
        torch.manual_seed(args.seed)
        write_synthetic(args.synthetic, pick_dtype(args.dtype, args.device)[0], args.save, args.shard_mb)
        print(f"-> {args.save}: give it as --model")
        return
    try:
        lengths, batch_sizes = ([int(v) for v in text.split(",")] for text in (args.lengths, args.batch_sizes))
        sparsities = [float(v) for v in args.sparsity.split(",")]
    except ValueError:
        check(False, f"--lengths {args.lengths} --batch_sizes {args.batch_sizes} --sparsity {args.sparsity}: give numbers parted by commas")
    check(min(lengths) > 1 and min(batch_sizes) > 0 and args.rounds > 0 and args.n_decode >= 0,
          "--lengths must exceed 1, --batch_sizes and --rounds be at least 1, --n_decode at least 0")
    check(not args.ragged or 2 * max(batch_sizes) <= min(lengths), "--ragged: the shortest prompt would have one token; give longer --lengths")
    check(not args.vary or min(lengths) // (max(batch_sizes) if args.ragged else 1) > args.rounds + 1,
          "--vary: the shortest prompt would be used up; give longer --lengths or fewer --rounds")
    check(not args.device_map, "--device_map: the clock and the memory counter here read one device; leave it out")
    if args.memory:
        return print_memory(lengths, batch_sizes, sparsities, pick_dtype(args.dtype, args.device)[0], args.kv)
    schedule = Schedule.load(args.schedule) if args.schedule else None
    router = Router.load(args.router) if args.router else None
    peers = load_peers(args)
    check(router is None or schedule, "--router: it needs the --schedule it was trained with")
    model, config = start(args, (lambda dtype, device: synthetic(args.synthetic, dtype, device)) if args.synthetic else None,
                          pack=not args.compile)
    if args.compile:
        model.compile()
    device, n = model.device, model.config.n_layer
    check(max(lengths) + args.n_decode <= model.config.max_len, f"--lengths {args.lengths}: longer than the model's {model.config.max_len}")
    routing, static = routing_of(args) | {"decode": args.decode}, routing_of(args, learned=False)
    static |= {"decode": "rule"} if args.decode == "rule" else {}  # the paper's rule needs no router, thresholds do
    variants = {"dense": Ours(model)}
    if schedule:
        if router:
            variants["ftp"] = Ours(model, schedule, router, **routing)
        variants["static"] = Ours(model, schedule, **static)
    for s in [] if schedule else sparsities:
        variants[f"static {s:g}"] = Ours(model, Schedule.uniform(model, s), **static)
        if args.untrained or args.synthetic:  # an untrained router costs what a trained one does
            variants[f"router {s:g}"] = Ours(model, Schedule.uniform(model, s), Router(model.config, model.fingerprint), **static)
    if args.peers:
        for s in [schedule.mean] if schedule else sparsities:
            gone = round(s * n)
            variants[f"removal {gone}/{n}"] = Ours(model, Schedule([0.0] * (n - 1 - gone) + [1.0] * gone + [0.0], model.fingerprint))
    for name, (folder, s, r, how) in peers.items():
        variants[name] = Ours(peer_model(folder, model), s, r, **how)
    if not args.no_hf and not args.synthetic:
        variants["transformers"] = Transformers(find_model(args.model), model.dtype, device)
    sizes = lambda B, T: [T * (b + 1) // B if args.ragged else T for b in range(B)]
    rows = []
    for B in batch_sizes:
        for T in lengths:
            got = measure(variants, sizes(B, T), args.n_decode, args.rounds, model.config.vocab_size, device, args.vary)
            for name, g in got.items():
                for phase, bound in zip(("prefill", "decode"), g["bounds"]):
                    if not g[phase]:
                        continue
                    ms, base = np.array(g[phase]) * 1e3, np.median(got["dense"][phase]) * 1e3
                    row = {"name": name, "phase": phase, "batch_size": B, "prompt_len": T, "prompt_lens": sizes(B, T),
                           "dtype": str(model.dtype).removeprefix("torch."),
                           "median_ms": float(np.median(ms)), "p10_ms": float(np.percentile(ms, 10)), "p90_ms": float(np.percentile(ms, 90)),
                           "n": len(ms), "speedup_vs_dense": float(base / np.median(ms)), "flops_bound": bound, "peak_mb": g["peak"],
                           "kv_bytes": g["kv"], "tokens_per_s": float((sum(sizes(B, T)) if phase == "prefill" else B) / np.median(ms) * 1e3),
                           "sparsity_prefill": g.get("sparsity", (None,))[0], "flops_saved_prefill": g.get("sparsity", (None, None))[1],
                           "sparsity_decode": g.get("decode_sparsity")}
                    rows.append(row)
                    print(f"B {B:2d}  T {T:5d}  {phase:7s}  {name:14s} {row['median_ms']:9.2f} ms  (p10 {row['p10_ms']:.2f}, p90 {row['p90_ms']:.2f})"
                          f"  {row['tokens_per_s']:7.0f} tok/s  speed-up {row['speedup_vs_dense']:.3f}  bound {bound:.3f}  "
                          f"peak {row['peak_mb']:.0f} MB  KV {row['kv_bytes'] / 2**20:.1f} MB", flush=True)
    share = {name: {str(T): router_share(v, T, model.config.vocab_size) for T in lengths} for name, v in variants.items()
             if isinstance(v, Ours) and v.router is not None}
    for name, by_length in share.items():
        print(f"router and scores, share of routed prefill ({name}): " + ", ".join(f"{T}: {100 * v:.1f} %" for T, v in by_length.items()))
    apart = {name: {f"{B}x{T}": masked_difference(v, sizes(B, T), model.config.vocab_size) for B in batch_sizes for T in lengths}
             for name, v in variants.items() if args.verify and isinstance(v, Ours) and v.schedule is not None}
    for name, by_shape in apart.items():
        print(f"routed against masked reference, largest difference of a logit, and decisions that differ ({name}): "
              + ", ".join(f"{shape}: {v['logits']:.1e}, {100 * v['decisions']:.3f} %" for shape, v in by_shape.items()))
    result = {"format": "ftp-bench-1", "config": config, "rows": rows, "router_share": share, "masked_difference": apart}
    save_json(f"{args.out_dir}/bench.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
