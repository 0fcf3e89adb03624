"""Files: what is read is checked, what is written is whole; and how an expected mistake is told."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class FTPError(ValueError):
    """An expected mistake: its text is one line that names the flag or file and the mend."""
    rank = -1  # of several processes the one that made it, once the others know


def check(ok, message):
    """FTPError with `message` unless ok."""
    if not ok:
        raise FTPError(message)


def first_line(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def digest(value):
    """Short hash of a JSON value: whether a resumed run sees the same data, undamaged."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------
# writing

def save_files(files):
    """Write {path: function of a temporary path}: all to temporary files, then renamed in order.

    Whatever ends the run, each path holds its old content or the whole new one. FTPError when the
    disk is full or the folder can't be written.
    """
    parts = {Path(path): Path(f"{path}.tmp") for path in files}
    try:
        for part, fill in zip(parts.values(), files.values()):
            part.parent.mkdir(parents=True, exist_ok=True)
            fill(part)
            settle(part)
    except BaseException as e:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(e, (OSError, SafetensorError)):
            first = next(iter(parts))
            raise FTPError(f"--out_dir: {first} can't be written ({e}); make room or give another "
                           "folder; an older file there is untouched") from None
        raise
    for path, part in parts.items():
        os.replace(part, path)


def settle(part):
    """Bring a written file to the disk, with the rights that any new file gets."""
    with open(part, "rb") as f:
        os.fsync(f.fileno())  # a crash of the machine must not rename an empty file either
    umask = os.umask(0)       # it can only be read by setting it
    os.umask(umask)
    with contextlib.suppress(OSError):    # some file systems have no rights
        part.chmod(0o666 & ~umask)        # safetensors writes files that their owner alone can read


def to_json(value, indent=""):
    """JSON text that people can read: a key a line, but a list of plain values on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{to_key(k)}: {to_json(v, inner)}" for k, v in value.items()]
        return enclose("{", items, "}", indent)
    if isinstance(value, (list, tuple)) and not all(map(is_short, value)):
        items = [to_json(v, inner) for v in value]
        return enclose("[", items, "]", indent)
    return json.dumps(value)


def to_key(key):
    """A dictionary's key in JSON, where every key is a string: 1 is "1", None is "null"."""
    return json.dumps(key if isinstance(key, str) else json.dumps(key))


def is_short(value):
    """Whether a list's item may share a line with others."""
    if isinstance(value, str):
        return len(value) <= 60
    return not isinstance(value, (dict, list, tuple))


def enclose(start, items, end, indent):
    """Items one a line, one column further in than `indent`."""
    lines = ",\n".join(f"{indent} {item}" for item in items)
    return f"{start}\n{lines}\n{indent}{end}"


def write_json(value):
    """What fills a file with `value`, for save_files()."""
    text = to_json(value) + "\n"

    def fill(part):
        part.write_text(text, encoding="utf-8")
    return fill


def save_json(path, value):
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    save_files({path: write_json(value)})


