"""How little a block changes a token: cosine of its input and output, per block and token (the paper's redundancy figures).

    python analysis/redundancy.py                                   # -> out/redundancy.png, out/redundancy.json
    python analysis/redundancy.py --text book.txt --nsamples 500 --seqlen 1024
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch
import torch.nn.functional as F

from common import Parser, bar, check, run, start
from data import load_samples, load_text, load_tokenizer, windows
from files import save_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

THRESHOLDS = (0.7, 0.8, 0.9)


def main():
    p = Parser(__doc__).common()
    p.add_argument("--text", default=None, help="text to run through; default: the calibration samples")
    p.add_argument("--nsamples", type=int, default=64, help="sequences")
    p.add_argument("--seqlen", type=int, default=256, help="tokens a sequence, with --text")
    p.add_argument("--shown", type=int, default=96, help="tokens of the first sequence drawn in the heat map")
    args = p.parse_args()
    check(args.nsamples > 0 and args.seqlen > 1, "--nsamples must be at least 1, --seqlen at least 2")
    model, config = start(args)
    tokenizer = load_tokenizer(args.model)
    if args.text:
        ids = tokenizer(load_text(args.text), add_special_tokens=False)["input_ids"]
        seqs = [a for a, _ in windows(ids, args.seqlen, 0, args.nsamples)]
    else:
        seqs = [a + b for a, b in load_samples("self", model, tokenizer, "train", args.nsamples)]
    above, total, heat = torch.zeros(len(THRESHOLDS), model.config.n_layer), 0, None
    with torch.inference_mode():
        for seq in bar(seqs, unit="sequence"):
            state, first = model.begin([seq], [len(seq)]), []
            for l in range(model.config.n_layer):
                after = model.step(l, state)
                cos = F.cosine_similarity(state.x.to(after.x.device).float(), after.x.float(), dim=-1).cpu()
                above[:, l] += torch.stack([(cos > t).sum() for t in THRESHOLDS])
                first.append(cos[:args.shown])
                state = after
            total += len(seq)
            heat = torch.stack(first) if heat is None else heat
    share = above / total
    fig, (a, b) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1.4, 1))
    image = a.imshow(heat, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    a.set(xlabel="token of one sequence", ylabel="block", title="cosine of block input and output")
    fig.colorbar(image, ax=a)
    for t, line in zip(THRESHOLDS, share):
        b.plot(100 * line, marker=".", label=f"cosine > {t} (mean {100 * line.mean():.1f} %)")
    b.set(xlabel="block", ylabel="tokens, %", ylim=(0, 101), title=f"{len(seqs)} sequences, {total} tokens")
    b.legend()
    b.grid(alpha=0.3)
    fig.tight_layout()
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    fig.savefig(f"{args.out_dir}/redundancy.png", dpi=120)
    save_json(f"{args.out_dir}/redundancy.json", {"format": "ftp-redundancy-1", "config": config, "tokens": total, "sequences": len(seqs),
                                                  "share_above": {str(t): line.tolist() for t, line in zip(THRESHOLDS, share)},
                                                  "mean": {str(t): float(line.mean()) for t, line in zip(THRESHOLDS, share)}})
    for t, line in zip(THRESHOLDS, share):
        print(f"cosine > {t}: {100 * line.mean():.2f} % of tokens over all blocks; first three {100 * line[:3].mean():.1f} %, "
              f"middle {100 * line[3:-3].mean():.1f} %, last three {100 * line[-3:].mean():.1f} %")
    print(f"-> {args.out_dir}/redundancy.png")


if __name__ == "__main__":
    run(main)
