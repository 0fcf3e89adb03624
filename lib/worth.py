"""What a span of a prompt is worth: how far the answer moves if the span is skipped.

    worth = span_worth(model, prompt, response, 8)      # (spans,) nats a response token

One span of neighbouring tokens skips all blocks from `first` on, nothing else does: the KL of the
response to the dense model's is what the span is worth. What lies before a span is the dense
model's in every case, so that it runs once for all spans.
"""
import json
import math
from pathlib import Path

import torch

from lib.data import SHIPPED, read_rows, save_lines, weights_of
from lib.files import check, digest, misfit
from lib.processes import gather, rank, shard, world
from lib.scoring import MOST_TOKENS, batches, kl_divergence
from lib.stage import progress

LEAST = 1e-5           # nats: what is worth less is noise of rounding
BEST = 9.0             # log worth of tokens that never skip


def spans_of(n, size):
    """[(first, last + 1)] of the spans of a prompt of n tokens, without its first and last token,
    which never skip. An end that has nothing else is left out."""
    ends = [(max(a, 1), min(a + size, n - 1)) for a in range(0, n, size)]
    return [(a, b) for a, b in ends if b > a]


def on_tokens(n, size, values):
    """A value a span of a prompt of n tokens -> one a token, (n,); its ends have the largest."""
    of_token = torch.full((n,), BEST)
    for (a, b), value in zip(spans_of(n, size), values):
        # of a span that a quota cuts in two the later tokens come first
        of_token[a:b] = value + torch.linspace(0, 1e-3, b - a)
    return of_token


@torch.inference_mode()
def span_worth(model, prompt, response, size, first=1):
    """Worth of each of spans_of(len(prompt), size), (spans,) float32 on the CPU.

    model: dense here, whatever it was before. prompt, response: token ids; first: the block from
    which on a span skips. Nats a response token.
    """
    model.use()
    whole = model.new_cache(1)
    logits = model.prefill([prompt], whole)
    after = model.extend([response[:-1]], clone(whole, 1)) if len(response) > 1 else logits[:0]
    dense = torch.cat((logits, after))
    spans, worth = spans_of(len(prompt), size), []
    later = [(prompt[b:], response) for _, b in spans]      # what runs without each span
    for i, group in batches(later, MOST_TOKENS) if spans else ():
        some = spans[i:i + len(group)]
        worth += without_each(model, prompt, response, some, first, whole, dense)
    return torch.tensor(worth)


def without_each(model, prompt, response, spans, first, whole, dense):
    """KL(dense || without the span) for each span, a list; whole: the dense prompt's cache."""
    cache = clone(whole, len(spans))
    for row, (a, b) in enumerate(spans):
        # what follows sees the keys before the span, in the first blocks its own as well
        cache.len[:first, row], cache.len[first:, row], cache.seen[row] = b, a, b
    new = [[*prompt[b:], *response[:-1]] for _, b in spans]
    batch = model.batch(new, cache.seen)
    x = model.run(model.extend_step, batch, cache, None).x
    found = []
    for row, n in enumerate(batch.lengths.tolist()):
        end = int(batch.start[row]) + n
        routed = model.logits(x[end - len(response):end])
        found.append(float(kl_divergence(dense, routed).mean()))
    return found


def clone(cache, rows):
    """A KVCache of so many rows, each holding what the one row of `cache` holds."""
    made = type(cache)(cache.config, rows, cache.dtype)
    made.k = [None if k is None else k.repeat(rows, 1, 1, 1) for k in cache.k]
    made.v = [None if v is None else v.repeat(rows, 1, 1, 1) for v in cache.v]
    made.len = cache.len.repeat(rows, 1)
    made.seen = cache.seen.repeat(rows)
    return made


class Oracle:
    """The router that knows what each span is worth: no real one can, as it asks the answer.

    It bounds what a router can reach, and is what --teach worth shows to one. labels: {prompt (a
    tuple of ids): list of its spans' worth}; size: tokens of a span.
    """
    def __init__(self, labels, size):
        self.labels, self.size = labels, size

    @classmethod
    def of_samples(cls, model, samples, size, path):
        """The Oracle of samples [(prompt ids, response ids)]; what was measured before is read.

        path: a .jsonl that is written anew with each sample, so that an interrupted run goes on.
        What the embedded model's own samples are worth is shipped.
        """
        weights = weights_of(model)
        shipped, own = read_worth(SHIPPED / f"{weights}-worth{size}.jsonl"), read_worth(path)
        known = shipped | own
        missing = [s for s in samples if sample_id(weights, size, *s) not in known]
        n = world()
        for i in progress(range(0, len(missing), n), desc="worth of spans", unit="sample"):
            # one sample a rank
            found = {sample_id(weights, size, *s): span_worth(model, *s, size).tolist()
                     for s in shard(missing[i:i + n])}
            for part in gather(found):
                own |= part
            if rank() == 0:
                write_worth(path, own)
        known |= own
        labels = {tuple(prompt): known[sample_id(weights, size, prompt, response)]
                  for prompt, response in samples}
        return cls(labels, size)

    def __call__(self, batch, scores, s):
        """log worth of each token's span, (N,) float32; the first and the last token the most."""
        found = [self.of_prompt(tuple(ids)) for ids in batch.seqs]
        return torch.cat(found).to(scores.value.device)

    def of_prompt(self, prompt):
        """The same of one prompt, (len(prompt),)."""
        values = [math.log(max(worth, LEAST)) for worth in self.labels[prompt]]
        return on_tokens(len(prompt), self.size, values)

    def margins(self, batch, scores, s, free):
        """log worth of the free tokens, as a router's margin: of deviation 1, above 0 in a share
        1 - s of them."""
        value = self(batch, scores, s)[free]
        return (value - value.quantile(s)) / value.std().clamp(min=1e-6)

    def as_dict(self):
        """What artefacts store of it."""
        return {"worth_of_spans": self.size, "prompts": len(self.labels)}


# ------------------------------------------------------------------------------------------------
# what was measured, one sample a line


def sample_id(weights, size, prompt, response):
    """Names what is measured: the model, the span, the sample."""
    return digest([weights, size, list(prompt), list(response)])


def read_worth(path):
    """{sample_id: worth of its spans} of a file, {} where there is none. FTPError if damaged."""
    if not Path(path).exists():
        return {}
    rows = read_rows(path, "--teach worth")
    for row in rows:
        wrong = misfit(row, {"sample": str, "worth": [float]})
        check(not wrong, f"--teach worth: {path} is damaged ({wrong}); remove it, to measure anew")
    return {row["sample"]: row["worth"] for row in rows}


def write_worth(path, known):
    """Write what is known, whole or not at all."""
    save_lines(path, [json.dumps({"sample": name, "worth": [round(w, 6) for w in worth]})
                      for name, worth in known.items()])
