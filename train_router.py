"""Stage 2: train the router, a 2-layer MLP on four factors of a token; the LLM stays frozen.

    python train_router.py --schedule out/schedule.json    # -> out/router.safetensors and .json
    python train_router.py --inputs hidden --router_kind local --hinge    # the paper's ablations
    python train_router.py --group 3      # every third block decides, for the next two as well
    python train_router.py --teach worth --span 8 --data text,bare,cloze    # beyond the paper
    python train_router.py --guide out/router.safetensors --width 128    # the guide found for it
    python train_router.py --resume             # go on after an interruption
    torchrun --nproc_per_node 8 train_router.py --batch_size 8    # one sample of a step a GPU

    L = lambda_d KL(dense || routed)           on response tokens: L_d
      + lambda_s |s_l - realised_l|            over blocks: L_s
      + lambda_g(t) CE(decisions of a guide)   over free prompt tokens: L_g

Decisions are hard in the forward pass, with the quotas of inference, and straight-through in the
backward pass. The guide is a keeping order by position and score. The paper's is {first, newest ...
oldest} (--guide static). By default a better one is searched for on the samples, and the router
learns to imitate it before the distillation starts; --guide attended names one that few samples
may miss. With --teach worth it imitates instead what each span of the prompt is worth to the answer
(lib/worth.py).

Under torchrun the samples of a step are spread over the ranks, and the gradients summed here. This
is not DistributedDataParallel, which wraps one forward of one module: each block calls the router
from within the frozen model, and the forecaster is no module. It would also average the gradients
of the ranks' own losses, and L_s is no mean over samples.
"""
import json
import math
import random
import time
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

from lib.artefacts import FACTORS, KINDS, Schedule
from lib.calibration import calibrate_decode, decides
from lib.data import load_samples, load_tokenizer
from lib.files import check, digest, read_tensors, save_files, tensors_id
from lib.flops import Meter
from lib.guide import Order, decisions_of, imitate, search_guide, targets_of
from lib.numbers import error_of
from lib.processes import gather, rank, shard, share_meter, total, unshard, world
from lib.reference import step_pair
from lib.routing import with_thresholds
from lib.scoring import (
    begin_pair,
    by_sample,
    kl_divergence,
    make_pair,
    predicting,
    response_kl,
    response_states,
    spread_states,
)
from lib.skipped import Forecaster
from lib.stage import Parser, bar, number, run, saved, start, whole, words
from lib.worth import Oracle
from model_ftp import FTPModel, Router

FORMAT = "ftp-train-state-2"       # of the file that --resume reads


