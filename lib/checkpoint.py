"""Checkpoints: where models lie, how their tensors are read, and how a model is known again."""
import hashlib
import json
import os
import sys
from dataclasses import asdict
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from lib.config import Config
from lib.files import FTPError, check, first_line, load_json, misfit
from lib.gguf import from_gguf

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("FTP_HOME", ROOT / "models"))  # where "smollm2" lies
PICKLED = (
    "; pickled weights are not read, as reading them can run code: convert them once, in a place "
    'you trust it, by python -c "from transformers import AutoModelForCausalLM as M, '
    "AutoTokenizer as T; [X.from_pretrained('OLD').save_pretrained('NEW') for X in (M, T)]\"")

# ------------------------------------------------------------------------------------------------
# finding a checkpoint

EMBEDDED = ("smollm2", "qwen2.5-coder-1.5b")  # what prepare.py fetches
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"]
SECOND_COPIES = ["consolidated*", "original/*"]  # of the weights: Mistral's, LLaMA's


def find_model(path):
    """Folder of a model.

    path: one of EMBEDDED (made by prepare.py), a local folder, a GGUF file (converted once, into
    models/gguf), or a hub id, which is fetched into the hub's cache. FTPError on anything else.
    """
    check(isinstance(path, (str, Path)) and str(path), f"--model {path!r}: give a name or a path")
    name, path = str(path), Path(path)
    if name in EMBEDDED:
        folder = HOME / name
        check((folder / "config.json").exists(),
              f"--model {name}: not there yet; run `python prepare.py --model {name}` first")
        return folder
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return converted(path.resolve())
    if path.is_file():
        mend = PICKLED if path.suffix in (".bin", ".pt", ".pth") else ""
        raise FTPError(f"--model {path}: a {path.suffix or 'plain'} file; give the folder of a "
                       f"safetensors checkpoint, or a .gguf file{mend}")
    check(name.count("/") == 1 and not name.startswith((".", "/", "~")),
          f'--model {name}: no such folder; give "smollm2", a folder, or a hub id like owner/name')
    return fetched(name)


def converted(file):
    """Folder of a GGUF file's weights and tokenizer, written when the file is first met."""
    stat = file.stat()
    made_from = f"{file} {stat.st_size} {stat.st_mtime_ns}"  # a changed file is converted anew
    mark = hashlib.sha256(made_from.encode()).hexdigest()[:8]
    folder = HOME / "gguf" / f"{file.stem}-{mark}"
    if not (folder / "config.json").exists():
        from_gguf(file, folder)
    return folder


def fetched(name):
    """Folder of a hub id in the hub's cache."""
    from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=SECOND_COPIES)
    except Exception as e:  # the client raises many kinds, all meaning the same to the user
        raise FTPError(f"--model {name}: not fetched from the hub ({first_line(e)}); "
                       "check the id, or give a local folder") from None
    return Path(folder)


def weight_files(folder):
    """The safetensors files of a checkpoint, a list of paths.

    model.safetensors, else the shards that its index names, else all there are. FTPError where one
    is missing, or there are none.
    """
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = [folder / name for name in indexed(folder / "model.safetensors.index.json")]
    files = files or sorted(folder.glob("*.safetensors"))
    check(files, f"--model: no .safetensors file in {folder}; give a folder that has them{PICKLED}")
    for f in files:
        check(os.path.exists(f), f"--model: {folder} lacks {f.name[:60]}, which its index names; "
                                 "fetch the whole checkpoint")
    return files


def indexed(index):
    """Names of the files that a sharded checkpoint's index names; none without an index."""
    if not index.exists():
        return []
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"--model: {index} is damaged ({e}); fetch it again") from None
    damaged = f"--model: {index} is damaged (no map of file names); fetch it again"
    check(not misfit(content, {"weight_map": dict}), damaged)
    names = list(content["weight_map"].values())
    check(not misfit(names, [str]), damaged)
    return sorted(set(names))


# ------------------------------------------------------------------------------------------------
# reading a checkpoint

def read_config(path, config_class=Config):
    """The folder of a model and its shape: (Path, Config). Arguments as find_model()."""
    folder = find_model(path)
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    ends = read_json(generation) if generation.exists() else {}
    return folder, config_class.from_hf(hf, f"--model {path}", ends)


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"--model: {file} is not readable ({e}); "
                       "give a Hugging Face model folder") from None


