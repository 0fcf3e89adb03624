"""Text and instructions, from local files or `datasets` ids, as lists of token ids.

    load_samples("self", model, tokenizer)    # this repository's prompts, answered by the model
    load_samples("self,text", ...)            # and as many texts that it writes from nothing
    load_samples("tatsu-lab/alpaca", ...)     # the paper's data; or any Alpaca-form .json/.jsonl
    load_text("book.txt")
"""
import json
import os
import random
import re
from pathlib import Path

from lib.checkpoint import HOME, find_model
from lib.files import FTPError, check, digest, first_line, misfit, save_files
from lib.processes import gather, rank
from lib.stage import SPLIT, progress, saved

PROMPTS = Path(__file__).resolve().parent.parent / "prompts.jsonl"
SHIPPED = PROMPTS.parent / "artifacts" / "written"    # texts of the embedded model
SPLITS = ("train", "watch", "heldout")  # to fit, to stop early, to evaluate
CLOZE = (220, 480)             # letters before a word to be found again, about that many

# What an item may hold. "response_ids" are a model's own, else "output" is tokenised.
FORM: dict = {key: (str, None) for key in ("instruction", "input", "output", "text")}
FORM |= {"response_ids": ([int], None), "bare": (bool, None)}


def splits_of(n):
    """The split of each of n items, a list: of every four, drawn at random, two train.

    Not by place alone: a file that cycles through four subjects would have one in each part. Always
    drawn alike, whatever a stage's --seed, so that what one stage trained on no other holds out.
    """
    order = list(range(n))
    random.Random(SPLIT["seed"]).shuffle(order)
    splits = [""] * n
    for place, i in enumerate(order):
        splits[i] = SPLIT["of_four"][place % 4]
    return splits


def load_tokenizer(path):
    """The Hugging Face tokenizer of a model. FTPError where its folder has none."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(find_model(path))
    except FTPError:
        raise
    except Exception as e:  # transformers and tokenizers raise many kinds, some of them plain
        raise FTPError(f"--model {path}: no usable tokenizer ({first_line(e)}); "
                       "give a folder with tokenizer.json") from None


# ------------------------------------------------------------------------------------------------
# reading

def read_text(path, flag):
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FTPError(f"{flag}: {path} can't be read as UTF-8 text ({e}); "
                       "give an existing .jsonl, .json or .txt file") from None


def read_rows(path, flag="--data"):
    """Rows, dictionaries, of a .json list or .jsonl file.

    FTPError with the line or item of a bad one, and where two items have one "id".
    """
    path = Path(path)
    text = read_text(path, flag)
    parse = parse_json if path.suffix == ".json" else parse_jsonl
    rows, places = parse(text, path, flag)
    check(rows, f"{flag}: {path} is empty; give a file with items")
    if "\\ud" in text.lower():  # a surrogate may be written out, and only half a pair
        try:
            json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FTPError(f"{flag}: {path} has half a surrogate pair (\\ud8.. alone), "
                           "which is no character; mend or remove it") from None
    seen = {}
    for row, place in zip(rows, places):
        check(isinstance(row, dict),
              f"{flag}: {path} {place} is no JSON object; mend or remove it")
        if row.get("id") is not None:
            name = json.dumps(row["id"])
            check(name not in seen, f"{flag}: {path} {place} has the id {name[:60]} of "
                                    f"{seen.get(name)}; remove one, or its id")
            seen[name] = place
    return rows


def parse_json(text, path, flag):
    """Items of a JSON list and what to call each in a message."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as e:
        line = getattr(e, "lineno", 1)
        raise FTPError(not_json(path, line, e, flag)) from None
    check(isinstance(rows, list), f"{flag}: {path} must hold a list of JSON objects")
    return rows, [f"item {i}" for i in range(1, len(rows) + 1)]


def parse_jsonl(text, path, flag):
    """Items of a text with one a line, blank lines left out, and what to call each in a message."""
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 in a text would end splitlines()
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            raise FTPError(not_json(path, number, e, flag)) from None
        places.append(f"line {number}")
    return rows, places


def not_json(path, line, error, flag):
    return f"{flag}: {path} line {line} is not JSON ({error}); mend or remove it"


