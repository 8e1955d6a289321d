"""What every CUDA kernel uses of a multiprocessor, read from the objects that `make cuda` compiled for sm_90.

    python tools/cuda_table.py BUILD CORE           writes benchmarks/results/cuda/registers.json
    python tools/cuda_table.py --check BUILD CORE   fails where a kernel uses more than it says, or is not in it, or gone

BUILD: the folder of the objects. CORE: the folder of the core, which is imported: it must load without a driver and say so.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "cuda" / "registers.json"
# Of one kernel: registers of a thread, bytes a thread spills, bytes of shared memory known at compile time.
Use = dict[str, int]


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            raise SystemExit("cuobjdump: neither in the CUDA toolkit on PATH nor in an installed triton")
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def uses(build: Path) -> dict[str, Use]:
    objects = sorted(build.glob("**/cuda_kernels.dir/**/*.o"))
    if not objects:
        raise SystemExit(f"no CUDA objects under {build}")
    table: dict[str, Use] = {}
    for path in objects:
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        for name, line in re.findall(r"Function (\S+):\n\s*(.*)", text):
            found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            table[name] = {
                "registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": found["SHARED"],
            }  # fmt: skip
    names = subprocess.run(["c++filt"], input="\n".join(table), capture_output=True, text=True, check=True).stdout
    # without what is the same for all, and without the list of parameters
    plain = [re.sub(r"^void |kdfast::(cuda::)?|\([^()]*\)$", "", line) for line in names.splitlines()]
    assert len(set(plain)) == len(table), "two kernels of one name"
    return dict(sorted(zip(plain, table.values())))


def increases(before: dict[str, Use], now: dict[str, Use]) -> list[str]:
    """What has grown. Registers may move by a few with no loss: 8 is the unit the hardware hands them out in."""
    lines = [f"{name}: in the table, not in the build" for name in before.keys() - now.keys()]
    for name, use in now.items():
        if name not in before:
            lines.append(f"{name}: not in the table")
            continue
        for key, unit in (("registers", 8), ("spilled", 1), ("shared", 1)):
            if -(-use[key] // unit) > -(-before[name][key] // unit):
                lines.append(f"{name}: {key} {before[name][key]} -> {use[key]}")
    return sorted(lines)


def load(folder: Path) -> Any:
    """The core of `folder` as a module: what a machine without a driver does at import."""
    (path,) = folder.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    check = sys.argv[1] == "--check"
    build, core = map(Path, sys.argv[2:] if check else sys.argv[1:])
    info = load(core).cuda_info()
    print("cuda_info:", info)
    if not info["built"] or (info["devices"] == 0) != bool(info["reason"]):
        print("expected a core with CUDA kernels that says why it has no device, or has one")
        return 1
    now = uses(build)
    if not check:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(json.dumps({"cuda": info["runtime"], "sm_90": now}, indent=1) + "\n")
        print(f"{len(now)} kernels: {TABLE.relative_to(ROOT)}")
        return 0
    table = json.loads(TABLE.read_text())
    if table["cuda"] != info["runtime"]:
        print(f"the table was made with CUDA {table['cuda']}, this is {info['runtime']}: not compared")
        return 0
    lines = increases(table["sm_90"], now)
    for line in lines:
        print(line)
    print(f"{len(now)} kernels compared with {TABLE.relative_to(ROOT)}: {len(lines)} problems")
    if lines:
        print("meant? `make cuda-table` writes the table anew; the change is then seen in review")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
