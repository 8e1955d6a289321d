"""Peak memory of a piece of work, on the CPU as the kernel counts it, on a GPU as torch does."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from kdfast._library import release_memory


def resident() -> tuple[int, int]:
    """(bytes resident now, highest since the last reset) of this process; Linux."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            values[key] = int(value.split()[0]) * 1024
    return values["VmRSS"], values["VmHWM"]


def reset_peak() -> bool:
    """Sets the kernel's resident high-water mark of this process to what is resident now; False where that is not allowed.

    First the allocator and kdfast give their free pages back: a block taken from a free list that is still resident would
    cost nothing.
    """
    release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Bytes that `call` needs at its highest above what is held before it; None where nobody counts (macOS, Windows).

    What a library allocates besides tensors is seen on the CPU; a sampling thread would miss short peaks.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not reset_peak():
        return None
    before, _ = resident()
    call()
    return max(resident()[1] - before, 0)
