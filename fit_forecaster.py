"""Fit the forecast of skipped blocks in closed form: what a block adds to a token, as a low-rank linear map of the token's state.

    python fit_forecaster.py                                        # -> out/forecaster.safetensors, out/forecaster.json
    python fit_forecaster.py --rank 16 --data tatsu-lab/alpaca --nsamples 400

Reduced-rank ridge regression, block by block, from one streaming pass of the dense model over calibration samples: only sums of
products (float64) are kept, so memory does not grow with the tokens. The ridge is the one of lowest error on held-out samples. No
gradient step. Routing by what can be forecast is known (Informed Routing, arXiv 2510.13831, a forecaster trained by gradient; SwiftKV
takes later blocks' K/V from an earlier state); fitted in closed form under FTP's scheduler and router it is new as far as we know.
"""
import time

import torch

from common import Parser, bar, check, run, start
from data import load_samples, load_text, load_tokenizer, windows
from model_ftp import Forecaster, batches

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean variance of the inputs


def moments(model, samples):
    """Sums over the samples' tokens, per block: x'x, x'y, y'y and n, x the state before the block with a 1 behind it, y its update.

    First tokens are left out: they are always computed, and their huge activations would rule the fit.
    """
    n, d = model.config.n_layer, model.config.hidden_size
    xx = torch.zeros(n, d + 1, d + 1, dtype=torch.float64)
    xy = torch.zeros(n, d + 1, d, dtype=torch.float64)
    yy, count = torch.zeros(n, d, dtype=torch.float64), 0
    model.use()
    with torch.inference_mode():
        for _, group in bar(list(batches(samples, 2048)), desc="moments", unit="batch"):
            p = model.begin_samples(group)
            rows = p.local > 0
            for l in range(n):
                q = model.step(l, p)
                x, y = p.x[rows].double().cpu(), (q.x - p.x)[rows].double().cpu()
                x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
                xx[l] += x.T @ x
                xy[l] += x.T @ y
                yy[l] += y.square().sum(0)
                p = q
            count += int(rows.sum())
    return xx, xy, yy, count


def error(w, xx, xy, yy):
    """Squared error of the map w (d + 1, d) on the moments of some tokens, as a share of the updates' energy."""
    return float((yy.sum() - 2 * (w * xy).sum() + (w * (xx @ w)).sum()) / yy.sum())


def solve(xx, xy, yy, held, rank):
    """Reduced-rank ridge regression from moments: a (d, rank), b (rank, d), c (d,), the ridge, the held-out error."""
    d, best = xy.shape[1], None
    for ridge in RIDGES:
        penalty = torch.full((d + 1,), ridge * float(xx.diagonal()[:d].mean()), dtype=torch.float64)
        penalty[d] = 1e-9
        w = torch.linalg.solve(xx + torch.diag(penalty), xy)
        mean = xx[d] / xx[d, d]
        around = xx - torch.outer(mean, mean) * xx[d, d]                       # the fitted values' spread around their mean
        _, v = torch.linalg.eigh(w.T @ around @ w)
        v = v[:, d - rank:]
        low = (w - torch.outer(torch.nn.functional.one_hot(torch.tensor(d), d + 1).double(), w[d])) @ v @ v.T
        c = (mean @ w) - (mean @ low)                                          # so that the mean update is exact
        low[d] = c
        e = error(low, *held)
        if best is None or e < best[-1]:
            best = (w[:d] @ v, v.T, c, ridge, e)
    return best


def main():
    p = Parser(__doc__).common()
    p.add_argument("--rank", type=int, default=64, help="rank of the map, 0: the mean update alone")
    p.add_argument("--data", default="self", help='calibration: "self", an Alpaca-form .json/.jsonl, or a datasets id')
    p.add_argument("--text", default=None, help="calibrate on a text instead (.txt, .jsonl or datasets id)")
    p.add_argument("--nsamples", type=int, default=None, help="samples (or text windows of 512 tokens), default all of the training part")
    args = p.parse_args()
    model, config = start(args)
    check(0 <= args.rank <= model.config.hidden_size, f"--rank {args.rank}: must lie between 0 and {model.config.hidden_size}")
    tokenizer, t = load_tokenizer(args.model), time.time()
    if args.text:
        all_windows = windows(tokenizer(load_text(args.text), add_special_tokens=False)["input_ids"], 512, 0, args.nsamples)
        check(len(all_windows) > 4, f"--text {args.text}: too short to fit and to hold out; give more than 2560 tokens")
        fit, held = [w for i, w in enumerate(all_windows) if i % 5], all_windows[::5]
    else:
        fit = load_samples(args.data, model, tokenizer, "train", args.nsamples, seed=args.seed)
        held = load_samples(args.data, model, tokenizer, "watch", args.nsamples and max(args.nsamples // 4, 1), seed=args.seed)
    xx, xy, yy, n = moments(model, fit)
    hxx, hxy, hyy, m = moments(model, held)
    got = [solve(xx[l], xy[l], yy[l], (hxx[l], hxy[l], hyy[l]), args.rank) for l in bar(range(model.config.n_layer), desc="solve", unit="block")]
    errors = [g[4] for g in got]
    f = Forecaster(*(torch.stack([g[i] for g in got]).float() for i in range(3)), model.fingerprint,
                   {**config, "tokens": n, "held_out_tokens": m, "ridge": [g[3] for g in got], "held_out_error": errors})
    f.save(f"{args.out_dir}/forecaster.safetensors")
    print("unexplained share of each block's update, held out: " + "  ".join(f"{l}:{e:.2f}" for l, e in enumerate(errors)))
    print(f"{n} tokens, rank {args.rank}, {time.time() - t:.0f} s -> {args.out_dir}/forecaster.safetensors")


if __name__ == "__main__":
    run(main)