def from_hub(name, config, split, flag):
    """A split of a `datasets` id (or local data set folder)."""
    from datasets import load_dataset
    try:
        return load_dataset(name, config, split=split)
    except Exception as e:  # many kinds: no network, no such id, no such split
        raise FTPError(f"{flag} {name}: not loaded ({first_line(e)}); "
                       "check the id, or give a local file") from None


# ------------------------------------------------------------------------------------------------
# what the dense model itself writes

def render(tokenizer, instruction, context="", bare=False):
    """Token ids of a prompt: the model's chat template, or Alpaca's headings for a base model.

    bare: without the system prompt that a template may put first.
    """
    text = f"{instruction}\n\n{context}" if context else instruction
    if not tokenizer.chat_template:
        return tokenizer(f"### Instruction:\n{text}\n\n### Response:\n")["input_ids"]
    return template_ids(tokenizer, [{"role": "user", "content": text}], bare)


def template_ids(tokenizer, chat, bare=False):
    """Token ids of a chat [{"role", "content"}] in the model's template, up to the answer.

    bare: without the system prompt that a template may put first where the chat has none.
    """
    head = ""
    if bare:
        # some templates put their own where none is given: an empty one is given, and cut off
        empty = [{"role": "system", "content": ""}]
        head, chat = tokenizer.apply_chat_template(empty, tokenize=False), empty + chat
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text.removeprefix(head), add_special_tokens=False)["input_ids"]


def written(model, name, prompts, row, max_new_tokens, temperature, top_p=0.95, seed=0,
            batch_size=128):
    """What `model`, dense, writes after each prompt (token ids), as the rows of a cached file.

    row(i, new token ids) makes the i-th row. The file is named by model, weights, name and seed,
    and is made in batches that a later run goes on from. Leaves the model dense. What the embedded
    model wrote is shipped, so that every machine calibrates on the same.
    """
    weights = weights_of(model)
    shipped = SHIPPED / f"{weights}-{name}seed{seed}-{max_new_tokens}.jsonl"
    if shipped.exists():
        return read_rows(shipped)
    who = f"{Path(model.name).resolve().name}-{weights}"  # a tuned model writes anew
    path = HOME / "self" / f"{who}-{name}seed{seed}-{max_new_tokens}.jsonl"
    if rank() == 0 and not path.exists():
        part = path.with_suffix(".part")
        lines = whole_batches(part, batch_size)
        if lines:
            saved[part] = f"{len(lines)} of {len(prompts)} texts"
        model.use()
        starts = range(len(lines), len(prompts), batch_size)
        for i in progress(starts, desc="the dense model writes", unit="batch"):
            # the seed goes by place, so that a resumed run draws what a straight one does
            new = model.generate(prompts[i:i + batch_size], max_new_tokens,
                                 temperature=temperature, top_p=top_p, seed=seed + i)
            lines += [json.dumps(row(i + j, ids)) for j, ids in enumerate(new)]
            save_lines(part, lines)
            saved[part] = f"{len(lines)} of {len(prompts)} texts"
        part.rename(path)
        saved.pop(part, None)
        saved[path] = f"all {len(lines)} texts"
    gather(None)  # the other ranks wait for the file
    return read_rows(path)


def weights_of(model):
    """Names a model by its shape and weights, wherever it lies."""
    return digest([model.fingerprint["config"], model.fingerprint["weights"]])