def get_args():
    p = Parser(__doc__)

    add = p.add_argument_group("data").add_argument
    add("--schedule", default="out/schedule.json", help="schedule of stage 1")
    add("--data", default="self", help='"self" (own answers), "text" (own texts), .json/.jsonl, '
                                       ".txt or datasets ids, commas between")
    add("--nsamples", type=whole("[1, inf)"), default=None, help="samples to train on, or all")
    add("--nwatch", type=whole("[1, inf)"), default=32, help="samples that choose the best step")
    add("--max_prompt", type=whole("[1, inf)"), default=512, help="longest prompt taken, tokens")
    add("--max_response", type=whole("[1, inf)"), default=48, help="response tokens used")

    # the paper: one MLP of width 64 for all blocks
    add = p.add_argument_group("router").add_argument
    add("--inputs", type=words, default=",".join(FACTORS),
        help="inputs of the router, of position,place,score,rank,sparsity,forecast,hidden")
    add("--router_kind", default="global", choices=KINDS,
        help="one router for all blocks, one each, or recurrent over blocks")
    add("--width", type=whole("[1, inf)"), default=64, help="hidden width")
    add("--score", type=window, default=16,
        help="attention score from the last W prompt queries, or mean over all (paper-like)")
    # 3 costs a third of the router and scores; spans of 8 spare what reads the token before
    add("--group", type=whole("[1, inf)"), default=1, help="blocks that share a decision")
    add("--span", type=whole("[1, inf)"), default=1, help="tokens that skip together, 1: the paper")

    # under which the router is trained, and later runs
    add = p.add_argument_group("routing").add_argument
    add("--prefill", default="topk", choices=["topk", "argmax"],
        help="prompt: quota, or the router's own decision")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--forecaster", default=None, help="forecast of skipped tokens (fit_late_kv.py)")

    add = p.add_argument_group("optimisation").add_argument
    add("--steps", type=whole("[1, inf)"), default=60, help="training steps")
    add("--batch_size", type=whole("[1, inf)"), default=1, help="samples a step, of all ranks")
    add("--lr", type=number("(0, inf)"), default=2e-3, help="learning rate at the start")
    add("--lr_floor", type=number("[0, 1]"), default=0.1, help="share of it where a cosine ends")
    add("--clip", type=number("(0, inf)"), default=1.0, help="largest norm of the gradient")
    add("--gumbel", type=number("[0, inf)"), default=0.0,
        help="temperature of Gumbel noise on training decisions, 0: none")
    add("--decode_share", type=number("[0, 1]"), default=0.0,
        help="share of steps whose response tokens are routed too")
    add("--tune_forecaster", type=number("[0, inf)"), default=0.0,
        help="train the --forecaster too, with this learning rate; 0: as it is")
    add("--eval_every", type=whole("[1, inf)"), default=20, help="steps between validations")

    # L = lambda_d L_d + lambda_s L_s + lambda_g(t) L_g
    add = p.add_argument_group("losses").add_argument
    add("--lambda_d", type=number("[0, inf)"), default=1.0, help="weight of the distillation loss")
    add("--lambda_s", type=number("[0, inf)"), default=1.0, help="weight of the sparsity loss")
    add("--lambda_g", type=number("[0, inf)"), default=0.05, help="of the guide loss, at first")
    add("--guide_until", type=number("[0, inf)"), default=0.5, help="share of steps it decays in")
    add("--hinge", action="store_true", help="the paper's one-sided sparsity loss")
    add("--distill", default="kl", choices=["kl", "mse"],
        help="distil the next-token distribution or the last hidden state")

    # before the distillation the router imitates an order, or what each span is worth
    add = p.add_argument_group("teaching").add_argument
    add("--teach", default="guide", choices=["guide", "worth"],
        help="an order (the paper), or what each span of the training samples is worth to them")
    add("--worth_span", type=whole("[1, inf)"), default=8, help="tokens of a span measured so")
    add("--guide", default="search",
        help='"search", "static" (the paper\'s), "attended" (newest, then attended), or a router')
    add("--guide_evals", type=whole("[1, inf)"), default=40, help="orders tried by the search")
    add("--guide_samples", type=whole("[1, inf)"), default=24, help="samples it measures on")
    add("--warmup", type=whole("[0, inf)"), default=1500, help="steps of the guide loss alone")
    add("--warmup_lr", type=number("(0, inf)"), default=0.02, help="their rate, falling to 0")
    add("--warmup_samples", type=whole("[1, inf)"), default=16, help="their samples, in each step")

    # thresholds for decoded tokens, stored with the router
    add = p.add_argument_group("after the training").add_argument
    add("--calibration_samples", type=whole("[1, inf)"), default=64, help="samples they come from")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
    add("--out_dir", default="out", help="folder of the artefacts")
    add("--resume", action="store_true", help="go on from the last saved step")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")
    return p.parse_args()


def window(text):
    """Type of --score: how many queries, or "mean"."""
    return text if text == "mean" else whole("[1, inf)")(text)


# ------------------------------------------------------------------------------------------------
# what a training works with, and how far it is


@dataclass
class Lab:
    """What is trained, and how it is run; only the values of the learner's parameters change."""
    args: Namespace
    model: FTPModel                # frozen
    schedule: Schedule
    router: Router
    forecaster: Forecaster | None
    learner: dict                  # name -> parameter, on every rank in the same order
    optimizer: torch.optim.Optimizer

    def use(self, router):
        """Route the model by the Router, "static", or an Order.

        Anew for each step: of a tuned forecaster the model may hold a copy in another dtype, and
        the gradient goes through the copying once.
        """
        a = self.args
        prefill = a.prefill if isinstance(router, Router) else "topk"    # it alone has an argmax
        self.model.use(self.schedule, router, prefill=prefill, kv=a.kv, one_pass=a.one_pass,
                       group=a.group, forecaster=self.forecaster)


