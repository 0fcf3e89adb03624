"""Beyond the paper: which keys and values a skipped token leaves, as linear maps of its state.

    python fit_late_kv.py --only_kv --keys 0.5 --schedule out/schedule.json --tune 400
    python fit_late_kv.py                                # maps to its next state, too: a forecast
    python fit_late_kv.py --data self,book.txt --rank 128
    python fit_late_kv.py --schedule out/schedule.json   # on the states that this schedule leads to
    python fit_late_kv.py --schedule out/schedule.json --tune 400 --resume   # after an interruption

In: a model, a schedule (but for a first forecast). Out: out/forecaster.safetensors and .json, for
--kv keep --forecaster of the other stages.

Reduced-rank ridge regression, block by block, against the dense model: from the states that routing
with the forecasts of the blocks before leads to (they drift: a forecast fitted on dense states
measures worse), to the dense model's next state and its keys and values. Without --schedule the
states come from random schedules. The ridge is the one of lowest error on held-out samples. No
gradient step, unless --tune asks for some.

--only_kv is for schedules that skip the last blocks (search_scheduler.py --method late): nobody
reads a skipped token's state there but later keys and values, so that one map of full rank a block
stands for their projections and costs what they do.

Routing by what can be forecast is known (Informed Routing, arXiv 2510.13831, a forecaster trained
by gradient; SwiftKV, arXiv 2410.03960, takes later blocks' K/V of all prompt tokens from an earlier
state, by distilled projections); fitted in closed form on routed states, under FTP's scheduler and
router, it is new as far as we know.
"""
import time
from pathlib import Path

import torch

from lib.artefacts import SELECTIONS, Schedule
from lib.data import load_samples, load_tokenizer
from lib.files import check, digest
from lib.forecast import Learner, Tuning, fit, load_state, save_state, tune
from lib.skipped import Forecaster
from lib.stage import Parser, number, numbers, run, saved, start, whole
from model_ftp import Router


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("what is fitted").add_argument
    add("--only_kv", action="store_true",
        help="keys and values alone: for schedules whose skips run to the last block")
    add("--rank", type=whole("[0, inf)"), default=64,
        help="rank of the map of state, keys and values, 0: the mean alone")
    # less keeps the keys of skipped tokens apart from each other: 0.5 measured best tuned
    add("--keys", type=number("[0, 1]"), default=1.0,
        help="share of the keys' correction that is taken: less keeps them more distinct")
    add("--ridges", type=numbers("[0, inf)"), default="1e-4,1e-2,1e-1,1",
        help="ridges tried, times the mean variance of the inputs")

    # states drift under routing: the fit sees what this routing makes of them
    add = p.add_argument_group("routing").add_argument
    add("--schedule", default=None, help="fit on the states that this schedule leads to")
    add("--router", default="static",
        help=f"the router beside it, a file or one of {', '.join(SELECTIONS)}")

    add = p.add_argument_group("data").add_argument
    add("--data", default="self",
        help='"self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, commas '
             "between")
    add("--max_prompt", type=whole("[1, inf)"), default=512,
        help="longest prompt taken, tokens; plain text comes in windows of it")
    add("--nsamples", type=whole("[1, inf)"), default=None,
        help="samples to fit on, default all of the training part")
    add("--nheld", type=whole("[1, inf)"), default=None,
        help="others that choose the ridge, default a quarter of --nsamples, or all there are")

    # distillation of the whole model's output, on the path that inference runs
    add = p.add_argument_group("tuning").add_argument
    add("--tune", type=whole("[0, inf)"), default=0,
        help="steps of distillation after the fit, under --schedule")
    add("--forecaster", default=None, help="tune this one instead of fitting one")
    add("--tune_samples", type=whole("[1, inf)"), default=400,
        help="training samples the steps are drawn from")
    add("--nwatch", type=whole("[1, inf)"), default=24, help="samples that choose the best step")
    add("--max_response", type=whole("[1, inf)"), default=64, help="response tokens of both")
    add("--batch_size", type=whole("[1, inf)"), default=4, help="samples a step")
    add("--tune_lr", type=number("(0, inf)"), default=2e-4, help="largest learning rate")
    add("--lr_warmup", type=whole("[0, inf)"), default=20,
        help="steps in which the learning rate rises to it")
    add("--lr_floor", type=number("[0, 1]"), default=0.02,
        help="share of the learning rate to which a cosine takes it")
    add("--clip", type=number("(0, inf)"), default=1.0, help="largest norm of the gradient")
    add("--eval_every", type=whole("[1, inf)"), default=50, help="steps between validations")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--resume", action="store_true", help="go on with a tuning from its last validation")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


