"""Quality of the pruned model beside the dense one: choice tasks, perplexity, KL and top-1 agreement, realised sparsity.

    python evaluate.py --schedule out/schedule_ft.json --router out/router.safetensors            # -> out/eval.json, a table
    python evaluate.py --tasks arc_easy,hellaswag,mmlu --limit 500 --rows static,ftp,ftp_decode   # by datasets ids
    python evaluate.py --tasks mine=items.jsonl --text book.txt --protocol joint
    python evaluate.py --tasks arc_easy,piqa,lambada --floor --text Salesforce/wikitext:wikitext-2-raw-v1:test --nwindows 0
    python evaluate.py --rows static,ftp --peer shortgpt=out/baselines/shortgpt_0.30.json --peer laco=out/baselines/laco_0.30
    torchrun --nproc_per_node 8 evaluate.py --tasks hellaswag,mmlu                                # the items spread over 8 GPUs

Rows: dense (always), uniform (static router, uniform schedule of the same mean), static (static router, --schedule), random and
attention (other selections), ftp (--router; the prompt is routed, decoding is dense), ftp_decode (decoded tokens skip too, by
threshold), rule (the paper's decode rule), and those of each --peer (made by analysis/baselines.py). Protocol causal: a context is
routed as a prompt, the scored text runs as decoded tokens. joint (the paper's): context and continuation are routed together, which no
generation can reproduce.

Perplexity is the field's: WikiText-2 raw, its rows joined by blank lines, tokenised once without a start token, cut in windows that do not
overlap, exp of the mean loss of all scored tokens. A window's first --context tokens are the prompt (routed), the --scored ones after it run
as decoded tokens. --context 1 --scored 2047 --nwindows 0 is the usual number of a dense model at length 2048; nothing is routed then.

Retention is the mean over tasks of score / dense score; corrected, of what both have above chance. Tasks that need their context (LAMBADA,
documents, yes/no questions: NEEDS_CONTEXT in data.py) have a mean of their own. --floor scores every choice task without its question, too:
what a model keeps that skips the whole prompt.
"""
import math
import string
import time
from pathlib import Path

import torch

from common import (
    Parser,
    bar,
    check,
    digest,
    gather,
    load_forecaster,
    load_peers,
    load_progress,
    peer_id,
    peer_model,
    rank,
    routing_of,
    run,
    save_progress,
    shard,
    share_stats,
    spread_states,
    start,
    unshard,
)
from data import encode, encode_pair, load_samples, load_task, load_text, load_tokenizer, standard_error, windows
from files import save_json
from model_ftp import Stats, batches, by_sample, kl_divergence
from router import Router, Schedule

METRIC = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbook_qa": "acc_norm", "piqa": "acc_norm"}  # others: acc
ANSWER = 32  # tokens generated where an answer is searched for
ROWS = {  # name: (schedule, router, decode)
    "dense": (None, "static", "dense"), "uniform": ("uniform", "static", "dense"), "static": ("given", "static", "dense"),
    "random": ("given", "random", "dense"), "attention": ("given", "attention", "dense"), "ftp": ("given", "given", "dense"),
    "ftp_decode": ("given", "given", "threshold"), "rule": ("given", "given", "rule")}


def pick(logits, targets):
    """Log-probability of each target token and whether it is the likeliest: logits (M, vocab), targets (M,)."""
    logp = logits.float().log_softmax(-1)
    targets = torch.as_tensor(targets, device=logits.device)
    return logp.gather(1, targets[:, None])[:, 0].cpu(), (logits.argmax(-1) == targets).cpu()