@dataclass(frozen=True)
class Data:
    """What is learned from, with the dense model's answers; made once, as that model is frozen."""
    samples: list                  # [(prompt ids, response ids)] to train on
    teacher: dict                  # index of one of them -> the dense model's states (R, d)
    watched: list                  # other samples with such states, as spread_states() gives them


@dataclass
class Training:
    """How far a training is: with learner and optimizer all that --resume takes up."""
    guide: Order | Oracle
    step: int = 0
    best: dict | None = None       # step, watch_kl, state {name: values} of the best validation
    history: list = field(default_factory=list)     # what validate() returned

    def note(self, entry, learner):
        """Add a validation; keep the parameters if it is the best so far."""
        self.history.append(entry)
        if self.best is None or entry["watch_kl"] < self.best["watch_kl"]:
            state = {name: value.detach().clone() for name, value in learner.items()}
            self.best = {"step": entry["step"], "watch_kl": entry["watch_kl"], "state": state}


# ------------------------------------------------------------------------------------------------
# the loss, over the samples that all ranks have in a step


def distillation_loss(model, student, teacher, kind):
    """L_d: how far the routed model is from the dense one, a mean over response tokens.

    student, teacher (R, d): last hidden states of the rows that predict them. kind: "kl" of the
    next-token distributions, or "mse" of the states.
    """
    if kind == "kl":
        with torch.no_grad():
            wanted = model.logits(teacher)                 # (R, vocab)
        far = kl_divergence(wanted, model.logits(student))
    else:
        # normalised, as the head sees them
        student, teacher = model.norm(student), model.norm(teacher)
        far = (student.float() - teacher.float()).square().mean(1)
    far, n = total(torch.stack((far.sum(), far.new_tensor(len(far)))))     # far was (R,)
    return far / n


def sparsity_loss(decisions, hinge):
    """L_s: |s_l - realised_l|, a mean over deciding blocks; and the mean of realised_l.

    realised_l is the share of the free prompt tokens (not kept anyway) that argmax would skip,
    hard in value, with the gradient of the sigmoid. hinge: only skipping too few costs.
    """
    asked, counts = [], []
    for d in decisions:
        margin = d.margin[d.free]                          # (free tokens of this rank's prompts,)
        soft = torch.sigmoid(-margin)                      # probability of a skip
        hard = (margin <= 0).float()
        skipped = (hard + soft - soft.detach()).sum()
        counts.append(torch.stack((skipped, skipped.new_tensor(len(margin)))))
        asked.append(d.s)
    skipped, n = total(together(counts)).unbind(1)         # (deciding blocks,)
    realised = skipped / n
    gap = realised.new_tensor(asked) - realised
    cost = gap.clamp(min=0) if hinge else gap.abs()
    return cost.mean(), float(realised.detach().mean())


def guide_loss(decisions, guide):
    """L_g: cross-entropy of the router's decisions with the guide's, a mean as in L_s."""
    sums = []
    for d in decisions:
        margin = d.margin[d.free]
        # from the scores that the router saw
        target = targets_of(guide, d.batch, d.scores, d.s, d.free)
        entropy = F.binary_cross_entropy_with_logits(margin, target, reduction="sum")
        sums.append(torch.stack((entropy, entropy.new_tensor(len(margin)))))
    entropy, n = total(together(sums)).unbind(1)
    return (entropy / n).mean()


def together(rows):
    """Stack what blocks on several devices computed, on the first one's."""
    return torch.stack([row.to(rows[0].device) for row in rows])


def lambda_g(args, step):
    """The guide shows the way at first; from --guide_until on the distillation goes on alone."""
    until = args.guide_until * args.steps
    return args.lambda_g * max(0.0, 1 - step / until) if until else 0.0


