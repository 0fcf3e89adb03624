"""Fit the forecast of skipped blocks in closed form: what a block adds to a token, as a low-rank linear map of the token's state.

    python fit_forecaster.py                                        # -> out/forecaster.safetensors, out/forecaster.json
    python fit_forecaster.py --data self,book.txt --rank 128
    python fit_forecaster.py --schedule out/schedule.json           # again, on the states that this schedule leads to
    python fit_forecaster.py --only_kv --keys 0.5 --schedule out/schedule.json --tune 400    # keys and values alone, then tuned

Reduced-rank ridge regression, block by block, against the dense model: from the states that routing with the forecasts of the blocks
before leads to (they drift: a forecast fitted on dense states measures worse), to the dense model's next state and its keys and values.
Without --schedule the states come from random schedules. A block's sums of products (float64) are all that is kept of it; the ridge is
the one of lowest error on held-out samples. No gradient step, unless --tune asks for some.

--only_kv is for schedules that skip the last blocks (search_scheduler.py --method late): nobody reads a skipped token's state there but
later keys and values, so that one map of full rank a block stands for their projections and costs what they do.

Routing by what can be forecast is known (Informed Routing, arXiv 2510.13831, a forecaster trained by gradient; SwiftKV, arXiv 2410.03960,
takes later blocks' K/V of all prompt tokens from an earlier state, by distilled projections); fitted in closed form on routed states, under
FTP's scheduler and router, it is new as far as we know.
"""
import math
import random
import time

import torch
import torch.nn.functional as F

from common import Parser, bar, check, kept, run, start
from data import load_samples, load_tokenizer
from model_ftp import batches, kl_divergence, response_rows
from router import Forecaster, Schedule

RIDGES = (1e-4, 1e-2, 1e-1, 1.0)  # times the mean variance of the inputs


def random_schedule(model, rng):
    """A schedule of random level and steepness towards the last block."""
    L, level, steep = model.config.n_layer, rng.uniform(0.1, 1.2), 8 * rng.random() ** 2
    return Schedule([min(0.99, level * (l / (L - 1)) ** steep * 2 * rng.random()) if l else 0.0 for l in range(L)], model.fingerprint)


def moments(model, l, routed, dense, after, update=True):
    """Sums over the prompts' tokens but the first (always computed): x'x, x'y, y'y with x the routed state scaled to unit RMS and a 1
    behind it, y what leads from there to the dense model's next state (with `update`), and to its key and value."""
    d, block = model.config.hidden_size, model.blocks[l]
    e = d * update + model.config.kv_bytes(1, 1)
    xx, xy, yy = (torch.zeros(*n, dtype=torch.float64) for n in ((d + 1, d + 1), (d + 1, e), (e,)))
    kv = lambda x: block.qkv(block.norm1(x))[:, -model.config.kv_bytes(1, 1):].float()
    for p, q, t in zip(routed, dense, after):
        rows = p.in_set & (p.local > 0)
        x, now, new = p.x[rows], q.x[rows], t.x[rows]
        y = torch.cat(([new.float() - x.float()] if update else []) + [kv(now) - kv(x)], 1).cpu()
        x = F.pad(F.rms_norm(x.float(), (d,)), (0, 1), value=1.0).cpu()
        xx += x.T @ x  # products of one batch in float32, their sum in float64
        xy += x.T @ y
        yy += y.double().square().sum(0)
    return xx, xy, yy


def error(w, xx, xy, yy):
    """Squared error of the map w (d + 1, e) on the moments of some tokens, (e,)."""
    return yy - 2 * (w * xy).sum(0) + (w * (xx @ w)).sum(0)


