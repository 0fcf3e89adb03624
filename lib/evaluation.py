"""Quality of a pruned model beside the dense one: choice tasks, perplexity, KL and agreement.

evaluate_row() measures one model, evaluate_rows() the dense one and all that is compared with it,
and goes on where an interrupted run stopped. Every model with the face of FTPModel will do.
"""
import math
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib.data import encode, load_text, windows
from lib.files import check, digest, save_json
from lib.flops import PHASES, Meter
from lib.numbers import standard_error
from lib.processes import from_all_ranks, rank, shard, share_meter, unshard
from lib.scoring import (
    MOST_TOKENS,
    batches,
    by_sample,
    kl_divergence,
    response_states,
    spread_states,
)
from lib.stage import load_progress, progress, save_progress
from lib.tasks import encode_pair, keys_of, load_task

ANSWER = 32     # tokens generated where an answer is searched for
CHUNK = 512     # rows of which logits are held at a time: of 128 000 tokens, 250 MB in float32

# the score a task is reported by in the field; all others by acc
METRIC = dict.fromkeys(
    ("arc_challenge", "hellaswag", "openbookqa", "piqa"), "acc_norm")


# ------------------------------------------------------------------------------------------------
# log-probabilities of continuations

def pick(logits, targets):
    """Log-probability of each target token and whether it is the likeliest, (M,) on the CPU.

    logits (M, vocab), targets (M,) ids.
    """
    logp = logits.float().log_softmax(-1)
    targets = torch.as_tensor(targets, device=logits.device)
    of_target = logp.gather(1, targets[:, None])[:, 0]
    likeliest = logits.argmax(-1) == targets
    return of_target.cpu(), likeliest.cpu()


def score_pairs(model, pairs, protocol, max_tokens=MOST_TOKENS, meter=None):
    """(sum of log-probabilities, all greedy) of each continuation.

    pairs: [(context ids, continuation ids)], spread over the ranks. protocol causal: each distinct
    context is prefilled once, and its continuations run from that cache one after the other.
    joint: context and continuation are routed together.
    """
    score = score_joint if protocol == "joint" else score_causal
    return from_all_ranks(score(model, pairs, max_tokens, meter))


def score_joint(model, pairs, max_tokens, meter):
    """As score_pairs(), None at the places of other ranks."""
    out: list = [None] * len(pairs)
    sizes = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=sizes.__getitem__)    # of one length: one kernel
    groups = shard(list(batches([pairs[i] for i in order], max_tokens)))
    for first, group in progress(groups, desc="joint", unit="batch", leave=False):
        states, owner = response_states(model, group, max_tokens, joint=True, meter=meter)
        logp, greedy = pick(model.logits(states), responses(group))
        for j, i in enumerate(order[first:first + len(group)]):
            mine = owner.cpu() == j
            out[i] = float(logp[mine].sum()), bool(greedy[mine].all())
    return out


def score_causal(model, pairs, max_tokens, meter):
    """As score_pairs(), None at the places of other ranks."""
    out, pairs_of = [None] * len(pairs), {}      # the pairs of each distinct context
    for i, (context, _) in enumerate(pairs):
        pairs_of.setdefault(tuple(context), []).append(i)
    contexts = [(list(c), ()) for c in sorted(pairs_of, key=len)]
    groups = shard(list(batches(contexts, max_tokens)))
    for _, group in progress(groups, desc="causal", unit="batch", leave=False):
        prompts = [c for c, _ in group]
        waiting = [pairs_of[tuple(c)] for c in prompts]                      # of each cache row
        cache = model.new_cache(len(prompts))
        first = model.prefill(prompts, cache, meter)
        mark = cache.mark()
        # the t-th continuations of all contexts run together, then the cache forgets them
        for t in range(max(map(len, waiting))):
            rows = [b for b, mine in enumerate(waiting) if t < len(mine)]
            here = [waiting[b][t] for b in rows]
            texts = [pairs[i][1] for i in here]
            scores = score_continuations(model, cache, rows, first[rows], texts, meter)
            cache.rewind(mark)
            for i, score in zip(here, scores):
                out[i] = score
    return out