OUTSIDE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
INSIDE = {                    # of a block; qkv_proj holds three of a checkpoint's tensors
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_parts(name, config):
    """Our parameter name -> [(name in a Hugging Face checkpoint, rows of ours that it fills)]."""
    if not name.startswith("blocks."):
        return [(OUTSIDE.get(name, name), slice(None))]
    _, l, module, leaf = name.split(".")
    layer = f"model.layers.{l}"
    if module != "qkv_proj":
        return [(f"{layer}.{INSIDE.get(module, module)}.{leaf}", slice(None))]
    c = config.block(int(l))
    sizes = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    edges = accumulate(sizes, initial=0)
    return [(f"{layer}.self_attn.{part}_proj.{leaf}", slice(*rows))
            for part, rows in zip("qkv", pairwise(edges))]


def load_weights(model, folder, dtype, device_of=lambda name: "cpu", fit=None):
    """Give a model that has no storage yet its weights; returns the model, frozen.

    model: built on the "meta" device. Each tensor goes from the memory-mapped file straight to its
    place, dtype and device, so that the weights are held once. device_of: our name of a parameter
    -> its device. fit: (tensor, wanted shape) -> tensor, changes what a file holds before it is
    checked. FTPError on anything missing, unknown, misshapen, NaN or infinite.
    """
    owed = {}                                # name in the checkpoint -> our name, rows it fills
    for name, _ in model.named_parameters():
        if not (name == "head.weight" and model.config.tied):
            for theirs, rows in hf_parts(name, model.config):
                owed[theirs] = name, rows
    for file in weight_files(folder):
        try:
            for theirs in tensor_names(file):
                if theirs in owed:
                    name, rows = owed.pop(theirs)
                    place = storage(model, name, dtype, device_of)[rows]
                    fill(place, file, theirs, fit)
                else:
                    refuse_unknown(theirs, file)
        except FTPError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise FTPError(f"--model: {file} is damaged ({first_line(e)}); "
                           "fetch it again") from None
    check(not owed, f"--model: {folder} lacks {len(owed)} tensors, the first "
                    f"{next(iter(owed), None)}; give the whole checkpoint")
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model


def tensor_names(file):
    with safe_open(file, "pt") as f:
        return list(f.keys())


def refuse_unknown(name, file):
    """FTPError on a tensor of the model itself that nothing asks for (a second time).

    Older checkpoints store the rotary frequencies, which follow from the config.
    """
    known = not name.startswith("model.") or name.endswith("inv_freq")
    check(known, f"--model: {file.name} has a tensor {name} twice, or one that this family has "
                 "not; give a plain checkpoint")


def storage(model, name, dtype, device_of):
    """The data of a parameter, which gets its storage when first asked for."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    parameter = getattr(owner, leaf)
    if parameter.is_meta:
        data = torch.empty_like(parameter, dtype=dtype, device=device_of(name))
        parameter = nn.Parameter(data, requires_grad=False)
        setattr(owner, leaf, parameter)
    return parameter.data


def fill(place, file, name, fit):
    """Copy the tensor `name` of a file to its place, checked."""
    with safe_open(file, "pt") as f:  # opened for each anew: mapped pages go when it closes
        tensor = f.get_tensor(name)
    if fit is not None:
        tensor = fit(tensor, place.shape)
    check(tensor.shape == place.shape,
          f"--model: {name} in {file.name} has shape {tuple(tensor.shape)}, config.json asks for "
          f"{tuple(place.shape)}; give a matching folder")
    ends = tensor.aminmax()           # reads it once, copies nothing; NaN where one value is NaN
    finite = all(v.to(place.dtype).isfinite() for v in ends)
    check(finite, f"--model: {name} in {file.name} has NaN or infinite values; fetch it again")
    place.copy_(tensor)


def exported_routing(folder):
    """Keywords of FTPModel.use() for a folder that export.py wrote, None for any other."""
    file = folder / "ftp" / "ftp.json"
    if not file.exists():
        return None
    exported = load_json(file, "ftp-export-1", "--model", {
        "router": (str, None),
        "forecaster": (str, None),
        "routing": {"prefill": str, "decode": str, "kv": str, "one_pass": bool,
                    "mismatch": (bool, None)},
    })
    stored = exported["routing"]
    check(stored.get("removal") in (None, "whole"),
          f"--model: {file} removes blocks for prompts alone, which no folder can run; "
          "export another schedule")
    names = ("prefill", "decode", "kv", "one_pass")
    routing = {name: stored[name] for name in names}
    routing["mismatch"] = bool(stored.get("mismatch"))
    routing["schedule"] = file.parent / "schedule.json"
    for name in ("router", "forecaster"):
        value = exported[name]
        routing[name] = value if value in (None, "static") else file.parent / value
    return routing


# ------------------------------------------------------------------------------------------------
# knowing a model again

FINGERPRINT = {                # as stored in every artefact
    "config": str,
    "norm": [float],
    "weights": (str, None),    # artefacts made before weights were fingerprinted lack it
    "dtype": (str, None),
}
NO_SHAPE = ("eos", "max_len")  # these say how a model is used, not which it is
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "n_layer", "n_head", "n_kv_head",
         "head_dim", "rms_eps", "rope_theta", "rope_scaling", "qkv_bias", "tied")


def fingerprint(model):
    """Tells models apart: a hash of the shape, eight weights of the last norm, a hash of samples.

    The weights are compared as bfloat16 rounds them, so that a checkpoint is the same in float32
    and bfloat16. float16 rounds some values of a float32 checkpoint otherwise, once more before
    bfloat16 does: a model in it says so under "dtype".
    """
    h = hashlib.sha256()
    for name, values in sorted(weight_samples(model).items()):
        h.update(f"{name} {values}\n".encode())
    norm = model.norm.weight[:8].float().tolist()
    made = {
        "config": shape_hash(model.config),
        "norm": [round(v, 5) for v in norm],
        "weights": h.hexdigest()[:16],
    }
    if model.norm.weight.dtype == torch.float16:
        made["dtype"] = "float16"
    return made


def shape_hash(config):
    """Hash of a Config, 16 hex digits.

    Fields that came later count where they are set: artefacts made before them stay valid.
    """
    fields = {name: value for name, value in asdict(config).items()
              if name in SHAPE or value and name not in NO_SHAPE}
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weight_samples(model):
    """{parameter name: eight values of it}; a packed weight brings its own under `.sample`."""
    few, samples = {}, {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            few[name] = picked(parameter)
        packed = getattr(module, "sample", None)
        if packed is not None:
            samples[f"{module_name}.weight"] = packed
    # of one device all at once: a GPU would be waited for at each weight, and use() asks often
    for device in {values.device for values in few.values()}:
        here = {name: values for name, values in few.items() if values.device == device}
        together = iter(torch.cat(list(here.values())).tolist())
        for name, values in here.items():
            samples.setdefault(name, list(islice(together, len(values))))
    return samples


def sample_of(tensor):
    """Eight values spread evenly over a tensor, rounded to bfloat16: a list of floats."""
    return picked(tensor).tolist()


def picked(tensor):
    """The same as a tensor, where the weight lies."""
    flat = tensor.detach().flatten()
    step = max(1, (len(flat) - 1) // 7)     # seldom a multiple of the rows' length: many columns
    return flat[::step][:8].bfloat16()


warned: set = set()  # artefacts whose weights could not be compared, each told once


def check_fingerprint(made_for, model_print, what):
    """FTPError unless `made_for`, stored in an artefact, is the fingerprint of this model.

    Norms may differ by 1 %, as any dtype may load it. Where the weights can't be compared, a line
    on stderr says so.
    """
    same = isinstance(made_for, dict) and made_for.get("config") == model_print["config"]
    same = same and near(made_for.get("norm", []), model_print["norm"])
    mend = "; give the --model it was made for, or make it again"
    check(same, f"{what} was made for another model than the one loaded{mend}")
    made, now = made_for.get("weights"), model_print.get("weights")
    if made == now:
        return
    if made is None or now is None:
        warn(what, "made before weights were fingerprinted")
    elif made_for.get("dtype") != model_print.get("dtype"):
        warn(what, "float16 rounds weights otherwise")
    else:
        raise FTPError(f"{what} was made for other weights of the same shape{mend}")


def near(values, wanted):
    """Whether two lists of numbers are the same to 1 %."""
    if len(values) != len(wanted):
        return False
    return all(abs(a - b) <= 0.01 * abs(b) + 1e-3 for a, b in zip(values, wanted))


def warn(what, why):
    """One line on stderr, once for each artefact."""
    if what not in warned:
        warned.add(what)
        print(f"{what} was compared with the model by shape and last norm alone ({why})",
              file=sys.stderr)
