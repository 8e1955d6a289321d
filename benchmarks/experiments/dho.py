"""DHO on digits with five labels per class: do two heads serve labels and a weak teacher better than one head does?

A pool of 500 images of which 50 have a label, a teacher trained on 200 other images with strong noise. Arms: labels alone; both
losses on one head; two heads at (0.5, 0.5); two heads with alpha and beta searched on the 100 validation images, once in the end
(dho_end) or after each epoch, of which the best is kept (dho, as published; no other arm chooses its epoch). The claims to look
at: two heads above one head, and above the labels alone. With ten labels per class labels alone won in a trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_own
from kdfast.data import Task
from kdfast.experiment import Arm
from kdfast.methods.dho import dho_loss
from kdfast.nn import DualOutput, dual_heads
from kdfast.train import Distiller

ARMS = (
    Arm("ce", None),
    Arm("single_head", "dho", {"heads": 1}),
    Arm("dual_half", "dho", {"search": "none"}),
    Arm("dho_end", "dho", {"search": "end"}),
    Arm("dho", "dho"),
)
CLAIMS = (
    ("dho_end", "single_head"), ("dho_end", "ce"), ("dho_end", "dual_half"), ("dho", "single_head"), ("dho", "ce"), ("dho", "dho_end"),
)  # fmt: skip


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "digit_few", "dho", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS, measure=measure,
        more=lambda results: [measured(results, name) for name in ("gradient cosine", "alpha", "beta")],
    )  # fmt: skip


def measure(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """The cosine of the two losses' gradients in the backbone's last layer at the end, and the pair of the search."""
    if distiller.teacher is None:
        return {}
    student = distiller.student
    images, labels = next(iter(loaders["student"]))
    student.train()
    out = student(images)
    ce, kd = out if isinstance(out, DualOutput) else (out, out)
    with torch.no_grad():
        teacher = distiller.teacher(images)
    last: Any = student.embedding[0]  # in digit_few: Linear(32, 32), before the heads
    gradients = [
        torch.autograd.grad(dho_loss(ce, kd, labels, teacher, **one).loss, last.weight, retain_graph=True)[0].flatten()
        for one in ({"kd_weight": 0.0}, {"ce_weight": 0.0})
    ]
    found = {"gradient cosine": float(torch.nn.functional.cosine_similarity(*gradients, dim=0))}
    heads: Any = dual_heads(distiller.method.best or student)  # those that are used
    return found | ({"alpha": float(heads[0].alpha), "beta": float(heads[0].beta)} if heads else {})