def score_continuations(model, cache, rows, first, texts, meter):
    """(sum of log-probabilities, all greedy) of one continuation a cache row.

    rows: cache rows; first (len(rows), vocab): logits of the contexts' last tokens; texts: lists
    of token ids.
    """
    logp, greedy = pick(first, [ids[0] for ids in texts])
    logp, greedy = [[v] for v in logp], [[v] for v in greedy]
    longer = [j for j, ids in enumerate(texts) if len(ids) > 1]
    if longer:
        new = [texts[j][:-1] for j in longer]                # nothing follows the last token
        logits = model.extend(new, cache, [rows[j] for j in longer], meter)
        targets = [t for j in longer for t in texts[j][1:]]
        later, hits = pick(logits, targets)
        sizes = [len(ids) for ids in new]
        for j, more, hit in zip(longer, later.split(sizes), hits.split(sizes)):
            logp[j].extend(more)
            greedy[j].extend(hit)
    sums = [float(sum(values)) for values in logp]
    return list(zip(sums, [bool(all(hits)) for hits in greedy]))


def responses(samples):
    """The response tokens of samples [(prompt ids, response ids)], one after the other."""
    return [t for _, response in samples for t in response]


# ------------------------------------------------------------------------------------------------
# tasks

def bare(text):
    """Lower case, without punctuation and articles: the form in which answers are compared."""
    words = "".join(c for c in text.lower() if c not in string.punctuation).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def generated_hits(model, tokenizer, items, truncate=False, max_new_tokens=ANSWER,
                   max_tokens=8192, meter=None):
    """1.0 for each item whose greedy answer is one of its answers, see is_answer(), else 0.0.

    Always a prompt, then decoding. truncate: cut prompts that leave no room at their left.
    """
    room = model.config.max_len - max_new_tokens + 1         # the last new token is not run
    prompts = [encode(tokenizer, item["contexts"][0]) for item in items]
    if truncate:
        prompts = [ids[-room:] for ids in prompts]
    hits: list = [None] * len(items)
    sized = [(ids, range(max_new_tokens)) for ids in prompts]
    groups = shard(list(batches(sized, max_tokens)))
    for first, group in progress(groups, desc="answers", unit="batch", leave=False):
        texts = model.generate([ids for ids, _ in group], max_new_tokens, meter=meter)
        for i, new in enumerate(texts, first):
            text = tokenizer.decode(new, skip_special_tokens=True)
            hits[i] = float(is_answer(text, items[i]))
    return from_all_ranks(hits)


def is_answer(text, item):
    """Whether the first line that was written holds an answer, or is JSON with an answer's keys."""
    line = text.strip().split("\n")[0]      # what follows is often a new question
    if item.get("json"):
        return keys_of(line) in [keys_of(a) for a in item["continuations"]]
    return any(bare(a) and bare(a) in bare(line) for a in item["continuations"])


def check_length(model, tokenizer, task, items, truncate):
    """FTPError unless every item fits the model, or with `truncate` its continuations do."""
    most = model.config.max_len
    for i, item in enumerate(items, 1):
        for context, continuation in zip(item["contexts"], item["continuations"]):
            if item.get("generate"):
                continuation = "x" * (ANSWER - 1)            # room for the answer
            if len((context + continuation).encode()) < most - 2:
                continue                                     # a token is at least a byte: it fits
            if item.get("generate"):
                before, after = encode(tokenizer, context), continuation
            else:
                before, after = encode_pair(tokenizer, context, continuation)
            total = len(before) + len(after)
            needed = len(after) + 1 if truncate else total       # one token to predict from stays
            mend = (", its choice alone is too long" if truncate else
                    ", or give --truncate to cut contexts at their left")
            check(needed <= most, f"--tasks {task}: item {i} has {total} tokens, the model takes "
                                  f"{most}; shorten it{mend}")


