"""Prompts with their responses: how they run, and how two models are compared on them.

A sample is (prompt ids, response ids). The prompt is routed as a whole, the response runs as new
tokens after it, block by block: at each block first all prompts, then all responses over the keys
that the prompts left there. So a block's keys live no longer than the block runs, and what is
between two blocks can be kept and gone on from.
"""
from dataclasses import dataclass

import torch

# Of samples that run together: a GPU needs many at once to be busy. Groups never depend on the
# number of ranks.
MOST_TOKENS = 16384 if torch.cuda.is_available() else 2048


def batches(samples, max_tokens=MOST_TOKENS):
    """Groups of neighbouring samples of at most max_tokens together.

    Yields (index of the first, list of samples).
    """
    group, first, size = [], 0, 0
    for i, (prompt, response) in enumerate(samples):
        n = len(prompt) + len(response)
        if group and size + n > max_tokens:
            yield first, group
            group, first, size = [], i, 0
        group.append((prompt, response))
        size += n
    yield first, group


@dataclass(frozen=True)
class Pair:
    """Prompts and responses of some samples, packed. owner (R,): the sample of each response
    token; rows (R,): where its prediction stands in the prompts' states with the responses' behind
    them."""
    prompts: object
    responses: object
    owner: torch.Tensor
    rows: torch.Tensor


def make_pair(model, samples):
    """Pair of samples [(prompt ids, response ids)], none of them empty."""
    prompts, responses = ([list(s[i]) for s in samples] for i in (0, 1))
    p = model.batch(prompts, last_only=True)
    r = model.batch(responses, p.lengths)
    owner, rows, n = [], [], int(p.lengths.sum())
    for b, response in enumerate(responses):
        # the prompt's last token predicts the first one, each of the others the next
        first = n + int(r.start[b])
        owner += [b] * len(response)
        rows += [int(p.start[b] + p.lengths[b]) - 1, *range(first, first + len(response) - 1)]
    return Pair(p, r, torch.tensor(owner), torch.tensor(rows))


def begin_pair(model, pair):
    """The States before block 0, (of the prompts, of the responses)."""
    return model.begin(pair.prompts), model.begin(pair.responses)


def step_pair(model, l, pair, states, meter=None):
    """Route and run block l on prompts and responses: States -> States."""
    cache = model.new_cache(len(pair.prompts.lengths))
    prompts = model.prefill_step(l, pair.prompts, states[0], cache, meter)
    responses = model.extend_step(l, pair.responses, states[1], cache, meter)
    return prompts, responses


def predicting(pair, states):
    """Hidden states (R, d) of the rows that predict the response tokens."""
    x = torch.cat([state.x for state in states])
    return x[pair.rows.to(x.device)]


def run_pair(model, pair, meter=None, first=0, states=None):
    """All blocks from `first` on -> States."""
    states = begin_pair(model, pair) if states is None else states
    for l in range(first, model.config.n_layer):
        states = step_pair(model, l, pair, states, meter)
    return states


def response_states(model, samples, max_tokens=MOST_TOKENS, joint=False, meter=None):
    """Last hidden states (R, d) that predict the responses, and the sample of each (R,).

    The quantity by which a routed model is compared with its teacher. joint: a response is routed
    with its prompt (the paper's protocol), which no generation can reproduce.
    """
    found, owners = [], []
    with torch.inference_mode():
        for first, group in batches(samples, max_tokens):
            pair = make_pair(model, group)
            if joint:
                x = joint_states(model, group, pair, meter)
            else:
                x = predicting(pair, run_pair(model, pair, meter))
            check_states(model, group, x)
            found.append(x)
            owners.append(pair.owner + first)
    return torch.cat(found), torch.cat(owners)


@torch.inference_mode()
def after_prompt(model, seqs, n_prompt):
    """Logits that are causal under routing: prompts as wholes, what follows as new tokens.

    seqs: lists of token ids, n_prompt (B,): how many of each are its prompt, at least one. Returns
    a list of (len - n_prompt + 1, vocab), from each prompt's last token on.
    """
    cache = model.new_cache(len(seqs))
    first = model.prefill([s[:n] for s, n in zip(seqs, n_prompt)], cache)
    out = [[logits] for logits in first.split(1)]
    longer = [b for b, (s, n) in enumerate(zip(seqs, n_prompt)) if len(s) > n]
    if longer:
        new = [seqs[b][n_prompt[b]:] for b in longer]
        logits = model.extend(new, cache, longer)
        for b, part in zip(longer, logits.split([len(s) for s in new])):
            out[b].append(part)
    return [torch.cat(parts) for parts in out]


def joint_states(model, group, pair, meter):
    """The same rows of prompts and responses that are routed together."""
    batch = model.batch([[*prompt, *response] for prompt, response in group])
    state = model.run(model.prefill_step, batch, None, meter)
    return state.x[joint_rows(batch, group).to(state.x.device)]


def joint_rows(batch, group):
    """Rows (R,) of a Batch of whole texts that predict the response tokens, on its device."""
    rows = []
    for start, (prompt, response) in zip(batch.start.tolist(), group):
        first = start + len(prompt) - 1
        rows += range(first, first + len(response))
    return torch.tensor(rows, device=batch.every.device)


def check_states(model, group, x):
    """FTPError naming block and token where states are not finite: the path that generation runs
    goes over them again and tells."""
    if x.sum(dtype=torch.float32).isfinite():
        return
    cache = model.new_cache(len(group))
    model.prefill([prompt for prompt, _ in group], cache)
    model.extend([response for _, response in group], cache)


def by_sample(values, owner):
    """Mean of values (R,) over each sample, (samples,) float32 on the CPU."""
    n = owner.bincount()
    return torch.zeros(len(n)).index_add(0, owner, values.float().cpu()) / n


def kl_divergence(teacher, student):
    """KL(teacher || student) of next tokens, nats: logits (M, vocab) -> (M,) float32."""
    t, s = (z.float().log_softmax(-1) for z in (teacher, student))
    return (t.exp() * (t - s)).sum(-1)


def response_kl(model, teacher, student, rows=1024):
    """KL(dense || routed) of hidden states (R, d), by the head of `model`, `rows` at a time."""
    pieces = zip(teacher.split(rows), student.split(rows))
    return torch.cat([kl_divergence(model.logits(t), model.logits(s)) for t, s in pieces])


def spread_states(model, samples, shard, joint=False, meter=None):
    """response_states() of this rank's share: a list of (group of samples, states (R, d), owner).

    shard: lib/processes.shard. The groups are the same whatever the number of ranks, and with them
    every rounding.
    """
    groups = [group for _, group in batches(samples)]
    return [(g, *response_states(model, g, joint=joint, meter=meter)) for g in shard(groups)]
