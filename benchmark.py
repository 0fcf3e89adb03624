"""Speed and memory: prefill and decode apart, dense, routed and transformers in turns.

    python benchmark.py --schedule out/schedule_ft.json --router out/router.safetensors
    python benchmark.py --lengths 512,1024,2048 --batch_sizes 1,8 --dtype bfloat16
    python benchmark.py --lengths 1024 --batch_sizes 8 --ragged      # unequal prompts in one batch
    python benchmark.py --lengths 512 --vary                         # no length twice, as in use
    python benchmark.py --synthetic llama2-7b --sparsity 0.30 --device cuda
    python benchmark.py --memory --dtype bfloat16 --lengths 4096     # what known shapes need

In: a model, its schedule and router, or sparsities to try. Out: bench.json and a table.

Prefill is bound by arithmetic: skipped tokens save time as they save FLOPs. "bound" is the
speed-up that the FLOPs allow (head, router and scores counted), beside the measured one. Decode of
few rows is bound by reading weights: a skipped block saves its weights only when no row needs it.
Figures are medians over the rounds, after a warm-up.
"""
import json

import torch

from lib.artefacts import Schedule
from lib.checkpoint import find_model
from lib.compiling import compile_model
from lib.files import check, save_json
from lib.skipped import Forecaster
from lib.stage import Parser, numbers, pick_device, pick_dtype, run, set_seed, start, whole, wholes
from lib.timing import (
    SHAPES,
    Ours,
    Transformers,
    bench_rows,
    bench_table,
    dtype_name,
    masked_difference,
    measure,
    memory_table,
    router_share,
    synthetic,
    write_synthetic,
)
from model_ftp import Router


def get_args():
    p = Parser(__doc__)

    # an exported folder brings its own routing, and is measured with it
    add = p.add_argument_group("what is measured, beside the dense model").add_argument
    add("--schedule", default=None,
        help="schedule; without one, that of an exported --model, else --sparsity")
    # both routers run: the static one costs nothing, so the difference is the router's price
    add("--router", default="static",
        help="trained router of --schedule, beside the static one")
    add("--sparsity", default=None, type=numbers("[0, 1)"),
        help="uniform sparsities, comma list; 0.30 where there is no schedule")
    add("--untrained", action="store_true",
        help="beside each --sparsity a router of random weights (--synthetic: always)")
    add("--no_hf", action="store_true",
        help="leave transformers out (with --synthetic it is there on GPUs alone)")
    add("--synthetic", default=None, choices=list(SHAPES),
        help="random weights of this shape instead of --model")

    # settings of FTPModel.use(), the same for all variants
    add = p.add_argument_group("how tokens are routed").add_argument
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or the router's own decision")
    add("--decode", default="dense", choices=["dense", "threshold", "rule"],
        help="how decoded tokens are routed")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true",
        help="decide all blocks by the first one's scores")
    add("--forecaster", default=None,
        help="forecast of skipped tokens (fit_late_kv.py), best with --kv keep")
    add("--mismatch", action="store_true",
        help="run a router under another --kv, --one_pass or forecast than it was "
             "trained with")

    add = p.add_argument_group("prompts").add_argument
    add("--lengths", default="256,1024,2048", type=wholes("[2, inf)"),
        help="prompt lengths, tokens, comma list")
    add("--batch_sizes", default="1", type=wholes("[1, inf)"),
        help="batch sizes, comma list")
    # the first of them is not timed: it makes room in the cache
    add("--n_decode", default=16, type=whole("[0, inf)"),
        help="tokens decoded after each prefill, 0: prefill only")
    add("--ragged", action="store_true",
        help="prompts of a batch of B have T/B, 2T/B, ... T tokens; ours are packed, "
             "transformers pads them")
    add("--vary", action="store_true",
        help="each round's prompts are a token shorter than the last's: a CPU's kernels "
             "are made anew for each number of rows, and in use lengths seldom repeat")

    add = p.add_argument_group("how it is measured").add_argument
    # an odd number, so that the median is a round that ran
    add("--rounds", default=7, type=whole("[1, inf)"),
        help="timed rounds after the warm-up")
    add("--compile", action="store_true",
        help="torch.compile the blocks, but for transformers' (warm-up: a minute)")
    add("--verify", action="store_true",
        help="also compare routed logits with the masked reference's (slow)")

    # for models that don't fit here, and to test loading at full size
    add = p.add_argument_group("instead of measuring").add_argument
    add("--memory", action="store_true",
        help="print what a prefill of the known shapes needs")
    add("--save", default=None,
        help="write the --synthetic weights to this new folder, a sharded checkpoint")
    add("--shard_mb", default=5000, type=whole("[1, inf)"),
        help="size of a shard of --save, MB")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of bench.json")
    add("--json", action="store_true",
        help="the last line of stdout is one short JSON document")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of random weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None, help="not here: one clock reads one device")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# what is asked for


