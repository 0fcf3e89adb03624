"""What the rival methods share: FLOPs of prompts, sizes that meet a target, folders of weights.

A method is a generator of (target, artefact, notes), the artefact a Schedule or a Pruned.
"""
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from lib import files
from lib.checkpoint import load_weights, read_config, weight_files
from lib.files import check, save_json
from lib.flops import Meter, prefill_flops
from lib.scoring import batches, response_states

FORMAT = "ftp-pruned-1"     # of the pruned.json that lies beside a pruned model's weights
FROM_SOURCE = (".json", ".jinja", ".model")     # config and tokenizer, as the original has them


class Pruned(NamedTuple):
    """A pruned model that is to become a folder.

    tensors: {Hugging Face name: tensor}. changes: of config.json, None takes a key out.
    model_class: what loads the folder again.
    """
    tensors: dict
    changes: dict
    model_class: type


# ------------------------------------------------------------------------------------------------
# sizes


def prompt_flops(config, samples, sparsity=None, kv="drop"):
    """FLOPs of the blocks over the samples' prompts; sparsity: a list over blocks, None: dense;
    kv: "drop" or "keep" keys and values of skipped tokens."""
    sparsity = sparsity or [0.0] * config.n_layer
    return sum(prefill_flops(config, len(prompt), sparsity, kv, head=0) for prompt, _ in samples)


def nearest(level, sizes, cost, dense):
    """The size whose share of FLOPs saved, 1 - cost(size) / dense, is nearest to level."""
    def distance(size):
        return abs(1 - cost(size) / dense - level)
    return min(sizes, key=distance)


def realised(model, samples, base=None):
    """Share of the prompts' block FLOPs saved on the samples, counted while they run.

    base: the Config that savings are counted against, of a pruned model the original's.
    """
    meter = Meter(model, base)
    response_states(model, samples, meter=meter)
    return meter.saved("prefill")


# ------------------------------------------------------------------------------------------------
# texts, tensors, folders


def text_batches(model, samples):
    """The samples as texts, prompt and response in one: a list of Batches that run by themselves.

    No method that judges by them skips a token: a text may then run as one prompt.
    """
    groups = [group for _, group in batches(samples)]
    return [model.batch([prompt + response for prompt, response in group]) for group in groups]


def read_tensors(folder):
    """{Hugging Face name: tensor} of a checkpoint."""
    tensors = {}
    for file in weight_files(folder):
        found, _ = files.read_tensors(file, "--model")
        tensors |= found
    return tensors


def load_as(model_class, config_class, path, dtype, device, fit=None):
    """A pruned model's folder, loaded as FTPModel.from_pretrained does; fit: of load_weights()."""
    folder, config = read_config(path, config_class)
    with torch.device("meta"):                      # no storage before the weights come
        model = model_class(config)

    def device_of(name):
        return device

    load_weights(model, folder, dtype, device_of, fit)
    model.name = str(path)
    return model.eval()


def as_one_of(cls, model):
    """A loaded FTPModel as one of the subclass `cls`: the same weights, routed as it is."""
    devices = {block.norm1.weight.device for block in model.blocks}
    check(len(devices) == 1, "--device_map: rivals run on one device; leave it out")
    made = cls.__new__(cls)
    made.__dict__.update(vars(model))
    return made


def pruned_config(source, changes):
    """config.json of a pruned model, a dict: the original's with the changes."""
    old = json.loads((source / "config.json").read_text())
    new = old | changes
    if changes.get("model_type"):                   # a type of our own: which family it was
        new["sliced_from"] = old["model_type"]
    gone = [key for key, value in changes.items() if value is None]
    return {key: value for key, value in new.items() if key not in gone}


def write_folder(source, target, made, meta, model, samples):
    """Write a Pruned as a model folder, with config and tokenizer of `source`.

    The folder appears whole or not at all. meta: what pruned.json tells; model: the original.
    Returns the share of prompt FLOPs that the written model saves on the samples.
    """
    tmp = Path(f"{target}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for file in source.iterdir():
        # an index would name the original's files
        if file.suffix in FROM_SOURCE and not file.name.endswith(".index.json"):
            shutil.copy(file, tmp)
    save_json(tmp / "config.json", pruned_config(source, made.changes))
    tensors = {name: t.contiguous() for name, t in made.tensors.items()}
    save_file(tensors, tmp / "model.safetensors", {"format": "pt"})

    # what was written is what is measured
    pruned = made.model_class.from_pretrained(tmp, model.dtype, model.device)
    saved = realised(pruned, samples, model.config)
    save_json(tmp / "pruned.json", {"format": FORMAT, **meta, "flops_saved": saved})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)
    return saved
