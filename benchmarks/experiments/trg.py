"""TRG on digits: does the graph over tokens help beyond KD, with a balanced and with a long-tailed training set?

Student: CNN with 5k weights; teacher: CNN with 220k weights, trained on the balanced images; tokens: the 4x4 map of both.
Arms: labels alone; KD (CE + T^2 KL); KD and relations between instances (the same graph, one pooled node per image); KD and
TRG; KD and each TRG term alone. The settings are the method's defaults, nothing is tuned per arm. The claims to look at:
TRG above KD on the long-tailed set, and not below it on the full one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast._files import write_text
from kdfast.data import Task, load_task
from kdfast.experiment import Arm
from kdfast.experiment import run as run_arms

WORK = Path(__file__).resolve().parents[2] / "runs" / "experiments" / "trg"  # finished arms and seeds, not committed
DATA = ("digit_maps", "digit_maps_tail")
NONE = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
ARMS = (
    Arm("ce", None),
    Arm("kd", "kd", {"ce_weight": 1.0, "kd_weight": 1.0}),  # TRG's own logit term
    Arm("kd_instance", "trg", NONE | {"beta": 1.0, "grid": 1}),
    Arm("kd_inner", "trg", NONE | {"alpha": 1.0}),
    Arm("kd_local", "trg", NONE | {"beta": 1.0}),
    Arm("kd_global", "trg", NONE | {"gamma": 1.0}),
    Arm("kd_trg", "trg"),
)


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, tasks: Sequence[Task] | None = None, work: Path = WORK
) -> dict[str, Any]:
    """Both data sets, what `work` does not hold yet; returns and writes {"data": {name: results}, "sentences": [...]}.

    A result of as many seeds that is there already is returned as it stands.
    """
    if out.exists():
        results = json.loads(out.read_text())
        if all(len(found["seeds"]) >= seeds for found in results["data"].values()):
            return results
    data = {}
    for task in tasks or [load_task(name) for name in DATA]:

        def tell(what: str, done: int, total: int, name: str = task.name) -> None:
            print(f"{name} {done}/{total} {what}", flush=True)

        data[task.name] = run_arms(
            task, "trg", seeds=seeds, out=work / task.name, steps=steps, arms=ARMS, on_progress=tell
        )
    results = {
        "data": data,
        "sentences": [
            f"{name}: {comparison['sentence']}"
            for name, found in data.items()
            for comparison in found["comparisons"]
            if comparison["against"] == "kd" or comparison["arm"] == "kd_trg"
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(results, indent=1) + "\n")
    return results