def score_pairs(model, pairs, protocol, max_tokens=2048):
    """(sum of log-probabilities, all greedy) of each continuation: pairs [(context ids, continuation ids)].

    causal: each distinct context is prefilled once, and its continuations run from that cache one after the other.
    """
    out = [None] * len(pairs)
    if protocol == "joint":
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        ordered = [pairs[i] for i in order]
        for first, group in bar(shard(list(batches(ordered, max_tokens))), desc="joint", unit="batch", leave=False):
            states, owner = model.response_states(group, max_tokens, joint=True)
            logp, greedy = pick(model.logits(states), [t for _, c in group for t in c])
            for j in range(len(group)):
                out[order[first + j]] = float(logp[owner == j].sum()), bool(greedy[owner == j].all())
        return from_all_ranks(out)
    by_context = {}
    for i, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(i)
    contexts = sorted(by_context, key=len)
    for _, group in bar(shard(list(batches([(list(c), ()) for c in contexts], max_tokens))), desc="causal", unit="batch", leave=False):
        group = [c for c, _ in group]
        cache = model.new_cache(len(group))
        first = model.extend(group, cache, prompt=True, last_only=True)
        mark, todo = cache.mark(), [by_context[tuple(c)] for c in group]
        for turn in range(max(map(len, todo))):
            rows = [b for b in range(len(group)) if turn < len(todo[b])]
            cont = [pairs[todo[b][turn]][1] for b in rows]
            logp, greedy = pick(first[rows], [c[0] for c in cont])
            logp, greedy = [[v] for v in logp], [[v] for v in greedy]
            more = [j for j, c in enumerate(cont) if len(c) > 1]
            if more:
                logits = model.extend([cont[j][:-1] for j in more], cache, torch.tensor([rows[j] for j in more]))
                later, hit = pick(logits, [t for j in more for t in cont[j][1:]])
                sizes = [len(cont[j]) - 1 for j in more]
                for j, a, b in zip(more, later.split(sizes), hit.split(sizes)):
                    logp[j].extend(a)
                    greedy[j].extend(b)
                cache.rewind(mark)
            for j, b in enumerate(rows):
                out[todo[b][turn]] = float(sum(logp[j])), bool(all(greedy[j]))
    return from_all_ranks(out)


def from_all_ranks(out):
    """Lists that each rank has filled at other places, as the one full list."""
    return [next(v for v in some if v is not None) for some in zip(*gather(out))]


def bare(text):
    """Lower case, without punctuation and articles: the form in which short answers are compared."""
    words = "".join(c for c in text.lower() if c not in string.punctuation).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def generated_hits(model, tokenizer, items, truncate=False, max_new_tokens=ANSWER, max_tokens=8192):
    """1.0 for each item whose greedy answer's first line holds one of its answers, else 0.0: (n,) list. Always prompt, then decoding."""
    cut = -(model.config.max_len - max_new_tokens + 1) if truncate else None  # the last new token is not run
    prompts, hits = [(encode(tokenizer, it["contexts"][0])[cut:], range(max_new_tokens)) for it in items], [None] * len(items)  # type: list, list
    for first, group in bar(shard(list(batches(prompts, max_tokens))), desc="answers", unit="batch", leave=False):
        for i, new in enumerate(model.generate([list(ids) for ids, _ in group], max_new_tokens), first):
            line = bare(tokenizer.decode(new, skip_special_tokens=True).strip().split("\n")[0])
            hits[i] = float(any(bare(a) and bare(a) in line for a in items[i]["continuations"]))
    return from_all_ranks(hits)


def check_length(model, tokenizer, task, items, truncate):
    """FTPError unless every item fits the model, or with `truncate` at least its continuations do."""
    most = model.config.max_len
    for i, it in enumerate(items):
        for texts in zip(it["contexts"], it["continuations"]):
            if it.get("generate"):
                texts = texts[0], "x" * (ANSWER - 1)  # room for the answer
            if len("".join(texts).encode()) >= most - 2:  # a token is at least a byte: shorter ones fit
                context, continuation = (encode(tokenizer, texts[0]), texts[1]) if it.get("generate") else encode_pair(tokenizer, *texts)
                n = len(continuation) + (1 if truncate else len(context))
                check(n <= most, f"--tasks {task}: item {i + 1} has {len(context) + len(continuation)} tokens, the model takes {most}; shorten it"
                                 + (", its choice alone is too long" if truncate else ", or give --truncate to cut contexts at their left"))


