"""Checks of what is handed to the model from Python: one line each that names the mend."""
import math
from pathlib import Path

import torch

from lib.artefacts import SELECTIONS
from lib.files import FTPError, check


def is_path(router):
    """Whether a router is given as the path of its file."""
    return isinstance(router, (str, Path)) and str(router) not in SELECTIONS


def id_lists(seqs):
    """Sequences of token ids as a list of lists. FTPError for a text, a flat list, or no token."""
    mend = "give lists of token ids, like [tokenizer(text)[\"input_ids\"]]"
    check(not isinstance(seqs, (str, bytes, dict)), f"prompts: a text is no list of ids; {mend}")
    if hasattr(seqs, "tolist"):
        seqs = seqs.tolist()
    try:
        seqs = [s.tolist() if hasattr(s, "tolist") else list(s) for s in seqs]
    except TypeError:
        raise FTPError(f"prompts: ids of one sequence are no list of sequences; {mend}") from None
    check(seqs and all(seqs), "empty prompt: every sequence needs at least one token")
    whole = all(type(t) is int for s in seqs for t in s)
    check(whole, f"prompts: they hold something that is no whole number; {mend}")
    return seqs


def check_place(dtype, device):
    """dtype (or its name) and device as torch has them; FTPError for what no model can run on."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    check(floating, "dtype: give torch.float32, torch.bfloat16 or torch.float16")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise FTPError(f"device={device}: no such device; give cpu or cuda") from None
    check(device.type in ("cpu", "cuda"), f"device={device}: not supported; give cpu or cuda")
    check(device.type == "cpu" or torch.cuda.is_available(),
          f"device={device}: no CUDA here; give cpu")
    return dtype, device


def check_input(input_ids):
    """FTPError unless they are a tensor (B, T) of whole numbers."""
    whole = torch.is_tensor(input_ids) and not input_ids.is_floating_point()
    check(whole and input_ids.dim() == 2, "input_ids: give a tensor (B, T) of token ids; for lists "
                                          "there are prefill() and generate()")


def check_ids(seqs, vocab):
    """FTPError where an id lies outside the vocabulary."""
    low, high = min(map(min, seqs)), max(map(max, seqs))
    check(low >= 0 and high < vocab, f"token id {low if low < 0 else high} is outside the "
                                     f"vocabulary of {vocab}; use the model's tokenizer")


def is_number(value):
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_generation(prompts, max_new_tokens, temperature, top_p, max_len):
    """FTPError where arguments of generate() are out of range."""
    check(isinstance(max_new_tokens, int) and max_new_tokens > 0,
          f"max_new_tokens={max_new_tokens}: must be a whole number of at least 1")
    check(is_number(temperature) and temperature >= 0,
          f"temperature={temperature}: must be at least 0; 0 is greedy")
    check(is_number(top_p) and 0 < top_p <= 1, f"top_p={top_p}: must lie in (0, 1]")
    longest = max(map(len, prompts))
    check(longest + max_new_tokens - 1 <= max_len,      # the last new token is not run
          f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
          f"{max_len} (max_position_embeddings); shorten the prompt or lower max_new_tokens")
