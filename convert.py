"""A GGUF file (llama.cpp's format, quantised or not) as a Hugging Face folder, its weights dequantised.

    python convert.py Llama-3.2-1B-Instruct-Q4_K_M.gguf my/folder      # a minute; needs the dequantised weights' size in memory and on disk
    python search_scheduler.py --model Llama-3.2-1B-Instruct-Q4_K_M.gguf    # does the same once, into models/gguf

transformers reads the file. What it would pass over without a word is looked at here: rotary scaling, tensors it does not find, parts of a
split file, further end tokens.
"""
import shutil
from pathlib import Path

import torch

from common import Parser, check, run
from config import Config, rope_frequencies
from files import FTPError


def llama3_scaling(factors, config, source):
    """The rope_parameters that give these rotary `factors` (head_dim / 2,): LLaMA 3.1's and 3.2's, which differ in "factor" alone."""
    rope = {**config["rope_parameters"], "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    plain, scaled = (rope_frequencies(Config.from_hf({**config, "rope_parameters": r}, source)) for r in (config["rope_parameters"], rope))
    check(torch.allclose(plain / scaled, factors, rtol=1e-3),
          f"{source}: rotary factors other than LLaMA 3's are not supported; use the safetensors checkpoint")
    return rope


def from_gguf(file, folder, dtype=torch.float16):
    """Write the model and tokenizer of the GGUF `file` to `folder`, weights in `dtype`; the folder appears when it is complete.

    float16 loses nothing that matters: the scales of GGUF's blocks are float16 themselves. FTPError on what can't be read.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    file, folder, source = Path(file), Path(folder), f"--model {file}"
    try:
        reader = GGUFReader(file)
        say = lambda key: reader.fields[key].contents() if key in reader.fields else None
        arch, scaling = say("general.architecture"), say(f"{say('general.architecture')}.rope.scaling.type")
        for bad, why in ((arch not in Config.FAMILIES, f"architecture {arch!r}"), (scaling not in (None, "none"), f"rope scaling {scaling!r}"),
                         ((say("split.count") or 1) > 1, "a file in parts (merge them with llama-gguf-split --merge)")):
            check(not bad, f"{source}: {why} is not supported in a GGUF file; use another file, or the safetensors checkpoint")
        where = dict(gguf_file=file.name)
        model, info = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, output_loading_info=True, quantization_config=GgufConfig(dequantize=True),
                                                           **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except FTPError:
        raise
    except Exception as e:  # gguf and transformers raise many kinds on a damaged or unknown file
        raise FTPError(f"{source}: not read ({(str(e).splitlines() or [type(e).__name__])[0]}); fetch it again, or use the safetensors checkpoint") from None
    lost = sorted(info["missing_keys"])
    check(not lost, f"{source}: {len(lost)} tensors were not found in it, the first {lost[:1]}; use the safetensors checkpoint")
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config |= dict(sliding_window=say(f"{arch}.attention.sliding_window")) if arch == "mistral" else {}
    freqs = next((torch.tensor(t.data) for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if freqs is not None:
        config["rope_parameters"] = llama3_scaling(freqs, config, source)
    Config.from_hf(config, source)  # refuses by name before anything is written
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**config))  # save_pretrained refuses a model that remembers its quantisation
    plain.load_state_dict(model.state_dict(), assign=True)
    ends = {say(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")} - {None}
    plain.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(part, max_shard_size="2GB")
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main():
    p = Parser(__doc__)
    p.add_argument("gguf", help="GGUF file")
    p.add_argument("folder", help="new folder to write")
    p.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"], help="dtype of the written weights")
    args = p.parse_args()
    check(Path(args.gguf).is_file(), f"{args.gguf}: no such file; give a .gguf file")
    check(not Path(args.folder).exists(), f"{args.folder}: exists already; give a new folder")
    from_gguf(args.gguf, args.folder, getattr(torch, args.dtype))
    print(f"{args.folder} is ready: give it as --model")


if __name__ == "__main__":
    run(main)
