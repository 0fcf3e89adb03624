"""Text, instructions and choice tasks, from local files or `datasets` ids, as lists of token ids.

    load_samples("self", model, tokenizer)          # 260 prompts of this repository, answered by the model itself
    load_samples("self,text", ...)                  # and as many texts that it writes from nothing
    load_samples("tatsu-lab/alpaca", ...)           # the paper's set; any Alpaca-form .json/.jsonl file works too
    load_task("arc_easy"), load_task("mine=items.jsonl"), load_text("book.txt")
"""
import json
import math
import os
import random
import re
import statistics
from pathlib import Path

from common import bar, check, digest, gather, kept, rank
from files import HOME, FTPError, find_model, misfit, save_files

PROMPTS = Path(__file__).parent / "prompts.jsonl"
SPLITS = {"train": (0, 1), "watch": (2,), "heldout": (3,)}  # of every four items: fit, early stopping, evaluation


def load_tokenizer(path):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(find_model(path))
    except FTPError:
        raise
    except Exception as e:  # transformers and tokenizers raise many kinds, plain Exception among them
        raise FTPError(f"--model {path}: no usable tokenizer ({(str(e).splitlines() or [type(e).__name__])[0]}); give a folder with "
                       "tokenizer.json") from None


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FTPError(f"{flag}: {path} can't be read as UTF-8 text ({e}); give an existing .jsonl, .json or .txt file") from None


def read_rows(path, flag="--data"):
    """Rows of a .json list or .jsonl file. FTPError with the line number of a bad one, and where two items have one "id"."""
    path, rows, places, n = Path(path), [], [], 1
    text = read_text(path, flag)
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
            places = [f"item {i + 1}" for i in range(len(rows))] if isinstance(rows, list) else []
        else:
            for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand within a JSON text
                if line.strip():
                    rows.append(json.loads(line))
                    places.append(f"line {n}")
        if "\\ud" in text.lower():
            json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FTPError(f"{flag}: {path} has half a surrogate pair (\\ud8.. alone), which is no character; mend or remove it") from None
    except (ValueError, RecursionError) as e:
        raise FTPError(f"{flag}: {path} line {n if path.suffix != '.json' else getattr(e, 'lineno', 1)} is not JSON ({e}); mend or remove it") from None
    check(isinstance(rows, list), f"{flag}: {path} must hold a list of JSON objects")
    check(rows, f"{flag}: {path} is empty; give a file with items")
    seen = {}
    for r, place in zip(rows, places):
        check(isinstance(r, dict), f"{flag}: {path} {place} is no JSON object; mend or remove it")
        if r.get("id") is not None:
            name = json.dumps(r["id"])
            check(name not in seen, f"{flag}: {path} {place} has the id {name[:60]} of {seen.get(name)}; remove one, or its id")
            seen[name] = place
    return rows


def from_hub(name, config, split, flag):
    """A split of a `datasets` id (or local data set folder)."""
    from datasets import load_dataset
    try:
        return load_dataset(name, config, split=split)
    except Exception as e:  # many kinds: no network, no such id, no such split
        raise FTPError(f"{flag} {name}: not loaded ({(str(e).splitlines() or [type(e).__name__])[0]}); check the id, or give a local file") from None


# ------------------------------------------------------------------------------------------------
# instructions

def render(tokenizer, instruction, context=""):
    """Token ids of a prompt: the model's chat template, or Alpaca's headings for a base model."""
    text = f"{instruction}\n\n{context}" if context else instruction
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"### Instruction:\n{text}\n\n### Response:\n")["input_ids"]


