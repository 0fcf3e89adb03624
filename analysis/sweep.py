"""Quality against prompt FLOPs saved, with plain skips (the paper's), with forecasts of states, keys and values, and of late keys and values.

    python analysis/sweep.py --text calibration.txt --test_text test.txt          # -> out/sweep.png, out/sweep.json
    python analysis/sweep.py --test_text test.txt --resume                        # only the points that are missing

A point of skip or forecast takes the better of a few schedule shapes on the calibration text; the forecaster is fitted on random schedules
once, and again on the chosen one. late skips the last blocks alone, under fit_forecaster.py --only_kv, not tuned. Quality is that of
another text: KL to the dense model and perplexity of the tokens after each prompt.
"""
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

from common import Parser, check, run, start
from data import load_text, load_tokenizer, windows
from evaluate import nll
from files import FTPError, load_json, save_json
from fit_forecaster import fit
from model_ftp import Stats, kl_divergence
from router import Forecaster
from search_scheduler import GRAIN, Fitness, flops_converter, late, shapes

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    p = Parser(__doc__).common()
    p.add_argument("--text", default="self", help="calibration text (.txt, .jsonl or datasets id)")
    p.add_argument("--test_text", default="self", help="text to measure on, another one than --text")
    p.add_argument("--levels", default="0.2,0.3,0.4,0.5,0.6,0.7", help="shares of the prompts' block FLOPs to save")
    p.add_argument("--methods", default="skip,forecast,late", help="of skip, forecast, late")
    p.add_argument("--rank", type=int, default=64, help="rank of the forecaster")
    p.add_argument("--keys", type=float, default=1.0, help="share of the keys' correction that it takes")
    p.add_argument("--context", type=int, default=256, help="prompt tokens of a window")
    p.add_argument("--scored", type=int, default=64, help="scored tokens of a window")
    p.add_argument("--nfit", type=int, default=120, help="windows the forecaster is fitted on; a fifth of them choose its ridge")
    p.add_argument("--nsearch", type=int, default=16, help="calibration windows that choose the shape")
    p.add_argument("--nwindows", type=int, default=100, help="test windows at most")
    p.add_argument("--resume", action="store_true", help="keep the points that sweep.json holds from the same settings")
    args = p.parse_args()
    try:
        levels = [float(v) for v in args.levels.split(",")]
    except ValueError:
        raise FTPError(f"--levels {args.levels}: give numbers like 0.2,0.3") from None
    methods = args.methods.split(",")
    check(set(methods) <= {"skip", "forecast", "late"}, f"--methods {args.methods}: of skip, forecast, late")
    model, config = start(args)
    tokenizer, L, path = load_tokenizer(args.model), model.config.n_layer, f"{args.out_dir}/sweep.json"
    cut = lambda text, n: (lambda w: random.Random(args.seed).sample(w, min(n, len(w))))(
        windows(tokenizer(load_text(text), add_special_tokens=False)["input_ids"], args.context, args.scored))
    calibration, test = cut(args.text, args.nfit), cut(args.test_text, args.nwindows)
    parts = [w for i, w in enumerate(calibration) if i % 5], calibration[::5]
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "levels", "methods", "threads")}
    points, same = [], False
    if args.resume and Path(path).exists():
        old = load_json(path, "ftp-sweep-1", "--resume", {"settings": dict, "points": [
            {"method": str, "level": float, "flops_saved": float, "kl": float, "ppl": float}]})
        same = old["settings"] == settings
        points = old["points"] if same else []
    teacher = model.use().response_states(test)[0]
    dense = math.exp(nll(model, teacher, test))
    print(f"dense perplexity {dense:.3f} over {len(test)} windows", flush=True)
    first = None
    for method in methods:
        for level in levels:
            if any(q["method"] == method and q["level"] == level for q in points):
                continue
            if method == "forecast" and first is None:
                kept = Path(args.out_dir) / "sweep_forecaster.safetensors"
                if not (same and kept.exists()):
                    fit(model, *parts, args.rank, seed=args.seed, keys=args.keys).save(kept)
                first = Forecaster.load(kept)
            t, routing = time.time(), {"kv": "drop" if method == "skip" else "keep", "forecaster": first if method == "forecast" else None}
            convert, top = flops_converter(model.config, args.context, routing, 0.99)
            total = round(level * L * GRAIN)
            if total > top * (L - 1):
                print(f"{method} {level}: out of reach", flush=True)
                continue
            fitness = Fitness(model, calibration[:args.nsearch], convert=convert, **routing)
            s = fitness.schedule(late(L, total, top) if method == "late" else
                                 min((tuple(u) for u in shapes(L, total, top, random.Random(args.seed))), key=fitness))
            if method != "skip":
                routing["forecaster"] = fit(model, *parts, args.rank if method == "forecast" else None, s, seed=args.seed, keys=args.keys)
            model.use(s, "static", **routing).stats = Stats(L)
            states = model.response_states(test)[0]
            kl = sum(float(kl_divergence(model.logits(a), model.logits(b)).sum()) for a, b in zip(teacher.split(512), states.split(512)))
            points.append({"method": method, "level": level, "flops_saved": model.stats.saved("prefill"), "sparsity": s.sparsity,
                           "kl": kl / len(teacher), "ppl": math.exp(nll(model, states, test)), "ppl_dense": dense, "seconds": round(time.time() - t, 1)})
            q = points[-1]
            print(f"{method:8s} {q['flops_saved']:.3f} of FLOPs saved  KL {q['kl']:.4f}  perplexity {q['ppl']:.2f} ({q['ppl'] / dense:.3f}x)", flush=True)
            save_json(path, {"format": "ftp-sweep-1", "config": config, "settings": settings, "points": points})
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for method, style in (("skip", "o--"), ("forecast", "s-"), ("late", "^-")):
        mine = sorted((q["flops_saved"], q["kl"], q["ppl"] / dense) for q in points if q["method"] == method)
        for a, i in zip(axes, (1, 2)):
            a.plot([q[0] for q in mine], [q[i] for q in mine], style, label={"skip": "plain skip, K/V dropped", "forecast": "states, keys and values forecast",
                                                                          "late": "late keys and values forecast"}[method])
    for a, what, scale in zip(axes, ("KL to the dense model, nats per token", "perplexity, times dense"), ("log", "linear")):
        a.set(xlabel="prompt block FLOPs saved", ylabel=what, yscale=scale)
        a.grid(alpha=0.3)
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(f"{args.out_dir}/sweep.png", dpi=120)
    print(f"-> {args.out_dir}/sweep.png, {path}")


if __name__ == "__main__":
    run(main)
