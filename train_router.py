"""Stage 2: train the dynamic router, a 2-layer MLP on four factors; the LLM stays frozen.

    python train_router.py --schedule out/schedule.json                          # -> out/router.safetensors, out/router.json
    python train_router.py --inputs hidden --router_kind local --hinge           # the ablations of the paper
    python train_router.py --group 3                                             # every third block decides, for the two after it as well
    python train_router.py --guide out/router.safetensors --width 128            # another router on the guide that was found for this one
    python train_router.py --model meta-llama/Llama-2-7b-hf --data tatsu-lab/alpaca --nsamples 2000 --steps 2000
    python train_router.py --schedule out/schedule.json --resume                 # go on after an interruption
    torchrun --nproc_per_node 8 train_router.py --batch_size 8                   # one sample of each step a GPU

    L = lambda_d KL(dense || routed) on response tokens  +  lambda_s |s_l - realised_l|  +  lambda_g(t) CE(static decisions)

The guide is a keeping order by position and score. The paper's is {first, newest ... oldest} (--guide static); the default searches
a better one on the samples first, then lets the router imitate it before the distillation starts.
Decisions are hard in the forward pass (the same quotas as at inference) and straight-through in the backward pass.

Under torchrun the samples of a step are spread over the ranks and the gradients summed here, not by DistributedDataParallel: that wraps
one forward a step of one module, but the router is called by each block from within the frozen model and the forecaster is no module;
and it averages the gradients of the ranks' own losses, while L_s is no mean over samples.
"""
import json
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

from common import Parser, bar, check, digest, gather, kept, rank, routing_of, run, shard, share_stats, spread_states, start, total, unshard, world
from data import load_samples, load_tokenizer
from files import load_json, read_tensors, save_files, tensors_id
from model_ftp import by_quota, by_sample, kl_divergence, response_rows
from router import FACTORS, Router, Schedule

KNOTS = 6


def free(p):
    """Prompt rows that are not kept anyway, (N,)."""
    return p.in_set & ~p.ends


class Order:
    """A keeping order of prompt tokens, the guide of the router: a piecewise-linear curve over the place in the prompt, plus weights
    of score and rank; the first `head` tokens go before all others (but for the very first), the last `tail` stay the longest.

    Order.static() is the paper's {x_0, newest ... oldest}.
    """
    def __init__(self, curve, weights=(0.0, 0.0), head=0, tail=0):
        self.curve, self.weights, self.head, self.tail = list(curve), list(weights), head, tail

    @classmethod
    def static(cls):
        return cls([i / (KNOTS - 1) for i in range(KNOTS)])

    @classmethod
    def of_router(cls, path):
        """The guide that a router was trained with."""
        o = load_json(Path(path).with_suffix(".json"), "ftp-router-1", "--guide", {"meta": {"guide": {
            "curve": [float], "weights": [float], "head": int, "tail": int}}})["meta"]["guide"]
        check((len(o["curve"]), len(o["weights"])) == (KNOTS, 2), f"--guide: {path} is damaged (its guide has another shape); give another router")
        return cls(o["curve"], o["weights"], o["head"], o["tail"])

    def __call__(self, p, s):
        curve, at = torch.tensor(self.curve, device=p.place.device), p.place * (KNOTS - 1)
        i = at.long().clamp(max=KNOTS - 2)
        ends = (p.local >= p.size - self.tail).float() - (p.local < self.head).float()
        return curve[i].lerp(curve[i + 1], at - i) + self.weights[0] * p.score + self.weights[1] * p.rank + 9 * ends

    def targets(self, p, s):
        """Its decisions for the free prompt rows of a pass: 1 compute, 0 skip."""
        return by_quota(p, self(p, s), s)[free(p)].float()

    def mutated(self, other, rng, width):
        """A neighbour, the curve between its own and another's."""
        jump = lambda n: max(0, n + rng.choice((-4, -2, -1, 1, 2, 4)))
        mix = rng.random() * (rng.random() < 0.5)
        noise = width * (rng.random() < 0.6)
        blend = lambda a, b: [x + mix * (y - x) + rng.gauss(0, noise) for x, y in zip(a, b)]
        return Order(blend(self.curve, other.curve), blend(self.weights, other.weights),
                     jump(self.head) if rng.random() < 0.6 else self.head, jump(self.tail) if rng.random() < 0.4 else self.tail)


