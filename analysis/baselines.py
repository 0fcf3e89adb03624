"""Rival methods, made from the same calibration samples at the same share of prompt FLOPs saved, for the same evaluation and benchmark.

    python analysis/baselines.py --flops_saved 0.22,0.30,0.40                     # all methods -> out/baselines/
    python analysis/baselines.py --methods blockpruner --nsamples 64 --resume     # go on after an interruption
    python evaluate.py --rows "" --peer shortgpt=out/baselines/shortgpt_0.30.json --peer slicegpt=out/baselines/slicegpt_0.30
    python evaluate.py --rows "" --peer lazyllm=out/baselines/lazyllm_0.30.json+progressive

shortgpt     ShortGPT (arXiv 2403.03853): the blocks of lowest Block Influence go                                        schedule
blockpruner  BlockPruner (2406.10594): sub-blocks go one by one, each time the one whose absence leaves the best perplexity  schedule
lazyllm      LazyLLM-like (2407.14057): prompt tokens drop out for good, in three steps, by the last token's attention     schedule
laco         LaCo (2402.11187): groups of blocks merged from the top; the paper's sum of differences                     folder
laco_last    LaCo as its notebook runs it: updated in place the sum telescopes, and the last block of the group stands for all  folder
slicegpt     SliceGPT (2401.15024): each sub-block in its own principal components, of which the first stay                folder
width        structured width pruning, LLM-Pruner-like (2305.11627): MLP channels (and K/V heads) by |gradient x weight| folder

None is trained afterwards. Each takes the size nearest to the target; the share it realises on the calibration prompts is stored. Folders
but slicegpt's load in transformers too. Others need no script: first + recent under a uniform or BI schedule (search_scheduler.py --method
uniform or bi --flops_saved), random and attention selection (--peer NAME=SCHEDULE+random), and a Mixture-of-Depths-like router that reads
the hidden state (train_router.py --inputs hidden, then --peer NAME=SCHEDULE+ROUTER).
"""
import copy
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from common import Parser, bar, check, peer_model, run, start
from data import load_samples, load_tokenizer
from evaluate import nll
from files import FTPError, find_model, load_json, save_json
from model_ftp import Keep, batches, response_rows
from router import Schedule
from search_scheduler import block_influence


def prompt_flops(config, samples, sparsity=None, parts=None):
    """FLOPs of the blocks over the samples' prompts."""
    return sum(config.prefill_flops(len(a), sparsity or [0.0] * config.n_layer, head=0, parts=parts) for a, _ in samples)


def nearest(level, sizes, cost, dense):
    """The size whose share of FLOPs saved, 1 - cost(size) / dense, is nearest to level."""
    return min(sizes, key=lambda size: abs(1 - cost(size) / dense - level))


def whole_texts(samples):
    """The samples as texts of which all but the first token are predicted, in groups that run together."""
    return [g for _, g in batches([((a + b)[:1], (a + b)[1:]) for a, b in samples], 2048)]


def every(p):
    return Keep(p, None, p.counts, p.set_counts)


# ------------------------------------------------------------------------------------------------
# schedules. Each method is a generator of (level, artefact, what to note of it)

def shortgpt(model, samples, levels):
    bi = block_influence(model, samples)
    order = sorted(range(len(bi)), key=bi.__getitem__)
    for level in levels:
        gone = order[:round(level * len(bi))]  # a block's share of the FLOPs is 1 / n_layer
        yield level, Schedule([float(l in gone) for l in range(len(bi))], model.fingerprint), {"block_influence": bi, "removed": gone}


def without(model, removed):
    """Schedule without the sub-blocks removed, a collection of (block, "attention" or "mlp")."""
    left = [[h for h in ("attention", "mlp") if (l, h) not in removed] for l in range(model.config.n_layer)]
    return Schedule([float(not h) for h in left], model.fingerprint, parts=["both" if len(h) != 1 else h[0] for h in left])