def check_args(args):
    """Refuse what contradicts itself, before any work."""
    check(not args.schedule or args.sparsity is None,
          "--sparsity: beside --schedule it would change nothing; give one of the two")
    check(args.router == "static" or args.schedule,
          "--router: it needs the --schedule it was trained with")
    if args.router == "static":
        for flag, value in (("prefill", "argmax"), ("decode", "threshold")):
            check(getattr(args, flag) != value,
                  f"--{flag} {value}: only a trained router decides so; give --router too")
    shortest = min(args.lengths)
    # each round of --vary takes a token off, and the shortest prompt must outlast them
    if args.ragged:
        check(2 * max(args.batch_sizes) <= shortest,
              "--ragged: the shortest prompt would have one token; give longer --lengths")
        shortest //= max(args.batch_sizes)
    check(not args.vary or shortest > args.rounds + 1,
          "--vary: the shortest prompt would be used up; give longer --lengths or fewer --rounds")
    check(not args.device_map,
          "--device_map: the clock and the memory counter read one device; leave it out")
    check(not args.save or args.synthetic, "--save: nothing to write; give --synthetic")


def check_length(args, config):
    """Refuse prompts that leave the model no room to decode."""
    longest = max(args.lengths)
    needed = f"a prompt of {longest} and {args.n_decode} decoded tokens exceed"
    if args.n_decode == 0:
        needed = f"a prompt of {longest} tokens exceeds"
    check(longest + args.n_decode <= config.max_len,
          f"--lengths {longest}: {needed} the model's {config.max_len}; lower --lengths or "
          "--n_decode")


def check_own_routing(args):
    """Refuse settings beside a folder that brings its routing: they would change nothing."""
    settings = ("prefill", "decode", "kv", "one_pass", "forecaster", "mismatch")
    given = [k for k in settings if k in args.typed]
    check(not given, f"--{', --'.join(given)}: {args.model} brings its own routing, which this "
                     "does not change; give --schedule too")