def training_step(lab, data, guide, step):
    """One step down the loss -> {name of a part: its value}."""
    args, model = lab.args, lab.model
    picks, decoding = draw(args, len(data.samples), step)
    mine = shard(picks)
    samples = [data.samples[i] for i, _ in mine]
    teacher = torch.cat([data.teacher[i] for i, _ in mine])                # (R, d)
    lab.use(lab.router)
    added = noise(args, model, samples, mine)
    student, decisions = masked_forward(model, samples, decoding, added)

    # L = lambda_d L_d + lambda_s L_s + lambda_g(t) L_g
    l_d = distillation_loss(model, student, teacher, args.distill)
    l_s, realised = sparsity_loss(decisions, args.hinge)
    l_g = guide_loss(decisions, guide)
    of_decisions = args.lambda_s * l_s + lambda_g(args, step) * l_g
    # the last block and the first that decides may lie on two devices
    loss = args.lambda_d * l_d + of_decisions.to(l_d.device)
    check(bool(loss.isfinite()), f"--lr {args.lr}: the loss of step {step} is NaN or infinite; "
                                 "lower it, or give --dtype float32")

    # gradient, clip, step
    lab.optimizer.zero_grad()
    loss.backward()
    sum_over_ranks(lab.learner)
    for group in lab.optimizer.param_groups:
        # router and forecaster apart: the size of one's gradient says nothing of the other's
        torch.nn.utils.clip_grad_norm_(group["params"], args.clip)
        group["lr"] = group["top"] * cosine(step / args.steps, args.lr_floor)
    lab.optimizer.step()
    # apart, as it is larger: their means are over different steps
    name = "L_d_decode" if decoding else "L_d"
    return {name: l_d.item(), "L_s": l_s.item(), "L_g": l_g.item(), "argmax_sparsity": realised}


# ------------------------------------------------------------------------------------------------
# what a step is made of


def draw(args, n, step):
    """By seed and step alone, so that ranks agree and a resumed run goes on alike.

    -> the samples of the step, all ranks' together: [(index of n, seed of its noise)]; and whether
    their response tokens are routed too.
    """
    rng = random.Random(f"{args.seed}-{step}")
    indices = [rng.randrange(n) for _ in range(args.batch_size)]
    picks = [(i, f"{args.seed}-{step}-{j}") for j, i in enumerate(indices)]
    return picks, rng.random() < args.decode_share


def gumbel(seed, *shape):
    """Difference of two Gumbel draws.

    Seeded for one sample, so that neither its batch mates nor the ranks change it.
    """
    rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    u = torch.rand(shape, generator=rng).clamp(1e-6, 1 - 1e-6)     # its logarithms are finite
    return u.log() - (1 - u).log()


def noise(args, model, samples, picks):
    """What is added to the margins of each block: [(of prompt tokens, of response tokens)]."""
    n_layer = model.config.n_layer
    if not args.gumbel:
        return [(0.0, 0.0)] * n_layer
    # drawn for a sample as a whole, (n_layer, its tokens), then parted
    prompts, responses = [], []
    for (prompt, response), (_, seed) in zip(samples, picks):
        drawn = args.gumbel * gumbel(seed, n_layer, len(prompt) + len(response))
        of_prompt, of_response = drawn.split([len(prompt), len(response)], 1)
        prompts.append(of_prompt)
        responses.append(of_response)
    return list(zip(torch.cat(prompts, 1), torch.cat(responses, 1)))


def masked_forward(model, samples, decoding, noise):
    """All rows of all blocks, with gradients through the gates.

    -> hidden states (R, d) that predict the response tokens; the Decisions about prompts.
    decoding: response tokens are routed too. A block's threshold is then the quantile of this
    step's margins at its sparsity, as the margins move while the router learns.
    """
    pair = make_pair(model, samples)
    states, taken = begin_pair(model, pair), []
    routing, thresholds = model.routing, [0.0] * model.config.n_layer
    if decoding:
        # from the first block on: it gives the response tokens the scores that the next one reads
        model.routing = with_thresholds(routing, thresholds)
    for l, s in enumerate(routing.sparsity):
        place = model.blocks[l].norm1.weight.device        # of several, where --device_map says so
        added = [n.to(place) if torch.is_tensor(n) else n for n in noise[l]]
        if decoding and decides(routing, l):
            with torch.no_grad():
                margin, _ = model.margins(l, pair.responses, states[1])    # (response tokens,)
                thresholds[l] = float((margin + added[1]).quantile(s))
            model.routing = with_thresholds(routing, thresholds)
        states, decisions = step_pair(model, l, pair, states, added)
        # no sparsity is asked of the responses but that of their thresholds, and no order
        taken += [d for d in decisions if not d.batch.new]
    return predicting(pair, states), taken


