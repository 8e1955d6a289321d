"""General knowledge transfer on digits: does a trained student gain from a weaker, an equal and a stronger model, and forget nothing?

400 images. The student is an MLP 64-16-16-10 on pixels, trained on the labels for 400 AdamW steps; the teacher another kind of
model, an MLP on the 2-D cosine transform of the image, trained on the same images with a third of the classes 5 to 9 left in, and
narrower, as wide, or wider than the student. Then 400 steps of transfer: plain KL, KL with labels, the same with weight
interpolation, data partitioning with and without labels. The claims to look at: partitioning does not lose for any teacher, and
gains for more pairs than plain KL; plain KL loses with clearly weaker teachers. Tau is 0.99, since 0.9999 moves nothing in 400 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_tasks, sentences, write
from kdfast.data import Rows, Task, load_task
from kdfast.data.digits import digit_mlp, digit_splits
from kdfast.experiment import Arm
from kdfast.methods.general_knowledge_transfer import complementary_knowledge
from kdfast.train import Distiller

SLUG = "general_knowledge_transfer"
WIDTHS = {"weaker": 5, "equal": 16, "stronger": 128}
ARMS = (
    Arm("ce", None),
    Arm("kl", SLUG, {"strategy": "none"}, start="ce"),
    Arm("xe_kl", SLUG, {"strategy": "none", "ce_weight": 0.5}, start="ce"),
    Arm("xe_kl_mcl", SLUG, {"strategy": "none", "ce_weight": 0.32, "mcl": True, "tau": 0.99}, start="ce"),
    Arm("dp", SLUG, {}, start="ce"),
    Arm("dp_unsupervised", SLUG, {"strategy": "most_confident_unsupervised"}, start="ce"),
)
TRANSFERS = tuple(arm.name for arm in ARMS[1:])


class Cosines(nn.Module):
    """The 2-D discrete cosine transform (type II, orthonormal) of images [B, C, S, S]."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        i = torch.arange(size)
        table = torch.cos(math.pi / size * (i + 0.5) * i.unsqueeze(1)) * math.sqrt(2 / size)  # [frequency, place]
        table[0] /= math.sqrt(2)
        self.register_buffer("table", table)

    def forward(self, images: Tensor) -> Tensor:
        return self.table @ images @ self.table.T


def splits(seed: int) -> dict[str, Rows]:
    found = digit_splits(seed, teacher=400, student=200)
    images, labels = found["teacher"].tensors
    later = (labels >= 5).nonzero().flatten()
    keep = torch.cat(((labels < 5).nonzero().flatten(), later[::3]))
    return found | {"student": found["teacher"], "teacher": Rows(images[keep], labels[keep])}


def pair(name: str) -> Task:
    width = WIDTHS[name]
    return dataclasses.replace(
        load_task("digits"),
        name=f"{name}_teacher",
        title=f"handwritten digits (scikit-learn), 400 labels, a teacher of another kind, width {width} against 16",
        splits=splits,
        teacher=lambda: nn.Sequential(Cosines(), digit_mlp(width)),
        steps=400,
        teacher_steps=300,
    )


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, tasks: list[Task] | None = None, work: Path | None = None
) -> dict[str, Any]:
    """All three teachers, and over them {"improved": {arm: share}}."""
    tasks = tasks or [pair(name) for name in WIDTHS]
    results = run_tasks(
        out, SLUG, tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS, measure=positive_flips
    )  # fmt: skip
    if "improved" not in results:
        results["improved"] = improved = {name: share_improved(results["data"], name) for name in TRANSFERS}
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in improved.items())
        results["sentences"].append(f"pairs improved: {shares}")
        write(out, results)
    return results


def said(results: dict[str, Any]) -> list[str]:
    return [*sentences(results, [(name, "ce") for name in TRANSFERS]), measured(results, "teacher right alone")]


def share_improved(data: Mapping[str, Any], name: str) -> float:
    """Of all teachers and seeds, where the student is better after the transfer than before."""
    pairs = [
        (after, before)
        for found in data.values()
        for after, before in zip(found["arms"][name]["test"], found["arms"]["ce"]["test"])
    ]
    return sum(after > before for after, before in pairs) / len(pairs)


@torch.no_grad()
def positive_flips(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Share of the test split that the teacher predicts right and the student does not, after training."""
    if distiller.teacher is None:
        return {}
    distiller.student.eval()
    found = [(distiller.student(x).argmax(-1), distiller.teacher(x).argmax(-1), y) for x, y in loaders["test"]]
    student, teacher, labels = (torch.cat(column) for column in zip(*found))
    return {"teacher right alone": complementary_knowledge(student, teacher, labels)}
