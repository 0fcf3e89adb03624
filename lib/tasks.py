"""Choice tasks: items with one pair of context and continuation an option.

    load_task("arc_easy")               # from `datasets`, see HUB
    load_task("mine=items.jsonl")       # a local file

An item: {"contexts": [str], "continuations": [str], "answer": int or None, "needs_context": bool},
and "generate": True where the continuations are answers to search for in what the model writes,
beside it "json": True where they are JSON objects, of which the answer must have the keys.
"""
import json
import re

from lib.data import encode, from_hub, read_rows
from lib.files import FTPError, check, misfit

# ------------------------------------------------------------------------------------------------
# rows of the public tasks -> items in the form of a local file

def arc(r):
    return {
        "context": f"Question: {r['question']}\nAnswer:",
        "choices": [" " + text for text in r["choices"]["text"]],
        "answer": r["choices"]["label"].index(r["answerKey"]),
    }


def hellaswag(r):
    return {
        "context": clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
        "choices": [" " + clean(ending) for ending in r["endings"]],
        "answer": int(r["label"]),
    }


def clean(text):
    """HellaSwag's text without the marks of WikiHow, as lm-evaluation-harness has it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def mmlu(r):
    subject = r["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    body = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", r["choices"]))
    return {
        "context": f"{head}{r['question'].strip()}\n{body}Answer:",
        "choices": [" A", " B", " C", " D"],
        "answer": int(r["answer"]),
    }


def winogrande(r):
    before, after = r["sentence"].split("_")
    return {
        "contexts": [before + r["option1"], before + r["option2"]],
        "continuation": " " + after.strip(),
        "answer": int(r["answer"]) - 1,  # the data set counts from 1
    }


def piqa(r):
    return {
        "context": f"Question: {r['goal']}\nAnswer:",
        "choices": [" " + r["sol1"], " " + r["sol2"]],
        "answer": int(r["label"]),
    }


def openbookqa(r):
    return {
        "context": r["question_stem"],
        "choices": [" " + text for text in r["choices"]["text"]],
        "answer": r["choices"]["label"].index(r["answerKey"].strip()),
    }


def lambada(r):
    context, word = r["text"].rsplit(" ", 1)
    return {"context": context, "word": " " + word}


# names that this repository had before the field's
ALIASES = {"openbook_qa": "openbookqa", "lambada": "lambada_openai"}

# task: (datasets id, config, split, row -> item in the form of a local file)
HUB = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag),
    "mmlu": ("cais/mmlu", "all", "test", mmlu),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "piqa": ("ybisk/piqa", "plain_text", "validation", piqa),
    "openbookqa": ("allenai/openbookqa", "main", "test", openbookqa),
    "lambada_openai": ("EleutherAI/lambada_openai", "en", "test", lambada),
}

# Tasks that mean nothing without their context, known by name. LAMBADA-like and long-prompt items,
# and those that say "needs_context", join them.
NEEDS_CONTEXT = {"lambada_openai", "boolq", "squad", "multi_document_qa", "yes_no_qa"}


# ------------------------------------------------------------------------------------------------
# loading

def load_task(spec, limit=None):
    """name or name=file -> (name, items), at most `limit`; the items' form is on top of this file.

    The texts of a pair are scored as their plain concatenation. Rows of a file have one of these
    forms: {"context", "choices", "answer"}, {"contexts", "continuation", "answer"},
    {"context", "word"} (LAMBADA: one pair and no answer) and {"prompt", "answers"}. Where all
    "answers" are yes or no, prompts are a choice of these two; else questions whose generated
    answer is searched for one of them, or with "json": true must be JSON of the same keys. Of a
    file whose prompts have a "kind", the items of the kind that the task is named by are taken.
    FTPError on a row of another form.
    """
    name, _, path = spec.partition("=")
    name = ALIASES.get(name, name)
    rows = read_rows(path, "--tasks") if path else rows_from_hub(name)
    rows = of_kind(rows, name, path)
    for i, row in enumerate(rows):
        form: dict = {"needs_context": (bool, None)}
        if "prompt" in row:
            form |= {"prompt": str, "answers": [str], "json": (bool, None)}
        wrong = misfit(row, form, f"item {i + 1}")
        check(not wrong, f"--tasks {name}: {wrong}; see load_task in lib/tasks.py for the form")
    yes_no = all(is_yes_no(row["answers"]) for row in rows if "prompt" in row)
    items = []
    for i, row in enumerate(rows[:limit]):
        what = f"--tasks {name}: item {i + 1}"
        item = to_item(row, yes_no, what)
        check_item(item, what)
        by_nature = name in NEEDS_CONTEXT or "word" in row or "prompt" in row
        items.append(item | {"needs_context": bool(row.get("needs_context", by_nature))})
    check(items, f"--tasks {name}: no items; raise --limit or give another file")
    return name, items


def rows_from_hub(name):
    """Rows of a public task in the form of a local file."""
    check(name in HUB, f"--tasks {name}: unknown task; give name=file.jsonl, "
                       f"or one of {', '.join(HUB)}")
    hub, config, split, convert = HUB[name]
    rows = []
    for i, row in enumerate(from_hub(hub, config, split, "--tasks")):
        try:
            rows.append(convert(row))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FTPError(f"--tasks {name}: item {i + 1} of {hub} has not the expected form "
                           f"({type(e).__name__}: {e}); give name=file.jsonl") from None
    return rows


def of_kind(rows, name, path):
    """The rows whose "kind" is the task's name, where prompts have kinds; else all."""
    kinds = {str(row["kind"]) for row in rows if "prompt" in row and "kind" in row}
    if not kinds:
        return rows
    check(name in kinds, f"--tasks {name}: {path} holds prompts of several kinds; "
                         f"name the task after one of them: {', '.join(sorted(kinds))}")
    return [row for row in rows if str(row.get("kind")) == name]


