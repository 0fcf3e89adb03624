"""What this repository ships for the two real models, by name: ftp-0.30, late-0.30, ...

    model.use(**shipped("ftp-0.30"))
    with pruned(model, "late-0.30"):        # in a notebook: dense again behind it
        model.generate(prompts)

A folder of artifacts/MODEL/ each, with shipped.json: what to hand to FTPModel.use(), the command
and the commit that made it, and the quality measured then.
"""
from contextlib import contextmanager
from pathlib import Path

from lib.files import check, load_json

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"
FILES = ("schedule", "router", "forecaster")
FORM = {"use": {"schedule": str, "router": str, "kv": str, "forecaster": (str, None),
                "one_pass": (bool, None)},
        "measured": {"kl": float, "kl_items": [float], "flops_saved": float},
        "command": str, "commit": str}


def folder_of(model):
    """The folder of what is shipped for a model's name or path.

    That of the embedded model for a name that is unknown: whether it fits, its fingerprint says.
    """
    folder = ARTIFACTS / Path(str(model)).name
    return folder if any(folder.glob("*/shipped.json")) else ARTIFACTS / "smollm2"


def names(model="smollm2"):
    """The names that there are, in order."""
    return sorted(path.parent.name for path in folder_of(model).glob("*/shipped.json"))


def card(name, model="smollm2"):
    """The content of a shipped.json. FTPError for a name that there is not."""
    folder = folder_of(model)
    path = folder / name / "shipped.json"
    check("/" not in name and path.exists(),
          f"--pruned {name}: nothing of that name is shipped for {folder.name}; choose from "
          f"{', '.join(names(model))}")
    return load_json(path, "ftp-shipped-1", "--pruned", FORM)


def shipped(name, model="smollm2"):
    """Keyword arguments of FTPModel.use() for what is shipped under `name` for a model's name."""
    how = {key: value for key, value in card(name, model)["use"].items() if value is not None}
    for key in FILES:
        if how.get(key, "static") != "static":
            how[key] = folder_of(model) / name / how[key]
    return how


@contextmanager
def pruned(model, name):
    """Within it the model is routed as `name` says; behind it as it was before."""
    before = model.routing
    model.use(**shipped(name, model.name))
    try:
        yield model
    finally:
        model.routing = before
