"""Files: what is read is checked, what is written is whole; where models lie; and how an expected mistake is told."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HOME = Path(os.environ.get("FTP_HOME", Path(__file__).resolve().parent / "models"))  # where "smollm2" lies
PICKLED = ("; pickled weights are not read, as reading them can run code: convert them once, in a place you trust it, by python -c \"from transformers "
           "import AutoModelForCausalLM as M, AutoTokenizer as T; [X.from_pretrained('OLD').save_pretrained('NEW') for X in (M, T)]\"")
FINGERPRINT = {"config": str, "norm": [float]}


class FTPError(ValueError):
    """An expected mistake: its text is one line that names the flag or file and the mend."""
    rank = -1  # of several processes the one that made it, once the others know


def save_files(files):
    """Write {path: function of a temporary path}, all to temporary files and then renamed in this order: whatever ends the run, each
    path holds its old content or the whole new one. FTPError when the disk is full or the folder can't be written."""
    parts = {Path(p): Path(f"{p}.tmp") for p in files}
    try:
        for (path, part), fill in zip(parts.items(), files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(part)
            with open(part, "rb") as f:
                os.fsync(f.fileno())  # a crash of the machine must not rename an empty file either
    except BaseException as e:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(e, (OSError, SafetensorError)):
            raise FTPError(f"--out_dir: {next(iter(parts))} can't be written ({e}); make room or give another folder; an older file there "
                           "is untouched") from None
        raise
    for path, part in parts.items():
        os.replace(part, path)


def save_json(path, obj):
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    save_files({path: lambda part: part.write_text(json.dumps(obj, indent=1) + "\n")})


def tensors_id(tensors):
    """Hash of {name: tensor}, which ties weights to their twin."""
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        h.update(name.encode() + t.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


def save_tensors(path, tensors, twin):
    """Write path.safetensors (float32) and its readable JSON twin, each atomically."""
    path, tensors = Path(path).with_suffix(".safetensors"), {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    twin = {**twin, "id": tensors_id(tensors)}
    save_files({path: lambda part: save_file(tensors, part),
                path.with_suffix(".json"): lambda part: part.write_text(json.dumps(twin, indent=1) + "\n")})


def misfit(o, form, at="it"):
    """Where a JSON value departs from its form, in words, or None. Forms: float (any finite number), int (whole, 0 or more), str, bool,
    dict, list, None; {key: form}, where more keys may stand; [form], a list of them; (form, form), either."""
    if isinstance(form, dict) and isinstance(o, dict):
        return next((m for k, f in form.items() if (m := misfit(o.get(k), f, f"{at}.{k}"))), None)
    if isinstance(form, list) and isinstance(o, list):
        return next((m for i, v in enumerate(o) if (m := misfit(v, form[0], f"{at}[{i}]"))), None)
    if isinstance(form, tuple):
        return None if any(misfit(o, f) is None for f in form) else misfit(o, form[0], at)
    number = isinstance(o, (int, float)) and not isinstance(o, bool)
    good = {float: number and abs(o) < 1e300, int: number and isinstance(o, int) and 0 <= o < 2 ** 63, None: o is None}
    if good[form] if form is None or form in (float, int) else isinstance(form, type) and isinstance(o, form):
        return None
    kind = {float: "a finite number", int: "a whole number of at least 0"}.get(form) if isinstance(form, type) else None
    return f"{at} is {str(o)[:40]!r}, not {kind or getattr(form, '__name__', type(form).__name__)}"


def load_json(path, kind, flag, form=None):
    """Read an artefact whose "format" is `kind` and whose fields have the `form` of misfit(); FTPError names `flag` and the field."""
    try:
        obj = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FTPError(f"{flag}: no file {path}; run the stage that writes it, or give its path") from None
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"{flag}: {path} is not readable JSON ({e}); make it again") from None
    if not isinstance(obj, dict) or obj.get("format") != kind:
        found = str(obj.get("format"))[:40] if isinstance(obj, dict) else type(obj).__name__
        raise FTPError(f"{flag}: {path} is no {kind} file (found {found}); give the right file")
    if wrong := misfit(obj, form or {}):
        raise FTPError(f"{flag}: {path} is damaged ({wrong}); make it again")
    return obj


def read_tensors(path, flag):
    """{name: tensor} and the metadata of a safetensors file; FTPError names `flag`."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise FTPError(f"{flag}: no file {path}; run the stage that writes it, or give its path") from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise FTPError(f"{flag}: {path} is damaged ({(str(e).splitlines() or [type(e).__name__])[0]}); make it again") from None


def load_tensors(path, kind, flag, form):
    """What save_tensors() wrote -> {name: tensor}, twin. Weights and twin of different runs are refused; where a run was killed between
    its two renames, the twin still lies beside the old one under its temporary name."""
    path, wrong = Path(path).with_suffix(".safetensors"), None
    tensors, _ = read_tensors(path, flag)
    for twin in (path.with_suffix(".json"), path.with_suffix(".json.tmp")):
        try:
            o = load_json(twin, kind, flag, form)
            if o.get("id") in (None, tensors_id(tensors)):
                return tensors, o
            wrong = wrong or FTPError(f"{flag}: {path} and {twin.name} are damaged, or not of one run; make them again")
        except FTPError as e:
            wrong = wrong or e
    assert wrong is not None
    raise wrong


def check_tensors(tensors, shapes, what):
    """FTPError unless `tensors` has exactly the names and `shapes`, in float32 and finite."""
    for name in sorted(tensors.keys() | shapes.keys()):
        t = tensors.get(name)
        why = ("is missing" if t is None else "is unknown" if name not in shapes else
               f"has shape {tuple(t.shape)}, not {tuple(shapes[name])}" if t.shape != tuple(shapes[name]) else
               f"is {t.dtype}, not float32" if t.dtype != torch.float32 else None if t.isfinite().all() else "has NaN or infinite values")
        if why:
            raise FTPError(f"{what}: tensor {name} {why}; make it again")


def check_fingerprint(made_for, model_print, what):
    """FTPError unless `made_for` is the fingerprint of this model (norms to 1 %: any dtype may load it)."""
    same = isinstance(made_for, dict) and made_for.get("config") == model_print["config"]
    if not (same and len(made_for.get("norm", [])) == len(model_print["norm"])
            and all(abs(a - b) <= 0.01 * abs(b) + 1e-3 for a, b in zip(made_for["norm"], model_print["norm"]))):
        raise FTPError(f"{what} was made for another model than the one loaded; give the --model it was made for, "
                       "or make it again")


def weight_files(folder):
    """The safetensors files of a checkpoint: model.safetensors, else the shards that its index names, else all there are."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    try:
        o = json.loads(index.read_text()) if index.exists() else {"weight_map": {}}
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"--model: {index} is damaged ({e}); fetch it again") from None
    names = list(o["weight_map"].values()) if misfit(o, {"weight_map": dict}) is None else [None]
    if misfit(names, [str]):
        raise FTPError(f"--model: {index} is damaged (no map of file names); fetch it again")
    files = [folder / n for n in sorted(set(names))]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FTPError(f"--model: no .safetensors file in {folder}; give a folder that has them{PICKLED}")
    for f in files:
        if not os.path.exists(f):
            raise FTPError(f"--model: {folder} lacks {f.name[:60]}, which its index names; fetch the whole checkpoint")
    return files


def find_model(path):
    """Folder of a model: "smollm2" (made by prepare.py), a local folder, a GGUF file (converted once, into models/gguf), or a hub id,
    fetched into the hub's cache."""
    if str(path) == "smollm2":
        if not (HOME / "smollm2" / "config.json").exists():
            raise FTPError("--model smollm2: not there yet; run `python prepare.py` first")
        return HOME / "smollm2"
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file() and Path(path).suffix == ".gguf":
        file = Path(path).resolve()
        made_from = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
        folder = HOME / "gguf" / f"{file.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
        if not (folder / "config.json").exists():
            from convert import from_gguf
            from_gguf(file, folder)
        return folder
    if Path(path).is_file():
        raise FTPError(f"--model {path}: a {Path(path).suffix or 'plain'} file; give the folder of a safetensors checkpoint, or a .gguf file"
                       + PICKLED * (Path(path).suffix in (".bin", ".pt", ".pth")))
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise FTPError(f"--model {path}: no such folder; give \"smollm2\", a folder, or a hub id like owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md"],
                                      ignore_patterns=["consolidated*", "original/*"]))  # Mistral's second copy of the weights, LLaMA's
    except Exception as e:  # the hub client raises many kinds, all meaning the same to the user
        raise FTPError(f"--model {path}: not fetched from the hub ({str(e).splitlines()[0]}); check the id, or give a local folder") from None
