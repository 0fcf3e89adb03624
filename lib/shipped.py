"""What this repository ships for the embedded model, by name: ftp-0.30, late-0.30, ...

    model.use(**shipped("ftp-0.30"))
    with pruned(model, "late-0.30"):        # in a notebook: dense again behind it
        model.generate(prompts)

A folder of artifacts/smollm2/ each, with shipped.json: what to hand to FTPModel.use(), the command
and the commit that made it, and the quality measured then.
"""
from contextlib import contextmanager
from pathlib import Path

from lib.files import check, load_json

FOLDER = Path(__file__).resolve().parent.parent / "artifacts" / "smollm2"
FILES = ("schedule", "router", "forecaster")
FORM = {"use": {"schedule": str, "router": str, "kv": str, "forecaster": (str, None)},
        "measured": {"kl": float, "kl_items": [float], "flops_saved": float},
        "command": str, "commit": str}


def names():
    """The names that there are, in order."""
    return sorted(path.parent.name for path in FOLDER.glob("*/shipped.json"))


def card(name):
    """The content of a shipped.json. FTPError for a name that there is not."""
    path = FOLDER / name / "shipped.json"
    check("/" not in name and path.exists(),
          f"--pruned {name}: nothing of that name is shipped; choose from {', '.join(names())}")
    return load_json(path, "ftp-shipped-1", "--pruned", FORM)


def shipped(name):
    """Keyword arguments of FTPModel.use() for what is shipped under `name`."""
    how = dict(card(name)["use"])
    for key in FILES:
        if how.get(key) not in (None, "static"):
            how[key] = FOLDER / name / how[key]
    return how


@contextmanager
def pruned(model, name):
    """Within it the model is routed as `name` says; behind it as it was before."""
    before = model.routing
    model.use(**shipped(name))
    try:
        yield model
    finally:
        model.routing = before
