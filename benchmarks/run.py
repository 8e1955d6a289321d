"""`make bench`: measures what has no current result, then writes docs/benchmarks.md, its plots and the table in README.md.

    python -m benchmarks.run                    every case that has no result for these sources
    python -m benchmarks.run CASE [CASE ...]    these, measured again
    python -m benchmarks.run --report           only the pages, from the results that exist

A case is measured only when the tests of its op pass here and now, and only with the compiled core. Each case is written
as soon as it is done, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import kdfast
from benchmarks import accuracy, cases, large, machine, report
from benchmarks.case import ALLOCATORS, OURS, Case

RESULTS = Path(__file__).with_name("results")


def run_pytest(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=machine.ROOT, env=clean | (environment or {}), capture_output=True, text=True,
    )  # fmt: skip


def check_tests(case: Case, done: dict[str, tuple[bool, str]]) -> tuple[bool, str]:
    """Whether every test file of the case's op is green, and the summaries. Each file runs once per call of this program."""
    texts, green = [], True
    for file in (f"python_tests/ops/test_{case.op}.py", *case.tests):
        if file not in done:
            if not (machine.ROOT / file).exists():
                done[file] = (False, f"{file} does not exist")
            else:
                print(f"  tests: {file}", flush=True)
                run = run_pytest(["-x", file])
                lines = [line for line in run.stdout.splitlines() if line.strip()]
                done[file] = (run.returncode == 0, lines[-1] if lines else run.stderr[-300:])
        ok, text = done[file]
        green &= ok
        texts.append(f"{Path(file).name}: {text}")
    return green, "; ".join(texts)


NODES = ("fwd", "fwd+bwd", "fwd+bwd, upstream 3")


def measure(case: Case, allocator: str, modes: tuple[str, ...] = NODES) -> list[dict]:
    """pytest-benchmark's records of one case in one allocator mode, from a process of its own.

    A process killed for memory is tried again with one mode each: with trimming off, glibc may find no free block that an
    aligned request fits into although gigabytes are free, and a form with many large temporaries then grows with every call.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        nodes = f"benchmarks/bench_cases.py::test_case[{case.name}-"
        run = run_pytest(
            ["-o", "filterwarnings=default", "--benchmark-disable-gc", f"--benchmark-json={out}",
             *(f"{nodes}{mode}]" for mode in modes)],
            ALLOCATORS[allocator],
        )  # fmt: skip
        if run.returncode == -signal.SIGKILL and len(modes) > 1:
            return [record for mode in modes for record in measure(case, allocator, (mode,))]
        if run.returncode != 0:
            raise RuntimeError(f"{case.name} ({allocator}) failed:\n{run.stdout[-4000:]}\n{run.stderr[-1000:]}")
        return json.loads(out.read_text())["benchmarks"]


def digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")


def rows_of(record: dict, case: Case, allocator: str) -> list[dict]:
    info = record["extra_info"]
    seconds: dict[str, list[float]] = info["seconds"]
    rows = []
    for candidate, times in seconds.items():
        row = {
            "candidate": candidate,
            "mode": info["mode"],
            "allocator": allocator,
            "shape": case.shape,
            "dtype": case.dtype,
            "median_ms": digits(1e3 * statistics.median(times)),
            "min_ms": digits(1e3 * min(times)),
            "rounds": len(times),
            "ratio": digits(statistics.median(t / ours for t, ours in zip(times, seconds[OURS]))),
        }
        if "errors" in info:
            row["loss_error"] = digits(info["errors"][candidate], 2)
        if info.get("peak", {}).get(candidate) is not None:
            row["peak_mb"] = round(info["peak"][candidate] / 2**20, 1)
        rows.append(row | info["identity"])
    return rows


def run_case(case: Case, done: dict[str, tuple[bool, str]]) -> bool:
    path = RESULTS / f"{case.name}.json"
    result = {
        "case": case.name, "op": case.op, "title": case.title, "shape": case.shape, "dtype": case.dtype,
        "fingerprint": machine.fingerprint(case.op), "environment": machine.environment(), "traffic_bytes": case.traffic,
        "targets": [vars(target) for target in case.targets],
    }  # fmt: skip
    if isinstance(case, large.LargeCase):
        result["operations"] = case.operations
    green, result["tests"] = check_tests(case, done)
    if not green:
        result["red"] = True  # the page says so; no number stands
        print(f"  RED, no number: {result['tests']}")
    else:
        result["rows"] = []
        for allocator in ("default",) if isinstance(case, large.LargeCase) else ALLOCATORS:
            print(f"  measuring, {allocator} allocator", flush=True)
            records = large.measure(case) if isinstance(case, large.LargeCase) else measure(case, allocator)
            for record in records:
                result["rows"] += rows_of(record, case, allocator)
                result["missing_peers"] = record["extra_info"]["missing"]
                if "copy_bandwidth" in record["extra_info"]:
                    result["copy_gb_s"] = digits(record["extra_info"]["copy_bandwidth"] / 1e9)
                if "product_rate" in record["extra_info"]:
                    result["product_gflop_s"] = digits(record["extra_info"]["product_rate"] / 1e9)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return green


def current(case: Case) -> bool:
    path = RESULTS / f"{case.name}.json"
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    return result["fingerprint"] == machine.fingerprint(case.op) and "red" not in result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="measure these even when they have a current result")
    parser.add_argument("--report", action="store_true", help="write the pages only")
    options = parser.parse_args()
    known = cases.load()
    unknown = sorted(set(options.case) - set(known))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}")
    green = True
    if not options.report:
        if not kdfast.backend_info()["compiled"]:
            print("the compiled core is missing: run `make core` first, no number without it")
            return 1
        done: dict[str, tuple[bool, str]] = {}
        for name in options.case or [name for name, case in known.items() if not current(case)]:
            print(name, flush=True)
            green &= run_case(known[name], done)
        if not options.case:
            accuracy.update()
    report.write(known)
    return 0 if green else 1


if __name__ == "__main__":
    raise SystemExit(main())
