"""Builds CUDA sources for the emulator (cuda/emulator/emulator.h) with the machine's C++ compiler, once per session."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
EMULATOR = TESTS / "cuda" / "emulator"
CSRC = TESTS.parent / "csrc"
# What the module of the emulated kernels is made of, beside the core's own bindings of them.
KERNELS = ("routing", "routing_plan", "sinkhorn", "sinkhorn_grid")
# -fno-gnu-unique: two of these libraries in one process are two emulators, with states of their own.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fno-gnu-unique",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
)


def build(out: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of `sources`, two of them compiled at a time; skips the test where nothing can compile it."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the CUDA emulator needs g++ on Linux")
    objects = [out.with_name(f"{out.stem}-{source.stem}.o") for source in sources]

    def start(source: Path, into: Path) -> subprocess.Popen[str]:
        optimise = "-O1" if source.suffix == ".cu" else "-O0"
        include = ("-I", str(EMULATOR), "-I", str(CSRC))
        command = [compiler, *FLAGS, optimise, *include, *flags, "-c", "-x", "c++", str(source), "-o", str(into)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    for first in range(0, len(sources), 2):
        for process in [start(*pair) for pair in list(zip(sources, objects))[first : first + 2]]:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    subprocess.run([compiler, "-shared", "-pthread", *flags, *map(str, objects), "-o", str(out)], check=True)
    return out


@functools.cache
def emulated() -> ModuleType:
    """The CUDA bindings of the core, over emulated kernels: functions on addresses of CPU tensors."""
    sources = [EMULATOR / "module.cpp", *(CSRC / "cuda" / f"{kernel}.cu" for kernel in KERNELS)]
    headers = (sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include"))  # torch brings pybind11's
    flags = ("-fvisibility=hidden", *(flag for folder in headers for flag in ("-isystem", folder)))
    folder = tempfile.mkdtemp(prefix="kdfast-emulated-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = build(Path(folder) / "emulated_cuda.so", *sources, flags=flags)
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_the_cpu(patch: pytest.MonkeyPatch, op: ModuleType, kernels: ModuleType, names: dict[str, str]) -> None:
    """Puts functions of kdfast.cuda in the place of what an op's module calls, on emulated kernels.

    Until `patch` is undone its public functions, their autograd and their checks run them under backend="cpu".
    """

    def call(function: Any, tensor: Any, *args: Any) -> Any:
        return function(0, *args)

    patch.setattr(kernels, "core", emulated)
    patch.setattr(kernels, "call", call)
    for name, kernel in names.items():
        patch.setattr(op, name, _where_float32(getattr(op, name), getattr(kernels, kernel)))


def _where_float32(otherwise: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """float64 has no CUDA kernel: the tests' float64 inputs stay with the CPU."""

    def call(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, torch.Tensor))
        return (otherwise if first.dtype == torch.float64 else kernel)(*args)

    return call