def evaluate_task(model, tokenizer, items, protocol, truncate=False, meter=None):
    """Scores of one task's items, a dict with acc, acc_norm (None where there are no choices),
    stderr, n, chance, each item's hits, and ppl where items have no answer to choose."""
    if items[0].get("generate"):
        hits = generated_hits(model, tokenizer, items, truncate, meter=meter)
        return summary(hits, [], [0.0] * len(items))
    most = model.config.max_len if truncate else None
    pairs = [encode_pair(tokenizer, context, continuation, most) for item in items
             for context, continuation in zip(item["contexts"], item["continuations"])]
    scores = iter(score_pairs(model, pairs, protocol, meter=meter))
    hits, normed, chance, found = [], [], [], []
    for item in items:
        mine = [next(scores) for _ in item["contexts"]]
        if item["answer"] is None:               # a word to find: is it the likeliest?
            logp, greedy = mine[0]
            hits.append(float(greedy))
            found.append(logp)
            chance.append(0.0)
        else:
            plain, by_length = chosen([logp for logp, _ in mine], item["continuations"])
            hits.append(float(plain == item["answer"]))
            normed.append(float(by_length == item["answer"]))
            chance.append(1 / len(item["contexts"]))
    got = summary(hits, normed, chance)
    return got | ({"ppl": math.exp(-mean(found))} if found else {})


def chosen(logp, continuations):
    """Which option has the largest log-probability, and which the largest a character."""
    sizes = [max(len(text) - text.startswith(" "), 1) for text in continuations]
    by_length = [value / size for value, size in zip(logp, sizes)]
    return logp.index(max(logp)), by_length.index(max(by_length))


def summary(hits, normed, chance):
    """The dict of evaluate_task() from 0/1 values an item, plain and normalised by length."""
    return {"acc": mean(hits), "acc_norm": mean(normed), "stderr": standard_error(hits),
            "n": len(hits), "chance": mean(chance), "items": [int(v) for v in hits],
            "items_norm": [int(v) for v in normed]}


def mean(values):
    """Mean of a list, None of an empty one."""
    return sum(values) / len(values) if values else None


def figure_name(task, got):
    """Which of a task's scores it is reported by."""
    return "acc" if got["acc_norm"] is None else METRIC.get(task, "acc")


def figure(task, got):
    """The score that a task is reported by."""
    return got[figure_name(task, got)]


def floor(model, tokenizer, task, items, protocol):
    """The task's score with the question removed; None where there is nothing to choose by.

    Options that differ in the context alone tie: chance.
    """
    if items[0]["answer"] is None:
        return None
    if all(len(set(item["continuations"])) == 1 for item in items):
        return mean([1 / len(item["contexts"]) for item in items])
    # the start token alone stands where the context was
    blank = [item | {"contexts": [""] * len(item["contexts"])} for item in items]
    return figure(task, evaluate_task(model, tokenizer, blank, protocol))


def retention(mine, dense, key=figure):
    """What a model keeps of the dense one's scores {task: scores}, three figures.

    The mean over tasks of mine / dense; the same with chance taken off both; and the latter
    pooled, the sum over tasks of mine above chance by that of dense, which a task whose dense
    score is hardly above chance can't rule. None without a task above 0, or above chance.
    """
    plain, corrected, above = [], [], []
    for task, base in dense.items():
        a, b, chance = key(task, mine[task]), figure(task, base), base["chance"]
        if a is None:
            continue
        if b > 0:
            plain.append(a / b)
        if b > chance:
            corrected.append((a - chance) / (b - chance))
        above.append((a - chance, b - chance))
    kept = sum(a for a, _ in above)
    whole = sum(b for _, b in above)
    pooled = kept / whole if whole > 0 else None
    return [mean(plain), mean(corrected), pooled]


# ------------------------------------------------------------------------------------------------
# text, and the distance from the dense model

def nll(model, states, samples):
    """Mean negative log-likelihood of the responses, nats a token, from their states (R, d)."""
    targets, logp = torch.tensor(responses(samples)), []
    for x, ids in zip(states.split(CHUNK), targets.split(CHUNK)):
        logp.append(pick(model.logits(x), ids)[0])
    return -float(torch.cat(logp).mean())


def perplexity(model, spread):
    """exp of the mean loss of all response tokens of what spread_states() left on each rank."""
    mine = [(nll(model, states, group), len(states)) for group, states, _ in spread]
    parts = unshard(mine)                         # of all ranks, in the order of the samples
    tokens = sum(n for _, n in parts)
    return math.exp(sum(loss * n for loss, n in parts) / tokens)


