"""Speed and memory of rival methods, in turns with the dense model: as benchmark.py, with --peer.

    python analysis/rivals/benchmark.py --peer laco=out/baselines/laco_0.30
    python analysis/rivals/benchmark.py --lengths 512,1024 --peer lazyllm=lazy.json+progressive
    python analysis/rivals/benchmark.py --schedule out/schedule_ft.json --peers    # block removal
    python analysis/rivals/benchmark.py --synthetic llama2-7b --sparsity 0.30 --peers --device cuda

In: what make.py wrote, or any schedule with a router file, random, attention or progressive.
Out: bench.json and a table, as benchmark.py, whose flags these are.

A schedule that removes blocks or sub-blocks gives NAME and NAME_prompt, see evaluate.py here. The
bound of a pruned folder is the original's FLOPs over its own.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from analysis.rivals.peers import PEER, check_names, load_peers
from benchmark import (
    check_length,
    measure_all,
    print_report,
    print_variants,
    router_shares,
    short_json,
    ways_to_route,
)
from lib.artefacts import Schedule
from lib.checkpoint import find_model
from lib.files import check, save_json
from lib.stage import Parser, numbers, run, start, whole, wholes
from lib.timing import SHAPES, Ours, Transformers, synthetic
from model_ftp import Router


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("rivals").add_argument
    add("--peer", action="append", default=[], metavar=PEER,
        help="a pruned model: a schedule (and a router file, random, attention or progressive), "
             "or a model folder of make.py; may be repeated")
    add("--peers", action="store_true",
        help="also block removal (ShortGPT-like: the last blocks but one) at about equal FLOPs")

    add = p.add_argument_group("what is measured beside them and the dense model").add_argument
    add("--schedule", default=None, help="schedule, under the static router")
    add("--router", default="static", help="trained router of --schedule, beside the static one")
    add("--sparsity", default=None, type=numbers("[0, 1)"),
        help="uniform sparsities, comma list; 0.30 where there is no schedule")
    add("--no_hf", action="store_true", help="leave transformers out")
    add("--synthetic", default=None, choices=list(SHAPES),
        help="random weights of this shape instead of --model")

    add = p.add_argument_group("how tokens are routed").add_argument
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or a trained router's own decision")
    add("--decode", default="dense", choices=["dense", "threshold", "rule"],
        help="how decoded tokens are routed, of rivals densely")
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
    add("--n_decode", default=16, type=whole("[0, inf)"),
        help="tokens decoded after each prefill, 0: prefill only")
    add("--ragged", action="store_true",
        help="prompts of a batch of B have T/B, 2T/B, ... T tokens; ours are packed, "
             "transformers pads them")
    add("--vary", action="store_true",
        help="each round's prompts are a token shorter than the last's: a CPU's kernels "
             "are made anew for each number of rows, and in use lengths seldom repeat")

    add = p.add_argument_group("how it is measured").add_argument
    add("--rounds", default=7, type=whole("[1, inf)"),
        help="timed rounds after the warm-up")

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
    shortest = min(args.lengths)
    if args.ragged:
        shortest //= max(args.batch_sizes)
        check(shortest > 1, "--ragged: the shortest prompt would have one token; give longer "
                            "--lengths")
    check(not args.vary or shortest > args.rounds + 1,
          "--vary: the shortest prompt would be used up; give longer --lengths or fewer --rounds")
    check(not args.device_map,
          "--device_map: the clock and the memory counter read one device; leave it out")


def load_model(args):
    """As lib.stage.start: the model and what its artefact stores."""
    if not args.synthetic:
        return start(args)

    def build(dtype, device):
        return synthetic(args.synthetic, dtype, device)

    return start(args, build)


# ------------------------------------------------------------------------------------------------
# the variants


def our_variants(args, model, schedule, router):
    """{name: Ours}, dense first: the model under our own routing."""
    learned, untrained = ways_to_route(args)
    variants = {"dense": Ours(model)}
    if router:
        variants["ftp"] = Ours(model, schedule, router, **learned)
    if schedule:
        variants["static"] = Ours(model, schedule, **untrained)
        return variants
    for s in uniform_sparsities(args):
        variants[f"static {s:g}"] = Ours(model, Schedule.uniform(model, s), **untrained)
    return variants


def uniform_sparsities(args):
    return args.sparsity or [0.30]


def removal_variants(args, model, schedule):
    """{name: Ours} of block removal: the last blocks but one go, as many as the sparsity says."""
    n, variants = model.config.n_layer, {}
    for s in [schedule.mean] if schedule else uniform_sparsities(args):
        gone = round(s * n)
        removed = Schedule([0.0] * (n - 1 - gone) + [1.0] * gone + [0.0], model.fingerprint)
        variants[f"removal {gone}/{n}"] = Ours(model, removed)
    return variants


def rival_variants(args, model, peers):
    """{name: Ours} of the rivals; schedules share the model's weights."""
    learned, _ = ways_to_route(args)
    how = learned | {"decode": "dense"}
    variants = {}
    for peer in peers:
        runner, base = peer.runner(model)
        if peer.schedule is None:
            variants[peer.name] = Ours(runner, routing=runner.routing, base=base)
        else:
            variants[peer.name] = Ours(runner, peer.schedule, peer.router, **peer.settings(how))
    return variants


def main():
    args = get_args()
    check_args(args)

    # artefacts are read first: a mistake there shall not wait for the model
    schedule = Schedule.load(args.schedule) if args.schedule else None
    router = None if args.router == "static" else Router.load(args.router)
    peers = load_peers(args.peer)

    # the variants take turns
    model, config = load_model(args)
    check_length(args, model.config)
    variants = our_variants(args, model, schedule, router)
    if args.peers:
        variants |= removal_variants(args, model, schedule)
    if not args.no_hf and not args.synthetic:
        folder = find_model(args.model)
        variants["transformers"] = Transformers.from_pretrained(folder, model.dtype, model.device)
    check_names(peers, variants, "a variant's name")
    variants |= rival_variants(args, model, peers)
    print_variants(variants)

    # the clock first, then the profiler, which would disturb it
    result = {
        "format": "ftp-bench-1",
        "config": config,
        "rows": measure_all(args, variants, model),
        "router_share": router_shares(args, variants, model),
        "masked_difference": {},
    }

    path = f"{args.out_dir}/bench.json"
    save_json(path, result)
    print_report(result, path)
    if args.json:
        print(short_json(result, path))


if __name__ == "__main__":
    run(main)