def written(model, name, prompts, row, max_new_tokens, temperature, seed=0, batch_size=32):
    """What `model` writes after each prompt (token ids), as the rows that row(i, new token ids) makes: cached by model, weights, name and
    seed, made in resumable batches."""
    who = f"{Path(model.name).resolve().name}-{digest([model.fingerprint['config'], model.first_values()])}"  # a tuned model writes anew
    path = HOME / "self" / f"{who}-{name}seed{seed}-{max_new_tokens}.jsonl"
    if rank() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        done = part.read_text().splitlines() if part.exists() else []
        done = done[:len(done) // batch_size * batch_size]
        if done:
            kept[part] = f"{len(done)} of {len(prompts)} texts"
        model.use()
        for i in bar(range(len(done), len(prompts), batch_size), desc="the dense model writes", unit="batch"):
            new = model.generate(prompts[i:i + batch_size], max_new_tokens, temperature=temperature, top_p=0.95, seed=seed + i)
            done += [json.dumps(row(i + j, n)) for j, n in enumerate(new)]
            save_files({part: lambda p: p.write_text("\n".join(done) + "\n")})
            kept[part] = f"{len(done)} of {len(prompts)} texts"
        part.rename(path)
        kept.pop(part, None)
        kept[path] = f"all {len(done)} texts"
    gather(None)  # the other ranks wait for the file
    return read_rows(path)


def self_responses(model, tokenizer, seed=0, max_new_tokens=64, batch_size=32):
    """The repository's prompts with responses that `model` writes once."""
    rows = read_rows(PROMPTS)
    prompts = [render(tokenizer, r["instruction"], r["input"]) for r in rows]
    return written(model, "", prompts, lambda i, new: {**rows[i], "response_ids": new}, max_new_tokens, 0.7, seed, batch_size)


def self_text(model, tokenizer, seed=0, max_new_tokens=320, n=256):
    """Plain text of all kinds: what `model` writes from nothing but a text's beginning (its start token, the end-of-text token where it has one)."""
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if first is None or first == tokenizer.unk_token_id:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    check(first is not None, "--data text: the tokenizer has no start token; give a file")
    return written(model, "text-", [[first]] * n, lambda i, new: {"text": tokenizer.decode(new, skip_special_tokens=True)}, max_new_tokens, 0.8, seed)


def load_samples(data, model, tokenizer, split="train", nsamples=None, max_prompt=512, max_response=64, min_response=8, seed=0):
    """[(prompt ids, response ids)] of one of the three disjoint SPLITS, shuffled by `seed`.

    data: "self", "text", an Alpaca-form .json/.jsonl file, a .txt, or a `datasets` id; or several with commas between, of which each gives its
    share of nsamples. Prompts beyond max_prompt tokens are left out, never cut; responses are cut at max_response. Plain text (items
    with "text" alone) gives windows of max_prompt + max_response tokens.
    """
    out, sources = [], data.split(",")
    for k, source in enumerate(sources):
        share = None if nsamples is None else nsamples * (k + 1) // len(sources) - nsamples * k // len(sources)
        out += samples_of(source, model, tokenizer, split, max_prompt, max_response, min_response, random.Random(seed))[:share]
    random.Random(seed).shuffle(out)
    return out


def samples_of(data, model, tokenizer, split, max_prompt, max_response, min_response, rng):
    """The samples of one source, in the order that rng gives them."""
    if data in ("self", "text"):
        rows = (self_responses if data == "self" else self_text)(model, tokenizer)
    elif Path(data).suffix == ".txt":
        text = load_text(data, "--data")
        size = min(8000, len(text) // 8 + 1)  # pieces that go to one split together; even a short text has some for each
        rows = [{"text": text[i:i + size]} for i in range(0, len(text), size)]
    else:
        rows = read_rows(data) if os.path.exists(data) else list(from_hub(data, None, "train", "--data"))
    out, too_long = [], 0
    for i, r in enumerate(rows):
        if i % 4 not in SPLITS[split]:
            continue
        wrong = misfit(r, {k: (str, None) for k in ("instruction", "input", "output", "text")} | {"response_ids": ([int], None)}, f"item {i + 1}")
        check(not wrong, f"--data: in {data} {wrong}; mend or remove it")
        if r.get("instruction") is None and r.get("text") is not None:  # plain text: its beginning is the prompt, what follows the response
            ids = tokenizer(r["text"], add_special_tokens=False)["input_ids"]
            context = min(max_prompt, len(ids) - max_response)
            out += windows(ids, context, max_response) if context >= max_response else []
            continue
        ids, output = r.get("response_ids"), r.get("output")
        check(r.get("instruction") is not None and (ids is not None or output is not None), f"--data: item {i + 1} of {data} lacks instruction or output")
        prompt = render(tokenizer, r["instruction"], r.get("input") or "")
        response = tokenizer(output, add_special_tokens=False)["input_ids"] if ids is None else ids
        check(max(response, default=0) < model.config.vocab_size, f"--data: item {i + 1} of {data} has response_ids beyond the vocabulary; make it again")
        if len(prompt) > max_prompt:
            too_long += 1
        elif len(response) >= min_response:
            out.append((prompt, response[:max_response]))
    longest = max((len(a) + len(b) for a, b in out), default=0)
    check(longest <= model.config.max_len, f"--data {data}: a prompt with its response has {longest} tokens, the model takes {model.config.max_len}; "
          f"lower --max_prompt and --max_response, now {max_prompt} and {max_response}, or shorten the items")
    if too_long:
        print(f"--data {data}: {too_long} {split} prompts of more than {max_prompt} tokens are left out (--max_prompt, where the stage has it)")
    check(out, f"--data: no usable item in {data}; items need an instruction of at most {max_prompt} tokens and an output of at least "
               f"{min_response}, or a text")
    rng.shuffle(out)
    return out


# ------------------------------------------------------------------------------------------------
# text

def load_text(spec, flag="--text"):
    """A text: "self" (the held-out prompts' passages), a .txt file (WikiText lines joined the usual way), the "text" fields of
    a .jsonl, or a `datasets` id as owner/name[:config[:split]]."""
    path = Path(spec)
    if spec == "self":
        return "\n\n".join(r["input"] for i, r in enumerate(read_rows(PROMPTS)) if i % 4 in SPLITS["heldout"] and r["input"])
    if os.path.exists(path):
        if path.suffix == ".txt":
            lines = read_text(path, flag).split("\n")
            check(any(s.strip() for s in lines), f"{flag}: {path} is empty; give a file with text")
            # WikiText's raw form keeps blank lines as " ": the field joins its rows by an empty line
            if "wiki" in path.name:
                return "\n\n".join("" if not s.strip() else s + "\n" for s in lines[:-1])
            return "\n".join(lines)
        rows = read_rows(path, flag)
    else:
        name, config, split = (spec.split(":") + [None, None])[:3]
        rows = from_hub(name, config, split or "test", flag)
    for i, r in enumerate(rows):
        check(isinstance(r.get("text"), str), f"{flag}: item {i + 1} of {spec} has no \"text\"")
    return "\n\n".join(r["text"] for r in rows)


def windows(ids, context, scored, n=None):
    """Non-overlapping windows [(prompt ids, ids to score)] of context + scored tokens."""
    size = context + scored
    check(len(ids) >= size, f"--text: {len(ids)} tokens are fewer than one window of {size}; give more text or smaller windows")
    return [(ids[i:i + context], ids[i + context:i + size]) for i in range(0, len(ids) - size + 1, size)][:n]


# ------------------------------------------------------------------------------------------------
# choice tasks: items {"contexts": [str], "continuations": [str], "answer": int}, one pair an option

def arc(r):
    return {"context": f"Question: {r['question']}\nAnswer:", "choices": [" " + t for t in r["choices"]["text"]],
            "answer": r["choices"]["label"].index(r["answerKey"])}


def hellaswag(r):
    clean = lambda t: re.sub(r"\[.*?\]", "", t.strip().replace(" [title]", ". ")).replace("  ", " ")
    return {"context": clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
            "choices": [" " + clean(e) for e in r["endings"]], "answer": int(r["label"])}


def mmlu(r):
    head = f"The following are multiple choice questions (with answers) about {r['subject'].replace('_', ' ')}.\n\n"
    body = "".join(f"{k}. {t}\n" for k, t in zip("ABCD", r["choices"]))
    return {"context": f"{head}{r['question'].strip()}\n{body}Answer:", "choices": [" A", " B", " C", " D"], "answer": int(r["answer"])}


def winogrande(r):
    before, after = r["sentence"].split("_")
    return {"contexts": [before + r["option1"], before + r["option2"]], "continuation": " " + after.strip(),
            "answer": int(r["answer"]) - 1}


def piqa(r):
    return {"context": f"Question: {r['goal']}\nAnswer:", "choices": [" " + r["sol1"], " " + r["sol2"]], "answer": int(r["label"])}


def openbookqa(r):
    return {"context": r["question_stem"], "choices": [" " + t for t in r["choices"]["text"]],
            "answer": r["choices"]["label"].index(r["answerKey"].strip())}


def lambada(r):
    context, word = r["text"].rsplit(" ", 1)
    return {"context": context, "word": " " + word}


# task: (datasets id, config, split, row -> item in the local schema)
HUB = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag),
    "mmlu": ("cais/mmlu", "all", "test", mmlu),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "piqa": ("ybisk/piqa", "plain_text", "validation", piqa),
    "openbook_qa": ("allenai/openbookqa", "main", "test", openbookqa),
    "lambada": ("EleutherAI/lambada_openai", "en", "test", lambada),
}