@torch.inference_mode()
def weakest(model, groups, removed):
    """(negative log-likelihood, (block, sub-block)) of the sub-block whose absence, beside those removed, the texts mind least.
    What candidates have in common, the blocks before, runs once."""
    texts, L, got = [s for g in groups for s in g], model.config.n_layer, []
    model.use(without(model, removed))
    states = [[model.begin_samples(g) for g in groups]]
    for l in range(L - 1):
        states.append([model.step(l, p) for p in states[-1]])
    for l, half in [(l, h) for l in range(L) for h in ("attention", "mlp") if (l, h) not in removed]:
        model.use(without(model, [*removed, (l, half)]))
        passes = states[l]
        for k in range(l, L):
            passes = [model.step(k, p) for p in passes]
        got.append((nll(model, torch.cat([p.x[response_rows(g)[0]] for g, p in zip(groups, passes)]), texts), (l, half)))
    return min(got)


def blockpruner(model, samples, levels, state_path=None, resume=False, settings=None):
    """Saves the order of removal to state_path after each step; with resume goes on from it."""
    groups, dense, trail = whole_texts(samples), prompt_flops(model.config, samples), []
    if resume and state_path.exists():
        old = load_json(state_path, "ftp-blockpruner-state-1", "--resume")
        check(old["settings"] == settings, f"--resume: {state_path} belongs to a run with other settings; give them again, or drop --resume")
        trail = old["trail"]
    gone = lambda n: [(t["block"], t["part"]) for t in trail[:n]]
    def cost(n):
        s = without(model, gone(n))
        return prompt_flops(model.config, samples, s.sparsity, s.parts)
    progress = bar(desc="blockpruner", unit="sub-block", initial=len(trail))
    while 1 - cost(len(trail)) / dense < max(levels):
        loss, (l, half) = weakest(model, groups, gone(len(trail)))
        trail.append({"block": l, "part": half, "ppl": math.exp(loss)})
        progress.update()
        if state_path:
            save_json(state_path, {"format": "ftp-blockpruner-state-1", "settings": settings, "trail": trail})
    progress.close()
    for level in levels:
        n = nearest(level, range(len(trail) + 1), cost, dense)
        yield level, without(model, gone(n)), {"removed": trail[:n]}