def divergence(model, spread, teacher, teacher_spread):
    """KL(teacher || model) of each sample, nats a token, and agreement of the likeliest tokens.

    spread, teacher_spread: spread_states() of the two models. Returns (samples,), (tokens,).
    """
    found = []
    for (_, states, owner), (_, wanted, _) in zip(spread, teacher_spread):
        kl, same = [], []
        for a, b in zip(wanted.split(CHUNK), states.split(CHUNK)):
            theirs, mine = teacher.logits(a), model.logits(b)
            kl.append(kl_divergence(theirs, mine))
            agree = theirs.argmax(-1) == mine.argmax(-1)
            same.append(agree.float().cpu())
        found.append((by_sample(torch.cat(kl), owner), torch.cat(same)))
    kl, same = zip(*unshard(found))
    return torch.cat(kl), torch.cat(same)


def paired(a, b):
    """Mean and standard error of the difference a - b, item by item."""
    d = [x - y for x, y in zip(a, b)]
    return mean(d), standard_error(d)


# ------------------------------------------------------------------------------------------------
# what the rows are measured on

class Data(NamedTuple):
    """tasks {name: items}, texts {name: windows}, samples [(prompt ids, response ids)]."""
    tasks: dict
    texts: dict
    samples: list


def names_of(text):
    """The names of a comma list, without blanks around them; "" gives none."""
    return [name.strip() for name in text.split(",") if name.strip()]


def load_tasks(spec, limit):
    """{name: items} of the comma list --tasks. FTPError where two have one name."""
    pairs = [load_task(task, limit) for task in names_of(spec)]
    tasks = dict(pairs)
    check(len(tasks) == len(pairs),
          f"--tasks {spec}: two tasks of one name; rename one, as other=file.jsonl")
    return tasks


def text_names(spec):
    """{file name: text} of the comma list --text. FTPError where two have one name."""
    names = {text.split("/")[-1]: text for text in names_of(spec)}
    check(len(names) == len(names_of(spec)),
          f"--text {spec}: two texts of one file name; rename one")
    return names


def text_windows(names, tokenizer, context, scored, n):
    """{name: windows [(ids before, ids to score)]}, of each text the first n, all for n = 0."""
    texts = {}
    for name, spec in names.items():
        ids = tokenizer(load_text(spec), add_special_tokens=False)["input_ids"]
        texts[name] = windows(ids, context, scored, n or None)
    return texts


# ------------------------------------------------------------------------------------------------
# rows

@dataclass
class Row:
    """A model to measure. artefacts: ids of what it is made from, which a resumed run compares.

    ready: makes the model, routed, when its turn comes; base: the Config that its saved FLOPs are
    counted against, None for its own.
    """
    name: str
    artefacts: list
    ready: Callable
    base: Any = None


class Dense(NamedTuple):
    """What the dense row leaves for the others to be compared with."""
    model: Any
    row: dict
    spread: list


def evaluate_row(model, tokenizer, name, settings, tasks, texts, samples, dense=None, base=None):
    """All measurements of one row, a dict, and its spread_states() on the samples.

    settings: anything with protocol, truncate and floor. tasks, texts, samples: see Data.
    dense: Dense, None where this is the dense row. base: see Row.
    """
    began, joint = time.time(), settings.protocol == "joint"
    row = {"name": name, "protocol": settings.protocol, "tasks": {}, "ppl": {}}
    meters = {}                                   # what each of the data made the model do

    def counted(data):
        meters[data] = Meter(model, base)
        return meters[data]

    # KL, agreement and perplexity come from the same states: the samples run once
    spread = spread_states(model, samples, shard, joint, counted(("samples", "responses")))
    teacher = Dense(model, row, spread) if dense is None else dense
    kl, same = divergence(model, spread, teacher.model, teacher.spread)
    row["kl"] = float(kl.mean())
    row["kl_stderr"] = standard_error(kl.tolist())
    # item by item, so that rows can be compared pair by pair
    row["kl_items"] = [round(v, 5) for v in kl.tolist()]
    row["top1_agreement"] = float(same.mean())
    row["ppl"]["responses"] = perplexity(model, spread)
    for text, pieces in texts.items():
        meter = counted(("text", text))
        row["ppl"][text] = perplexity(model, spread_states(model, pieces, shard, joint, meter))
    for task, items in tasks.items():
        meter = counted(("task", task))
        got = evaluate_task(model, tokenizer, items, settings.protocol, settings.truncate, meter)
        got["needs_context"] = any(item["needs_context"] for item in items)
        if settings.floor:                        # not counted: prompts of one token, see Meter
            got["floor"] = floor(model, tokenizer, task, items, settings.protocol)
        row["tasks"][task] = got
    row |= realised(model, base, meters) | retentions(row, teacher.row)
    row["seconds"] = round(time.time() - began, 1)
    return row, spread