def sum_over_ranks(learner):
    """Each rank's gradient is of its own samples' part of the loss: their sum is the whole."""
    if world() == 1:
        return
    for value in learner.values():
        if value.grad is not None:
            dist.all_reduce(value.grad)


def cosine(t, floor):
    """From 1 at t = 0 to `floor` at t = 1."""
    return (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * t)


# ------------------------------------------------------------------------------------------------
# before the first step: the guide, and the router's imitation of it


def make_lab(args, model, schedule, forecaster):
    """A Lab with a router that starts near dense."""
    router = Router(model.config, model.fingerprint, args.router_kind, tuple(args.inputs),
                    args.width, args.score, args.group, span=args.span).to(model.device)
    learner = dict(router.named_parameters())
    # top: the rate from which cosine() falls
    groups = [{"params": list(learner.values()), "top": args.lr}]
    if args.tune_forecaster:
        tuned = {f"forecaster.{k}": t.requires_grad_() for k, t in forecaster.tensors.items()}
        learner |= tuned
        groups.append({"params": list(tuned.values()), "top": args.tune_forecaster})
    optimizer = torch.optim.Adam(groups, args.lr)
    return Lab(args, model, schedule, router, forecaster, learner, optimizer)


def load_data(args, model):
    """Samples to train on, and samples to watch, of a part that is never trained on."""
    tokenizer = load_tokenizer(args.model)
    parts = []
    for split, n in (("train", args.nsamples), ("watch", args.nwatch)):
        parts.append(load_samples(args.data, model, tokenizer, split, n, seed=args.seed,
                                  max_prompt=args.max_prompt, max_response=args.max_response))
    return parts


def dense_states(args, model, samples, watch):
    """Data: what the frozen dense model says of them, once."""
    model.use()
    # a short training picks few of its samples, and of these a rank its own
    picked = set()
    for step in range(args.steps):
        picks, _ = draw(args, len(samples), step)
        picked |= {i for i, _ in shard(picks)}
    needed = sorted(picked)
    states, owner = response_states(model, [samples[i] for i in needed])
    teacher = {i: states[owner == j] for j, i in enumerate(needed)}
    return Data(samples, teacher, spread_states(model, watch, shard))


def routed_kl(lab, router, spread, meter=None):
    """KL to the dense model of each sample, (samples,), on the path that inference runs.

    spread: what spread_states() gave of the dense model.
    """
    lab.use(router)
    kl = []
    for samples, teacher, owner in spread:                 # this rank's share
        states, _ = response_states(lab.model, samples, meter=meter)
        kl.append(by_sample(response_kl(lab.model, teacher, states), owner))
    return torch.cat(unshard(kl))


def find_guide(lab, data, known, static):
    """The Order that the guide loss teaches.

    known: that of another router, or None. static (samples,): watched KL of the static router.
    """
    args, model = lab.args, lab.model
    if args.guide == "static":
        return Order.static()
    if args.guide == "attended":
        guide, found = Order.attended(args.span), "asked for"
    elif known is not None:
        guide, found = known, f"from {args.guide}"
    else:
        # measured as inference runs, not by the masked block: an order needs no gradients
        few = spread_states(model.use(), data.samples[:args.guide_samples], shard)

        def kl_of(order):
            return float(routed_kl(lab, order, few).mean())

        rng = random.Random(args.seed)
        guide, tried = search_guide(kl_of, args.guide_evals, rng, args.span)
        found = f"KL {min(tried):.4f} (static order {tried[0]:.4f}) after {len(tried)} orders"
    watched = routed_kl(lab, guide, data.watched).mean()
    print(f"guide: {found}, watched {watched:.4f}; {guide}", flush=True)
    if watched <= static.mean():
        return guide
    # found on few samples, it may fit these alone
    print("the static order is better on the watched samples: it stays the guide")
    return Order.static()


