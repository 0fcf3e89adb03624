"""Quality against prompt FLOPs saved: plain skips, forecasts, and late keys and values.

    python analysis/sweep.py --text calibration.txt --test_text test.txt  # -> sweep.png, sweep.json
    python analysis/sweep.py --test_text test.txt --resume                 # only the points missing

In: a model and two texts. Out: a figure, and its points.

A point of skip or forecast takes the better of a few schedule shapes on the calibration text; the
forecaster is fitted on random schedules once, and again on the chosen one. late skips the last
blocks alone, under maps of keys and values as fit_late_kv.py --only_kv fits them, untuned. Quality
is that of another text: KL to the dense model and perplexity of the tokens after each prompt.
"""
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from analysis.style import colour, label_lines, plt, save, settle
from lib.data import load_text, load_tokenizer, windows
from lib.evaluation import nll
from lib.files import check, load_json, save_json
from lib.flops import Meter
from lib.forecast import fit
from lib.scoring import response_kl, response_states
from lib.search import Fitness, flops_converter, late, shapes
from lib.skipped import Forecaster
from lib.stage import Parser, number, numbers, run, start, whole, words

SHOWN = {   # method -> its name in the figure
    "skip": "plain skip, K/V dropped",
    "forecast": "states, keys and values forecast",
    "late": "late keys and values forecast",
}
POINT = {"method": str, "level": float, "flops_saved": float, "kl": float, "ppl": float}


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("points").add_argument
    add("--levels", default="0.2,0.3,0.4,0.5,0.6,0.7", type=numbers("(0, 1)"),
        help="shares of the prompts' block FLOPs to save, comma list")
    add("--methods", default="skip,forecast,late", type=words, help="of skip, forecast, late")
    add("--most", default=0.99, type=number("(0, 1)"), help="largest sparsity of a block")

    add = p.add_argument_group("data").add_argument
    add("--text", default="passages", help="calibration text (.txt, .jsonl or datasets id)")
    add("--test_text", default="passages", help="text to measure on, another one than --text")
    add("--context", default=256, type=whole("[2, inf)"), help="prompt tokens of a window")
    add("--scored", default=64, type=whole("[1, inf)"), help="scored tokens of a window")
    add("--nfit", default=120, type=whole("[5, inf)"),
        help="windows the forecaster is fitted on; a fifth of them choose its ridge")
    add("--nsearch", default=16, type=whole("[1, inf)"),
        help="calibration windows that choose the shape")
    add("--nwindows", default=100, type=whole("[1, inf)"), help="test windows at most")

    add = p.add_argument_group("forecaster").add_argument
    add("--rank", default=64, type=whole("[1, inf)"), help="rank of the forecaster")
    add("--keys", default=1.0, type=number("[0, 1]"),
        help="share of the keys' correction that it takes")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the figure")
    add("--resume", action="store_true",
        help="keep the points that sweep.json holds from the same settings")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


def some_windows(text, n, args, tokenizer, flag):
    """At most n windows of a text, drawn by the seed: [(prompt ids, ids to score)]."""
    ids = tokenizer(load_text(text, flag), add_special_tokens=False)["input_ids"]
    found = windows(ids, args.context, args.scored)
    return random.Random(args.seed).sample(found, min(n, len(found)))


