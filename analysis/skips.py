"""Which tokens of a prompt skip which blocks, with the trained router.

    python analysis/skips.py --schedule out/schedule_ft.json --router out/router.safetensors    # -> out/skips.png, out/skips.json
    python analysis/skips.py --prompt "Why is the sky blue?" --router static
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch

from common import Parser, routing_of, run, start
from data import load_samples, load_tokenizer, render
from files import save_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    p = Parser(__doc__).common().routing()
    p.add_argument("--schedule", default="out/schedule_ft.json", help="schedule")
    p.add_argument("--router", default="out/router.safetensors", help="trained router, or static")
    p.add_argument("--prompt", default=None, help="an instruction; default: a held-out one")
    p.add_argument("--longest", type=int, default=160, help="longest held-out prompt shown, tokens")
    args = p.parse_args()
    model, config = start(args)
    routing = routing_of(args)
    model.use(args.schedule, args.router, **routing)  # refuses unfit artefacts before any work
    tokenizer = load_tokenizer(args.model)
    ids = render(tokenizer, args.prompt) if args.prompt else max(
        (a for a, _ in load_samples("self", model, tokenizer, "heldout", max_prompt=args.longest)), key=len)
    model.use(args.schedule, args.router, **routing)
    with torch.inference_mode():
        state, kept = model.begin([ids], [len(ids)]), []
        for l in range(model.config.n_layer):
            keep, _ = model.route(l, state)
            kept.append(torch.ones(len(ids), dtype=torch.bool) if keep.mask is None else keep.mask.cpu())
            state = model.step(l, state)
    kept = torch.stack(kept)
    words = [tokenizer.decode([t]).replace("\n", "\\n").replace("$", r"\$") for t in ids]
    fig, a = plt.subplots(figsize=(max(8, 0.16 * len(ids)), 6))
    a.imshow(kept, aspect="auto", origin="lower", cmap="Blues", vmin=-0.3, vmax=1)
    a.set_xticks(range(len(ids)), words, rotation=90, fontsize=6)
    a.set(ylabel="block", title=f"dark: computed, light: skipped ({100 * (1 - kept.float().mean()):.1f} % of token-blocks skip)")
    fig.tight_layout()
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    fig.savefig(f"{args.out_dir}/skips.png", dpi=120)
    save_json(f"{args.out_dir}/skips.json", {"format": "ftp-figure-1", "config": config, "tokens": words, "kept": kept.int().tolist()})
    print(f"-> {args.out_dir}/skips.png")


if __name__ == "__main__":
    run(main)
