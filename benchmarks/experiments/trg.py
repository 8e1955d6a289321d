"""TRG on digits: does the graph over tokens help beyond KD, with a balanced and with a long-tailed training set?

Student: CNN with 5k weights; teacher: CNN with 220k weights, trained on the balanced images; tokens: the 4x4 map of both.
Arms: labels alone; KD (CE + T^2 KL); KD and relations between instances (the same graph, one pooled node per image); KD and
TRG; KD and each TRG term alone. The settings are the method's defaults, nothing is tuned per arm. The claims to look at:
TRG above KD on the long-tailed set, and not below it on the full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_tasks
from kdfast.data import Task, load_task
from kdfast.experiment import Arm

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
    out: Path,
    *,
    seeds: int = 5,
    steps: int | None = None,
    tasks: Sequence[Task] | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Both data sets."""
    tasks = tasks or [load_task(name) for name in DATA]
    return run_tasks(out, "trg", tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS)


def said(results: dict[str, Any]) -> list[str]:
    """What each arm adds to KD, and the whole against every other."""
    return [
        found["sentence"] for found in results["comparisons"] if found["against"] == "kd" or found["arm"] == "kd_trg"
    ]