def report_worth(lab, data, oracle, began):
    """Print how far an Oracle goes, and how long its labels took; watched samples have none, as the
    best step is chosen by what a router does without."""
    args = lab.args
    first = spread_states(lab.model.use(), data.samples[:args.guide_samples], shard)
    static, best = (routed_kl(lab, router, first).mean() for router in ("static", oracle))
    print(f"worth of spans of {args.worth_span} tokens known after {time.time() - began:.0f} s: "
          f"KL {best:.4f} on {min(args.guide_samples, len(data.samples))} samples by an oracle "
          f"that knows it (static order {static:.4f})", flush=True)


def warm_up(lab, guide, samples):
    """The router learns the guide's decisions, without the LLM but for one run.

    guide: an Order, or an Oracle, of which the log worth itself is learned. -> the last
    cross-entropy or squared error, a mean over deciding blocks.
    """
    args, router = lab.args, lab.router
    if isinstance(guide, Oracle):
        # not along its own path: old scores of skipped tokens would give its decisions away
        lab.use(Order.static())
        blocks, batch = decisions_of(lab.model, router, samples, guide.margins)
        error = imitate(router, blocks, batch, args.warmup, args.warmup_lr, F.mse_loss)
    else:
        lab.use(guide)
        blocks, batch = decisions_of(lab.model, router, samples)
        error = imitate(router, blocks, batch, args.warmup, args.warmup_lr)
    # each rank did it, and may round differently: the first one's router counts
    mine = dict(router.named_parameters())
    first = gather({name: value.detach().cpu() for name, value in mine.items()})[0]
    fill(mine, first)
    return error


# ------------------------------------------------------------------------------------------------
# training, with validations


def train(lab, data, training, save):
    """Take the steps that are left. save(training): called after each validation."""
    args, values = lab.args, {}                            # of each loss since the last validation
    progress = bar(total=args.steps, initial=training.step, desc="router", unit="step")
    while training.step < args.steps:
        losses = training_step(lab, data, training.guide, training.step)
        for name, value in losses.items():
            values.setdefault(name, []).append(value)
        training.step += 1
        progress.update()
        if training.step % args.eval_every == 0 or training.step == args.steps:
            means = {name: sum(v) / len(v) for name, v in values.items()}
            training.note(validate(lab, data, training.step, means), lab.learner)
            values = {}
            save(training)
    progress.close()


def validate(lab, data, step, losses):
    """Watched KL and realised sparsity of the router -> an entry of the history.

    losses: {name: mean since the last validation}.
    """
    kl, sparsity = measure(lab, data)
    entry = {"step": step, **losses, "watch_kl": float(kl.mean()), "watch_sparsity": sparsity}
    parts = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    print(f"step {step:4d}  {parts}  watched KL {entry['watch_kl']:.4f}  "
          f"realised sparsity {sparsity:.4f}", flush=True)
    return entry


def measure(lab, data):
    """KL of each watched sample (samples,), and the share of prompt tokens skipped."""
    meter = Meter(lab.model)
    kl = routed_kl(lab, lab.router, data.watched, meter)
    return kl, share_meter(meter).mean("prefill")


# ------------------------------------------------------------------------------------------------
# the state of a training, in one file, so that nothing of two moments can meet


def checksum(state, tensors):
    """Of all that the file holds: a damaged one is refused, not gone on from."""
    shapes = sorted([name, str(t.dtype), *t.shape] for name, t in tensors.items())
    return digest([state, tensors_id(tensors), shapes])


def save_state(path, learner, optimizer, settings, training):
    """Write all that a resumed run needs, on rank 0."""
    if rank() > 0:
        return
    tensors = {f"learner.{name}": value for name, value in learner.items()}
    tensors |= {f"best.{name}": value for name, value in training.best["state"].items()}
    for name, parameter in learner.items():
        moments = optimizer.state[parameter]
        tensors |= {f"adam.{name}.{kind}": value for kind, value in moments.items()}
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    best = {name: value for name, value in training.best.items() if name != "state"}
    state = {"settings": settings, "step": training.step, "history": training.history,
             "guide": training.guide.as_dict(), "best": best}
    meta = {"format": FORMAT, "state": json.dumps(state), "digest": checksum(state, tensors)}
    save_files({path: lambda part: save_file(tensors, part, meta)})
    saved[path] = f"step {training.step}"


