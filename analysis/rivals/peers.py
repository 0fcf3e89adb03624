"""Rivals as --peer names them: NAME=PATH[+ROUTER], a schedule, or a pruned model."""
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.rivals.common import FORMAT
from analysis.rivals.lazyllm import PROGRESSIVE, LazyModel
from analysis.rivals.removal import REMOVALS, PartModel
from analysis.rivals.slicegpt import TYPE, SlicedModel
from analysis.rivals.swiftkv import Swift, SwiftModel
from analysis.rivals.width import NarrowModel
from lib.artefacts import SELECTIONS, Schedule
from lib.checkpoint import check_fingerprint, read_json
from lib.files import check, load_json
from lib.packing import is_packed, pack
from model_ftp import FTPModel, Router

PEER = "NAME=PATH[+ROUTER]"


@dataclass
class Peer:
    """A rival: a pruned model's folder, or a Swift, or a schedule with its router and removal.

    router: a Router, one of SELECTIONS, or "progressive"; removal: see removal.py.
    """
    name: str
    folder: Path | None = None
    schedule: Schedule | None = None
    router: Any = "static"
    removal: str = "whole"
    swift: Swift | None = None

    @property
    def learned(self):
        return isinstance(self.router, Router)

    @property
    def artefacts(self):
        """What tells a rival's artefacts from others, a list."""
        if self.folder is not None:
            return [weights_id(self.folder)]
        if self.swift is not None:
            return [self.swift.id]
        router = self.router.id if self.learned else self.router
        return [self.schedule.id, router, self.removal]

    def settings(self, how):
        """Keywords of PartModel.use(); only a trained router decides by argmax."""
        prefill = how["prefill"] if self.learned else "topk"
        return {**how, "prefill": prefill, "removal": self.removal}

    def runner(self, model):
        """What runs this rival, not routed yet; the base that its saved FLOPs are counted against.

        model: the original, whose weights a schedule runs on.
        """
        if self.folder is not None:
            return load_pruned(self.folder, model), model.config
        if self.swift is not None:
            return SwiftModel.of(model, self.swift), None
        kind = LazyModel if self.router == PROGRESSIVE else PartModel
        return kind.of(model), None

    def ready(self, model, how):
        """The rival as a model, routed; how: keywords of FTPModel.use()."""
        runner, _ = self.runner(model)
        if self.schedule is None:           # a model that needs no routing, or brings its own
            return runner
        return runner.use(self.schedule, self.router, **self.settings(how))

    def check(self, model, how):
        """FTPError where it was made for another model, or can't run under these settings."""
        if self.folder is not None:
            check_folder(self.folder, model)
        else:
            self.ready(model, how)


def load_peers(specs):
    """The Peers of --peer flags. A schedule that removes something gives two: NAME, removed for
    all tokens, and NAME_prompt, for prompts alone."""
    peers = []
    for spec in specs:
        name, _, path = spec.partition("=")
        path, _, router = path.partition("+")
        check(name and path and Path(path).exists(),
              f"--peer {spec}: give NAME=PATH, of a schedule or a model folder that exists")
        if Path(path).is_dir():
            peers.append(Peer(name, folder=Path(path)))
            continue
        if Path(path).suffix == ".safetensors":
            check(not router, f"--peer {spec}: a swiftkv brings its routing; leave out +{router}")
            peers.append(Peer(name, swift=Swift.load(path)))
            continue
        schedule, router = Schedule.load(path), load_router(router)
        for removal in REMOVALS if schedule.removes else ("whole",):
            suffix = "_prompt" if removal == "prompt" else ""
            peers.append(Peer(name + suffix, None, schedule, router, removal))
    names = [peer.name for peer in peers]
    check(len(set(names)) == len(names), "--peer: two of one name; rename one")
    return peers


def load_router(text):
    """What stands behind the + of a --peer."""
    if text in (*SELECTIONS, PROGRESSIVE):
        return text
    return Router.load(text) if text else "static"


def check_names(peers, taken, what):
    """FTPError where a rival has a name that is taken."""
    both = [peer.name for peer in peers if peer.name in taken]
    check(not both, f"--peer: {', '.join(both)} is {what} already; give another")


# ------------------------------------------------------------------------------------------------
# folders


def check_folder(folder, model):
    """FTPError unless a pruned model's folder was made from `model`."""
    made = load_json(folder / "pruned.json", FORMAT, "--peer")
    check_fingerprint(made.get("fingerprint"), model.fingerprint, f"--peer: {folder}")


def load_pruned(folder, model):
    """The pruned model in a folder, in dtype, device and layout as the original `model`."""
    check_folder(folder, model)
    pruned = class_of(folder).from_pretrained(folder, model.dtype, model.device)
    return pack(pruned) if is_packed(model) else pruned


def class_of(folder):
    """What loads a pruned model's folder."""
    hf = read_json(folder / "config.json")
    if not isinstance(hf, dict):
        return FTPModel                     # which tells what is wrong with it
    if hf.get("model_type") == TYPE:
        return SlicedModel
    return NarrowModel if hf.get("widths") else FTPModel


def weights_id(folder):
    """Hash of a folder's weights, 12 hex digits."""
    h = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()[:12]
