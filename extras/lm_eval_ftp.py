"""The model "ftp" for EleutherAI's lm-evaluation-harness (0.4.13): its tasks, on the routed model.

    pip install lm_eval==0.4.13
    python extras/lm_eval_ftp.py --model ftp --tasks arc_easy,piqa \\
        --model_args pretrained=smollm2,schedule=out/schedule_ft.json,router=out/router.safetensors
    python extras/lm_eval_ftp.py --model ftp --tasks wikitext --model_args pretrained=out/export

In: a model and its artefacts, or an exported folder, which is routed as it was exported. Out: the
harness's own. This is its command line, with one model more. A request's context is routed as a
prompt, its continuation runs as decoded tokens (protocol=joint routes them together, the paper's
way). Sequences are packed, not padded: --batch_size changes nothing.
"""
import inspect
import itertools
import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib.data import encode, load_tokenizer
from lib.evaluation import score_pairs
from lib.files import FTPError, check
from lib.flops import Meter
from lib.packing import pack
from lib.scoring import batches
from lib.stage import complain, pick_device, pick_dtype, run, versions
from model_ftp import FTPModel

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    why = f"lm-evaluation-harness can't be imported ({e}); pip install lm_eval==0.4.13"
    if __name__ == "__main__":
        sys.exit(complain(FTPError(why)))
    raise ImportError(why) from None