def lazyllm(model, samples, levels):
    """A quarter of the blocks dense, then three steps of sparsity u, 2u, 3u. For the selection "progressive"."""
    c, dense = model.config, prompt_flops(model.config, samples)
    steps = lambda u: [u * (4 * l // c.n_layer) for l in range(c.n_layer)]
    for level in levels:
        u = nearest(level, [i / 1000 for i in range(330)], lambda u: prompt_flops(c, samples, steps(u)), dense)
        yield level, Schedule(steps(u), model.fingerprint), {"step": u}


# ------------------------------------------------------------------------------------------------
# folders. The artefact is (tensors by their Hugging Face names, changes of config.json)

def combine(parts, get):
    """sum of coefficient * get(block index) over the parts, ((index, coefficient), ...)."""
    return sum(c * get(i) for i, c in parts) if len(parts) > 1 else get(parts[0][0])


def merge(layers, l, m, last):
    """Merge the m layers after l into it. A layer is ((original block, coefficient), ...): theta_l + sum_k (theta_l+k - theta_l), or, with
    last, what that becomes when theta_l is updated in place: theta_l+m."""
    if last:
        new = layers[l + m]
    else:
        total = {}
        for layer, weight in ((layers[l], 1 - m), *((t, 1) for t in layers[l + 1:l + m + 1])):
            for i, c in layer:
                total[i] = total.get(i, 0) + weight * c
        new = tuple(sorted(total.items()))
    return layers[:l] + (new,) + layers[l + m + 1:]


def similarity(model, groups):
    """Function: layers -> mean cosine, over the texts' tokens, of their normed last hidden states and the original model's."""
    @torch.inference_mode()
    def states(layers):
        blocks = []
        for layer in layers:
            block = model.blocks[layer[0][0]]
            if len(layer) > 1:
                block = copy.deepcopy(block)
                for name, q in block.named_parameters():
                    q.data = combine(layer, lambda i: model.blocks[i].get_parameter(name).data)
            blocks.append(block)
        for g in groups:
            p = model.begin_samples(g)
            for block in blocks:
                p = block(p, every(p), "drop", None)
            yield model.norm(p.x).float()
    model.use()
    teacher, known = list(states([((i, 1),) for i in range(model.config.n_layer)])), {}
    def score(layers):
        if layers not in known:
            known[layers] = float(torch.cat([F.cosine_similarity(a, b, dim=-1) for a, b in zip(teacher, states(layers))]).mean())
        return known[layers]
    return score


def collapse(L, gone, threshold, score, last, group, interval=2):
    """LaCo's walk from the top: merge `group` layers where the similarity stays above the threshold, until `gone` layers are gone (or
    the bottom is reached) -> layers."""
    layers, l = tuple(((i, 1),) for i in range(L)), L - group
    while l >= 1 and (left := gone - (L - len(layers))):
        new = merge(layers, l, min(group - 1, len(layers) - 1 - l, left), last)
        if score(new) > threshold:
            layers = new
            l = min(l - interval, len(layers) - group)
        else:
            l -= 1
    return layers


def laco(model, samples, levels, tensors, last=False):
    """LaCo leaves its settings to the user: of groups of 2, 3 or 4 layers, each with the highest threshold (in steps of 0.05) that
    removes enough, the result most similar to the original. Judged by 10 samples, as in the paper."""
    L, score = model.config.n_layer, similarity(model, whole_texts(samples[:10]))
    names = [n.removeprefix("model.layers.0.") for n in tensors if n.startswith("model.layers.0.")]
    for level in levels:
        gone, found = round(level * L), []
        for group in (2, 3, 4):
            tries = ((t / 100, collapse(L, gone, t / 100, score, last, group)) for t in range(95, -101, -5))
            found += [(score(got), t, group, got) for t, got in tries if L - len(got) == gone][:1]
        cosine, threshold, group, layers = max(found)
        new = {n: t for n, t in tensors.items() if not n.startswith("model.layers.")}
        for i, layer in enumerate(layers):
            new |= {f"model.layers.{i}.{n}": combine(layer, lambda j: tensors[f"model.layers.{j}.{n}"]) for n in names}
        yield level, (new, {"num_hidden_layers": len(layers), "layer_types": None}), {
            "form": "last layer of the group" if last else "sum of differences", "group": group, "threshold": threshold, "cosine": cosine, "layers": layers}


@torch.inference_mode()
def principal_bases(model, groups, k):
    """The first k principal directions (d, k), float64, of the residual before each norm, 2 * n_layer + 1 of them in the order of the pass;
    what comes after each sees the states cut to them, as in the sliced model. (Of the norms' outputs they measured worse.)"""
    bases = []
    model.use()
    passes = [model.begin_samples(g) for g in groups]
    for block, part in [*((b, part) for b in model.blocks for part in ("attention", "mlp")), (None, None)]:
        q = torch.linalg.eigh(sum(p.x.double().T @ p.x.double() for p in passes))[1].flip(1)[:, :k]
        bases.append(q.cpu())
        if block:
            cut = [p.next(x=(p.x.double() @ q @ q.T).to(p.x.dtype)) for p in passes]
            passes = [block(p, every(p), "drop", None, part) for p in cut]
    return bases


def slice_to(model, groups, tensors, k):
    """The model in k of its d dimensions: every matrix that reads the residual (its norm's scale folded in) takes its basis, every
    one that writes it the next basis; shortcuts lead from one to the next."""
    c, new, bases = model.config, {}, principal_bases(model, groups, k)
    get = lambda name: tensors[name].cpu().double()
    norm = lambda: torch.full((k,), math.sqrt(c.hidden_size / k))  # the mean square is over k numbers, the original's over hidden_size
    for l in range(c.n_layer):
        at, (here, mid, after) = f"model.layers.{l}.", bases[2 * l:2 * l + 3]
        for scale, names, q in (("input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), here),
                                ("post_attention", ("mlp.gate_proj", "mlp.up_proj"), mid)):
            new[f"{at}{scale}_layernorm.weight"] = norm()
            for n in names:
                new[f"{at}{n}.weight"] = get(f"{at}{n}.weight") * get(f"{at}{scale}_layernorm.weight") @ q
                if f"{at}{n}.bias" in tensors:
                    new[f"{at}{n}.bias"] = tensors[f"{at}{n}.bias"]
        for n, q in (("self_attn.o_proj", mid), ("mlp.down_proj", after)):
            new[f"{at}{n}.weight"] = q.T @ get(f"{at}{n}.weight")
        new |= {f"{at}shortcut1.weight": mid.T @ here, f"{at}shortcut2.weight": after.T @ mid}
    embed = get("model.embed_tokens.weight")
    new |= {"model.embed_tokens.weight": embed @ bases[0], "model.norm.weight": norm(),
            "lm_head.weight": (embed if c.tied else get("lm_head.weight")) * get("model.norm.weight") @ bases[-1]}
    return {n: t.float() for n, t in new.items()}, {
        "model_type": "slicegpt", "architectures": None, "hidden_size": k, "head_dim": c.head_dim, "rms_norm_eps": c.rms_eps * c.hidden_size / k,
        "tie_word_embeddings": False}


def slicegpt(model, samples, levels, tensors):
    c, dense = model.config, prompt_flops(model.config, samples)
    for level in levels:
        k = nearest(level, range(8, c.hidden_size + 1, 8), lambda k: prompt_flops(replace(c, hidden_size=k, shortcut=True), samples), dense)
        yield level, slice_to(model, whole_texts(samples), tensors, k), {"dimensions": k, "slicing": 1 - k / c.hidden_size}


def importance(model, samples, folder):
    """Sum over the samples of |gradient x weight| of the next-token loss, by transformers' own model -> {Hugging Face name: tensor}.
    LLM-Pruner adds the gradients first; texts cancel then, and it measured worse."""
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    weights = {n: q for n, q in hf.named_parameters() if "_proj.weight" in n}
    total = {n: torch.zeros_like(q, requires_grad=False) for n, q in weights.items()}
    for a, b in bar(samples, desc="gradients", unit="sample"):
        ids = torch.tensor([a + b], device=model.device)
        for n, g in zip(weights, torch.autograd.grad(hf(ids, labels=ids).loss, list(weights.values()))):
            total[n] += (g * weights[n].detach()).abs()
    return {n: t.cpu() for n, t in total.items()}


def narrow(config, tensors, taylor, widths):
    """Keep the most important K/V heads (with their queries) and MLP channels of each block, widths[l] = (heads, channels). What goes becomes
    zeros behind what stays, so that the folder is still a LLaMA to others; FTPModel leaves the zeros out."""
    new, D, Q = dict(tensors), config.head_dim, config.head_dim * config.n_head // config.n_kv_head
    for l, (heads, channels) in enumerate(widths):
        for part, sizes, n in (("self_attn", {"q": Q, "k": D, "v": D, "o": Q}, heads), ("mlp", {"gate": 1, "up": 1, "down": 1}, channels)):
            name = lambda m, kind="weight": f"model.layers.{l}.{part}.{m}_proj.{kind}"
            axis = lambda m: int(m in ("o", "down"))  # these read what the others write
            order = sum(taylor[name(m)].sum(1 - axis(m)).view(-1, size).sum(1) for m, size in sizes.items()).argsort(descending=True)
            for m, size in sizes.items():
                rows = (order[:, None] * size + torch.arange(size)).flatten()
                for kind in ("weight", "bias"):
                    if name(m, kind) in new:
                        new[name(m, kind)] = t = new[name(m, kind)].index_select(axis(m), rows)
                        t.narrow(axis(m), n * size, len(rows) - n * size).zero_()
    return new


def width(model, samples, levels, tensors, folder, kv_heads=0):
    """The first and the last block stay whole, as LLM-Pruner keeps its ends; the others lose kv_heads K/V heads, the rest in channels.
    (On smollm2 at 30 % channels alone measured best: one K/V head of three is much.)"""
    c, dense, taylor = model.config, prompt_flops(model.config, samples), importance(model, samples, folder)
    check(kv_heads < c.n_kv_head, f"--kv_heads {kv_heads}: must leave one of {c.n_kv_head}")
    whole, heads = [(c.n_kv_head, c.intermediate_size)], c.n_kv_head - kv_heads
    widths = lambda n: whole + [(heads, n)] * (c.n_layer - 2) + whole
    for level in levels:
        n = nearest(level, range(8, c.intermediate_size + 1, 8), lambda n: prompt_flops(replace(c, widths=widths(n)), samples), dense)
        yield level, (narrow(c, tensors, taylor, widths(n)), {"widths": widths(n)}), {"kv_heads": heads, "mlp_channels": n}


# ------------------------------------------------------------------------------------------------

def read_tensors(folder):
    """{name: tensor} of a checkpoint's safetensors."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            out |= {n: f.get_tensor(n) for n in f.keys()}
    return out


def realised(model, samples):
    """Share of prompt block FLOPs saved on the samples, counted by the engine in a pass."""
    model.response_states(samples)
    return model.stats.saved("prefill")


def write_folder(source, target, tensors, changes, meta, model, samples):
    """Write a model folder (config and tokenizer files of `source`), atomically; returns the share of FLOPs it saves."""
    tmp = Path(f"{target}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model") and not file.name.endswith(".index.json"):
            shutil.copy(file, tmp)
    old = json.loads((source / "config.json").read_text())
    changes = {**changes, **({"sliced_from": old["model_type"]} if changes.get("model_type") else {})}
    save_json(tmp / "config.json", {k: v for k, v in {**old, **changes}.items() if v is not None or k not in changes})
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp / "model.safetensors", {"format": "pt"})
    made = {"format": "ftp-pruned-1", **meta}
    save_json(tmp / "pruned.json", made)
    saved = realised(peer_model(tmp, model), samples)
    save_json(tmp / "pruned.json", made | {"flops_saved": saved})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)
    return saved


METHODS = ("shortgpt", "blockpruner", "lazyllm", "laco", "laco_last", "slicegpt", "width")


def main():
    p = Parser(__doc__).common(out_dir="out/baselines")
    p.add_argument("--methods", default=",".join(METHODS), help="comma list of the methods above")
    p.add_argument("--flops_saved", default="0.30", help="comma list of targets: share of the prompts' block FLOPs saved")
    p.add_argument("--data", default="self", help='calibration: "self" (own answers), "text" (own texts), .json/.jsonl, .txt or datasets ids, commas between')
    p.add_argument("--nsamples", type=int, default=32, help="calibration samples")
    p.add_argument("--max_prompt", type=int, default=512, help="longest prompt taken, tokens")
    p.add_argument("--max_response", type=int, default=64, help="response tokens used")
    p.add_argument("--kv_heads", type=int, default=0, help="K/V heads (with their queries) that width takes from a block beside the channels")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted blockpruner")
    args = p.parse_args()
    try:
        levels = [float(v) for v in args.flops_saved.split(",")]
    except ValueError:
        raise FTPError(f"--flops_saved {args.flops_saved}: give numbers like 0.22,0.30") from None
    check(all(0 < v <= 0.45 for v in levels), f"--flops_saved {args.flops_saved}: must lie in (0, 0.45], where every method can follow")
    methods = args.methods.split(",")
    check(set(methods) <= set(METHODS), f"--methods {args.methods}: of {', '.join(METHODS)}")
    check(args.nsamples > 0, f"--nsamples {args.nsamples}: must be at least 1")
    model, config = start(args, pack=False)
    source, out = find_model(args.model), Path(args.out_dir)
    samples = load_samples(args.data, model, load_tokenizer(args.model), "train", args.nsamples, max_prompt=args.max_prompt,
                           max_response=args.max_response, seed=args.seed)
    tensors = read_tensors(source) if set(methods) & {"laco", "laco_last", "slicegpt", "width"} else None
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "threads", "out_dir", "methods", "flops_saved")}
    how: dict = {"shortgpt": shortgpt, "lazyllm": lazyllm,
                 "blockpruner": partial(blockpruner, state_path=out / "blockpruner_state.json", resume=args.resume, settings=settings),
                 "laco": partial(laco, tensors=tensors), "laco_last": partial(laco, tensors=tensors, last=True),
                 "slicegpt": partial(slicegpt, tensors=tensors), "width": partial(width, tensors=tensors, folder=source, kv_heads=args.kv_heads)}
    for method in methods:
        t = time.time()
        for level, made, notes in how[method](model, samples, levels):
            seconds, name = round(time.time() - t, 1), out / f"{method}_{level:.2f}"
            meta = {**config, "method": method, "flops_saved_target": level, **notes, "seconds": seconds}
            if isinstance(made, Schedule):
                model.use(made, "progressive" if method == "lazyllm" else "static")
                name, saved = f"{name}.json", realised(model, samples)
                made.meta = meta | {"flops_saved": saved}
                made.save(name)
            else:
                weights, changes = made
                saved = write_folder(source, name, weights, changes, meta, model, samples)
            brief = {k: v for k, v in notes.items() if not isinstance(v, (list, tuple))}
            print(f"{method:12s} target {level:.2f}, {saved:.4f} of the prompts' block FLOPs saved, {seconds} s {brief or ''} -> {name}", flush=True)
            t = time.time()


if __name__ == "__main__":
    run(main)