def realised(model, base, meters):
    """The part of a row that tells what was skipped and saved. meters: {(kind, data): Meter}."""
    whole, shares = Meter(model, base), {}
    for (_, data), meter in meters.items():
        meter = share_meter(meter)
        shares[data] = {phase: meter.mean(phase) for phase in PHASES}
        whole.add(meter)
    schedule = model.routing.schedule
    return {"sparsity_target": schedule.mean if schedule else 0.0,
            "sparsity_prefill": whole.mean("prefill"),
            "sparsity_decode": whole.mean("decode"),
            "sparsity_per_block": whole.sparsity("prefill"),
            "realised": shares,
            "flops_saved_prefill": whole.saved("prefill"),
            "flops_saved_total": whole.saved(*PHASES)}


def retentions(row, dense_row):
    """The part of a row that tells what is kept of the dense scores, see retention().

    Tasks that mean nothing without their context have figures of their own.
    """
    out = {}
    for name, needs_context in (("retention", False), ("retention_context", True)):
        these = {task: got for task, got in dense_row["tasks"].items()
                 if got["needs_context"] == needs_context}
        plain, corrected, pooled = retention(row["tasks"], these)
        out[name] = plain
        out[f"{name}_chance_corrected"] = corrected
        out[f"{name}_pooled"] = pooled
    return out


# settings that a row does not depend on, or that its artefacts' ids stand for
FREE = ("resume", "rows", "peer", "threads", "out_dir", "schedule", "router", "forecaster")


def evaluate_rows(todo, model, tokenizer, args, data, commit):
    """The dense row of `model`, then those of `todo`, a list of Row -> list of dicts.

    args: flags of the stage; each row is saved in args.out_dir when it is there, and with
    args.resume one that was made from the same artefacts, settings, data and commit is kept.
    """
    path = Path(args.out_dir) / "eval_state.json"            # eval.json is only ever a whole one
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"commit": commit, "fingerprint": model.fingerprint,
                 "data_digest": digest([data.samples, data.texts, data.tasks])}
    done = saved_rows(path, settings) if args.resume else {}
    rows, dense = [], None
    for item in [Row("dense", [], model.use), *todo]:
        row, spread = done.get(item.name), None
        if row is None or row.get("artefacts") != item.artefacts:
            runner = item.ready()
            row, spread = evaluate_row(runner, tokenizer, item.name, args, data.tasks, data.texts,
                                       data.samples, dense, item.base)
            row["artefacts"] = item.artefacts
            done[item.name] = row
            save_progress(path, "ftp-eval-state-1",
                          {"settings": settings, "rows": list(done.values())},
                          f"{len(done)} rows")
            print(f"{item.name}: {row['seconds']} s", flush=True)
        if dense is None:                        # the others are compared with its states
            if spread is None:
                joint = args.protocol == "joint"
                spread = spread_states(model.use(), data.samples, shard, joint)
            dense = Dense(model, row, spread)
        rows.append(row)
    return rows


def saved_rows(path, settings):
    """{name: row} of an interrupted run with the same settings, if there was one."""
    if not path.exists():
        return {}
    old = load_progress(path, "ftp-eval-state-1")
    differ = [k for k in settings if old["settings"].get(k) != settings[k]]
    if differ:
        print(f"--resume: {path} was made with another {', '.join(differ)}; all rows are measured")
        return {}
    return {row["name"]: row for row in old["rows"]}