# tasks that mean nothing without their context, known by name; LAMBADA-like and long-prompt items, and those that say "needs_context", join them
NEEDS_CONTEXT = {"lambada", "boolq", "squad", "multi_document_qa", "yes_no_qa"}


def load_task(spec, limit=None):
    """name or name=file -> (name, items). Items hold "contexts" and "continuations" (one pair an option, texts whose plain
    concatenation is scored), "answer", and "needs_context"; LAMBADA-like items hold one pair and no answer.

    Forms in a file: {"context", "choices", "answer"}, {"contexts", "continuation", "answer"}, {"context", "word"}, and {"prompt", "answers"}:
    where all answers are yes or no a choice of these two, else questions whose generated answer is searched for one of "answers" (these
    items hold one context, and "generate"). Of a file whose prompts have a "kind", the items of the kind that the task is named by are taken.
    """
    name, _, path = spec.partition("=")
    if path:
        rows = read_rows(path, "--tasks")
    else:
        check(name in HUB, f"--tasks {name}: unknown task; give name=file.jsonl, or one of {', '.join(HUB)}")
        hub, config, split, convert = HUB[name]
        rows = []
        for i, r in enumerate(from_hub(hub, config, split, "--tasks")):
            try:
                rows.append(convert(r))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise FTPError(f"--tasks {name}: item {i + 1} of {hub} has not the expected form ({type(e).__name__}: {e}); give name=file.jsonl") from None
    kinds = {str(r["kind"]) for r in rows if "prompt" in r and "kind" in r}
    if kinds:
        check(name in kinds, f"--tasks {name}: {path} holds prompts of several kinds; name the task after one of them: {', '.join(sorted(kinds))}")
        rows = [r for r in rows if str(r.get("kind")) == name]
    for i, r in enumerate(rows):
        wrong = misfit(r, {"needs_context": (bool, None)} | ({"prompt": str, "answers": [str]} if "prompt" in r else {}), f"item {i + 1}")
        check(not wrong, f"--tasks {name}: {wrong}; see load_task in data.py for the form")
    yes_no = all({a.lower() for a in r["answers"]} in ({"yes"}, {"no"}) for r in rows if "prompt" in r)
    items, item = [], dict()  # type: list, dict
    for i, r in enumerate(rows[:limit]):
        try:
            if "prompt" in r and yes_no:
                item = {"contexts": [r["prompt"]] * 2, "continuations": [" yes", " no"], "answer": int(r["answers"][0].lower() == "no")}
            elif "prompt" in r:
                check(r["answers"], f"--tasks {name}: item {i + 1} has no answer to compare with; leave such items out")
                item = {"contexts": [r["prompt"]], "continuations": r["answers"], "answer": None, "generate": True}
            elif "word" in r:
                item = {"contexts": [r["context"]], "continuations": [r["word"]], "answer": None}
            elif "choices" in r:
                item = {"contexts": [r["context"]] * len(r["choices"]), "continuations": r["choices"], "answer": r["answer"]}
            else:
                item = {"contexts": r["contexts"], "continuations": [r["continuation"]] * len(r["contexts"]), "answer": r["answer"]}
        except (KeyError, TypeError) as e:
            raise FTPError(f"--tasks {name}: item {i + 1} has no usable {e}; see load_task in data.py for the form") from None
        free = item["answer"] is None and ("word" in r or "generate" in item)  # nothing to choose from
        wrong = misfit(item, {"contexts": [str], "continuations": [str], "answer": None if free else int}, f"item {i + 1}")
        check(not wrong, f"--tasks {name}: {wrong}; mend it")
        check(item["contexts"] and all(item["continuations"]), f"--tasks {name}: item {i + 1} has no choices, or an empty one; mend it")
        check(free or item["answer"] < len(item["contexts"]), f"--tasks {name}: item {i + 1} has the answer {item['answer']}, out of range "
              f"of {len(item['contexts'])} choices counted from 0; mend it")
        needed = r.get("needs_context", name in NEEDS_CONTEXT or "word" in r or "prompt" in r)
        items.append(item | {"needs_context": bool(needed)})
    check(items, f"--tasks {name}: no items; raise --limit or give another file")
    return name, items


