"""Talk to a pruned model: its answer streams, the dense one's beside it, and what was saved.

    python sample.py --prompt "Why is the sky blue?"              # the shipped pruned model answers
    python sample.py --prompt "Why is the sky blue?" --compare    # and the dense one, timed
    python sample.py --file report.txt --compare --show_skips    # a long prompt, skips shaded
    python sample.py                                              # a chat in the terminal
    python sample.py --pruned ftp-0.40                            # another one of those shipped
    python sample.py --schedule out/schedule_ft.json --router out/router.safetensors     # your own

In: a model, and a schedule with its router or forecaster. Out: text. In the chat /dense and /pruned
choose who answers, /skips shows the last prompt's skipped tokens, Ctrl-C ends an answer, Ctrl-D the
chat. Only the reading of a prompt gets faster, so time to the first token is what to look at.
"""
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib.data import load_tokenizer, read_text, template_ids
from lib.files import check
from lib.flops import Meter
from lib.scoring import response_kl, response_states
from lib.shipped import names, shipped
from lib.skips import prefill_with_map
from lib.stage import Parser, number, run, start, whole
from model_ftp import sample

SHADES = (231, 252, 248, 244, 240, 237)    # of ANSI's 256 colours: white computes all, dark skips
DENSE, PRUNED = "dense", "pruned"


def get_args():
    p = Parser(__doc__)

    # what to ask
    add = p.add_argument_group("prompt").add_argument
    add("--prompt", default=None, help="what to ask; without it and --file a chat begins")
    add("--file", default=None, help="text file that is the prompt, or stands behind --prompt")
    add("--system", default=None,
        help='system prompt, "" for none; by default the chat template\'s own, if any')

    # who answers
    add = p.add_argument_group("pruned model").add_argument
    add("--pruned", default="late-0.30", help=f"shipped for smollm2: {', '.join(names())}")
    add("--schedule", default=None, help="your own schedule, instead of --pruned")
    add("--router", default="static", help="its router, or static")
    add("--forecaster", default=None, help="its late keys and values (fit_late_kv.py)")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--compare", action="store_true", help="let the dense model answer too, and compare")

    # how the text is drawn
    add = p.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=whole("[1, inf)"), default=128, help="longest answer, tokens")
    add("--temperature", type=number("[0, inf)"), default=0.0, help="0 is greedy")
    add("--top_p", type=number("(0, 1]"), default=1.0, help="nucleus, where --temperature is not 0")
    add("--show_skips", action="store_true",
        help="print the prompt, each token shaded by the share of blocks that it skipped")

    add = p.add_argument_group("machine and output").add_argument
    add("--model", default="smollm2",
        help="smollm2 (after prepare.py), a Hugging Face folder, or a hub id")
    add("--out_dir", default="out", help="folder of other stages' artefacts; nothing is written")
    add("--seed", type=whole("[0, 4294967296)"), default=0, help="seed of everything random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ...")
    add("--device_map", default=None,
        help="for a model larger than one GPU: auto, or e.g. cuda:0=0-15,cuda:1=16-31 (blocks)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the device computes in it, else float32")
    add("--threads", type=whole("[0, inf)"), default=0, help="CPU threads, 0: all cores")

    args = p.parse_args()
    check(args.prompt is None or args.prompt.strip(), "--prompt: it is empty; give a question")
    return args


@dataclass
class Answer:
    """One answer: token ids and text, seconds to each token, the prompt's Meter and skip map."""
    ids: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    text: str = ""
    meter: Meter | None = None
    computed: torch.Tensor | None = None     # (n_layer, N) bool


