"""Checks a built core without running it: what it links to, and that no inline code is shared between instruction sets.

python tools/check_core.py path/to/_C.so [build folder with the object files]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# What any Linux with a C++ runtime has. No OpenMP runtime (two of them in one process hang or fight), nothing of torch.
ALLOWED = re.compile(r"^(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux.*)\.so")


def needed(core: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", str(core)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", text)


def undefined_torch(core: Path) -> list[str]:
    text = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(core)], check=True, capture_output=True, text=True
    ).stdout
    return [line.strip() for line in text.splitlines() if re.search(r"\b(c10|at|torch)::", line) or "GOMP" in line]


def shared_inline(obj: Path) -> list[str]:
    """Weak and unique symbols (nm: W, V, u): code the linker may take from any object, the AVX-512 one among them.

    A definition inside a namespace of its instruction set cannot be taken for another's and is no danger.
    """
    text = subprocess.run(["nm", "-C", "--defined-only", str(obj)], check=True, capture_output=True, text=True).stdout
    found = []
    for line in text.splitlines():
        match = re.match(r"[0-9a-f]*\s+([A-Za-z])\s+(.*)", line)
        if match and match[1] in "WVu" and not re.search(r"kdfast::(baseline|v3|v4)::", match[2]):
            found.append(f"{obj}: {match[1]} {match[2]}")
    return found


def main() -> int:
    core = Path(sys.argv[1])
    libraries = needed(core)
    errors = [f"{core.name} links to {name}" for name in libraries if not ALLOWED.match(name)]
    errors += [f"{core.name} wants {name}" for name in undefined_torch(core)]
    objects: list[Path] = []
    if len(sys.argv) > 2:
        objects = sorted(Path(sys.argv[2]).glob("**/kd_*.dir/**/*.o"))
        if not objects:
            errors.append(f"no kernel objects under {sys.argv[2]}")
        errors += [line for obj in objects for line in shared_inline(obj)]
    for line in errors:
        print(line)
    print(f"{core.name}: links to {', '.join(libraries)}; {len(objects)} kernel objects; {len(errors)} problems")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