def encode(tokenizer, text):
    """Ids of a text, with the start token that the tokenizer adds, unless the text begins with it (chat templates)."""
    return tokenizer(text, add_special_tokens=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)))["input_ids"]


def encode_pair(tokenizer, context, continuation, max_len=None):
    """Ids of context and continuation, tokenised as one text and parted as lm-evaluation-harness does: blanks that end the context
    go to the continuation. An empty context becomes the start token, so that there is something to predict from. max_len: cut the
    context at its left, to so many tokens in all."""
    stem = context.rstrip()
    both = encode(tokenizer, context + continuation) if stem else tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    n = max(0, min(len(encode(tokenizer, stem)), len(both) - 1)) if stem else 0
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if n == 0 and (len(both) == 1 or both[:1] != [start]):
        check(start is not None and both, "--tasks: an empty context needs a tokenizer with a start or end token; give the items a context")
        return [start], both
    n = max(n, 1)
    return both[max(0, len(both) - max_len) if max_len else 0:n], both[n:]


def standard_error(values):
    """Standard error of the mean."""
    n = len(values)
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)


def spread(values):
    """Over seeds: {"mean", "std", "n"} of the values that are there (None is not); std None for one value, mean None for none."""
    v = [x for x in values if x is not None]
    return {"mean": statistics.mean(v) if v else None, "std": statistics.stdev(v) if len(v) > 1 else None, "n": len(v)}


def shown(s):
    """A spread as text."""
    return "-" if s["mean"] is None else f"{s['mean']:.4f}" + ("" if s["std"] is None else f" ± {s['std']:.4f}")
