"""FTP in EleutherAI's lm-evaluation-harness (0.4.13): its tasks, its prompts, its scores, on the routed model.

    pip install lm_eval==0.4.13
    python lm_eval_ftp.py --model ftp --model_args pretrained=smollm2,schedule=out/schedule_ft.json,router=out/router.safetensors --tasks arc_easy,piqa
    python lm_eval_ftp.py --model ftp --model_args pretrained=smollm2,schedule=s.json,kv=keep,forecaster=f.safetensors --tasks wikitext --limit 4

Registers the model "ftp", then is the harness's own command line. A request's context is routed as a prompt, its continuation runs as decoded
tokens (protocol=joint routes them together, the paper's way). Sequences are packed, not padded: --batch_size changes nothing.
"""
import itertools
import json
import sys

import torch

from common import check, complain, pick_dtype, run, versions
from data import encode, load_tokenizer
from evaluate import score_pairs
from model_ftp import FTPModel, batches
from router import Router

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    why = f"lm-evaluation-harness can't be imported ({e}); pip install lm_eval==0.4.13"
    if __name__ == "__main__":
        sys.exit(complain(why))
    raise ImportError(why) from None


@register_model("ftp")
class FTPLM(TemplateLM):
    """The arguments are those of FTPModel.from_pretrained and use(), and:

    protocol: "causal" or "joint". max_length: tokens of context and continuation at most (default the model's); contexts are cut at their
    start. scored: loglikelihood_rolling scores each window in pieces of this many tokens, each decoded after all of the window before it was
    routed as a prompt; at sparsity 0 that is the harness's number. max_tokens: tokens of a packed pass. device, dtype: as in evaluate.py.
    """
    def __init__(self, pretrained="smollm2", schedule=None, router="static", prefill="topk", decode="dense", kv="drop", one_pass=False, score=None,
                 forecaster=None, protocol="causal", max_length=None, scored=256, max_tokens=2048, dtype="float32", device=None, seed=0,
                 mismatch=False, batch_size=None, max_batch_size=None):
        super().__init__()
        check(protocol in ("causal", "joint"), f"protocol={protocol}: unknown; choose from causal, joint")
        check(min(scored, max_tokens) > 0, f"scored={scored},max_tokens={max_tokens}: must be at least 1")
        device = torch.device(device or "cuda")  # the harness asks for cuda:0 unless told otherwise
        self._device = torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device
        check(dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype), f"dtype={dtype}: unknown; give auto, float32 or bfloat16")
        dtype, why = pick_dtype(dtype, self._device)
        self.model = FTPModel.from_pretrained(pretrained, dtype, self._device).pack()
        check(router == "static" or schedule is not None, f"router={router}: it needs the schedule it was trained with; give schedule=")
        router = Router.load(router) if router not in ("static", "random", "attention") else router
        self.model.use(schedule, router, prefill=prefill, decode=decode, kv=kv, one_pass=one_pass, score=score, forecaster=forecaster, seed=seed,
                       mismatch=mismatch)
        self.tokenizer, self.protocol, self.scored, self.max_tokens, self.seed = load_tokenizer(pretrained), protocol, scored, max_tokens, seed
        self.max_length = max_length or self.model.config.max_len
        check(1 < self.max_length <= self.model.config.max_len, f"max_length={max_length}: must lie between 2 and the model's {self.model.config.max_len}")
        schedule = self.model.schedule and {"id": self.model.schedule.id, "sparsity": self.model.schedule.sparsity}
        self.info = {"versions": versions(self._device, dtype, why), "fingerprint": self.model.fingerprint, "protocol": protocol,
                     "schedule": schedule, "router": router.id if isinstance(router, Router) else router}

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self):
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def get_model_info(self):
        """For the harness's result file: what ran, and what was realised over all requests."""
        st = self.model.stats
        return {"ftp": self.info | {"sparsity_prefill": st.mean("prefill"), "sparsity_decode": st.mean("decode"),
                                    "flops_saved_prefill": st.saved("prefill"), "flops_saved_total": st.saved("prefill", "decode")}}

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(texts, context ids, continuation ids)] -> [(sum of log-probabilities, all greedy)]."""
        most, pairs = self.max_length + (self.protocol == "causal"), []  # the last token of a decoded continuation is never run
        for _, context, continuation in requests:
            check(0 < len(continuation) < most, f"max_length={self.max_length}: a continuation of {len(continuation)} tokens; it must have 1 or more, and fit")
            pairs.append((context[-(most - len(continuation)):], continuation))
        return score_pairs(self.model, pairs, self.protocol, self.max_tokens)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sum of the log-probabilities of each text, in the harness's windows: every token once, after the whole of its window before it."""
        pieces, owner = [], []
        for i, (text,) in enumerate(r.args for r in requests):
            for context, continuation in map(make_disjoint_window, get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length - (self.protocol == "joint"), 1)):
                ids, step = context + continuation, self.scored if self.model.schedule else len(continuation)
                pieces += [(None, ids[:n], ids[n:n + step]) for n in range(len(context), len(ids), step)]
                owner += [i] * (len(pieces) - len(owner))
        total = [0.0] * len(requests)
        for i, (logp, _) in zip(owner, self._loglikelihood_tokens(pieces) if pieces else []):
            total[i] += logp
        return total

    def generate_until(self, requests, disable_tqdm=False):
        """Texts generated after each context, up to a stop sequence; greedy unless the task samples (then one by one, seeded)."""
        out, asked = [None] * len(requests), [r.args for r in requests]
        setting = lambda i: json.dumps(asked[i][1], sort_keys=True)
        for _, same in itertools.groupby(sorted(range(len(asked)), key=setting), setting):
            group = list(same)
            kw = normalize_gen_kwargs(asked[group[0]][1])
            sampled, limit = kw["do_sample"], kw["max_gen_toks"]
            until = handle_stop_sequences(list(kw["until"]), self.tokenizer.eos_token)
            known = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"} | (set() if sampled else {"top_k"})
            odd = {k: v for k, v in kw.items() if k not in known and (k, v) != ("num_beams", 1)}
            check(not odd, f"--gen_kwargs: {', '.join(odd)} not supported; use do_sample, temperature, top_p, until, max_gen_toks")
            check(limit < self.max_length, f"max_length={self.max_length}: no room for a prompt beside max_gen_toks={limit}; lower that")
            prompts = [(self.tok_encode(asked[i][0])[limit - self.max_length:], range(limit)) for i in group]
            for first, part in batches(prompts, 1 if sampled else self.max_tokens):
                ids, texts = [[] for _ in part], [""] * len(part)
                for step in self.model.stream([a for a, _ in part], limit, kw.get("temperature", 1.0) if sampled else 0.0, kw.get("top_p", 1.0),
                                              self.seed + group[first], {*self.model.config.eos, self.eot_token_id}):
                    for j, t in enumerate(step):
                        if t is not None:
                            ids[j].append(t)
                            texts[j] = self.tokenizer.decode(ids[j], skip_special_tokens=True)
                    if all(t is None or any(u and u in s for u in until) for t, s in zip(step, texts)):
                        break
                for j, s in enumerate(texts):
                    out[group[first + j]] = postprocess_generated_text(s, until, None)
        return out


if __name__ == "__main__":
    run(cli_evaluate)