def solve(xx, xy, yy, held, rank, update=True):
    """Reduced-rank ridge regression from moments: a (d, rank), b (rank, e), c (e,), the ridge, and the error on the moments `held`
    as a share of the targets' energy, updates, keys and values weighing the same."""
    d, e = len(xx) - 1, xy.shape[1]
    widths = [d] * update + [(e - d * update) // 2] * 2
    mean = xx[d] / xx[d, d]
    around, with_y = xx - torch.outer(mean, mean) * xx[d, d], xy - torch.outer(mean, xy[d])
    weight = torch.cat([(1 / part.sum().clamp(min=1e-12)).expand(len(part)) for part in yy.split(widths)]) / len(widths)
    best = None
    for ridge in RIDGES:
        penalty = ridge * float(around.diagonal()[:d].mean()) * torch.eye(d, dtype=torch.float64)
        w = torch.linalg.solve(around[:d, :d] + penalty, with_y[:d])
        scaled = w * weight.sqrt()
        _, v = torch.linalg.eigh(scaled.T @ around[:d, :d] @ scaled)
        v = v[:, e - rank:]                                                     # where the forecasts vary most
        a, b = scaled @ v, v.T / weight.sqrt()
        even = (b.norm(dim=1) / a.norm(dim=0).clamp(min=1e-12)).sqrt()          # factors of equal size, so that both can be tuned
        a, b = a * even, b / even[:, None]
        c = (xy[d] - xx[d, :d] @ a @ b) / xx[d, d]                              # so that the mean is exact
        wrong = float((error(torch.cat((a @ b, c[None])), *held) * weight).sum() / (held[2] * weight).sum().clamp(min=1e-12))
        if best is None or wrong < best[-1]:
            best = (a, b, c, ridge, wrong)
    return best


def own_map(block, kv):
    """A block's key and value projections as a map of the state scaled to unit RMS: (d, kv) and (kv,) float64."""
    a = (block.qkv.plain()[-kv:] * block.norm1.weight).T.double().cpu()
    return a, a.new_zeros(kv) if block.qkv.bias is None else block.qkv.bias[-kv:].double().cpu()


@torch.no_grad()
def fit(model, samples, held, rank, schedule=None, router="static", seed=0, keys=1.0):
    """Forecaster of `rank` from samples [(prompt ids, response ids)], the ridge from `held`; prompts are routed by `schedule`, else by
    random ones. rank None: keys and values alone, of the blocks from the schedule's first skip on. keys: share of the keys' correction
    that is taken. Its meta tells the ridge and the held-out error of each block."""
    c, rng, update = model.config, random.Random(seed), rank is not None
    kv = c.kv_bytes(1, 1)
    first = next(l for l, s in enumerate(schedule.sparsity) if s > 0) if schedule else 0
    n, d, e = c.n_layer - first, c.hidden_size, c.hidden_size * update + kv
    groups = [(g, i >= len(samples)) for part, i in ((samples, 0), (held, len(samples))) for _, g in batches(part, 2048)]
    f = Forecaster(torch.zeros(n, d, rank if update else e), torch.zeros(n, rank, e) if update else None, torch.zeros(n, e), c.n_layer, model.fingerprint)
    plans = [schedule or random_schedule(model, rng) for _ in groups]
    dense = routed = [model.use().begin_samples(g) for g, _ in groups]
    ridges, errors, held_out = [], [], torch.tensor([h for _, h in groups])
    for l in bar(range(c.n_layer), desc="fit", unit="block"):
        model.use()
        dense, routed = ([p.to(model.place_of(l)) for p in part] for part in (dense, routed))
        after = [model.step(l, p) for p in dense]
        if l >= first:
            pick = lambda h: ([x for x, is_held in zip(part, held_out) if is_held == h] for part in (routed, dense, after))
            xx, xy, yy = moments(model, l, *pick(False), update=update)
            a_l, b_l, c_l, ridge, wrong = solve(xx, xy, yy, moments(model, l, *pick(True), update=update), rank if update else e, update)
            for whole in (b_l, c_l):
                whole[..., e - kv:e - kv // 2] *= keys
            if update:
                f.b[l - first] = b_l.float()
            else:  # the block's own projections of the same state, and what they miss
                a_l, c_l = (mine + missing for mine, missing in zip(own_map(model.blocks[l], kv), (a_l @ b_l, c_l)))
            f.a[l - first], f.c[l - first] = a_l.float(), c_l.float()
            ridges.append(ridge)
            errors.append(wrong)
            ready = f.to(model.device, model.dtype)
            routed = [model.use(s, router, kv="keep", forecaster=ready).step(l, p) for s, p in zip(plans, routed)]
        dense = after
        routed = routed if l >= first else dense
    f.meta = {"tokens": sum(len(a) for a, _ in samples), "ridge": ridges, "held_out_error": errors}
    return f


def tune(model, f, samples, held, schedule, steps, lr, batch_size=4, seed=0, router="static", every=50, better=lambda: None):
    """Train a Forecaster's tensors by distillation, KL(dense || routed) on the response tokens, on the path that inference runs. What comes
    before the first skip is the same at every step, and run once: a step costs the blocks behind it, on the tokens that compute them.
    Leaves the values of lowest KL on the samples `held`, calling better() whenever they are new; returns [(step, that KL)]."""
    L = model.config.n_layer
    first = next(l for l, s in enumerate(schedule.sparsity) if s > 0)

    @torch.no_grad()
    def before(some):
        """[(sample, its state before the first skip, last dense states of the rows that predict its response)]"""
        out = []
        for s in bar(some, desc="teacher", unit="sample"):
            p, h = model.use().begin_samples([s]), None
            for l in range(L):
                h = p.x if l == first else h
                p = model.step(l, p)
            out.append((s, h, p.x[response_rows([s])[0]]))
        return out

    def student_kl(some):
        group = [s for s, _, _ in some]
        p = model.use(schedule, router, kv="keep", forecaster=f).begin_samples(group)
        p = p.next(x=torch.cat([h for _, h, _ in some]))
        for l in range(first, L):
            p = model.step(l, p)
        with torch.no_grad():
            aim = model.logits(torch.cat([t for _, _, t in some]))
        return kl_divergence(aim, model.logits(p.x[response_rows(group)[0]]))

    def watch():
        with torch.no_grad():
            return float(torch.cat([student_kl([s]) for s in watched]).mean())

    data, watched, rng = before(samples), before(held), random.Random(seed)
    tensors = {k: t.requires_grad_() for k, t in f.tensors.items()}
    optimizer = torch.optim.Adam(tensors.values(), lr)
    history, t = [(0, watch())], time.time()
    best = {k: v.detach().clone() for k, v in tensors.items()}
    f.meta["tuning"] = history
    for step in bar(range(1, steps + 1), desc="tune", unit="step"):
        for g in optimizer.param_groups:
            g["lr"] = lr * min(1, step / 20) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        loss = student_kl(rng.sample(data, min(batch_size, len(data)))).mean()
        check(bool(loss.isfinite()), f"--lr {lr}: the loss of step {step} is NaN or infinite; lower it")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps:
            history.append((step, watch()))
            if history[-1][1] == min(k for _, k in history):
                best = {k: v.detach().clone() for k, v in tensors.items()}
                better()
            print(f"step {step:4d}  KL {loss.item():.4f}  watched {history[-1][1]:.4f} (before tuning {history[0][1]:.4f})  "
                  f"{step / (time.time() - t) * 60:.0f} steps/min", flush=True)
    for k, v in tensors.items():
        v.requires_grad_(False).copy_(best[k])
    return history


def main():
    p = Parser(__doc__).common()
    p.add_argument("--rank", type=int, default=64, help="rank of the map, 0: the mean alone")
    p.add_argument("--data", default="self", help='calibration: "self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, commas between')
    p.add_argument("--max_prompt", type=int, default=512, help="longest prompt taken, tokens; plain text comes in windows of it")
    p.add_argument("--nsamples", type=int, default=None, help="samples to fit on, default all of the training part")
    p.add_argument("--only_kv", action="store_true", help="keys and values alone: for schedules whose skips run to the last block")
    p.add_argument("--keys", type=float, default=1.0, help="share of the keys' correction that is taken: less keeps them more distinct")
    p.add_argument("--schedule", default=None, help="fit on the states that this schedule leads to")
    p.add_argument("--router", default="static", help="the router beside it")
    p.add_argument("--forecaster", default=None, help="tune this one instead of fitting one")
    p.add_argument("--tune", type=int, default=0, help="steps of distillation after the fit, under --schedule")
    p.add_argument("--tune_lr", type=float, default=2e-4, help="their largest learning rate")
    p.add_argument("--batch_size", type=int, default=4, help="their samples a step")
    p.add_argument("--tune_samples", type=int, default=400, help="training samples they are drawn from")
    p.add_argument("--nwatch", type=int, default=24, help="samples that choose the best step")
    p.add_argument("--max_response", type=int, default=64, help="their response tokens")
    args = p.parse_args()
    model, config = start(args, pack=False)
    check(args.only_kv or 0 <= args.rank <= model.config.hidden_size, f"--rank {args.rank}: must lie between 0 and {model.config.hidden_size}")
    for flag in ("only_kv", "tune"):
        check(args.schedule or not getattr(args, flag), f"--{flag}: needs the blocks that skip; give --schedule")
    tokenizer, t = load_tokenizer(args.model), time.time()
    schedule, out = Schedule.load(args.schedule) if args.schedule else None, f"{args.out_dir}/forecaster.safetensors"
    load = lambda part, n, length: load_samples(args.data, model, tokenizer, part, n, args.max_prompt, max_response=length, seed=args.seed)
    if args.forecaster:
        f = Forecaster.load(args.forecaster)
    else:
        f = fit(model, load("train", args.nsamples, 8), load("watch", args.nsamples and max(args.nsamples // 4, 1), 8),
                None if args.only_kv else args.rank, schedule, args.router, args.seed, args.keys)
        f.meta |= config
        print("unexplained share of what it forecasts, held out: " + "  ".join(f"{l}:{e:.2f}" for l, e in enumerate(f.meta["held_out_error"], f.first)))
        print(f"{f.meta['tokens']} tokens, rank {f.rank}, {time.time() - t:.0f} s -> {out}", flush=True)
        f.save(out)
        kept[out] = "as fitted"
    if args.tune:
        def better():
            f.save(out)
            kept[out] = f"tuned for {f.meta['tuning'][-1][0]} steps, --forecaster {out} goes on from it"
        history = tune(model, f, load("train", args.tune_samples, args.max_response), load("watch", args.nwatch, args.max_response), schedule,
                       args.tune, args.tune_lr, args.batch_size, args.seed, args.router, better=better)
        f.save(out)
        step, kl = min(history, key=lambda e: e[1])
        print(f"watched KL {history[0][1]:.4f} before tuning, {kl:.4f} after {step} steps -> {out}")


if __name__ == "__main__":
    run(main)
