"""What a span of a prompt is worth: how far the answer moves if the span is skipped.

    worth = span_worth(model, prompt, response, 8)      # (spans,) nats a response token

One span of neighbouring tokens skips all blocks from `first` on, nothing else does: the KL of the
response to the dense model's is what the span is worth. What lies before a span is the dense
model's in every case, so that it runs once for all spans.
"""
import torch

from lib.scoring import kl_divergence

MOST_TOKENS = 2048     # new tokens of the spans that run as one batch


def spans_of(n, size):
    """[(first, last + 1)] of the spans of a prompt of n tokens, without its first and last token,
    which never skip. An end that has nothing else is left out."""
    ends = [(max(a, 1), min(a + size, n - 1)) for a in range(0, n, size)]
    return [(a, b) for a, b in ends if b > a]


@torch.inference_mode()
def span_worth(model, prompt, response, size, first=1):
    """Worth of each of spans_of(len(prompt), size), (spans,) float32 on the CPU.

    model: dense here, whatever it was before. prompt, response: token ids; first: the block from
    which on a span skips. Nats a response token.
    """
    model.use()
    whole = model.new_cache(1)
    logits = model.prefill([prompt], whole)
    later = model.extend([response[:-1]], clone(whole, 1)) if len(response) > 1 else logits[:0]
    dense = torch.cat((logits, later))
    spans, worth = spans_of(len(prompt), size), []
    for group in batches(spans, len(prompt) + len(response)):
        worth += without_each(model, prompt, response, group, first, whole, dense)
    return torch.tensor(worth)


def batches(spans, n):
    """Spans in lists that run at once; n: tokens of prompt and response."""
    group, size = [], 0
    for span in spans:
        if group and size + n - span[1] > MOST_TOKENS:
            yield group
            group, size = [], 0
        group.append(span)
        size += n - span[1]
    yield group


def without_each(model, prompt, response, spans, first, whole, dense):
    """KL(dense || without the span) for each span, a list; whole: the dense prompt's cache."""
    cache = clone(whole, len(spans))
    for row, (a, b) in enumerate(spans):
        # what follows sees the keys before the span, in the first blocks its own as well
        cache.len[:first, row], cache.len[first:, row], cache.seen[row] = b, a, b
    new = [[*prompt[b:], *response[:-1]] for _, b in spans]
    rows = torch.arange(len(spans)).numpy()
    batch = model.batch(new, cache.seen[rows], rows)
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