def evaluate_task(model, tokenizer, items, protocol, truncate=False):
    """Scores of one task's items -> {"acc", "acc_norm", "stderr", "n", "chance", ...}, perplexity for items without an answer."""
    if items[0].get("generate"):
        acc = generated_hits(model, tokenizer, items, truncate)
        return {"acc": sum(acc) / len(acc), "acc_norm": None, "stderr": standard_error(acc), "n": len(acc), "chance": 0.0,
                "items": [int(v) for v in acc], "items_norm": []}
    most = model.config.max_len if truncate else None
    pairs = [encode_pair(tokenizer, a, b, most) for it in items for a, b in zip(it["contexts"], it["continuations"])]
    scores, i = score_pairs(model, pairs, protocol), 0
    acc, norm, sums = [], [], []
    for it in items:
        s = scores[i:i + len(it["contexts"])]
        i += len(s)
        if it["answer"] is None:
            acc.append(float(s[0][1]))
            sums.append(s[0][0])
        else:
            plain = [v for v, _ in s]
            by_length = [v / max(len(c) - c.startswith(" "), 1) for v, c in zip(plain, it["continuations"])]
            acc.append(float(plain.index(max(plain)) == it["answer"]))
            norm.append(float(by_length.index(max(by_length)) == it["answer"]))
    mean = lambda v: sum(v) / len(v) if v else None
    got = {"acc": mean(acc), "acc_norm": mean(norm), "stderr": standard_error(acc), "n": len(items),
           "chance": mean([0.0 if it["answer"] is None else 1 / len(it["contexts"]) for it in items]),
           "items": [int(v) for v in acc], "items_norm": [int(v) for v in norm]}
    return got | ({"ppl": math.exp(-mean(sums))} if sums else {})


def figure(task, got):
    """The score that a task is reported by."""
    return got["acc"] if got["acc_norm"] is None else got[METRIC.get(task, "acc")]


def floor(model, tokenizer, task, items, protocol):
    """The task's score with the question removed; None where there is none to choose by. Options that differ in the context alone tie."""
    if items[0]["answer"] is None:
        return None
    if all(len(set(it["continuations"])) == 1 for it in items):
        return sum(1 / len(it["contexts"]) for it in items) / len(items)
    return figure(task, evaluate_task(model, tokenizer, [it | {"contexts": [""] * len(it["contexts"])} for it in items], protocol))


def retention(mine, dense, key=figure):
    """Means over tasks {name: scores} of mine / dense, of the same with chance taken off both, and the latter pooled: the sum over tasks of
    mine above chance by that of dense, which a task whose dense score is hardly above chance can't rule. None without a task above 0, or chance."""
    kept, fixed, above = [], [], []
    for task, base in dense.items():
        a, b, chance = key(task, mine[task]), figure(task, base), base["chance"]
        if a is not None:
            kept += [a / b] if b > 0 else []
            fixed += [(a - chance) / (b - chance)] if b > chance else []
            above.append((a - chance, b - chance))
    mine, full = (sum(v) for v in zip(*above)) if above else (0, 0)
    return [*(sum(v) / len(v) if v else None for v in (kept, fixed)), mine / full if full > 0 else None]


def nll(model, states, samples):
    """Mean negative log-likelihood of the responses in nats per token, from their last hidden states."""
    targets = [t for _, c in samples for t in c]
    logp = [pick(model.logits(x), t)[0] for x, t in zip(states.split(512), [targets[i:i + 512] for i in range(0, len(targets), 512)])]
    return -float(torch.cat(logp).mean())


def spread_nll(model, spread):
    """The same of what spread_states() left on each rank."""
    parts = unshard([(nll(model, states, group), len(states)) for group, states, _ in spread])
    return sum(v * n for v, n in parts) / sum(n for _, n in parts)


