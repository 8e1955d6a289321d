"""KD^3 on a pool of digits as if from the web: does selecting images help, and how many of the kept ones are no digits?

Teacher CNN on 700 clean digits; pool of 700 others, half changed in light, sharpness or noise, a quarter no digits; student CNN with a quarter
of the channels, 600 SGD steps of 64, equal for all arms. Arms: KD (T = 4, no labels) on the whole pool; KD^3 without selection; KD^3. The
claims to look at: KD^3 not below KD, nor below itself without selection; less than a quarter of the kept images are no digits. Only the
schedule is scaled to the number of epochs, as 120 and 160 are to 240; nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_own
from kdfast.data import Task
from kdfast.data.web_digits import NO_DIGIT
from kdfast.experiment import Arm
from kdfast.train import Distiller

ARMS = (
    Arm("kd", "kd", {"temperature": 4.0, "ce_weight": 0.0, "kd_weight": 1.0}),
    Arm("kd3 all", "kd3", {"cutoff": None}),
    Arm("kd3", "kd3", {}),
)
CLAIMS = (("kd3", "kd"), ("kd3", "kd3 all"), ("kd3 all", "kd"))
MEASURES = ("share kept", "no digits among the kept")


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "web_digits", "kd3", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS, measure=kept,
        more=lambda results: [measured(results, name) for name in MEASURES],
    )  # fmt: skip


def kept(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Of the last epoch's selection."""
    selected = getattr(distiller.method, "selected", None)
    if selected is None or not len(selected):
        return {}
    kind = torch.cat([batch[3] for batch in loaders["student"]])
    share = float(selected.double().mean())
    return dict(zip(MEASURES, (share, float((kind[selected] == NO_DIGIT).double().mean()))))
