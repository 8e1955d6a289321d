"""The part that experiments share: arms run once, sentences for the claims, settings chosen on the validation split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast._files import write_text
from kdfast.data import Task, load_task
from kdfast.experiment import Arm, Measure
from kdfast.experiment import run as run_arms
from kdfast.metrics.comparison import compare, mean_and_error

RUNS = Path(__file__).resolve().parents[2] / "runs" / "experiments"  # finished arms and seeds, not committed
Claims = Sequence[tuple[str, str]]  # (arm, against)


def stored(out: Path, wanted: Mapping[str, int] | int) -> dict[str, Any] | None:
    """The results in `out` if they have as many seeds (of each task: {task: seeds}), else None."""
    results = json.loads(out.read_text()) if out.exists() else {}
    found = results.get("data", {}) if not isinstance(wanted, int) else {"": results} if results else {}
    wanted = {"": wanted} if isinstance(wanted, int) else wanted
    enough = all(name in found and len(found[name]["seeds"]) >= seeds for name, seeds in wanted.items())
    return results if enough else None


def run_task(
    task: Task, method: str, *, work: Path, seeds: int, steps: int | None = None, arms: Sequence[Arm] | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`kdfast.experiment.run` with a line of progress for each arm and seed."""

    def tell(what: str, done: int, total: int) -> None:
        print(f"{method} on {task.name} {done}/{total} {what}", flush=True)

    return run_arms(task, method, seeds=seeds, out=work, steps=steps, arms=arms, measure=measure, on_progress=tell)


def sentences(results: Mapping[str, Any], claims: Claims) -> list[str]:
    """The computed sentence of each claim (arm, against)."""
    found = {(c["arm"], c["against"]): c["sentence"] for c in results["comparisons"]}
    return [found[pair] for pair in claims]


def best_on_val(results: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """The arm with the best mean validation score, and a sentence with the score of every one that was tried."""
    val = {name: results["arms"][name]["val"] for name in names}
    best = max(names, key=lambda name: sum(val[name]))
    tried = ", ".join(f"{name} {mean_and_error(scores)}" for name, scores in val.items())
    return best, f"chosen on the validation split: {best} (tried: {tried})"


def measured(results: Mapping[str, Any], name: str, *, scale: float = 1.0, digits: int = 2) -> str:
    """A measured number of every arm that has it: mean and standard error."""
    arms = {arm: found["measures"][name] for arm, found in results["arms"].items() if name in found["measures"]}
    return f"{name}: " + ", ".join(
        f"{arm} {mean_and_error(values, scale=scale, digits=digits)}" for arm, values in arms.items()
    )


def write(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def run_own(
    out: Path, data: str, method: str, claims: Claims, *, seeds: int, steps: int | None, task: Task | None, work: Path | None,
    arms: Sequence[Arm] | None = None, measure: Measure | None = None, more: Callable[[dict[str, Any]], list[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One task, arms by name or the method's own: runs what `work` does not hold yet; returns and writes the results.

    A result of as many seeds that is there already is returned as it stands. more: results -> further sentences, after the claims'.
    """
    if (found := stored(out, seeds)) is not None:
        return found
    work = RUNS / method if work is None else work
    results = run_task(
        task or load_task(data), method, work=work, seeds=seeds, steps=steps, arms=arms, measure=measure
    )  # fmt: skip
    results["sentences"] = sentences(results, claims)
    if more is not None:
        results["sentences"] += more(results)
    return write(out, results)


def run_tasks(
    out: Path, method: str, tasks: Sequence[Task], say: Callable[[dict[str, Any]], list[str]], *, seeds: int | Mapping[str, int],
    steps: int | None, work: Path | None, arms: Sequence[Arm], measure: Measure | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Several tasks, each in a folder of its own in `work`; returns and writes {"data": {task: results}, "sentences": [...]}.

    seeds: of every task, or {task: seeds}. say: results of one task -> its sentences. A result of as many tasks and seeds that is
    there already is returned as it stands.
    """
    wanted = {task.name: seeds if isinstance(seeds, int) else seeds[task.name] for task in tasks}
    if (found := stored(out, wanted)) is not None:
        return found
    data = {}
    for task in tasks:
        folder = (RUNS / method if work is None else work) / task.name
        data[task.name] = run_task(
            task, method, work=folder, seeds=wanted[task.name], steps=steps, arms=arms, measure=measure
        )
    said = [f"{name}: {line}" for name, results in data.items() for line in say(results)]
    return write(out, {"data": data, "sentences": said})


def seed_rows(
    name: str, seeds: int, key: str, make: Callable[[int], dict[str, Any]], work: Path | None
) -> list[dict[str, Any]]:  # fmt: skip
    """make(seed) of every seed, for an experiment with a loop of its own: read where `work` holds it under `key`, else made and written."""
    folder = RUNS / name if work is None else work
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(seeds):
        path = folder / f"{seed}-{key}.json"
        if not path.exists():
            print(f"{name}: seed {seed}", flush=True)
            write_text(path, json.dumps(make(seed)))
        rows.append(json.loads(path.read_text()))
    return rows


def measure_sentence(results: Mapping[str, Any], name: str, arm: str, against: str, *, scale: float = 100.0) -> str:
    """Of a measured number, paired by seed: lower, higher or no difference (95 % interval), with means and standard errors."""
    values, baseline = (results["arms"][one]["measures"][name] for one in (arm, against))
    found = compare(values, baseline)
    start = f"{name} of {arm} {mean_and_error(values, scale=scale, digits=2)} against {against} {mean_and_error(baseline, scale=scale, digits=2)} (n = {found['n']})"
    if found["low"] is None:
        return f"{start}: one seed decides nothing."
    verdict = {"gain": "higher", "loss": "lower"}.get(found["verdict"], found["verdict"])
    interval = f"{scale * found['low']:+.2f} to {scale * found['high']:+.2f}"
    return f"{start}: {verdict}; the paired difference is {scale * found['mean']:+.2f}, 95 % interval {interval}."
