"""A GGUF file (llama.cpp's format, quantised or not) as a Hugging Face folder, dequantised.

transformers reads the file. What it would pass over without a word is looked at here: rotary
scaling, tensors it does not find, parts of a split file, further end tokens.
"""
import shutil
from importlib import import_module
from pathlib import Path

import torch

from lib.config import FAMILIES, Config, rope_frequencies
from lib.files import FTPError, check, first_line


def from_gguf(file, folder, dtype=torch.float16):
    """Write the model and tokenizer of the GGUF `file` to `folder`, weights in `dtype`.

    The folder appears when it is complete. float16 loses nothing that matters: the scales of
    GGUF's blocks are float16 themselves. FTPError on what can't be read.
    """
    file, folder, source = Path(file), Path(folder), f"--model {file}"
    try:
        reader, model, lost, tokenizer = read_gguf(file, dtype, source)
    except FTPError:
        raise
    except Exception as e:  # gguf and transformers raise many kinds on a damaged or unknown file
        raise FTPError(f"{source}: not read ({first_line(e)}); fetch it again, "
                       "or use the safetensors checkpoint") from None
    check(not lost, f"{source}: {len(lost)} tensors were not found in it, the first {lost[:1]}; "
                    "use the safetensors checkpoint")
    config = hf_config(reader, model, source)
    Config.from_hf(config, source)  # refuses by name before anything is written
    plain = without_quantisation(model, config)
    plain.generation_config.eos_token_id = end_tokens(reader)
    write_folder(folder, plain, tokenizer)


def read_gguf(file, dtype, source):
    """The file's fields, model, names of tensors it lacks, and tokenizer."""
    # by name, as transformers asks for all that a routed folder's code imports
    reader = import_module("gguf").GGUFReader(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    refuse_features(reader, source)
    model, info = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True,
        quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return reader, model, sorted(info["missing_keys"]), tokenizer


def say(reader, key):
    """What a GGUF file says under `key`, None if nothing."""
    return reader.fields[key].contents() if key in reader.fields else None


def refuse_features(reader, source):
    """FTPError on what transformers would read wrongly without a word."""
    arch = say(reader, "general.architecture")
    scaling = say(reader, f"{arch}.rope.scaling.type")
    parts = say(reader, "split.count") or 1
    merge = "a file in parts (merge them with llama-gguf-split --merge)"
    for present, feature in (
            (arch not in FAMILIES, f"architecture {arch!r}"),
            (scaling not in (None, "none"), f"rope scaling {scaling!r}"),
            (parts > 1, merge)):
        check(not present, f"{source}: {feature} is not supported in a GGUF file; "
                           "use another file, or the safetensors checkpoint")


def hf_config(reader, model, source):
    """The config.json of the model, with what transformers has passed over."""
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    arch = say(reader, "general.architecture")
    if arch == "mistral":
        config["sliding_window"] = say(reader, f"{arch}.attention.sliding_window")
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            factors = torch.tensor(tensor.data)
            config["rope_parameters"] = llama3_scaling(factors, config, source)
    return config


def llama3_scaling(factors, config, source):
    """The rope_parameters that give these rotary `factors` (head_dim / 2,).

    LLaMA 3.1's and 3.2's, which differ in "factor" alone; FTPError on others.
    """
    plain = config["rope_parameters"]
    rope = {
        **plain,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    before = frequencies(config, plain, source)
    after = frequencies(config, rope, source)
    check(torch.allclose(before / after, factors, rtol=1e-3),
          f"{source}: rotary factors other than LLaMA 3's are not supported; "
          "use the safetensors checkpoint")
    return rope


def frequencies(config, rope, source):
    return rope_frequencies(Config.from_hf({**config, "rope_parameters": rope}, source))


def without_quantisation(model, config):
    """The same model, built anew: save_pretrained refuses one that remembers its quantisation."""
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain


def end_tokens(reader):
    """The end tokens of text, turn and message: an id, a list where there are more, or None."""
    ends = {say(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    ends = sorted(ends - {None})
    return ends if len(ends) > 1 else next(iter(ends), None)


def write_folder(folder, model, tokenizer):
    """Save both beside `folder`, which then takes the place of an older one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(part, max_shard_size="2GB")
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