def evaluate_row(model, tokenizer, name, args, tasks, texts, samples, dense):
    """All measurements of one row; `dense` is what the dense row left for comparison, None for itself."""
    t, joint = time.time(), args.protocol == "joint"
    row = {"name": name, "protocol": args.protocol, "tasks": {}, "ppl": {}}
    total, realised = model.stats, {}

    def account(data):
        """Move what was counted since the last call to the totals, under the name of its data."""
        share_stats(model)
        st, model.stats = model.stats, Stats(model.config.n_layer)
        realised[data] = {ph: st.mean(ph) for ph in ("prefill", "decode")}
        total.add(st)

    model.stats = Stats(model.config.n_layer)
    spread, found = spread_states(model, samples, joint), []
    account("responses")
    for (_, states, owner), (_, teacher, _) in zip(spread, spread if dense is None else dense["states"]):
        kl, same = [], []
        for a, b in zip(teacher.split(512), states.split(512)):
            za, zb = (dense["model"] if dense else model).logits(a), model.logits(b)
            kl.append(kl_divergence(za, zb))
            same.append((za.argmax(-1) == zb.argmax(-1)).float().cpu())
        found.append((by_sample(torch.cat(kl), owner), torch.cat(same)))
    items, same = (torch.cat(part) for part in zip(*unshard(found)))
    row |= {"kl": float(items.mean()), "kl_stderr": standard_error(items.tolist()), "kl_items": [round(v, 5) for v in items.tolist()],
            "top1_agreement": float(same.mean())}
    row["ppl"]["responses"] = math.exp(spread_nll(model, spread))
    for text, wins in texts.items():
        row["ppl"][text] = math.exp(spread_nll(model, spread_states(model, wins, joint)))
        account(text)
    for task, things in tasks.items():
        row["tasks"][task] = evaluate_task(model, tokenizer, things, args.protocol, args.truncate)
        account(task)
        row["tasks"][task]["needs_context"] = any(it["needs_context"] for it in things)
        if args.floor:
            row["tasks"][task]["floor"] = floor(model, tokenizer, task, things, args.protocol)
            model.stats = Stats(model.config.n_layer)  # prompts of one token are not what the row is about
    st = total
    row |= {"sparsity_target": model.schedule.mean if model.schedule else 0.0, "sparsity_prefill": st.mean("prefill"),
            "sparsity_decode": st.mean("decode"), "sparsity_per_block": st.sparsity("prefill"), "realised": realised,
            "flops_saved_prefill": st.saved("prefill"), "flops_saved_total": st.saved("prefill", "decode")}
    base = (dense or {"row": row})["row"]["tasks"]
    for name, needed in (("retention", False), ("retention_context", True)):
        these = {k: v for k, v in base.items() if v["needs_context"] == needed}
        row[name], row[f"{name}_chance_corrected"], row[f"{name}_pooled"] = retention(row["tasks"], these)
    row["seconds"] = round(time.time() - t, 1)
    return row, spread


def table(rows, tasks, texts):
    """The rows as lines of text: tasks that need their context stand behind the others, with a mean of their own."""
    share = lambda v: "-" if v is None else f"{100 * v:.1f}"
    columns = [("skip prefill", lambda r: share(r["sparsity_prefill"])), ("skip decode", lambda r: share(r["sparsity_decode"])),
               ("FLOPs saved", lambda r: share(r["flops_saved_prefill"])), ("KL", lambda r: f"{r['kl']:.4f}"),
               ("+-", lambda r: f"{r['kl_stderr']:.4f}"), ("top-1", lambda r: share(r["top1_agreement"])),
               *((f"ppl {t}", lambda r, t=t: f"{r['ppl'][t]:.2f}") for t in ("responses", *texts))]
    for needed, what, key in ((False, "retention", "retention"), (True, "with context", "retention_context")):
        names = [t for t in tasks if rows[0]["tasks"][t]["needs_context"] == needed]
        for t in names:
            columns.append((t, lambda r, t=t: share(figure(t, r["tasks"][t]))))
            if rows[0]["tasks"][t].get("floor") is not None:
                columns.append(("floor", lambda r, t=t: share(r["tasks"][t]["floor"])))
            if "ppl" in rows[0]["tasks"][t]:  # a word to find: its perplexity says more
                columns.append((f"ppl {t}", lambda r, t=t: f"{r['tasks'][t]['ppl']:.2f}"))
        if names:
            columns += [(what, lambda r, k=key: share(r[k])), ("corrected", lambda r, k=key: share(r[f"{k}_chance_corrected"])),
                        ("pooled", lambda r, k=key: share(r[f"{k}_pooled"]))]
    lines = [["row", *(head for head, _ in columns)], *([r["name"], *(get(r) for _, get in columns)] for r in rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, width))) for line in lines)