# arguments of FTPModel.use() beside schedule and router, and its defaults
ROUTING = {
    "prefill": "topk",
    "decode": "dense",
    "kv": "drop",
    "one_pass": False,
    "score": None,
    "forecaster": None,
    "mismatch": False,
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
GENERATION = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"}   # what we understand


@register_model("ftp")
class FTPLM(TemplateLM):
    """The harness's model. Arguments are those of FTPModel.from_pretrained and use(), and:

    protocol: "causal" or "joint". max_length: tokens of context and continuation at most (default
    the model's); contexts are cut at their start. scored: rolling texts are scored in pieces of
    this many tokens, each decoded after all of the window before it was routed as a prompt; at
    sparsity 0 that is the harness's number. max_tokens: tokens of a packed batch. device, dtype:
    as in evaluate.py. FTPError on anything else, and on artefacts that don't fit.
    """

    def __init__(self, pretrained="smollm2", schedule=None, router="static", protocol="causal",
                 max_length=None, scored=256, max_tokens=2048, dtype="auto", device=None, seed=0,
                 batch_size=None, max_batch_size=None, **routing):
        super().__init__()
        check_arguments(routing)
        check(protocol in ("causal", "joint"),
              f"protocol={protocol}: unknown; choose from causal, joint")
        for name, value in (("scored", scored), ("max_tokens", max_tokens)):
            check(isinstance(value, int) and value > 0,
                  f"{name}={value}: must be a whole number of at least 1")
        check(dtype in DTYPES, f"dtype={dtype}: unknown; choose from {', '.join(DTYPES)}")
        self._device = device_here(device)
        dtype, reason = pick_dtype(dtype, self._device)
        self.model = FTPModel.from_pretrained(pretrained, dtype, self._device)
        self.use(schedule, router, routing, seed)
        pack(self.model)
        self.meter = Meter(self.model)             # over all requests
        self.tokenizer = load_tokenizer(pretrained)
        self.protocol, self.scored, self.max_tokens = protocol, scored, max_tokens
        self.seed = seed
        most = self.model.config.max_len
        self.max_length = most if max_length is None else max_length
        check(isinstance(self.max_length, int) and 1 < self.max_length <= most,
              f"max_length={max_length}: must lie between 2 and the model's {most}")
        self.info = self.about(versions(self._device, dtype, reason))

    def use(self, schedule, router, routing, seed):
        """Route by the schedule given; without one, as an exported folder says, else not at all."""
        if schedule is not None:
            self.model.use(schedule, router, seed=seed, **routing)
            return
        given = [f"{k}={v}" for k, v in routing.items() if v != ROUTING[k]]
        given += [f"router={router}"] if router != "static" else []
        check(not given, f"--model_args {','.join(given)}: nothing to route without a schedule; "
                         "give schedule=")

    def about(self, made):
        """What is in use, for the harness's result file; also printed."""
        r = self.model.routing
        schedule, router = None, None
        if r.schedule is not None:
            schedule = {"id": r.schedule.id, "sparsity": r.schedule.sparsity}
            router = r.router.id if r.learned else r.router
            print(f"ftp: schedule {r.schedule.id} of mean sparsity {r.schedule.mean:.3f}, router "
                  f"{router}, prefill {r.prefill}, decode {r.decode}, kv {r.kv}")
        else:
            print("ftp: dense, no schedule is in use")
        return {"versions": made, "fingerprint": self.model.fingerprint, "protocol": self.protocol,
                "schedule": schedule, "router": router}

    def get_model_info(self):
        """For the harness's result file: what ran, and what was realised over all requests."""
        m = self.meter
        realised = {
            "sparsity_prefill": m.mean("prefill"),
            "sparsity_decode": m.mean("decode"),
            "flops_saved_prefill": m.saved("prefill"),
            "flops_saved_total": m.saved("prefill", "decode"),
        }
        return {"ftp": self.info | realised}

    # -- text and tokens

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self):
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt)

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    # -- the three kinds of requests

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(texts, context ids, continuation ids)] -> [(sum of log-probabilities, all greedy)]."""
        # the last token of a decoded continuation is never run
        most = self.max_length + (self.protocol == "causal")
        pairs = []
        for _, context, continuation in requests:
            check(0 < len(continuation) < most,
                  f"max_length={self.max_length}: a continuation of {len(continuation)} tokens; it "
                  "must have 1 or more, and fit")
            pairs.append((context[-(most - len(continuation)):], continuation))
        return score_pairs(self.model, pairs, self.protocol, self.max_tokens, meter=self.meter)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sum of the log-probabilities of each text, in the harness's windows.

        Every token counts once, after the whole of its window before it.
        """
        pieces, owner = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            for context, continuation in self.windows(text):
                new = self.pieces(context, continuation)
                pieces += new
                owner += [i] * len(new)
        total = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pieces) if pieces else []
        for i, (logp, _) in zip(owner, scores):
            total[i] += logp
        return total

    def windows(self, text):
        """The harness's windows of a text: [(context ids, continuation ids)]."""
        room = self.max_length - (self.protocol == "joint")
        rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, room, 1)
        return map(make_disjoint_window, rolling)

    def pieces(self, context, continuation):
        """A window as requests, each with all that comes before it as its context."""
        ids = context + continuation
        # a dense model has no prompt to route: one piece gives the same, sooner
        step = self.scored if self.model.routing.schedule is not None else len(continuation)
        return [(None, ids[:n], ids[n:n + step]) for n in range(len(context), len(ids), step)]

    def generate_until(self, requests, disable_tqdm=False):
        """Texts generated after each context, up to a stop sequence.

        Greedy unless the task samples (then one by one, seeded).
        """
        asked = [request.args for request in requests]
        out = [None] * len(asked)

        def setting(i):
            return json.dumps(asked[i][1], sort_keys=True)

        for _, group in itertools.groupby(sorted(range(len(asked)), key=setting), setting):
            self.generate_group(asked, list(group), out)
        return out

    def generate_group(self, asked, group, out):
        """Texts of the requests `group`, which share their settings, to their places in `out`."""
        settings = normalize_gen_kwargs(asked[group[0]][1])
        sampled, limit = settings["do_sample"], settings["max_gen_toks"]
        known = GENERATION if sampled else GENERATION | {"top_k"}
        odd = [k for k, v in settings.items() if k not in known and (k, v) != ("num_beams", 1)]
        check(not odd, f"--gen_kwargs: {', '.join(odd)} not supported; use do_sample, temperature, "
                       "top_p, until, max_gen_toks")
        check(limit < self.max_length, f"max_length={self.max_length}: no room for a prompt beside "
                                       f"max_gen_toks={limit}; lower that")
        until = handle_stop_sequences(list(settings["until"]), self.tokenizer.eos_token)
        prompts = []
        for i in group:
            context = self.tok_encode(asked[i][0])
            prompts.append((context[limit - self.max_length:], range(limit)))
        how = {"temperature": 0.0}
        if sampled:
            how = {"temperature": settings.get("temperature", 1.0),
                   "top_p": settings.get("top_p", 1.0)}
        for first, part in batches(prompts, 1 if sampled else self.max_tokens):
            ids = [a for a, _ in part]
            texts = self.generate_texts(ids, limit, until, seed=self.seed + group[first], **how)
            for j, text in enumerate(texts):
                out[group[first + j]] = postprocess_generated_text(text, until, None)

    def generate_texts(self, prompts, limit, until, **how):
        """Decoded texts of a batch, until each has a stop sequence or an end token."""
        new, texts = [[] for _ in prompts], [""] * len(prompts)
        ends = {*self.model.config.eos, self.eot_token_id}
        for step in self.model.stream(prompts, limit, eos=ends, meter=self.meter, **how):
            for j, token in enumerate(step):
                if token is not None:
                    new[j].append(token)
                    texts[j] = self.tokenizer.decode(new[j], skip_special_tokens=True)
            stopped = [any(u and u in text for u in until) for text in texts]
            if all(done or token is None for done, token in zip(stopped, step)):
                break
        return texts


def check_arguments(routing):
    """Refuse a misspelt --model_args; set what was not given."""
    known = [*inspect.signature(FTPLM.__init__).parameters][1:-1] + list(ROUTING)
    unknown = [k for k in routing if k not in ROUTING]
    check(not unknown,
          f"--model_args {', '.join(unknown)}: unknown; choose from {', '.join(known)}")
    for name, default in ROUTING.items():
        routing.setdefault(name, default)


def device_here(name):
    """The device asked for; the harness asks for cuda:0 unless told otherwise, GPU or not."""
    name = str(name or "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        return torch.device("cpu")
    return pick_device(name)


def main():
    try:
        cli_evaluate()
    except (ValueError, FileNotFoundError) as e:
        # what the harness's own command line and task lookup refuse: unknown tasks, bad files
        raised_in = traceback.extract_tb(e.__traceback__)[-1].filename
        if isinstance(e, FTPError) or not refuses(raised_in):
            raise
        raise FTPError(f"{e}; see --help, and the tasks by: lm-eval ls tasks") from None


def refuses(file):
    """Whether a file of the harness reads its command line or looks up its tasks."""
    return any(f"lm_eval/{part}" in Path(file).as_posix() for part in ("_cli", "config", "tasks"))


if __name__ == "__main__":
    run(main)
