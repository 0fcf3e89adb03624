"""Items that ask for an exact copy out of the prompt, as task files for evaluate.py.

    python analysis/copying.py                                  # -> out/copying/*.jsonl
    python evaluate.py --tasks lookup_512=out/copying/lookup_512.jsonl

Multiple choice hides what is lost with a skipped token: an answer can be the likeliest without
having been read. These can only be had from the prompt, at a place drawn at random:

    repeat   lists of words under names, one of them asked for again: its words, in their order
    lookup   keys and values, one key asked for again: its value
    json     records of text and as JSON, the last one without: a line that parses, of the same keys

Each prompt is filled with examples up to --lengths tokens. Seeded: the same items everywhere for
the same tokenizer. Of `repeat` and `lookup`, evaluate.py tells how many are found by greedy
decoding and the perplexity of an answer; of `json` how many are such a line.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import random

from lib.data import load_tokenizer, save_lines
from lib.files import check
from lib.stage import Parser, run, whole, wholes

WORDS = ("river stone cloud apple chair window garden bridge candle forest mirror basket winter "
         "summer letter pocket button rocket tunnel island copper silver orange purple butter "
         "pepper dragon spider rabbit turtle falcon salmon violin guitar hammer ladder engine "
         "anchor castle temple market school doctor farmer sailor painter kettle blanket").split()
NAMES = "Ada Ben Cora Dan Eva Finn Gus Hana Ivan Jane Kurt Lena Max Nora Otto Pia Rosa Sam".split()
TOWNS = "Oslo Rome Lima Cairo Bern Quito Delhi Paris Tokyo Seoul Dublin Vienna".split()
OF_LIST = 5     # words of a list


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("items").add_argument
    add("--lengths", type=wholes("[64, inf)"), default="128,512,2048",
        help="tokens of a prompt at most, comma list")
    add("--nitems", type=whole("[1, inf)"), default=50, help="items of each kind and length")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2", help="whose tokenizer counts")
    add("--out_dir", default="out/copying", help="folder of the task files")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# one line of a prompt after another, and the item that is asked of them


def repeat_lines(rng):
    """Endless lines, each a name and its words."""
    while True:
        name = " ".join(rng.sample(WORDS, 2))
        yield f"List {name}:", " " + " ".join(rng.sample(WORDS, OF_LIST))


def lookup_lines(rng):
    """Endless lines, each a key and its value."""
    while True:
        yield f"The code of {rng.choice(WORDS)} {rng.choice(WORDS)} is", f" {rng.randint(100, 999)}"


def json_lines(rng):
    """Endless records, each as text and as JSON."""
    while True:
        record = {"name": rng.choice(NAMES), "age": rng.randint(18, 80), "town": rng.choice(TOWNS)}
        yield (f"{record['name']} is {record['age']} years old and lives in {record['town']}.\n",
               json.dumps(record))


KINDS = {"repeat": repeat_lines, "lookup": lookup_lines, "json": json_lines}


def make_item(kind, length, tokenizer, rng):
    """An item in a form of load_task() (lib/tasks.py), its prompt of at most `length` tokens."""
    lines, room = {}, length
    for head, tail in KINDS[kind](rng):
        if head in lines:                       # a key twice would have two answers
            continue
        size = len(tokenizer(f"{head}{tail}\n", add_special_tokens=False)["input_ids"])
        longest = size if kind == "json" else 2 * size      # the line, and what asks for it
        if longest > room:
            break
        lines[head], room = tail, room - size
    check(len(lines) > 1, f"--lengths {length}: no room for two {kind} lines; raise it")
    if kind == "json":
        ask, answer = lines.popitem()
        return {"prompt": text_of(lines) + ask, "answers": [answer], "json": True}
    ask = rng.choice(list(lines)[:-1])          # the last one would be no search
    return {"context": text_of(lines) + ask, "word": lines[ask]}


def text_of(lines):
    """The text of lines {head: tail}."""
    return "".join(f"{head}{tail}\n" for head, tail in lines.items())


def main():
    args = get_args()
    tokenizer = load_tokenizer(args.model)
    for kind in KINDS:
        for length in args.lengths:
            rng = random.Random(f"{args.seed} {kind} {length}")
            items = [make_item(kind, length, tokenizer, rng) for _ in range(args.nitems)]
            path = Path(args.out_dir) / f"{kind}_{length}.jsonl"
            rows = [{"id": f"{kind}-{length}-{i}", **item} for i, item in enumerate(items)]
            save_lines(path, [json.dumps(row) for row in rows])
            print(f"-> {path}, {len(items)} items")


if __name__ == "__main__":
    run(main)