def paired(a, b):
    """Mean and standard error of the per-item difference a - b."""
    d = [x - y for x, y in zip(a, b)]
    return sum(d) / len(d), standard_error(d)


def main():
    p = Parser(__doc__).common(dtype="float32").routing().peers()
    p.add_argument("--schedule", default="out/schedule_ft.json", help="schedule of stage 1 or 3")
    p.add_argument("--router", default="out/router.safetensors", help="router of stage 2")
    p.add_argument("--rows", default="uniform,static,ftp,ftp_decode", help=f"comma list of {','.join(ROWS)}")
    p.add_argument("--tasks", default="", help="comma list of task names (by datasets id) or name=file.jsonl")
    p.add_argument("--floor", action="store_true", help="score each choice task with its question removed, too")
    p.add_argument("--text", default="self", help='comma list of texts for perplexity: "self", .txt, .jsonl, or datasets id[:config[:split]]')
    p.add_argument("--context", type=int, default=256, help="routed tokens of a text window")
    p.add_argument("--scored", type=int, default=64, help="scored tokens of a text window")
    p.add_argument("--nwindows", type=int, default=100, help="text windows at most, 0: all")
    p.add_argument("--data", default="self", help="samples for KL, agreement and response perplexity (their held-out part)")
    p.add_argument("--nsamples", type=int, default=None, help="held-out samples, default all")
    p.add_argument("--max_response", type=int, default=64, help="response tokens used")
    p.add_argument("--limit", type=int, default=None, help="items a task")
    p.add_argument("--protocol", default="causal", choices=["causal", "joint"], help="see above")
    p.add_argument("--decode_sparsity", type=float, default=None, help="calibrate ftp_decode to this mean sparsity instead of the schedule's")
    p.add_argument("--truncate", action="store_true", help="cut the context of an item that exceeds the model's length at its left, instead of refusing it")
    p.add_argument("--resume", action="store_true", help="keep the rows that eval_state.json holds from the same settings, data and commit")
    args = p.parse_args()
    names = [n for n in args.rows.split(",") if n and n != "dense"]
    check(all(n in ROWS for n in names), f"--rows {args.rows}: unknown row; choose from {','.join(ROWS)}")
    check(args.limit is None or args.limit > 0, f"--limit {args.limit}: must be at least 1")
    check(min(args.context, args.scored) > 0 <= args.nwindows, "--context and --scored must be at least 1, --nwindows at least 0")
    tasks = dict(pairs := [load_task(t, args.limit) for t in args.tasks.split(",") if t])
    specs = {spec.split("/")[-1]: spec for spec in args.text.split(",") if spec}
    check(len(tasks) == len(pairs), f"--tasks {args.tasks}: two tasks of one name; rename one, as other=file.jsonl")
    check(len(specs) == len([t for t in args.text.split(",") if t]), f"--text {args.text}: two texts of one file name; rename one")
    schedule = Schedule.load(args.schedule) if any(ROWS[n][0] for n in names) else None
    router = Router.load(args.router) if any(ROWS[n][1] == "given" for n in names) else None
    peers = load_peers(args)
    check(not set(peers) & set(ROWS), f"--peer: {', '.join(set(peers) & set(ROWS))} is a row's name already; give another")
    model, config = start(args)
    forecast = load_forecaster(args.forecaster)
    given = lambda n: [schedule.id, router.id if ROWS[n][1] == "given" else None] if ROWS[n][0] else []
    made_by = lambda n: [*(peer_id(*peers[n]) if n in peers else given(n)), forecast and forecast.id] if n != "dense" else []
    for n in names:  # refuse artefacts of another model before the long work
        r = router if ROWS[n][1] == "given" else "static"
        model.use(schedule, r, **routing_of(args, isinstance(r, Router)))
    for _, s, r, routing in peers.values():
        model.use(s, r, **routing)
    tokenizer = load_tokenizer(args.model)
    samples = load_samples(args.data, model, tokenizer, "heldout", args.nsamples, max_response=args.max_response)
    for task, items in tasks.items():
        check_length(model, tokenizer, task, items, args.truncate)
    check(args.context + args.scored <= model.config.max_len, f"--context {args.context} and --scored {args.scored}: the model takes "
          f"{model.config.max_len} tokens; lower them")
    texts = {}
    for name, spec in specs.items():
        ids = tokenizer(load_text(spec), add_special_tokens=False)["input_ids"]
        texts[name] = windows(ids, args.context, args.scored, args.nwindows or None)
    rows, dense, out, done = [], None, f"{args.out_dir}/eval.json", {}
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "rows", "peer", "threads", "out_dir", "schedule", "router", "forecaster")} | {
        "commit": config["commit"], "fingerprint": model.fingerprint, "data_digest": digest([samples, texts, tasks])}
    state = Path(args.out_dir) / "eval_state.json"  # eval.json is only ever a whole one
    if args.resume and state.exists():
        old = load_progress(state, "ftp-eval-state-1")
        done = {r["name"]: r for r in old["rows"]} if old["settings"] == settings else {}
    for name in ["dense", *names, *peers]:
        if done.get(name, {}).get("artefacts") == made_by(name):
            rows.append(done[name])
            if name == "dense":  # the others are compared with its states
                dense = {"row": done[name], "states": spread_states(model.use(), samples, args.protocol == "joint"), "model": model}
            continue
        which, chosen, decode = ROWS.get(name, (None, None, "dense"))
        if name in peers:
            folder, s, r, routing = peers[name]
        else:
            folder, s = None, {"uniform": schedule and Schedule.uniform(model, schedule.mean), "given": schedule}.get(which)
            r = router if chosen == "given" else chosen
            routing = routing_of(args, isinstance(r, Router)) if s else {}
        routing |= {"seed": args.seed}
        runner = peer_model(folder, model).use(s, r, **routing)
        if decode == "threshold" and (args.decode_sparsity is not None or not model.thresholds):
            model.calibrate_decode(load_samples(args.data, model, tokenizer, "train", 64, max_response=args.max_response), args.decode_sparsity)
        elif decode != "dense":
            model.use(s, r, decode=decode, **routing)
        row, states = evaluate_row(runner, tokenizer, name, args, tasks, texts, samples, dense)
        dense = dense or {"row": row, "states": states, "model": model}
        rows.append(row | {"artefacts": made_by(name)})
        done[name] = rows[-1]
        save_progress(state, "ftp-eval-state-1", {"settings": settings, "rows": list(done.values())}, f"{len(done)} rows")
        print(f"{name}: {row['seconds']} s", flush=True)
    print(table(rows, tasks, texts))
    if args.floor and tasks:
        easy = {k: v for k, v in rows[0]["tasks"].items() if not v["needs_context"]}
        names = "retention_floor", "retention_floor_chance_corrected", "retention_floor_pooled"
        rows[0] |= zip(names, retention(easy, easy, lambda task, got: got["floor"]))
        kept = ["-" if rows[0][k] is None else f"{100 * rows[0][k]:.1f} %" for k in names]
        print(f"without any question the dense model keeps {kept[0]}; corrected for chance {kept[1]}, pooled {kept[2]}")
    by_name = {r["name"]: r for r in rows}
    for other in ("uniform", "static"):
        if "ftp" in by_name and other in by_name:
            d, e = paired(by_name[other]["kl_items"], by_name["ftp"]["kl_items"])
            by_name["ftp"][f"kl_gain_over_{other}"] = {"mean": d, "stderr": e, "n": len(samples)}
            print(f"KL of {other} minus KL of ftp: {d:+.4f} +- {e:.4f} (paired, standard error over {len(samples)} samples)")
    if rank() == 0:
        save_json(out, {"format": "ftp-eval-1", "config": config, "rows": rows})
    print(f"-> {out}")


if __name__ == "__main__":
    run(main)