def chat_ids(tokenizer, turns, system):
    """Token ids of a chat [(role, text)], rendered by the model's template up to the answer."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text} for role, text in turns]
    if not tokenizer.chat_template:                       # a base model: text goes on as it is
        return tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
    return template_ids(tokenizer, messages, bare=system == "")


def stream_answer(model, tokenizer, prompt, args):
    """Generate after `prompt` (ids), printing as it comes -> Answer. Ctrl-C ends the answer."""
    answer, began = Answer(meter=Meter(model)), time.perf_counter()
    cache = model.new_cache(1)                            # keys and values of this answer alone
    rng = torch.Generator(model.device).manual_seed(args.seed)
    try:
        # the prompt in one pass: all that pruning makes faster is behind this line
        logits, answer.computed = prefill_with_map(model, prompt, cache, answer.meter)
        for i in range(args.max_new_tokens):
            token = int(sample(logits, args.temperature, args.top_p, rng))
            answer.seconds.append(time.perf_counter() - began)
            if token in model.config.eos:                 # counted in time, not shown
                break
            answer.ids.append(token)
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):               # half a character: its rest comes next
                print(text[len(answer.text):], end="", flush=True)
                answer.text = text
            if i + 1 < args.max_new_tokens:
                logits = model.extend([[token]], cache)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return answer


def shaded(tokenizer, prompt, computed):
    """The prompt's text, each token shaded by the share of blocks that it skipped.

    computed: (n_layer, N) bool. ANSI colours on a terminal; else the share in tenths behind each
    token that skipped more than a tenth.
    """
    share = 1 - computed.float().mean(0)                  # (N,) of the blocks, by token
    out = []
    for token, s in zip(prompt, share.tolist()):
        text = tokenizer.decode([token])
        if sys.stdout.isatty():
            colour = SHADES[min(int(s * len(SHADES)), len(SHADES) - 1)]
            out.append(f"\x1b[38;5;{colour}m{text}")
        else:
            out.append(f"{text}[{10 * s:.0f}]" if s > 0.1 else text)
    return "".join(out) + ("\x1b[0m" if sys.stdout.isatty() else "")


def say_timing(name, answer, dense=None):
    """One line: time to the first token, time a token, what was saved; beside dense if given."""
    first = answer.seconds[0] if answer.seconds else float("nan")
    # the first token pays for the prompt, the others for themselves
    each = (answer.seconds[-1] - first) / max(len(answer.seconds) - 1, 1)
    parts = [f"first token after {1e3 * first:.0f} ms", f"then {1e3 * each:.1f} ms a token"]
    if name == PRUNED:
        parts += [f"{100 * answer.meter.mean('prefill'):.1f} % of prompt tokens skipped a block",
                  f"{100 * answer.meter.saved('prefill'):.1f} % of the prompt's FLOPs saved"]
    if dense and dense.seconds:
        parts.append(f"first token {dense.seconds[0] / first:.2f} times as soon as dense")
    print(f"[{name}: {', '.join(parts)}]", flush=True)


class Speaker:
    """The model and how it is pruned: answers as "pruned" or "dense"."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.routing = use_pruned(model, args)            # checked once, then only put in place

    def answer(self, name, prompt):
        """Stream one answer to `prompt` (ids), with a line of timing -> Answer."""
        self.switch(name)
        return stream_answer(self.model, self.tokenizer, prompt, self.args)

    def switch(self, name):
        if name == DENSE:
            self.model.use()
        else:
            self.model.routing = self.routing

    def warm(self, prompt):
        """Run the prompt once in both forms, untimed: kernels are made at the first use."""
        for name in (DENSE, PRUNED):
            self.switch(name)
            self.model.prefill([prompt])

    def kl(self, prompt, ids):
        """KL(dense || pruned), nats a token, along an answer `ids` to the prompt."""
        states = []
        for name in (DENSE, PRUNED):
            self.switch(name)
            # the same answer under both: each token is judged after the same past
            states.append(response_states(self.model, [(prompt, ids)])[0])
        with torch.inference_mode():
            return float(response_kl(self.model, *states).mean())


def use_pruned(model, args):
    """Route the model as the flags say, print it -> its Routing."""
    if args.schedule:
        model.use(args.schedule, args.router, kv=args.kv, forecaster=args.forecaster)
        what = args.schedule
    elif model.routing.schedule is not None:              # a folder that brings its own routing
        what = args.model
    else:
        model.use(**shipped(args.pruned, args.model))
        what = args.pruned
    mean = 100 * model.routing.schedule.mean
    print(f"pruned: {what}, {mean:.1f} % of tokens skip a block on average, router "
          f"{'trained' if model.routing.learned else model.routing.router}, K/V of skipped tokens "
          f"{'forecast' if model.routing.forecaster else model.routing.kv}")
    return model.routing


def ask_once(speaker, prompt):
    """One prompt (ids): the pruned answer, with --compare the dense one's beside it."""
    args = speaker.args
    print(f"prompt: {len(prompt)} tokens\n", flush=True)
    dense = None
    if args.compare:
        speaker.warm(prompt)                              # or the first one timed pays for both
        print("--- dense ---")
        dense = speaker.answer(DENSE, prompt)
        say_timing(DENSE, dense)
        print()
    print("--- pruned ---")
    answer = speaker.answer(PRUNED, prompt)
    say_timing(PRUNED, answer, dense)
    if dense and dense.ids:
        kl = speaker.kl(prompt, dense.ids)
        print(f"[KL(dense || pruned) along the dense answer: {kl:.4f} nats a token]")
    if args.show_skips and answer.computed is not None:
        print("\n--- the prompt, shaded by the share of blocks that each token skipped ---")
        print(shaded(speaker.tokenizer, prompt, answer.computed))


def chat(speaker, system):
    """Read lines, answer them with the history as prompt, until Ctrl-D."""
    who, turns, last = PRUNED, [], None                   # last: prompt and map for /skips
    print("type and press return; /dense, /pruned, /skips; Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        try:
            line = input(f"\n{who}> ").strip()
        except EOFError:                                  # Ctrl-D
            print()
            return
        except KeyboardInterrupt:                         # Ctrl-C at the prompt: a new line
            print()
            continue
        if line in ("/dense", "/pruned"):
            who = line[1:]
        elif line == "/skips":
            print("nothing was skipped yet" if last is None else shaded(speaker.tokenizer, *last))
        elif line:
            turns.append(("user", line))
            # the whole history is the prompt: it is routed anew, no cache goes from turn to turn
            prompt = chat_ids(speaker.tokenizer, turns, system)
            answer = speaker.answer(who, prompt)
            say_timing(who, answer)
            turns.append(("assistant", answer.text))
            if who == PRUNED and answer.computed is not None:
                last = prompt, answer.computed


def main():
    args = get_args()
    model, _ = start(args)
    tokenizer = load_tokenizer(args.model)
    speaker = Speaker(model, tokenizer, args)

    # a question, a file, or both: the file stands behind the question
    text = args.prompt
    if args.file:
        found = read_text(Path(args.file), "--file").strip()
        check(found, f"--file {args.file}: it is empty; give a text")
        text = f"{text}\n\n{found}" if text else found
    if text:
        ask_once(speaker, chat_ids(tokenizer, [("user", text)], args.system))
    else:
        chat(speaker, args.system)


if __name__ == "__main__":
    run(main)