def whole_batches(part, batch_size):
    """The lines that an ended run has left, up to its last whole batch."""
    lines = part.read_text().splitlines() if part.exists() else []
    return lines[:len(lines) // batch_size * batch_size]


def save_lines(path, lines):
    text = "\n".join(lines) + "\n"
    save_files({path: lambda temporary: temporary.write_text(text)})


def self_responses(model, tokenizer, seed=0, max_new_tokens=64, batch_size=32, bare=False):
    """Rows of this repository's prompts with responses that `model` writes once.

    bare: the prompts stand without a system prompt.
    """
    rows = read_rows(PROMPTS)
    prompts = [render(tokenizer, r["instruction"], r["input"], bare) for r in rows]

    def row(i, new):
        return {**rows[i], "response_ids": new, **({"bare": True} if bare else {})}
    return written(model, "bare-" if bare else "", prompts, row, max_new_tokens, temperature=0.7,
                   seed=seed, batch_size=batch_size)


def self_text(model, tokenizer, seed=0, max_new_tokens=320, n=256):
    """Rows of plain text of all kinds: what `model` writes after a text's start token alone."""
    first = start_of_text(tokenizer)
    check(first is not None, "--data text: the tokenizer has no start token; give a file")

    def row(i, new):
        return {"text": tokenizer.decode(new, skip_special_tokens=True)}
    return written(model, "text-", [[first]] * n, row, max_new_tokens, temperature=0.8, seed=seed)


def start_of_text(tokenizer):
    """The id before a text in training, or None: the end-of-text token where there is one."""
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if first is not None and first != tokenizer.unk_token_id:
        return first
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


# ------------------------------------------------------------------------------------------------
# samples

def load_samples(data, model, tokenizer, split="train", nsamples=None, max_prompt=512,
                 max_response=64, min_response=8, seed=0):
    """[(prompt ids, response ids)] of one of the disjoint SPLITS, shuffled by `seed`.

    data: "self", "bare" (as "self" without a system prompt), "text", "cloze" (words of "text"
    that stood there before, to be found again; "cloze:FILE" those of a file), an Alpaca-form
    .json/.jsonl file, a .txt, or a `datasets` id; or several with commas between, each of its
    share of nsamples. Prompts of more than max_prompt tokens are left out, never cut; responses
    are cut at max_response. Plain text (items with "text" alone) gives windows of max_prompt +
    max_response tokens.
    """
    out = []
    sources = [source.strip() for source in data.split(",")]
    for k, source in enumerate(sources):
        samples = samples_of(source, model, tokenizer, split, max_prompt, max_response,
                             min_response)
        random.Random(seed).shuffle(samples)
        if nsamples is not None:
            # shares differ by one at most, and add up to nsamples
            samples = samples[:nsamples * (k + 1) // len(sources) - nsamples * k // len(sources)]
        out += samples
    random.Random(seed).shuffle(out)
    return out


def samples_of(source, model, tokenizer, split, max_prompt, max_response, min_response):
    """The samples of one source, in its order."""
    out, too_long = [], 0
    texts = source.removeprefix("cloze:")
    is_cloze = source == "cloze" or texts != source
    rows = list(rows_of(texts, model, tokenizer))
    check(len(rows) >= 4, f"--data: {source} has {len(rows)} items; give at least 4, as they are "
                          "parted into some to train on, to watch and to hold out")
    mine = splits_of(len(rows))
    for i, row in enumerate(rows):
        if mine[i] != split:
            continue
        what = f"item {i + 1}"
        wrong = misfit(row, FORM, what)
        check(not wrong, f"--data: in {source} {wrong}; mend or remove it")
        if is_cloze:
            out += cloze(row.get("text") or "", tokenizer, max_prompt)
            continue
        if row.get("instruction") is None and row.get("text") is not None:
            out += text_windows(row["text"], tokenizer, max_prompt, max_response)
            continue
        prompt, response = instruction_sample(row, tokenizer, f"{what} of {source}")
        check(max(response, default=0) < model.config.vocab_size,
              f"--data: {what} of {source} has response_ids beyond the vocabulary; make it again")
        if len(prompt) > max_prompt:
            too_long += 1
        elif len(response) >= min_response:
            out.append((prompt, response[:max_response]))

    longest = max((len(prompt) + len(response) for prompt, response in out), default=0)
    check(longest <= model.config.max_len,
          f"--data {source}: a prompt with its response has {longest} tokens, the model takes "
          f"{model.config.max_len}; lower --max_prompt and --max_response, now {max_prompt} and "
          f"{max_response}, or shorten the items")
    if too_long:
        print(f"--data {source}: {too_long} {split} prompts of more than {max_prompt} tokens are "
              "left out (--max_prompt, where the stage has it)")
    check(out, f"--data: no usable item in {source}; items need an instruction of at most "
               f"{max_prompt} tokens and an output of at least {min_response}, or a text")
    return out


def rows_of(source, model, tokenizer):
    """The rows of one source of load_samples()."""
    if source == "self":
        return self_responses(model, tokenizer)
    if source == "bare":
        return self_responses(model, tokenizer, bare=True)
    if source in ("text", "cloze"):
        return self_text(model, tokenizer)
    if Path(source).suffix == ".txt":
        text = load_text(source, "--data")
        # pieces go to one split whole, and even a short text has some for each split
        size = min(8000, len(text) // 8 + 1)
        return [{"text": text[i:i + size]} for i in range(0, len(text), size)]
    if os.path.exists(source):
        return read_rows(source)
    return list(from_hub(source, None, "train", "--data"))


def text_windows(text, tokenizer, max_prompt, max_response):
    """Samples of plain text: a window's beginning is the prompt, what follows the response."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    context = min(max_prompt, len(ids) - max_response)
    if context < max_response:  # too short to be half a prompt
        return []
    return windows(ids, context, max_response)


def cloze(text, tokenizer, max_prompt, most=4, least=40):
    """Samples of a text, LAMBADA's kind: some sentences up to a word that they had before, and that
    word. `most` of them, whose prompts have `least` to max_prompt tokens.
    """
    out, rng = [], random.Random(text)
    words = list(re.finditer(r"(?<= )[A-Za-z]{4,}", text))
    rng.shuffle(words)
    for m in words:
        # from the beginning of a sentence, some sentences earlier
        far = max(0, m.start() - rng.randint(*CLOZE))
        sentence = re.search(r"[.!?\n]\s+", text[far:m.start()]) if far else None
        if far and not sentence:
            continue
        context = text[far + (sentence.end() if sentence else 0):m.start() - 1]
        if not re.search(rf"\b{m[0]}\b", context, re.IGNORECASE):
            continue
        prompt = tokenizer(context, add_special_tokens=False)["input_ids"]
        word = tokenizer(" " + m[0], add_special_tokens=False)["input_ids"]
        if least <= len(prompt) <= max_prompt:
            out.append((prompt, word))
        if len(out) == most:
            break
    return out


def instruction_sample(row, tokenizer, what):
    """(prompt ids, response ids) of one instruction, neither cut."""
    ids, output = row.get("response_ids"), row.get("output")
    answered = ids is not None or output is not None
    check(row.get("instruction") is not None and answered,
          f"--data: {what} lacks instruction or output")
    prompt = render(tokenizer, row["instruction"], row.get("input") or "", bool(row.get("bare")))
    if ids is None:
        ids = tokenizer(output, add_special_tokens=False)["input_ids"]
    return prompt, ids


# ------------------------------------------------------------------------------------------------
# text

def load_text(spec, flag="--text"):
    """One text: "passages" (those of the held-out prompts), a .txt file, the "text" fields of a
    .json/.jsonl, or a `datasets` id as owner/name[:config[:split]]."""
    path = Path(spec)
    check(spec != "self", f"{flag} self: these texts are called passages now, as self means the "
                          f"model's own answers; give {flag} passages")
    if spec == "passages":
        rows = read_rows(PROMPTS)
        heldout = [r for r, split in zip(rows, splits_of(len(rows))) if split == "heldout"]
        return "\n\n".join(r["input"] for r in heldout if r["input"])
    if os.path.exists(path):
        if path.suffix == ".txt":
            return load_txt(path, flag)
        rows = read_rows(path, flag)
    else:
        name, config, split = (spec.split(":") + [None, None])[:3]
        rows = from_hub(name, config, split or "test", flag)
    for i, row in enumerate(rows):
        check(isinstance(row.get("text"), str), f'{flag}: item {i + 1} of {spec} has no "text"')
    return "\n\n".join(row["text"] for row in rows)


def load_txt(path, flag):
    """The text of a .txt file; WikiText's lines are joined the field's way."""
    lines = read_text(path, flag).split("\n")
    check(any(line.strip() for line in lines), f"{flag}: {path} is empty; give a file with text")
    if "wiki" not in path.name:
        return "\n".join(lines)
    # WikiText's raw form keeps blank lines as " ": the field joins its rows by an empty line
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines[:-1])


def encode(tokenizer, text):
    """Ids of a text, with the start token that the tokenizer adds unless the text has it."""
    begun = tokenizer.bos_token and text.startswith(tokenizer.bos_token)  # a chat template's
    return tokenizer(text, add_special_tokens=not begun)["input_ids"]


def windows(ids, context, scored, n=None):
    """[(prompt ids, ids to score)]: windows of context + scored tokens, n at most, no overlap."""
    size = context + scored
    check(len(ids) >= size, f"--text: {len(ids)} tokens are fewer than one window of {size}; "
                            "give more text or smaller windows")
    starts = range(0, len(ids) - size + 1, size)
    return [(ids[i:i + context], ids[i + context:i + size]) for i in starts][:n]