def search_guide(score, evaluations, rng):
    """The order of lowest score(order): simple curves first (the paper's is the first), then heads, then an evolution strategy.

    Returns it, with the scores in the order of trying.
    """
    line, seen = Order.static().curve, []
    curves = [line, line[::-1]] + [[abs(v - m) for v in line] for m in (0.4, 0.6, 0.8)]
    for n in bar(range(evaluations), desc="guide search", unit="order"):
        best = sorted(seen, key=lambda e: e[0])
        if n < 5:
            order = Order(curves[n])
        elif n < 11:
            order = Order(best[0][1].curve, head=(8, 16, 24, 32, 48, 20)[n - 5])
        else:
            order = best[int(4 * rng.random() ** 2)][1].mutated(best[rng.randrange(4)][1], rng, 0.25 * (1 - n / evaluations) + 0.03)
        seen.append((score(order), order))
    return min(seen, key=lambda e: e[0])[1], [s for s, _ in seen]


def warm_up(router, model, guide, samples, steps, lr=0.02):
    """Guide loss alone: the router learns the guide's decisions from the factors of one pass of the LLM, which `model` makes
    with the guide in place. Returns the last cross-entropy."""
    blocks, optimizer = [], torch.optim.Adam(router.parameters(), lr)
    with torch.no_grad():
        p = model.begin_samples(samples)
        for l, s in enumerate(model.schedule.sparsity):
            if 0 < s < 1 and model.lead[l] == l:
                q = model.route(l, p)[1]  # the Pass that a decision sees
                blocks.append((l, *(t.to(model.device) for t in (router.factors(q, s)[free(q)], guide.targets(q, s)))))
            p = model.step(l, p)
    loss = torch.tensor(float("nan"))
    for step in bar(range(steps), desc="guide", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        memory, loss = None, 0.0
        for l, f, target in blocks:
            margin, memory = router(l, f, memory)
            loss = loss + F.binary_cross_entropy_with_logits(margin, target) / len(blocks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def losses(p, guide, hinge):
    """L_s and L_g of a step's decisions, of all ranks' passes together, each a mean over blocks; and the share argmax would skip."""
    sums = []
    for s, margin, q in p.trace:
        z = margin[free(q)]
        soft, hard = torch.sigmoid(-z), (z <= 0).float()
        skipped = (hard + soft - soft.detach()).sum()      # straight-through number of skipped tokens, as argmax has it
        imitation = F.binary_cross_entropy_with_logits(z, guide.targets(q, s), reduction="sum")
        sums.append(torch.stack((skipped, imitation, z.new_tensor(len(z)))).to(p.x.device))
    skipped, imitation, n = total(torch.stack(sums)).unbind(1)
    gap = torch.tensor([s for s, _, _ in p.trace], device=n.device) - skipped / n
    return (gap.clamp(min=0) if hinge else gap.abs()).mean(), (imitation / n).mean(), float((skipped / n).detach().mean())


def routed_kl(model, taught, schedule, router, **routing):
    """KL to the dense model of each sample, (samples,), on the path that inference runs. taught: spread_states() of the dense model."""
    model.use(schedule, router, **routing)
    kl = []
    for group, teacher, owner in taught:
        states, _ = model.response_states(group)
        kl.append(by_sample(torch.cat([kl_divergence(model.logits(t), model.logits(s)) for t, s in zip(teacher.split(1024), states.split(1024))]), owner))
    share_stats(model)
    return torch.cat(unshard(kl))


def gumbel(seed, *shape):
    """Difference of two Gumbel draws, seeded for one sample, so that neither its batch mates nor the ranks change it."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(random.Random(seed).getrandbits(63))).clamp(1e-6, 1 - 1e-6)
    return u.log() - (1 - u).log()


def checksum(state, tensors):
    return digest([state, tensors_id(tensors), sorted([k, str(t.dtype), *t.shape] for k, t in tensors.items())])


def save_state(path, learner, optimizer, step, best, history, settings, guide):
    """All a resumed run needs, in one file of rank 0, so that nothing of two moments can meet. learner: {name: parameter}."""
    if rank() > 0:
        return
    tensors = {f"learner.{k}": v for k, v in learner.items()} | {f"best.{k}": v for k, v in best["state"].items()}
    tensors |= {f"adam.{k}.{name}": v for k, q in learner.items() for name, v in optimizer.state[q].items()}
    state = {"settings": settings, "step": step, "history": history, "guide": vars(guide), "best": {k: v for k, v in best.items() if k != "state"}}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    meta = {"format": "ftp-train-state-2", "state": json.dumps(state), "digest": checksum(state, tensors)}
    save_files({path: lambda part: save_file(tensors, part, meta)})
    kept[path] = f"step {step}"


def fill(learner, values):
    """Write values {name: tensor} into the parameters."""
    with torch.no_grad():
        for k, q in learner.items():
            q.copy_(values[k])


def load_state(path, learner, optimizer, settings):
    """Take up what save_state() wrote -> step, best, history, guide. FTPError unless it is whole and of a run with these settings."""
    t, meta = read_tensors(path, "--resume")
    check(meta.get("format") == "ftp-train-state-2", f"--resume: {path} is no ftp-train-state-2 file; start again without --resume")
    try:
        s = json.loads(meta["state"])
    except (KeyError, ValueError, RecursionError):
        s = None
    check(meta.get("digest") == checksum(s, t), f"--resume: {path} is damaged; start again without --resume")
    check(s["settings"] == settings, f"--resume: {path} belongs to a run with other settings, data or artefacts; give them again, or drop --resume")
    part = lambda head: {k.removeprefix(head): v for k, v in t.items() if k.startswith(head)}
    fill(learner, part("learner."))
    for k, q in learner.items():
        optimizer.state[q] = {name: v if name == "step" else v.to(q.device) for name, v in part(f"adam.{k}.").items()}
    return s["step"], {**s["best"], "state": part("best.")}, s["history"], Order(**s["guide"])


def main():
    p = Parser(__doc__).common().routing()
    p.add_argument("--schedule", default="out/schedule.json", help="schedule of stage 1")
    p.add_argument("--data", default="self", help='training: "self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, commas between')
    p.add_argument("--nsamples", type=int, default=None, help="samples to train on, default all of the training part")
    p.add_argument("--nwatch", type=int, default=32, help="samples that choose the best step")
    p.add_argument("--max_prompt", type=int, default=512, help="longest prompt taken, tokens")
    p.add_argument("--max_response", type=int, default=48, help="response tokens used")
    p.add_argument("--inputs", default=",".join(FACTORS), help="inputs of the router, of position,place,score,rank,sparsity,forecast,hidden")
    p.add_argument("--router_kind", default="global", choices=Router.KINDS, help="one router for all blocks, one each, or recurrent over blocks")
    p.add_argument("--width", type=int, default=64, help="hidden width")
    p.add_argument("--score", default="16", help="attention score from the last W prompt queries, or mean over all (paper-like)")
    p.add_argument("--group", type=int, default=1, help="neighbouring blocks that share a decision; 3 costs a third of the router and scores")
    p.add_argument("--steps", type=int, default=60, help="training steps")
    p.add_argument("--batch_size", type=int, default=1, help="samples a step, all ranks together")
    p.add_argument("--lr", type=float, default=2e-3, help="learning rate, falling to a tenth by a cosine")
    p.add_argument("--warmup", type=int, default=1500, help="steps of the guide loss alone, without the LLM")
    p.add_argument("--guide", default="search", help='order the guide loss teaches: "search" for it on the samples, "static" (the paper\'s), or a router '
                   "file, to take its guide; the search is more than half of a short training")
    p.add_argument("--guide_evals", type=int, default=40, help="orders tried by the guide search")
    p.add_argument("--guide_samples", type=int, default=24, help="training samples the guide search measures on")
    p.add_argument("--lambda_d", type=float, default=1.0, help="weight of the distillation loss")
    p.add_argument("--lambda_s", type=float, default=1.0, help="weight of the sparsity loss")
    p.add_argument("--lambda_g", type=float, default=0.05, help="weight of the guide loss at the start")
    p.add_argument("--guide_until", type=float, default=0.5, help="share of the steps after which the guide loss has decayed to 0")
    p.add_argument("--hinge", action="store_true", help="the paper's one-sided sparsity loss")
    p.add_argument("--distill", default="kl", choices=["kl", "mse"], help="distil the next-token distribution or the last hidden state")
    p.add_argument("--decode_share", type=float, default=0.0, help="share of steps whose response tokens are routed too")
    p.add_argument("--tune_forecaster", type=float, default=0.0, help="train the --forecaster too, with this learning rate; 0: as it is")
    p.add_argument("--gumbel", type=float, default=0.0, help="temperature of Gumbel noise on training decisions, 0: none")
    p.add_argument("--eval_every", type=int, default=20, help="steps between looks at the watched samples")
    p.add_argument("--resume", action="store_true", help="go on from the last saved step")
    args = p.parse_args()
    for flag in ("steps", "batch_size", "nwatch", "group", "width", "eval_every", "lr"):
        check(getattr(args, flag) > 0, f"--{flag} {getattr(args, flag)}: must be positive")
    check(args.score == "mean" or args.score.isdigit() and int(args.score) > 0, f"--score {args.score}: give a number of queries, or mean")
    check(args.batch_size >= world(), f"--batch_size {args.batch_size}: fewer samples a step than ranks; give at least {world()}")
    check(args.decode_share == 0 or world() == 1, "--decode_share: its thresholds are quantiles over a whole step, so it trains in one process only")
    schedule = Schedule.load(args.schedule)
    taken = None if args.guide in ("search", "static") else Order.of_router(args.guide)
    model, config = start(args, pack=False)
    tokenizer, out = load_tokenizer(args.model), Path(args.out_dir)
    kw = dict(max_prompt=args.max_prompt, max_response=args.max_response, seed=args.seed)
    samples = load_samples(args.data, model, tokenizer, "train", args.nsamples, **kw)
    held = load_samples(args.data, model, tokenizer, "watch", args.nwatch, **kw)
    routing, fixed = routing_of(args), routing_of(args, learned=False) | {"group": args.group}
    router = Router(model.config, model.fingerprint, args.router_kind, tuple(args.inputs.split(",")), args.width,
                    args.score if args.score == "mean" else int(args.score), args.group).to(model.device)
    model.use(schedule, router, **routing)

    t = time.time()
    def draw(step):
        """The samples of a step as (index, seed of its noise), all ranks' together, and the random numbers that go on from there."""
        rng = random.Random(f"{args.seed}-{step}")
        picks = [rng.randrange(len(samples)) for _ in range(args.batch_size)]
        return [(i, f"{args.seed}-{step}-{j}") for j, i in enumerate(picks)], rng

    model.use()
    needed = sorted({i for step in range(args.steps) for i, _ in shard(draw(step)[0])})
    states, owner = model.response_states([samples[i] for i in needed])  # what the frozen teacher gives, once
    teacher = {i: states[owner == j] for j, i in enumerate(needed)}
    held_taught = spread_states(model, held)
    static = routed_kl(model, held_taught, schedule, "static", **fixed)
    print(f"{len(samples)} training samples, {len(needed)} of them picked{' by this rank' * (world() > 1)}; teacher ran in {time.time() - t:.0f} s; "
          f"watched KL with the static router {static.mean():.4f}", flush=True)

    learner, tuned = dict(router.named_parameters()), []
    if args.tune_forecaster:
        check(routing["forecaster"] is not None, "--tune_forecaster: nothing to tune; give --forecaster")
        learner |= {f"forecaster.{k}": q.requires_grad_() for k, q in routing["forecaster"].tensors.items()}
        tuned = list(routing["forecaster"].tensors.values())
    rates = [{"params": list(router.parameters()), "top": args.lr}] + [{"params": tuned, "top": args.tune_forecaster}] * bool(tuned)
    optimizer = torch.optim.Adam(rates, args.lr)
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "threads", "out_dir")} | {
        "schedule_id": schedule.id, "fingerprint": model.fingerprint, "data_digest": digest([samples, held]),
        "guide_taken": taken and vars(taken), "forecaster_id": routing["forecaster"] and routing["forecaster"].id}
    state_path, step, history, best = out / "train_state.safetensors", 0, [], None
    if args.resume and state_path.exists():
        step, best, history, guide = load_state(state_path, learner, optimizer, settings)
        print(f"resuming at step {step}")
    else:
        guide, rng = Order.static(), random.Random(args.seed)
        if args.guide != "static":
            if taken:
                guide, found = taken, f"from {args.guide}"
            else:
                model.use()
                few = spread_states(model, samples[:args.guide_samples])
                guide, tried = search_guide(lambda o: float(routed_kl(model, few, schedule, o, **fixed).mean()), args.guide_evals, rng)
                found = f"KL {min(tried):.4f} (static order {tried[0]:.4f}) after {len(tried)} orders"
            watched = routed_kl(model, held_taught, schedule, guide, **fixed).mean()
            print(f"guide: {found}, watched {watched:.4f}; curve {[round(v, 2) for v in guide.curve]}, "
                  f"weights {[round(v, 2) for v in guide.weights]}, head {guide.head}, tail {guide.tail}", flush=True)
            if watched > static.mean():
                print("the static order is better on the watched samples: it stays the guide")
                guide = Order.static()
        model.use(schedule, guide, **fixed)
        entropy = warm_up(router, model, guide, samples[:16], args.warmup)
        own = dict(router.named_parameters())
        fill(own, gather({k: v.detach().cpu() for k, v in own.items()})[0])  # warm-up may round differently on each rank
        print(f"guide warm-up: cross-entropy {entropy:.4f} after {args.warmup} steps", flush=True)

    def look(step, loss):
        nonlocal best
        kl = routed_kl(model, held_taught, schedule, router, decode="dense", **routing)
        entry = {"step": step, **loss, "watch_kl": float(kl.mean()), "watch_sparsity": model.stats.mean("prefill")}
        history.append(entry)
        if best is None or entry["watch_kl"] < best["watch_kl"]:
            best = {"step": step, "watch_kl": entry["watch_kl"], "state": {k: v.detach().clone() for k, v in learner.items()}}
        print(f"step {step:4d}  " + "  ".join(f"{k} {v:.4f}" for k, v in loss.items())
              + f"  watched KL {entry['watch_kl']:.4f}  realised sparsity {entry['watch_sparsity']:.4f}", flush=True)

    if best is None:
        look(0, {})
        save_state(state_path, learner, optimizer, step, best, history, settings, guide)  # the guide's search is not done again
    progress, began, first, mean = bar(total=args.steps, initial=step, desc="router", unit="step"), time.time(), step, {}
    tokens = 0
    while step < args.steps:
        picks, rng = draw(step)
        mine = shard(picks)
        for g in optimizer.param_groups:
            g["lr"] = g["top"] * (0.55 + 0.45 * torch.cos(torch.tensor(step / args.steps * torch.pi)).item())
        weight = args.lambda_g * max(0.0, 1 - step / (args.guide_until * args.steps)) if args.guide_until else 0.0
        decode = "threshold" if rng.random() < args.decode_share else "dense"
        model.use(schedule, router, **routing, decode="dense")
        if decode == "threshold":
            model.decode, model.aim, model.thresholds = decode, model.schedule.sparsity, [0.0] * len(schedule.sparsity)
        group = [samples[i] for i, _ in mine]
        L, noise = model.config.n_layer, [0.0] * model.config.n_layer
        if args.gumbel:
            noise = torch.cat([gumbel(seed, L, len(a) + len(b)) for (_, seed), (a, b) in zip(mine, group)], 1)
            noise = [args.gumbel * n.to(model.place_of(l)) for l, n in enumerate(noise)]
        q = model.begin_samples(group)
        for l in range(L):
            q = model.step(l, q, masked=True, noise=noise[l])
        student, want = q.x[response_rows(group)[0]], torch.cat([teacher[i] for i, _ in mine])
        if args.distill == "kl":
            with torch.no_grad():
                aim = model.logits(want)
            wrong = kl_divergence(aim, model.logits(student))
        else:
            wrong = (model.norm(student).float() - model.norm(want).float()).square().mean(1)
        wrong, n = total(torch.stack((wrong.sum(), wrong.new_tensor(len(wrong)))).to(q.x.device))
        l_d = wrong / n
        l_s, l_g, share = losses(q, guide, args.hinge)
        loss = args.lambda_d * l_d + args.lambda_s * l_s + weight * l_g
        check(bool(loss.isfinite()), f"--lr {args.lr}: the loss of step {step} is NaN or infinite; lower it, or give --dtype float32")
        optimizer.zero_grad()
        loss.backward()
        if world() > 1:
            for v in learner.values():
                if v.grad is not None:
                    dist.all_reduce(v.grad)
        for g in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(g["params"], 1.0)
        optimizer.step()
        tokens += sum(len(a) + len(b) for a, b in (samples[i] for i, _ in picks))
        step += 1
        progress.update()
        for k, v in (("L_d" if decode == "dense" else "L_d_decode", l_d), ("L_s", l_s), ("L_g", l_g), ("argmax_sparsity", torch.tensor(share))):
            mean[k] = mean.get(k, []) + [v.item()]
        if step % args.eval_every == 0 or step == args.steps:
            look(step, {k: sum(v) / len(v) for k, v in mean.items()})
            mean = {}
            save_state(state_path, learner, optimizer, step, best, history, settings, guide)
    progress.close()
    seconds = time.time() - began
    fill(learner, best["state"])
    if tuned:
        if rank() == 0:
            routing["forecaster"].save(out / "forecaster_ft.safetensors")
        print(f"forecaster tuned -> {out}/forecaster_ft.safetensors")
    model.use(schedule, router, **routing)
    kl = routed_kl(model, held_taught, schedule, router, decode="dense", **routing)
    realised, diff = model.stats.mean("prefill"), static - kl
    model.use(schedule, router, **routing)
    thresholds = model.calibrate_decode(samples[:64])
    rate = (step - first) / max(seconds, 1e-9) * 60
    router.meta = {**config, "schedule_id": schedule.id, "decode_threshold": thresholds, "best_step": best["step"], "guide": vars(guide), "history": history,
                   "kl_watch": float(kl.mean()), "kl_watch_static": float(static.mean()), "realised_sparsity": realised,
                   "work": {"steps": step, "steps_per_minute": round(rate, 1), "tokens": tokens, "seconds": round(seconds, 1)}}
    if rank() == 0:
        router.save(out / "router.safetensors")
    print(f"watched KL: static {static.mean():.4f}, router {kl.mean():.4f} (step {best['step']}), difference {diff.mean():.4f} +- "
          f"{diff.std() / len(diff) ** 0.5:.4f} (standard error over {len(diff)} samples); {rate:.0f} steps/min")
    if diff.mean() <= 0:
        print("on these samples the static router (--router static) is no worse, and it costs less")
    print(f"realised prefill sparsity {realised:.4f} (target {schedule.mean:.4f}); {sum(q.numel() for q in router.parameters())} parameters "
          f"-> {out}/router.safetensors")


if __name__ == "__main__":
    run(main)
