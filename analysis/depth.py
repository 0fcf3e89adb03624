"""At which depth does the model know what a span of its prompt is worth to the answer?

    python analysis/depth.py                       # chats without a system prompt
    python analysis/depth.py --data cloze --max_prompt 128 --ntrain 200

A router decides before a block by what the blocks before it have shown. Here small networks predict
the log worth of spans (lib/worth.py) from position alone, and from position and the attention that
the spans get in the first b blocks of the dense model, for several b: what the last queries look at
is what a router can see of content. How much of the variance of held-out prompts they explain says
from where on a learned router can be better than a rule by position.

Out: depth.png, depth.json, and a table. The last row of keeping orders, "all blocks", is no router:
it has read the whole dense model, and says what a second pass over the prompt would gain.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from analysis.style import plt, save
from analysis.worth import measure, print_gains
from lib.artefacts import FIRST, Schedule
from lib.attention import received, relative_score
from lib.data import load_samples, load_tokenizer
from lib.files import save_json
from lib.numbers import spread
from lib.routing import WINDOW
from lib.stage import Parser, number, progress, run, start, whole
from lib.worth import LEAST, Oracle, on_tokens, spans_of

DEPTHS = 8                         # how many depths are tried
WIDTH, DROPOUT = 64, 0.3           # of a network: that of the routers, and against few samples
STEPS, LR, DECAY, BATCH = 300, 3e-3, 0.03, 1024
SEEDS = 3                          # networks whose mean is taken


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("what is measured").add_argument
    add("--data", default="bare",
        help='"self" (own answers), "bare" (without a system prompt), "text", "cloze", '
             ".json/.jsonl, .txt or datasets ids, commas between")
    add("--ntrain", type=whole("[1, inf)"), default=100, help="samples to learn from")
    add("--nsamples", type=whole("[2, inf)"), default=30, help="held-out samples")
    add("--max_prompt", type=whole("[1, inf)"), default=220, help="longest prompt taken, tokens")
    add("--max_response", type=whole("[1, inf)"), default=24, help="response tokens used")
    add("--size", type=whole("[1, inf)"), default=8, help="tokens of a span")
    add("--sparsity", type=number("(0, 1)"), default=0.30,
        help="of the uniform schedule that keeping orders are measured under")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, a hub id or GGUF file")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--seed", default=0, type=whole("[0, 4294967296)"), help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", default=0, type=whole("[0, inf)"), help="CPU threads, 0: all cores")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# what there is to see of a span


@torch.inference_mode()
def attention_by_block(model, prompt):
    """Attention that each token gets in each block of the dense model, (n_layer, 2, T) in [0, 1].

    Of the last WINDOW queries and of the very last one, means over heads.
    """
    model.use()
    batch = model.batch([prompt])
    state, found = model.begin(batch), []
    for l, block in enumerate(model.blocks):
        q, k, _ = block.qkv(state.x, batch.all.rope)
        got = torch.cat([received(q[None], k[None], None, last) for last in (WINDOW, 1)])   # (2, T)
        found.append(relative_score(got, len(prompt)).cpu())
        state = model.prefill_step(l, batch, state)
    return torch.stack(found)


def places_of(n, spans):
    """Position of spans of a prompt of n tokens, (spans, 5) in [0, 1]."""
    middle = torch.tensor([(a + b) / 2 for a, b in spans])
    return torch.stack((middle / n, middle / 64, (n - middle) / 64, middle / 16,
                        torch.full_like(middle, n / 256)), 1).clamp(max=1)


def seen_of(model, samples, size):
    """What there is to see of the spans of each sample: [(places (S, 5), attention (S, n_layer,
    4): mean and largest of a span's tokens, of the two kinds)]."""
    seen = []
    for prompt, _ in progress(samples, desc="dense pass", unit="prompt"):
        attention, spans = attention_by_block(model, prompt), spans_of(len(prompt), size)
        of_spans = [torch.cat((attention[..., a:b].mean(-1), attention[..., a:b].amax(-1)), 1)
                    for a, b in spans]
        seen.append((places_of(len(prompt), spans), torch.stack(of_spans)))
    return seen


def inputs_of(seen, depth):
    """Inputs (spans of all samples, ...) of a network that sees the first `depth` blocks."""
    return torch.cat([torch.cat((places, attention[:, :depth].flatten(1)), 1)
                      for places, attention in seen])


# ------------------------------------------------------------------------------------------------
# how well it tells the worth


def predictions(x, y, x_held, seed):
    """Networks trained on x (n, f), y (n,) -> their predictions of x_held, (SEEDS, m)."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_held = (x - mean) / deviation, (x_held - mean) / deviation
    found = []
    for i in range(SEEDS):
        torch.manual_seed(seed + i)
        net = nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Dropout(DROPOUT),
                            nn.Linear(WIDTH, 1))
        optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
        for _ in range(STEPS):
            some = torch.randint(len(x), (min(BATCH, len(x)),))
            loss = F.mse_loss(net(x[some])[:, 0], y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            found.append(net(x_held)[:, 0])
    return torch.stack(found)


def explained(predicted, y):
    """Share of the variance of y (m,) that predictions (m,) explain."""
    return float(1 - F.mse_loss(predicted, y) / y.var(correction=0))


class Told:
    """A keeping order by values that were told of each prompt's spans."""
    def __init__(self, samples, values, size):
        self.values, i = {}, 0
        for prompt, _ in samples:
            n = len(spans_of(len(prompt), size))
            self.values[tuple(prompt)] = on_tokens(len(prompt), size, values[i:i + n].tolist())
            i += n

    def __call__(self, batch, scores, s):
        return torch.cat([self.values[tuple(ids)] for ids in batch.seqs]).to(scores.value.device)


def log_worth(oracle, samples):
    """Log worth of the spans of all samples, (spans,)."""
    found = [w for prompt, _ in samples for w in oracle.labels[tuple(prompt)]]
    return torch.tensor(found).clamp(min=LEAST).log()


def draw(path, rows, position):
    """Explained variance over depth."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    depth = [r["blocks"] for r in rows]
    ax.errorbar(depth, [r["r2"] for r in rows], [r["deviation"] for r in rows], marker="o",
                color="#d55e00", capsize=2)
    ax.axhline(position["r2"], color="#0072b2", ls="--")
    ax.annotate("position alone", (depth[-1], position["r2"]), (0, -12), ha="right",
                textcoords="offset points", color="#0072b2")
    ax.annotate("with the attention of the blocks seen", (depth[-1], rows[-1]["r2"]), (0, 8),
                ha="right", textcoords="offset points", color="#d55e00")
    ax.set(xlabel="blocks that were seen", ylabel="share of the log worth explained", ylim=(0, 1),
           title="From which depth on can a router know what a span is worth?")
    return save(figure, path)


def main():
    args = get_args()
    model, config = start(args)
    tokenizer = load_tokenizer(args.model)
    parts = [load_samples(args.data, model, tokenizer, split, n, args.max_prompt,
                          args.max_response, seed=args.seed)
             for split, n in (("train", args.ntrain), ("heldout", args.nsamples))]
    train, held = parts

    # the labels, and what there is to see
    oracle = Oracle.of_samples(model, train + held, args.size, Path(args.out_dir) / "worth.jsonl")
    y, y_held = log_worth(oracle, train), log_worth(oracle, held)
    seen, seen_held = seen_of(model, train, args.size), seen_of(model, held, args.size)

    # what position explains, and what the attention of ever more blocks adds
    n_layer, rows, orders = model.config.n_layer, [], {}
    for depth in sorted({0, 1, *(round(n_layer * i / DEPTHS) for i in range(1, DEPTHS + 1))}):
        told = predictions(inputs_of(seen, depth), y, inputs_of(seen_held, depth), args.seed)
        found = spread([explained(t, y_held) for t in told])
        mean, deviation = found["mean"], found["std"]
        rows.append({"blocks": depth, "r2": mean, "deviation": deviation})
        orders[depth] = Told(held, told.mean(0), args.size)
        print(f"{depth:3d} blocks seen: {100 * mean:.1f} +- {100 * deviation:.1f} % of the "
              f"variance of {len(y_held)} spans' log worth explained", flush=True)

    # what such an order would do to the answer, if it were known before block 1
    schedule = Schedule.uniform(model, args.sparsity, FIRST)
    routers = {"static": ("static", {}), "position": (orders[0], {}), "1 block": (orders[1], {}),
               "all blocks": (orders[n_layer], {}), "oracle": (oracle, {})}
    table = measure(model, held, schedule, routers)
    print_gains(table)
    path = draw(f"{args.out_dir}/depth.png", rows[1:], rows[0])
    save_json(f"{args.out_dir}/depth.json", {
        "format": "ftp-depth-1", "config": config, "explained": rows, "rows": table})
    print(f"-> {path}, {args.out_dir}/depth.json")


if __name__ == "__main__":
    run(main)
