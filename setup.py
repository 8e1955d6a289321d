"""Drives CMakeLists.txt, which alone knows sources and flags.

KDFAST_CORE=auto|0|1: build the compiled core if this machine can (else warn and install the reference path alone), never
build it (a pure Python wheel), or fail when it cannot be built. KDFAST_CUDA=auto|0|1 does the same for the CUDA kernels in it,
KDFAST_CUDA_ARCHS="90" or "80;90" names the GPUs they are built for. KDFAST_CMAKE_ARGS: more arguments for CMake.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("KDFAST_CORE") or "auto"
if MODE not in ("auto", "0", "1"):
    raise ValueError(f"KDFAST_CORE: expected auto, 0 or 1, got {MODE!r}")
CUDA = os.environ.get("KDFAST_CUDA") or "auto"
if CUDA not in ("auto", "0", "1"):
    raise ValueError(f"KDFAST_CUDA: expected auto, 0 or 1, got {CUDA!r}")
# Every build starts empty: a build/ in the source tree would put the last build's core or a deleted module in this wheel.
BUILD = tempfile.TemporaryDirectory(prefix="kdfast-build-")


class CMakeBuild(build_ext):
    """Builds kdfast._C with CMake: into the wheel, or next to the sources for an editable install."""

    def run(self):
        target = Path(self.get_ext_fullpath("kdfast._C")).resolve()
        remove_core(target.parent)  # an editable install over an older one: a failed build must not leave that core
        try:
            try:
                self._cmake(target, CUDA)
            except subprocess.CalledProcessError:
                if CUDA != "auto":
                    raise
                self._cmake(target, "0")  # a toolkit that cannot build the kernels costs the kernels, not the core
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if MODE == "1":
                raise
            self.extensions.clear()
            warnings.warn(
                f"kdfast: the compiled core was not built ({error}); the slower reference path will be used. "
                "Install a C++17 compiler and reinstall, or set KDFAST_CORE=1 to make this an error.",
                stacklevel=2,
            )

    def _cmake(self, target: Path, cuda: str) -> None:
        import pybind11  # a requirement of the build; absent only when someone builds without isolation and without it

        cmake = shutil.which("cmake") or "cmake"
        folder = Path(BUILD.name) / "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKDFAST_CUDA={cuda}", f"-DKDFAST_CUDA_ARCHS={os.environ.get('KDFAST_CUDA_ARCHS', '')}",
            *os.environ.get("KDFAST_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)
        (built,) = folder.glob("_C*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


class BuildPython(build_py):
    def run(self):
        if MODE == "0" and self.editable_mode:  # asked for no core, so none may be left next to the sources
            remove_core(ROOT / "kdfast")
        super().run()


def remove_core(folder: Path) -> None:
    for stale in folder.glob("_C*.so"):
        stale.unlink()


setup(
    ext_modules=[] if MODE == "0" else [Extension("kdfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    options={"build": {"build_base": str(Path(BUILD.name) / "base")}},
)
