"""FF-G2M on a graph of digits: what an MLP takes over from a GCN by neighbours' predictions and by differences along edges.

1797 nodes joined to their 8 nearest, 20 labels per class, 30 validation nodes per class; a fifth of the test nodes is away during training
in the second task. Arms: labels alone; node-wise KD; each term alone; both. The settings are the method's defaults (lambda 0.1, tau 1.5),
nothing is tuned; teacher and students stop after 50 steps without a gain on the validation nodes, and the best step counts. The claim
to look at: both terms above the labels alone, clearly. Against node-wise KD and the low-frequency term alone it is reported as found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_tasks, sentences
from kdfast.data import Task, load_task
from kdfast.experiment import Arm
from kdfast.methods.ff_g2m import high_frequency_kd
from kdfast.nn import evaluating
from kdfast.train import Distiller

DATA = ("digit_nodes", "digit_nodes_unseen")
ARMS = (
    Arm("labels", "ff_g2m", {"lam": 1.0}),  # the terms have weight 0
    Arm("node", "ff_g2m", {"form": "node"}),
    Arm("low", "ff_g2m", {"form": "low"}),
    Arm("high", "ff_g2m", {"form": "high"}),
    Arm("ff_g2m", "ff_g2m"),
)
CLAIMS = (
    ("ff_g2m", "labels"), ("ff_g2m", "node"), ("ff_g2m", "low"), ("node", "labels"), ("low", "labels"), ("high", "labels"),
)  # fmt: skip
MEASURES = ("cosine along edges", "gap of difference profiles")


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, tasks: Sequence[Task] | None = None, work: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Both tasks."""
    tasks = tasks or [load_task(name) for name in DATA]
    return run_tasks(out, "ff_g2m", tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS, measure=measure)


def said(results: dict[str, Any]) -> list[str]:
    return [*sentences(results, CLAIMS), *(measured(results, name, digits=3) for name in MEASURES)]


@torch.no_grad()
def measure(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Of the trained student on the training graph: mean cosine of the logits along an edge, and the high-frequency term."""
    assert distiller.teacher is not None
    graph = next(iter(loaders["student"]))
    features, edges = graph["features"], graph["edges"]
    with evaluating(distiller.student):
        s, t = distiller.student(features), distiller.teacher(features, edges)
    cosine = F.cosine_similarity(s[edges[0]], s[edges[1]], dim=-1).mean()
    return dict(zip(MEASURES, (float(cosine), float(high_frequency_kd(s, t, edges)))))
