"""What a run ran on: machine, versions, code, rows and weights; and the memory in use."""

import ctypes
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


FILE = "environment.json"  # in a run's folder, for one that comes to no result
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("peft-prompt-ext", "peft", "transformers", "torch", "datasets", "accelerate", "bitsandbytes")
CODE = ("*.py", "*.toml")  # not the store, which grows while runs go on and may be a file of the repository
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_")  # OMP_WAIT_POLICY=passive made small operations a third slower


def touch(model: Any) -> None:
    """Read every weight: those that are still on the disk alone would count as memory of the first step."""
    import torch

    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).max()


def clock() -> float:
    """Seconds on a clock that is read when the GPU, if there is one, has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> int:
    """Forget the peak so far; returns the memory in use now, in bytes."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        raise RuntimeError(f"memory without a GPU is measured on Linux only; this is {sys.platform}")
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak(device: str) -> int:
    """The most memory since `reset_peak`, in bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine(device: str) -> dict[str, Any]:
    """Versions and machine of a row, and what the threads of PyTorch depend on."""
    import torch

    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "thread_variables": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(THREAD_VARIABLES)},
        "versions": {found.name: found.version for found in distributions() if found.name in PACKAGES},
    }


def _cpu_name() -> str:
    """Number and kind of the cores; virtual machines hide the product's name, but not its family and model."""
    core = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in core.splitlines())}
    kind = facts.get("model name", platform.machine())
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{os.cpu_count()} cores of {kind}" + (f" ({numbers})" if numbers else "")


def code() -> dict[str, Any]:
    """The commit, and whether the code is another than there."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {"commit": commit, "dirty": bool(changes) if commit else None}


def environment(
    model: str, revision: str | None, device: str, dtype: str, scored: Any, train: Any | None
) -> dict[str, Any]:
    """Machine, versions, and hashes of the scored and trained rows and of the weights (of a Hub model: its commit)."""
    return {
        **machine(device),
        "device": device,
        "dtype": dtype,
        "python": sys.version.split()[0],
        "scored_rows_sha256": _rows_hash(scored),
        "train_rows_sha256": None if train is None else _rows_hash(train),
        "weights_sha256": _weights_hash(model) or revision,
    }


def _rows_hash(rows: Any) -> str:
    """Of rows in any order."""
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weights_hash(name: str) -> str | None:
    """Of the files of a local model."""
    from peft_prompt_ext.assets import resolve

    digest, files = hashlib.sha256(), sorted(Path(resolve(name)).glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if files else None


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
