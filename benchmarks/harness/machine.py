"""Memory in use, the machine's name, and what other programs take of it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_")  # OMP_WAIT_POLICY=passive made small operations a third slower


def touch(model: Any) -> None:
    """Read every weight: those that are still on the disk alone would count as memory of the first step."""
    import torch

    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).max()


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
    import peft
    import torch
    import transformers

    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "thread_variables": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(THREAD_VARIABLES)},
        "versions": versions,
    }


def _cpu_name() -> str:
    """Number and kind of the cores; virtual machines hide the product's name, but not its family and model."""
    core = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in core.splitlines())}
    kind = facts.get("model name", platform.machine())
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{os.cpu_count()} cores of {kind}" + (f" ({numbers})" if numbers else "")


class OtherPrograms:
    """What programs besides this one use of the machine's CPU time, from `start` to `stop`, and again."""

    def __init__(self) -> None:
        self._used_s = self._elapsed_s = 0.0

    def start(self) -> None:
        """Begin a stretch."""
        self._busy, self._own, self._since = _busy_s(), time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """End it."""
        own = time.process_time() - self._own
        self._used_s += max(0.0, _busy_s() - self._busy - own) / (os.cpu_count() or 1)
        self._elapsed_s += time.perf_counter() - self._since

    @property
    def share(self) -> float:
        """From 0 to 1, of all stretches so far."""
        return self._used_s / self._elapsed_s if self._elapsed_s else 0.0


def _busy_s() -> float:
    """CPU seconds that all programs of this machine have used since it started, over all cores."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
