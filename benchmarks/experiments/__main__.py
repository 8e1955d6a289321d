"""Runs the experiments named on the command line, or all; finished arms and seeds are read from their result files."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks import experiments

RESULTS = Path(__file__).resolve().parents[1] / "results" / "methods"


def main(names: list[str]) -> None:
    known = sorted(m.name for m in pkgutil.iter_modules(experiments.__path__) if not m.name.startswith("_"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"experiment: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    for name in names or known:
        results = importlib.import_module(f"benchmarks.experiments.{name}").run(RESULTS / f"{name}.json")
        print(f"{name}:", *results["sentences"], sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])
