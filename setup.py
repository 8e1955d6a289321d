"""Drives CMakeLists.txt, which alone knows sources and flags. KDFAST_CORE=auto|0|1: build if possible, never, or fail."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds kdfast._C in a fresh temporary folder: a build/ left by another build never leaks into this one."""

    def run(self):
        target = Path(self.get_ext_fullpath("kdfast._C")).resolve()
        for stale in target.parent.glob("_C*.so"):
            stale.unlink()
        mode = os.environ.get("KDFAST_CORE", "auto")
        if mode not in ("auto", "0", "1"):
            raise ValueError(f"KDFAST_CORE must be auto, 0 or 1; got {mode!r}")
        if mode == "0":
            self.extensions.clear()
            return
        try:
            self._cmake(target)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if mode == "1":
                raise
            self.extensions.clear()
            warnings.warn(
                f"kdfast: the compiled core was not built ({error}); the slower reference path will be used. "
                "Install a C++17 compiler and reinstall, or set KDFAST_CORE=1 to make this an error.",
                stacklevel=2,
            )

    def _cmake(self, target: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake") or "cmake"
        with tempfile.TemporaryDirectory() as build:
            configure = [
                cmake, "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *os.environ.get("KDFAST_CMAKE_ARGS", "").split(),
            ]  # fmt: skip
            if shutil.which("ninja"):
                configure += ["-G", "Ninja"]
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", build, "--parallel", str(os.cpu_count() or 1)], check=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (built,) = Path(build).glob("_C*.so")
            shutil.copy2(built, target)


setup(ext_modules=[Extension("kdfast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
