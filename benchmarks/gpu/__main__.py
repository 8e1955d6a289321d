"""python -m benchmarks.gpu: measures every case that has no result for this GPU yet, then docs/benchmarks-gpu.md.

    python -m benchmarks.gpu                      what is missing
    python -m benchmarks.gpu CASE ...             these, again
    python -m benchmarks.gpu --list               the cases
    python -m benchmarks.gpu --report             the page alone
    --budget SECONDS  of measuring per mode of a case (default 1)    --stop-after SECONDS  begins no case later (default 540)

Each case is a process of its own (no memory, no compiled graph of another case) and is written when it is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import page
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.measure import measure

RESULTS = Path(__file__).resolve().parents[1] / "results"


def folder_of(device: torch.device) -> Path:
    """benchmarks/results/<gpu>, as `nvidia-h200`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--stop-after", type=float, default=540.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<gpu>")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    known = {case.name: case for case in CASES}
    unknown = sorted({*options.case, *([options.one] if options.one else [])} - set(known))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}")
    if options.list:
        print("\n".join(known))
        return 0
    if options.report:
        page.write()
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU: nothing can be measured", file=sys.stderr)
        return 1
    out = options.out or folder_of(device)
    if options.one:
        out.mkdir(parents=True, exist_ok=True)
        result = measure(known[options.one], device, options.budget)
        (out / f"{options.one}.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        for target in result["targets"]:
            print(f"  {target['what']} {target['value']}: {target['measured']} {'met' if target['met'] else 'NOT MET'}")
        return 0
    begin, failed = time.monotonic(), []
    for name in options.case or [name for name in known if not (out / f"{name}.json").exists()]:
        if time.monotonic() - begin > options.stop_after:
            print(f"time is up before {name}: run again for the rest")
            break
        print(f"{name} ({time.monotonic() - begin:.0f} s)", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--budget", str(options.budget), "--device", options.device,
                   "--out", str(out)]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            failed.append(name)
    page.write()
    print(f"failed: {', '.join(failed)}" if failed else "no case failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