def tensors_id(tensors):
    """Hash of {name: tensor}, which ties weights to their twin: 12 hex digits."""
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        h.update(name.encode())
        h.update(t.detach().float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


def save_tensors(path, tensors, twin, dtype=torch.float32):
    """Write path.safetensors in `dtype` and its readable JSON twin, each atomically."""
    path = Path(path).with_suffix(".safetensors")
    tensors = {name: t.detach().to(dtype).cpu().contiguous() for name, t in tensors.items()}
    twin = {**twin, "id": tensors_id(tensors)}

    def fill(part):
        save_file(tensors, part)
    save_files({path: fill, path.with_suffix(".json"): write_json(twin)})


# ------------------------------------------------------------------------------------------------
# reading

def misfit(value, form, at="it"):
    """Where a JSON value departs from its form, in words, or None.

    Forms: float (any finite number), int (whole, 0 or more), str, bool, dict, list, None;
    {key: form}, where more keys may stand; [form], a list of them; (form, form), either.
    """
    if isinstance(form, tuple):
        fits = any(misfit(value, f) is None for f in form)
        return None if fits else misfit(value, form[0], at)
    if isinstance(form, dict) and isinstance(value, dict):
        parts = [(value.get(k), f, f"{at}.{k}") for k, f in form.items()]
    elif isinstance(form, list) and isinstance(value, list):
        parts = [(v, form[0], f"{at}[{i}]") for i, v in enumerate(value)]
    elif is_plain(value, form):
        return None
    else:
        return f"{at} is {str(value)[:40]!r}, not {form_name(form)}"
    found = (misfit(*part) for part in parts)
    return next(filter(None, found), None)


def is_plain(value, form):
    """Whether a value that has no parts to look into is of the form."""
    if form is None:
        return value is None
    if form in (int, float) and isinstance(value, bool):  # which Python counts among the numbers
        return False
    if form is float:
        return isinstance(value, (int, float)) and abs(value) < 1e300
    if form is int:
        return isinstance(value, int) and 0 <= value < 2 ** 63
    return isinstance(form, type) and isinstance(value, form)


def form_name(form):
    """A form in words."""
    if form is float:
        return "a finite number"
    if form is int:
        return "a whole number of at least 0"
    return form.__name__ if isinstance(form, type) else type(form).__name__


def load_json(path, kind, flag, form=None):
    """Read an artefact whose "format" is `kind` and whose fields have the `form` of misfit().

    FTPError names `flag` and the field.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FTPError(missing(path, flag)) from None
    except (OSError, ValueError, RecursionError) as e:
        raise FTPError(f"{flag}: {path} is not readable JSON ({e}); make it again") from None
    is_dict = isinstance(value, dict)
    found = str(value.get("format"))[:40] if is_dict else type(value).__name__
    check(is_dict and value.get("format") == kind,
          f"{flag}: {path} is no {kind} file (found {found}); give the right file")
    wrong = misfit(value, form or {})
    check(not wrong, f"{flag}: {path} is damaged ({wrong}); make it again")
    return value


def missing(path, flag):
    return f"{flag}: no file {path}; run the stage that writes it, or give its path"


def read_tensors(path, flag):
    """{name: tensor} and the metadata of a safetensors file; FTPError names `flag`."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise FTPError(missing(path, flag)) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise FTPError(f"{flag}: {path} is damaged ({first_line(e)}); make it again") from None


def load_tensors(path, kind, flag, form):
    """What save_tensors() wrote -> {name: tensor}, twin.

    FTPError on weights and twin of different runs. Where a run was killed between its two renames,
    the twin still lies beside the old one under its temporary name.
    """
    check(Path(path).name, f"{flag}: {path or 'an empty name'} is no file; give its path")
    path = Path(path).with_suffix(".safetensors")
    tensors, _ = read_tensors(path, flag)
    twin, left = path.with_suffix(".json"), path.with_suffix(".json.tmp")
    try:
        return tensors, load_twin(twin, tensors, kind, flag, form)
    except FTPError as e:
        with contextlib.suppress(FTPError):
            return tensors, load_twin(left, tensors, kind, flag, form)
        raise e from None  # what is wrong with the twin proper is what a user can mend


def load_twin(path, tensors, kind, flag, form):
    """The twin of `tensors`, or FTPError where it belongs to others."""
    twin = load_json(path, kind, flag, form)
    check(twin.get("id") in (None, tensors_id(tensors)),
          f"{flag}: {path} and its .safetensors are damaged, or not of one run; make them again")
    return twin


def check_tensors(tensors, shapes, what):
    """FTPError unless `tensors` has exactly the names and `shapes`, in float32 and finite."""
    for name in sorted(tensors.keys() | shapes.keys()):
        why = flaw(tensors.get(name), shapes.get(name))
        check(not why, f"{what}: tensor {name} {why}; make it again")


def flaw(tensor, shape):
    """What is wrong with a tensor that should have this shape, or None."""
    if tensor is None:
        return "is missing"
    if shape is None:
        return "is unknown"
    if tensor.shape != tuple(shape):
        return f"has shape {tuple(tensor.shape)}, not {tuple(shape)}"
    if tensor.dtype != torch.float32:
        return f"is {tensor.dtype}, not float32"
    return None if tensor.isfinite().all() else "has NaN or infinite values"