def load_state(path, learner, optimizer, settings, oracle=None):
    """Take up what save_state() wrote: fills learner and optimizer -> Training.

    oracle: the guide of a run with --teach worth, which is not in the file. FTPError unless the
    file is whole and of a run with these settings.
    """
    tensors, meta = read_tensors(path, "--resume")
    check(meta.get("format") == FORMAT,
          f"--resume: {path} is no {FORMAT} file; start again without --resume")
    try:
        state = json.loads(meta["state"])
    except (KeyError, ValueError, RecursionError):
        state = None
    check(meta.get("digest") == checksum(state, tensors),
          f"--resume: {path} is damaged; start again without --resume")
    then = state["settings"]
    differ = sorted(k for k in settings.keys() | then.keys() if settings.get(k) != then.get(k))
    check(not differ, f"--resume: {path} belongs to a run with other settings, data or artefacts "
                      f"({', '.join(differ)}); give them again, or drop --resume")

    def part(head):
        return {k.removeprefix(head): t for k, t in tensors.items() if k.startswith(head)}

    fill(learner, part("learner."))
    for name, parameter in learner.items():
        moments = part(f"adam.{name}.")
        # Adam's count of steps stays on the CPU
        optimizer.state[parameter] = {kind: t if kind == "step" else t.to(parameter.device)
                                      for kind, t in moments.items()}
    best = {**state["best"], "state": part("best.")}
    guide = oracle or Order(**state["guide"])
    return Training(guide, state["step"], best, state["history"])


def fill(learner, values):
    """Write values {name: tensor} into the parameters."""
    with torch.no_grad():
        for name, parameter in learner.items():
            parameter.copy_(values[name])


# ------------------------------------------------------------------------------------------------


def check_args(args, schedule, forecaster):
    """FTPError where flags don't fit each other, before any work."""
    check(args.batch_size >= world(), f"--batch_size {args.batch_size}: fewer samples a step than "
                                      f"ranks; give at least {world()}")
    check(args.decode_share == 0 or world() == 1,
          "--decode_share: its thresholds are quantiles over a whole step, so it trains in one "
          "process only")
    check(not args.tune_forecaster or forecaster is not None,
          "--tune_forecaster: nothing to tune; give --forecaster")
    check(any(0 < s < 1 for s in schedule.sparsity),
          f"--schedule: {args.schedule} leaves nothing to decide; give one with sparsities between "
          "0 and 1")


def settings_of(lab, samples, watch, known):
    """What a resumed run must have in common with the one that it goes on from."""
    free = ("resume", "threads", "out_dir")                # they change no result
    settings = {k: v for k, v in vars(lab.args).items() if k not in free}
    return settings | {
        "schedule_id": lab.schedule.id,
        "fingerprint": lab.model.fingerprint,
        "data_digest": digest([samples, watch]),
        "guide_taken": known and known.as_dict(),
        "forecaster_id": lab.forecaster and lab.forecaster.id,
    }


def tokens_of(args, samples, first):
    """Tokens of all ranks' samples in the steps from `first` on."""
    n = 0
    for step in range(first, args.steps):
        picks, _ = draw(args, len(samples), step)
        n += sum(len(prompt) + len(response) for prompt, response in (samples[i] for i, _ in picks))
    return n


def report(lab, static, kl):
    """Print what the router gained. static, kl (samples,): watched KL of both routers."""
    meta, args = lab.router.meta, lab.args
    gain = static - kl
    parameters = sum(value.numel() for value in lab.router.parameters())
    print(f"watched KL: static {static.mean():.4f}, router {kl.mean():.4f} (step "
          f"{meta['best_step']}), difference {gain.mean():.4f} +- {error_of(gain)} "
          f"(standard error over {len(gain)} samples); "
          f"{meta['work']['steps_per_minute']:.0f} steps/min")
    print(f"realised prefill sparsity {meta['realised_sparsity']:.4f} (target "
          f"{lab.schedule.mean:.4f}); {parameters} parameters "
          f"-> {args.out_dir}/router.safetensors")
    # the same in words: a best step of 0 is easily overlooked
    before = "the guide warm-up" if args.warmup else "the untrained router"
    if meta["best_step"] == 0:
        print(f"{before} was already best: distillation moved nothing")
    else:
        print(f"distillation took the watched KL from {meta['history'][0]['watch_kl']:.4f} "
              f"({before}) to {kl.mean():.4f}")
    if gain.mean() <= 0:
        print("the static router is no worse here and costs less: benchmark.py and evaluate.py "
              "measure it as row static")