def save_rows(path, config, rows):
    """Write eval.json, on rank 0."""
    if rank() == 0:
        save_json(path, {"format": "ftp-eval-1", "config": config, "rows": rows})
    print(f"-> {path}")


# ------------------------------------------------------------------------------------------------
# what is printed

# columns: what stands above, where it stands in a row, factor, digits
COLUMNS = [
    ("skip prefill", ("sparsity_prefill",), 100, 1),
    ("skip decode", ("sparsity_decode",), 100, 1),
    ("FLOPs saved", ("flops_saved_prefill",), 100, 1),
    ("KL", ("kl",), 1, 4),
    ("+-", ("kl_stderr",), 1, 4),
    ("top-1", ("top1_agreement",), 100, 1),
]
MEANS = [("retention", False, "retention"), ("with context", True, "retention_context")]


def table(rows, tasks, texts):
    """The rows as lines of text.

    Tasks that need their context stand behind the others, with a mean of their own.
    """
    columns: list = list(COLUMNS)
    for text in ("responses", *texts):
        columns.append((f"ppl {text}", ("ppl", text), 1, 2))
    first = rows[0]["tasks"]                      # dense
    for head, needs_context, key in MEANS:
        names = [task for task in tasks if first[task]["needs_context"] == needs_context]
        for task in names:
            columns += task_columns(task, first[task])
        if names:
            columns += [
                (head, (key,), 100, 1),
                ("corrected", (f"{key}_chance_corrected",), 100, 1),
                ("pooled", (f"{key}_pooled",), 100, 1)]
    lines = [["row", *(head for head, *_ in columns)]]
    for row in rows:
        lines.append([row["name"], *(cell(row, *column) for _, *column in columns)])
    return aligned(lines)


def task_columns(task, got):
    """The columns of one task, by what its dense row holds."""
    where = ("tasks", task)
    columns = [(task, (*where, figure_name(task, got)), 100, 1)]
    if got.get("floor") is not None:
        columns.append(("floor", (*where, "floor"), 100, 1))
    if "ppl" in got:                              # a word to find: its perplexity says more
        columns.append((f"ppl {task}", (*where, "ppl"), 1, 2))
    return columns


def cell(row, where, factor, digits):
    """A row's figure as text, a dash where there is none."""
    value = reduce(lambda part, key: part[key], where, row)
    return "-" if value is None else f"{factor * value:.{digits}f}"


def share(value):
    """A share in per cent, a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def aligned(lines):
    """Lists of words as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    out = []
    for first, *others in lines:
        padded = [first.ljust(widths[0])]
        padded += [word.rjust(width) for word, width in zip(others, widths[1:])]
        out.append("  ".join(padded))
    return "\n".join(out)


def add_floor(rows):
    """Tell, and note in the dense row, what a model keeps that never saw a question."""
    tasks = {task: got for task, got in rows[0]["tasks"].items() if not got["needs_context"]}
    kept = retention(tasks, tasks, lambda task, got: got["floor"])
    names = ("retention_floor", "retention_floor_chance_corrected", "retention_floor_pooled")
    rows[0].update(zip(names, kept))
    plain, corrected, pooled = [share(value) for value in kept]
    print(f"without any question the dense model keeps {plain}; "
          f"corrected for chance {corrected}, pooled {pooled}")


def add_gain(rows, name, others):
    """Tell, and note in row `name`, how much nearer to dense it is than each of the others."""
    by_name = {row["name"]: row for row in rows}
    for other in others:
        if name not in by_name or other not in by_name:
            continue
        mine, theirs = by_name[name]["kl_items"], by_name[other]["kl_items"]
        gain, error = paired(theirs, mine)
        n = len(mine)
        by_name[name][f"kl_gain_over_{other}"] = {"mean": gain, "stderr": error, "n": n}
        print(f"KL of {other} minus KL of {name}: {gain:+.4f} +- {error:.4f} "
              f"(paired, standard error over {n} samples)")
