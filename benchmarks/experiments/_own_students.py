"""The part that experiments of methods with models of their own share: arms from the method, sentences for the claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.data import Task, load_task
from kdfast.experiment import run as run_arms
from kdfast.train.checkpoint import write_text

RUNS = Path(__file__).resolve().parents[2] / "runs" / "experiments"  # finished arms and seeds, not committed


def run_own(
    out: Path, data: str, method: str, claims: Sequence[tuple[str, str]], *, seeds: int, steps: int | None, task: Task | None,
    work: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Runs what `work` does not hold yet; writes and returns the results with the sentences of `claims` (arm, against).

    A result of as many seeds that is there already is returned as it stands.
    """
    if out.exists():
        results = json.loads(out.read_text())
        if len(results["seeds"]) >= seeds:
            return results

    def tell(what: str, done: int, total: int) -> None:
        print(f"{method} {done}/{total} {what}", flush=True)

    work = RUNS / method if work is None else work
    results = run_arms(task or load_task(data), method, seeds=seeds, out=work, steps=steps, on_progress=tell)
    found = {(c["arm"], c["against"]): c["sentence"] for c in results["comparisons"]}
    results["sentences"] = [found[pair] for pair in claims]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(results, indent=1) + "\n")
    return results