def main():
    args = get_args()
    schedule = Schedule.load(args.schedule)
    forecaster = Forecaster.load(args.forecaster) if args.forecaster else None
    named = args.guide in ("search", "static", "attended")
    known = None if named else Order.of_router(args.guide)
    check_args(args, schedule, forecaster)

    # not packed: packed weights give no gradients. Used at once, to be refused before any work
    model, info = start(args, pack=False)
    samples, watch = load_data(args, model)
    lab = make_lab(args, model, schedule, forecaster)
    lab.use(lab.router)

    # the two that the router is compared with: the dense model, and the static router
    began = time.time()
    data = dense_states(args, model, samples, watch)
    static = routed_kl(lab, "static", data.watched)
    by_rank = " by this rank" if world() > 1 else ""
    print(f"{len(samples)} training samples, {len(data.teacher)} of them picked{by_rank}; teacher "
          f"ran in {time.time() - began:.0f} s; watched KL with the static router "
          f"{static.mean():.4f}", flush=True)

    # what spans are worth, measured once, stands in the guide's place
    out, began, oracle = Path(args.out_dir), time.time(), None
    if args.teach == "worth":
        oracle = Oracle.of_samples(model, samples, args.worth_span, out / "worth.jsonl")

    # go on, or find a guide and imitate it
    path, settings = out / "train_state.safetensors", settings_of(lab, samples, watch, known)
    save = partial(save_state, path, lab.learner, lab.optimizer, settings)
    if args.resume and path.exists():
        training = load_state(path, lab.learner, lab.optimizer, settings, oracle)
        print(f"resuming at step {training.step}")
    else:
        if oracle:
            report_worth(lab, data, oracle, began)
        guide = oracle or find_guide(lab, data, known, static)
        training = Training(guide)
        # an order is simple; what a span is worth takes all samples to learn
        shown = samples if oracle else samples[:args.warmup_samples]
        error = warm_up(lab, guide, shown)
        what = "squared error" if oracle else "cross-entropy"
        print(f"guide warm-up: {what} {error:.4f} after {args.warmup} steps", flush=True)
        training.note(validate(lab, data, 0, {}), lab.learner)
        save(training)                     # so that a guide is not searched for again

    # distil; the best validation counts
    first, began = training.step, time.time()
    train(lab, data, training, save)
    seconds = time.time() - began
    fill(lab.learner, training.best["state"])
    if args.tune_forecaster:
        if rank() == 0:
            forecaster.save(out / "forecaster_ft.safetensors")
        print(f"forecaster tuned -> {out}/forecaster_ft.safetensors")
    kl, realised = measure(lab, data)

    # thresholds, by which decoded tokens may skip as well
    lab.use(lab.router)
    thresholds = calibrate_decode(model, samples[:args.calibration_samples])

    # what is stored says how it was made
    rate = (training.step - first) / max(seconds, 1e-9) * 60
    work = {"steps": training.step, "steps_per_minute": round(rate, 1),
            "tokens": tokens_of(args, samples, first), "seconds": round(seconds, 1)}
    lab.router.meta = {
        **info,
        "schedule_id": schedule.id,
        "decode_threshold": thresholds,
        "best_step": training.best["step"],
        "guide": training.guide.as_dict(),
        "history": training.history,
        "kl_watch": float(kl.mean()),
        "kl_watch_static": float(static.mean()),
        "realised_sparsity": realised,
        "work": work,
    }
    if rank() == 0:
        lab.router.save(out / "router.safetensors")
    report(lab, static, kl)


if __name__ == "__main__":
    run(main)