def is_yes_no(answers):
    """Whether all that counts as right is "yes", or all is "no"."""
    return {a.lower() for a in answers} in ({"yes"}, {"no"})


def to_item(row, yes_no, what):
    """An item of a row in any of the forms of load_task(); FTPError starts with `what`."""
    try:
        if "prompt" in row:
            return prompt_item(row, yes_no, what)
        if "word" in row:
            return {"contexts": [row["context"]], "continuations": [row["word"]], "answer": None}
        if "choices" in row:
            contexts = [row["context"]] * len(row["choices"])
            continuations = row["choices"]
        else:
            contexts = row["contexts"]
            continuations = [row["continuation"]] * len(contexts)
        answer = row["answer"]
    except (KeyError, TypeError) as e:
        raise FTPError(f"{what} has no usable {e}; "
                       "see load_task in lib/tasks.py for the form") from None
    # an answer is given, unlike above: None must not pass for "nothing to choose from"
    check(answer is not None, f"{what}.answer is None, not a whole number of at least 0; mend it")
    return {"contexts": contexts, "continuations": continuations, "answer": answer}


def prompt_item(row, yes_no, what):
    """A long prompt with answers: a choice of yes and no, or a question to be answered freely."""
    if yes_no:
        answer = int(row["answers"][0].lower() == "no")
        return {"contexts": [row["prompt"]] * 2, "continuations": [" yes", " no"], "answer": answer}
    check(row["answers"],
          f"{what} has no answer to compare with; leave such items out")
    if row.get("json"):
        check(all(keys_of(answer) for answer in row["answers"]),
              f"{what} has an answer that is no JSON object with keys; mend it")
    return {"contexts": [row["prompt"]], "continuations": row["answers"], "answer": None,
            "generate": True, "json": bool(row.get("json"))}


def keys_of(text):
    """The keys of a text that is a JSON object, a set; None of any other text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return set(found) if isinstance(found, dict) else None


def check_item(item, what):
    """FTPError unless an item's texts and answer can be used."""
    answer = item["answer"]
    form = {"contexts": [str], "continuations": [str], "answer": (int, None)}
    wrong = misfit(item, form, what)
    check(not wrong, f"{wrong}; mend it")
    n = len(item["contexts"])
    check(n > 0 and all(item["continuations"]),
          f"{what} has no choices, or an empty one; mend it")
    check(answer is None or answer < n,
          f"{what} has the answer {answer}, out of range of {n} choices counted from 0; mend it")


# ------------------------------------------------------------------------------------------------
# token ids

def encode_pair(tokenizer, context, continuation, max_len=None):
    """(ids of the context, ids of the continuation), tokenised as one text.

    They are parted as lm-evaluation-harness does: blanks that end the context go to the
    continuation. An empty context becomes the start token, so that there is something to predict
    from. max_len: cut the context at its left, to so many tokens in all.
    """
    stem = context.rstrip()
    if stem:
        both = encode(tokenizer, context + continuation)
        n = min(len(encode(tokenizer, stem)), len(both) - 1)
        n = max(n, 0)
    else:
        both = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        n = 0
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    begun = len(both) > 1 and both[0] == start  # a template's start token serves as the context
    if n == 0 and not begun:
        check(start is not None and both, "--tasks: an empty context needs a tokenizer with a "
              "start or end token; give the items a context")
        return [start], both
    n = max(n, 1)
    first = max(0, len(both) - max_len) if max_len else 0
    return both[first:n], both[n:]
