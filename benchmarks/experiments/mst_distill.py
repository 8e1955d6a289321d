"""MST-Distill on digits: is a teacher picked for each sample better than one teacher for all?

The student, an MLP 32-64-64-10, sees the right half of the image with much noise; one teacher sees both halves, one the left half alone.
420 AdamW steps of 64 together, 140 for the four masks, 840 of the student (the published stages of one epoch at 1e-4 train nothing at this
size). Arms: labels alone; KD from each teacher; from the mean of the four masked variants; MST-Distill with the published gate, which
learns from the balance alone, and with a gate that learns from the distillation too (weighted, two teachers a sample: of one alone it would learn nothing). The claims to look at: MST-Distill not below
labels alone, nor below the worse of the two single teachers. How often each variant is chosen is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_own
from kdfast.data import Task
from kdfast.methods.mst_distill import route
from kdfast.train import Distiller

CLAIMS = (
    ("mst", "alone"), ("mst", "multimodal"), ("mst", "cross"), ("mst", "average"), ("mst", "weighted"), ("weighted", "alone"),
)  # fmt: skip


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "two_view_digits", "mst_distill", CLAIMS, seeds=seeds, steps=steps, task=task, work=work,
        measure=routes, more=more,
    )  # fmt: skip


def more(results: dict[str, Any]) -> list[str]:
    worse = min(("multimodal", "cross"), key=lambda name: results["arms"][name]["mean"])
    names = [f"share of variant {e}" for e in range(4)]
    shares = [measured(results, name) for name in names if name in results["arms"]["mst"]["measures"]]
    return [f"the worse single teacher is {worse}", *shares]


@torch.no_grad()
def routes(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Share of the test samples that would learn from each variant (the first of their choices)."""
    model = distiller.student
    if model.source != "routed":
        return {}
    model.eval()
    first = torch.cat([route(model.gate(model(batch["images"])), model.top_k)[:, 0] for batch in loaders["test"]])
    shares = first.bincount(minlength=len(model.masks)).double() / len(first)
    return {f"share of variant {e}": float(share) for e, share in enumerate(shares)}
