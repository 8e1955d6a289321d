"""Builds CUDA sources for the emulator (cuda/emulator/emulator.h) with the machine's C++ compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EMULATOR = TESTS / "cuda" / "emulator"
CSRC = TESTS.parent / "csrc"


def build(out: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of `sources`; skips the test where nothing can compile it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the CUDA emulator with")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-shared",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
    ]
    command += ["-I", str(EMULATOR), "-I", str(CSRC), *flags, "-o", str(out), "-x", "c++", *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out
