"""The ways kdfast is installed, each tried for real: isolated, offline, archive, without a core, without a compiler.

    python tools/check_install.py        with the environment that `make test` made; writes to build/install

Nothing is installed into the running environment: every case goes to a folder of its own and is imported from there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
OUT = ROOT / "build" / "install"
BUILD_TOOLS = ["setuptools>=77", "pybind11>=2.13", "cmake>=3.24", "ninja", "wheel"]
UNOPTIMISED = "-DCMAKE_BUILD_TYPE=Debug"  # where it is tried that a core is built, not how fast it is
OFFLINE = ["--no-build-isolation", "--no-index", "--no-deps"]
# Says how many warnings the import gave, whether there is a core, and that a loss works all the same.
PROBE = """
import importlib.util, pathlib, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import kdfast
import torch
ours = [str(w.message) for w in caught if str(w.message).startswith("kdfast")]
x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
loss = kdfast.losses.kd_loss(x, -x.detach(), temperature=1.0)
loss.backward()
assert abs(loss.item() - 1.1504) < 1e-3 and x.grad.abs().sum() > 0.1, loss
print("folder", pathlib.Path(kdfast.__file__).parents[1])
print("warnings", len(ours))
print("found", importlib.util.find_spec("kdfast._C") is not None)
print("compiled", kdfast.backend_info()["compiled"])
"""


def run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    # without CUDA kernels, whose minutes of nvcc would be spent once per case; `make cuda` builds them
    env = os.environ | {"KDFAST_CUDA": "0"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if check and done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        raise SystemExit(f"failed: {' '.join(command)}")
    return done


def output(done: subprocess.CompletedProcess[str]) -> str:
    """Both streams: where pip puts the output of the build differs between its versions."""
    return done.stdout + done.stderr


def pip(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", *arguments, check=check, **environment)


def probe(folder: Path, *, core: bool) -> None:
    """Imports kdfast from `folder` in a new process, from outside the source tree.

    -S: the finder of an editable install would lend its core to a package that has none. torch is found by its path.
    """
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", PROBE], cwd=OUT, text=True, capture_output=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("KDFAST")} | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    want = {"folder": str(folder), "warnings": "0" if core else "1", "found": str(core), "compiled": str(core)}
    assert seen == want, f"expected {want}, got {seen}"


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def isolated() -> str:
    """pip makes the build environment itself: no torch in it, and a core that needs nothing of torch or OpenMP."""
    log = output(
        pip("wheel", ".", "--no-deps", "-v", "-w", str(OUT / "wheel"), KDFAST_CORE="1", KDFAST_CMAKE_ARGS=UNOPTIMISED)
    )
    installed = {
        name.rsplit("-", 1)[0] for line in re.findall(r"Successfully installed (.*)", log) for name in line.split()
    }
    assert installed == {"setuptools", "pybind11", "cmake", "ninja"}, f"the build environment holds {installed}"
    (wheel,) = (OUT / "wheel").glob("*.whl")
    cores = [name for name in names(wheel) if re.fullmatch(r"kdfast/_C.*\.so", name)]
    assert len(cores) == 1, names(wheel)
    shutil.unpack_archive(wheel, OUT / "wheel" / "files", "zip")
    print(run(sys.executable, "tools/check_core.py", str(OUT / "wheel" / "files" / cores[0])).stdout.strip())
    probe(OUT / "wheel" / "files", core=True)
    return wheel.name


def offline() -> str:
    """Right after the isolated build, whose tools are gone: nothing it left behind is used, and no index is asked."""
    pip("install", *OFFLINE, "--target", str(OUT / "offline"), ".", KDFAST_CORE="1", KDFAST_CMAKE_ARGS=UNOPTIMISED)
    probe(OUT / "offline", core=True)
    return "compiled"


def archive() -> str:
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(OUT)!r})")
    (path,) = OUT.glob("kdfast-*.tar.gz")
    with tarfile.open(path) as tar:
        inside = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = run(
        "git", "ls-files", "csrc", "kdfast", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"
    )
    missing = set(tracked.stdout.split()) - inside
    assert not missing, f"not in {path.name}: {sorted(missing)}"
    assert not [name for name in inside if name.endswith(".so")]
    return path.name


def without_core() -> str:
    pip("wheel", *OFFLINE, "-w", str(OUT / "pure"), ".", KDFAST_CORE="0")
    (wheel,) = (OUT / "pure").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    shutil.unpack_archive(wheel, OUT / "pure" / "files", "zip")
    probe(OUT / "pure" / "files", core=False)
    return wheel.name


def without_compiler() -> str:
    """PATH holds Python's own folder (with cmake and ninja) and no compiler; CC and CXX lead nowhere."""
    bare = {"PATH": str(Path(sys.executable).parent), "CC": "/bin/false", "CXX": "/bin/false"}
    target = OUT / "nocompiler"
    log = pip("install", *OFFLINE, "-v", "--target", str(target), ".", KDFAST_CORE="auto", **bare)
    said = re.findall(r"kdfast: the compiled core was not built", output(log))
    assert len(said) == 1, f"{len(said)} warnings in the build's log"
    assert not list(target.glob("kdfast/_C*")), "a core without a compiler: a stale one"
    probe(target, core=False)
    failed = pip("wheel", *OFFLINE, "-w", str(OUT / "must-fail"), ".", check=False, KDFAST_CORE="1", **bare)
    assert failed.returncode != 0, "KDFAST_CORE=1 must fail without a compiler"
    return "one warning; KDFAST_CORE=1 fails"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    pip("install", "-q", *BUILD_TOOLS)
    for case in (isolated, offline, archive, without_core, without_compiler):
        print(f"{case.__name__}: {case()}", flush=True)
    assert not (ROOT / "build" / "lib").exists(), "a build left files in the source tree"


if __name__ == "__main__":
    main()