# The fit looks at prompts alone, but the shortest response that load_samples() takes must be there.
# Of plain text it sets where windows begin.
FIT_RESPONSE = 8


def samples_of(args, model, tokenizer, split, n, max_response):
    """[(prompt ids, response ids)] of --data."""
    return load_samples(args.data, model, tokenizer, split, n, args.max_prompt,
                        max_response=max_response, seed=args.seed)


def held_out(args):
    """How many samples choose the ridge, None for all."""
    # four numbers to choose between need fewer samples than the maps themselves
    if args.nheld or args.nsamples is None:
        return args.nheld
    return max(args.nsamples // 4, 1)


def fitted(args, model, tokenizer, schedule, router, config, out):
    """The Forecaster in closed form, saved as `out`."""
    began = time.time()
    samples = samples_of(args, model, tokenizer, "train", args.nsamples, FIT_RESPONSE)
    held = samples_of(args, model, tokenizer, "watch", held_out(args), FIT_RESPONSE)
    rank = None if args.only_kv else args.rank    # keys and values alone take a map of full rank
    f = fit(model, samples, held, rank, schedule, router, args.seed, args.keys, args.ridges)
    f.meta |= config
    errors = "  ".join(f"{l}:{e:.2f}" for l, e in enumerate(f.meta["held_out_error"], f.first))
    print(f"unexplained share of what it forecasts, held out: {errors}")
    # a fit without tuning is a whole artefact, and one with it is there if the tuning is stopped
    f.save(out)
    saved[out] = "as fitted"
    print(f"{f.meta['tokens']} tokens, rank {f.rank}, {time.time() - began:.0f} s -> {out}",
          flush=True)
    return f


def resume_settings(args, model, schedule, router, samples, watched):
    """What a tuning that is gone on with must share with the one that was interrupted."""
    # where it lies and how fast it runs change nothing; the given files are known by their ids
    free = ("resume", "threads", "out_dir")
    f = Forecaster.load(args.forecaster).id if args.forecaster else None
    return {k: v for k, v in vars(args).items() if k not in free} | {
        "schedule_id": schedule.id,
        "router_id": router.id if isinstance(router, Router) else None,
        "forecaster_id": f,
        "fingerprint": model.fingerprint,
        "data_digest": digest([samples, watched])}


def main():
    args = get_args()
    # what can be refused before the model is there
    for flag in ("only_kv", "tune"):
        check(args.schedule or not getattr(args, flag), f"--{flag}: needs the blocks that skip; "
                                                        "give --schedule")
    schedule = Schedule.load(args.schedule) if args.schedule else None
    router = args.router if args.router in SELECTIONS else Router.load(args.router)
    given = Forecaster.load(args.forecaster) if args.forecaster else None

    # weights as they are, not packed for inference: tuning needs gradients through them
    model, config = start(args, pack=False)
    width = model.config.hidden_size
    check(args.only_kv or args.rank <= width, f"--rank {args.rank}: must lie in [0, {width}]")
    tokenizer = load_tokenizer(args.model)
    out, state = f"{args.out_dir}/forecaster.safetensors", f"{args.out_dir}/late_state.safetensors"

    # a tuning goes on where it stopped, and its fit is not done again
    how = Tuning(args.tune, args.tune_lr, args.batch_size, args.lr_warmup, args.lr_floor, args.clip,
                 args.eval_every, args.seed)
    learner = settings = samples = watched = None
    if args.tune:
        samples = samples_of(args, model, tokenizer, "train", args.tune_samples, args.max_response)
        watched = samples_of(args, model, tokenizer, "watch", args.nwatch, args.max_response)
        settings = resume_settings(args, model, schedule, router, samples, watched)
        if args.resume and Path(state).exists():
            learner = load_state(state, settings, how)
            print(f"resuming at step {learner.step}")

    # the fit in closed form, or the forecaster that is given; each serves as it is without --tune
    if learner is None:
        f = given or fitted(args, model, tokenizer, schedule, router, config, out)
        learner = Learner(f, how)
    if not args.tune:
        return

    # the tuning: whatever is best so far lies in the artefact, all else in the state
    def after_validation(better):
        save_state(state, learner, settings)
        if better and learner.step:
            learner.forecaster.save(out)
            saved[out] = f"tuned for {learner.step} steps"

    tune(model, learner, samples, watched, schedule, router, after_validation)
    learner.forecaster.save(out)
    step, kl = min(learner.history, key=lambda entry: entry[1])
    print(f"watched KL {learner.history[0][1]:.4f} before tuning, {kl:.4f} after {step} steps "
          f"-> {out}")


if __name__ == "__main__":
    run(main)