class Sweep:
    """The points, one at a time; what they share is made once."""

    def __init__(self, args, model):
        self.args, self.model = args, model
        tokenizer = load_tokenizer(args.model)
        self.calibration = some_windows(args.text, args.nfit, args, tokenizer, "--text")
        self.test = some_windows(args.test_text, args.nwindows, args, tokenizer, "--test_text")
        # a fifth of the windows choose the ridge
        self.held = self.calibration[::5]
        self.fitted = [w for i, w in enumerate(self.calibration) if i % 5]
        self.teacher, _ = response_states(model.use(), self.test)
        self.dense = math.exp(nll(model, self.teacher, self.test))
        self.first = None            # forecaster of the first rounds, see first_forecaster()

    def fit(self, rank, schedule=None):
        """A forecaster; rank None: of keys and values alone."""
        return fit(self.model, self.fitted, self.held, rank, schedule, seed=self.args.seed,
                   keys=self.args.keys)

    def first_forecaster(self, resumed):
        """The one fitted on random schedules, by which shapes are chosen; kept for --resume."""
        if self.first is None:
            path = Path(self.args.out_dir) / "sweep_forecaster.safetensors"
            if not (resumed and path.exists()):
                self.fit(self.args.rank).save(path)
            self.first = Forecaster.load(path)
        return self.first

    def schedule(self, method, level, routing):
        """The schedule that saves `level` of the prompts' FLOPs; None where none can."""
        args, blocks = self.args, self.model.config.n_layer - 1
        convert, top, full = flops_converter(self.model.config, args.context, routing, args.most)
        total = round(level * full)
        if total > top * (blocks - 1):
            return None
        fitness = Fitness(self.model, self.calibration[:args.nsearch], convert=convert, **routing)
        if method == "late":
            return fitness.schedule(late(blocks, total, top))
        tried = shapes(blocks, total, top, random.Random(args.seed))
        return fitness.schedule(min(map(tuple, tried), key=fitness))

    def point(self, method, level, resumed):
        """One point, a dict; None where the method can't save that much."""
        began, model = time.time(), self.model
        routing = {"kv": "drop" if method == "skip" else "keep", "forecaster": None}
        if method == "forecast":
            routing["forecaster"] = self.first_forecaster(resumed)
        schedule = self.schedule(method, level, routing)
        if schedule is None:
            return None
        if method != "skip":
            rank = self.args.rank if method == "forecast" else None
            routing["forecaster"] = self.fit(rank, schedule)
        model.use(schedule, "static", **routing)
        meter = Meter(model)
        states, _ = response_states(model, self.test, meter=meter)
        return {
            "method": method,
            "level": level,
            "flops_saved": meter.saved("prefill"),
            "sparsity": schedule.sparsity,
            "kl": float(response_kl(model, self.teacher, states).mean()),
            "ppl": math.exp(nll(model, states, self.test)),
            "ppl_dense": self.dense,
            "seconds": round(time.time() - began, 1),
        }


def stored_points(path, settings):
    """Points of an earlier run, and whether it had the same settings: of another one none."""
    if not Path(path).exists():
        return [], False
    old = load_json(path, "ftp-sweep-1", "--resume", {"settings": dict, "points": [POINT]})
    same = old["settings"] == settings
    return (old["points"] if same else []), same


def draw(path, points, dense):
    """The figure: one line a method, its name beside it."""
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4), layout="constrained")
    questions = (("kl", "KL to the dense model, nats per token", "log",
                  "How far from the dense model?"),
                 ("ppl", "perplexity, times dense", "linear", "How much worse does it predict?"))
    ends = {key: [] for key, *_ in questions}
    for axis, (key, label, scale, title) in zip(axes, questions):
        for method in SHOWN:
            mine = sorted((q["flops_saved"], q[key]) for q in points if q["method"] == method)
            if not mine:
                continue
            x, y = zip(*mine)
            if key == "ppl":
                y = [v / dense for v in y]
            axis.plot(x, y, marker="o", color=colour(method))
            ends[key].append((SHOWN[method], x[-1], y[-1]))
        axis.set(xlabel="prompt block FLOPs saved", ylabel=label, yscale=scale, title=title)
        # room for the names beside the lines
        low, high = axis.get_xlim()
        axis.set_xlim(low, high + 0.7 * (high - low))
    settle(figure)
    colours = {name: colour(method) for method, name in SHOWN.items()}
    for axis, (key, *_) in zip(axes, questions):
        label_lines(axis, ends[key], colours)
    return save(figure, path)


def main():
    args = get_args()
    check(set(args.methods) <= set(SHOWN),
          f"--methods {','.join(args.methods)}: of {', '.join(SHOWN)}")
    model, config = start(args)
    path = f"{args.out_dir}/sweep.json"
    free = ("resume", "levels", "methods", "threads")      # these change no point
    settings = {k: v for k, v in vars(args).items() if k not in free}
    points, same = stored_points(path, settings) if args.resume else ([], False)

    sweep = Sweep(args, model)
    print(f"dense perplexity {sweep.dense:.3f} over {len(sweep.test)} windows", flush=True)
    known = {(q["method"], q["level"]) for q in points}
    for method in args.methods:
        for level in args.levels:
            if (method, level) in known:
                continue
            point = sweep.point(method, level, same)
            if point is None:
                print(f"{method} {level}: out of reach", flush=True)
                continue
            points.append(point)
            print(f"{method:8s} {point['flops_saved']:.3f} of FLOPs saved  KL {point['kl']:.4f}  "
                  f"perplexity {point['ppl']:.2f} ({point['ppl'] / sweep.dense:.3f}x)", flush=True)
            save_json(path, {"format": "ftp-sweep-1", "config": config, "settings": settings,
                             "points": points})

    figure = draw(f"{args.out_dir}/sweep.png", points, sweep.dense)
    print(f"-> {figure}, {path}")


if __name__ == "__main__":
    run(main)