def prompt_sizes(batch_size, length, ragged):
    """Lengths of the prompts of a batch."""
    # ragged: evenly from length / batch_size up, so that a padded batch is almost half pads
    if not ragged:
        return [length] * batch_size
    return [length * (b + 1) // batch_size for b in range(batch_size)]


# ------------------------------------------------------------------------------------------------
# the variants


def ways_to_route(args):
    """Settings of use(): with a trained router, and with a selection that needs none."""
    forecaster = Forecaster.load(args.forecaster) if args.forecaster else None
    shared = {"kv": args.kv, "one_pass": args.one_pass, "forecaster": forecaster}
    learned = {**shared, "prefill": args.prefill, "decode": args.decode, "mismatch": args.mismatch}
    # only a trained router decides by argmax or has thresholds; the paper's decode rule needs none
    untrained = {**shared, "decode": "rule" if args.decode == "rule" else "dense"}
    return learned, untrained


def our_variants(args, model, schedule, router):
    """{name: Ours}, dense first. An exported folder brings its routing, unless told otherwise."""
    own = model.routing                            # before the variants put theirs in its place
    variants = {"dense": Ours(model)}
    learned, untrained = ways_to_route(args)
    if schedule:
        if router:
            variants["ftp"] = Ours(model, schedule, router, **learned)
        variants["static"] = Ours(model, schedule, **untrained)
    elif args.sparsity is None and own.schedule:
        check_own_routing(args)
        variants["ftp"] = Ours(model, routing=own)
    else:
        for s in args.sparsity or [0.30]:
            uniform = Schedule.uniform(model, s)
            variants[f"static {s:g}"] = Ours(model, uniform, **untrained)
            if args.untrained or args.synthetic:   # it costs what a trained one does
                random = Router(model.config, model.fingerprint)
                variants[f"router {s:g}"] = Ours(model, uniform, random, **untrained)
    return variants


def print_variants(variants):
    """What is in use, a line a routed variant."""
    for name, variant in variants.items():
        if isinstance(variant, Ours) and variant.routed:
            r = variant.routing
            router = f"router {r.router.id}" if variant.learned else f"{r.router} router"
            print(f"{name}: schedule {r.schedule.id} of mean sparsity {r.schedule.mean:.3f}, "
                  f"{router}, prefill {r.prefill}, decode {r.decode}", flush=True)


# ------------------------------------------------------------------------------------------------
# measuring


def measure_all(args, variants, model):
    """Every batch size and length in turn -> rows of bench.json; a line of progress each."""
    rows = []
    shapes = [(b, t) for b in args.batch_sizes for t in args.lengths]
    # within a shape the variants take turns, so that a noisy minute hits all of them alike
    for i, (batch_size, length) in enumerate(shapes, 1):
        sizes = prompt_sizes(batch_size, length, args.ragged)
        timings = measure(variants, sizes, args.n_decode, args.rounds, model.config.vocab_size,
                          model.device, args.vary)
        new = bench_rows(timings, sizes, model.dtype)
        rows += new
        prefill = [r for r in new if r["phase"] == "prefill"]
        said = ", ".join(f"{r['name']} {r['median_ms']:.1f}" for r in prefill)
        print(f"[{i}/{len(shapes)}] batch {batch_size}, prompt {length}, prefill ms: {said}",
              flush=True)
    return rows


def router_shares(args, variants, model):
    """{variant: {prompt length: share of its prefill that routing takes}} of trained routers."""
    vocab = model.config.vocab_size
    # by the profiler, which slows what it looks at: a share of its own pass, not of the clock's
    return {name: {str(t): router_share(v, t, vocab) for t in args.lengths}
            for name, v in variants.items() if isinstance(v, Ours) and v.learned}


def masked_differences(args, variants, model):
    """{variant: {"BxT": masked_difference()}} of the routed variants."""
    apart = {}
    for name, v in variants.items():
        if isinstance(v, Ours) and v.routed:
            apart[name] = {
                f"{b}x{t}": masked_difference(v, prompt_sizes(b, t, args.ragged),
                                              model.config.vocab_size)
                for b in args.batch_sizes for t in args.lengths}
    return apart


def print_report(result, path):
    """What was measured, for people: remarks first, the table last."""
    for name, shares in result["router_share"].items():
        said = ", ".join(f"{t} tokens {100 * v:.1f} %" for t, v in shares.items())
        print(f"{name}: router and scores take of a prefill: {said}")
    for name, shapes in result["masked_difference"].items():
        # rounding may swap two tokens of nearly equal margin: both numbers are told
        said = ", ".join(f"{shape} {v['logits']:.1e} and {100 * v['decisions']:.3f} %"
                         for shape, v in shapes.items())
        print(f"{name}: against the masked reference, logits and decisions differ: {said}")
    print()
    print("\n".join(bench_table(result["rows"])))
    print(f"\nspeed-up: over dense; bound: what the FLOPs allow. -> {path}")


def short_json(result, path):
    """One line for other programs: {variant: {"prefill 1x1024": speed-up}} and where all is."""
    speedups = {}                                  # the whole rows are walls of numbers
    for r in result["rows"]:
        key = f"{r['phase']} {r['batch_size']}x{r['prompt_len']}"
        speedups.setdefault(r["name"], {})[key] = round(r["speedup_vs_dense"], 3)
    return json.dumps({"format": result["format"], "file": path, "speedup_vs_dense": speedups})


def main():
    args = get_args()
    check_args(args)

    # without measuring
    if args.save:
        set_seed(args.seed)
        dtype, _ = pick_dtype(args.dtype, pick_device(args.device))
        write_synthetic(args.synthetic, dtype, args.save, args.shard_mb)
        print(f"-> {args.save}: give it as --model")
        return
    if args.memory:
        dtype, _ = pick_dtype(args.dtype, pick_device(args.device))
        print(f"prefill in {dtype_name(dtype)}, uniform schedules, skipped tokens' K/V: {args.kv}; "
              "GB = 10^9 bytes\n")
        levels = args.sparsity or [0.30]
        table = memory_table(args.lengths, args.batch_sizes, levels, dtype, args.kv)
        print("\n".join(table))
        return

    # artefacts are read first: a mistake there shall not wait for the model
    schedule = Schedule.load(args.schedule) if args.schedule else None
    router = None if args.router == "static" else Router.load(args.router)

    # a packed model can't be compiled, and a compiled one gains nothing by packing
    def build(dtype, device):
        return synthetic(args.synthetic, dtype, device)

    model, config = start(args, build if args.synthetic else None, pack=not args.compile)
    check_length(args, model.config)
    if args.compile:
        compile_model(model)

    # the variants: they share one model, and take turns
    variants = our_variants(args, model, schedule, router)
    if not args.no_hf and not args.synthetic:
        folder = find_model(args.model)
        variants["transformers"] = Transformers.from_pretrained(folder, model.dtype, model.device)
    elif not args.no_hf and model.device.type == "cuda":    # a host seldom has room for it twice
        variants["transformers"] = Transformers.synthetic(args.synthetic, model.dtype, model.device)
    print_variants(variants)

    # the clock first, then what would disturb it
    result = {
        "format": "ftp-bench-1",
        "config": config,
        "rows": measure_all(args, variants, model),
        "router_share": router_shares(args, variants, model),
        "masked_difference": masked_differences(args, variants, model) if args.verify else {},
    }

    path = f"{args.out_dir}/bench.json"
    save_json(path, result)
    print_report(result, path)
    if args.json:
        print(short_json(result, path))


if __name__ == "__main__":
    run(main)
