"""What a number depends on besides the code: the processor, versions, commit, bandwidth, load; and how memory is read."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

import kdfast
from benchmarks.baselines import peers
from kdfast.metrics.memory import reset_peak, resident

__all__ = ["reset_peak", "resident"]  # for the cases

ROOT = Path(__file__).resolve().parent.parent
# A number of an op stands until one of these changes: what every op shares ...
SHARED = (
    "CMakeLists.txt", "csrc/bind.h", "csrc/inline.h", "csrc/isa.h", "csrc/logits.h", "csrc/memory.h", "csrc/memory.cpp", "csrc/parallel.h",
    "csrc/parallel.cpp", "csrc/cpu/vec.h", "csrc/cpu/stage.h", "kdfast/_core.py", "kdfast/_library.py", "kdfast/_dispatch.py",
    "kdfast/losses/module.py", "benchmarks/case.py", "benchmarks/bench_cases.py",
)  # fmt: skip
# ... and the files of these folders whose names begin with the op's, or with one of those it stands on.
FOLDERS = ("csrc", "csrc/cpu", "kdfast/ops", "kdfast/losses", "benchmarks/cases", "benchmarks/baselines")
STANDS_ON = {
    "pairwise": ("relation",),
    "relation": ("pairwise",),
    "token_graph": ("relation", "sparse_kl"),
    "linear_divergence": ("linear", "divergence", "sparse_divergence"),
    "sinkhorn": ("pairwise",),
}


# ... and of one op alone.
OF_ONE = {"linear_divergence": ("benchmarks/large.py",)}


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def sources(op: str) -> list[Path]:
    names = (op, *STANDS_ON.get(op, ()))
    own = [
        file
        for folder in FOLDERS
        for file in sorted((ROOT / folder).glob("*"))
        if file.suffix in (".py", ".cpp", ".h") and file.stem.removeprefix("bind_").startswith(names)
    ]
    return [ROOT / name for name in (*SHARED, *OF_ONE.get(op, ()))] + own


@functools.cache
def fingerprint(op: str) -> str:
    """Hash of every source that a number of this op depends on, with torch and the processor: the same means measured already."""
    digest = hashlib.sha256(f"{torch.__version__} {processor()} {os.cpu_count()}".encode())
    for file in sources(op):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def processor() -> str:
    """The model name; a virtual machine hides the marketing name, so the family and model numbers stand beside it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name', platform.machine())} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def identity() -> dict[str, object]:
    """The short facts that every row carries."""
    info = kdfast.backend_info()
    commit = git("rev-parse", "--short=12", "HEAD")
    # Results and generated pages do not count: a run writes them case by case.
    changed = git("status", "--porcelain", "--", *SHARED, *FOLDERS)
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": info["cpu"].get("isa", "none"),
        "torch": torch.__version__,
        "kdfast": kdfast.__version__,
        "commit": commit + ("+changes" if changed else ""),
    }


def environment() -> dict[str, object]:
    """The longer facts, once per result file."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "huge_pages": pages.read_text().strip() if pages.exists() else "unknown",
        "peers": peers.versions(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def copy_bandwidth(megabytes: int = 256, rounds: int = 9) -> float:
    """Bytes per second of a plain copy by torch on all threads, read and write counted, both buffers already paged in."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times)


def product_rate(dtype: str, size: int = 2048, rounds: int = 9) -> float:
    """Floating-point operations per second of a square product by torch on all threads."""
    left, right = torch.randn(2, size, size).to(getattr(torch, dtype))
    out = left @ right
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
