"""LELP on digits with few classes: do subclasses read off the teacher's embeddings help where ten digits hide in two classes?

Even or odd, modulo 3, and all ten classes; teacher 64-256-64-C on 900 labels, student 64-8-(5 C) on 300 labels and 600 images
without. Arms: labels alone; plain KD on all images (one subclass); five random directions; LELP with five. The claims to look at:
LELP not below KD and above labels with two classes, and a gain that shrinks as the classes grow. Also measured: the mutual
information, in bits, of the teacher's most likely subclass and the hidden digit on the test split. Settings: the method's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_tasks, sentences
from kdfast.data import Task
from kdfast.data.digit_residues import residue_task
from kdfast.experiment import Arm
from kdfast.methods import Context
from kdfast.nn import capture_outputs
from kdfast.train import Distiller

ARMS = (
    Arm("ce", None),
    Arm("kd", "lelp", {"n_subclasses": 1}),
    Arm("random", "lelp", {"n_subclasses": 5, "random_directions": True}),
    Arm("lelp", "lelp", {"n_subclasses": 5}),
)
CLAIMS = (("lelp", "kd"), ("lelp", "ce"), ("lelp", "random"), ("kd", "ce"))
CLASSES = (2, 3, 10)


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, tasks: list[Task] | None = None, work: Path | None = None
) -> dict[str, Any]:
    """All three problems."""
    tasks = tasks or [residue_task(classes) for classes in CLASSES]
    return run_tasks(out, "lelp", tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS, measure=information)


def said(results: dict[str, Any]) -> list[str]:
    return [*sentences(results, CLAIMS), measured(results, "subclass and digit, bits")]


@torch.no_grad()
def information(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Nothing for an arm without subclasses."""
    if not hasattr(distiller.method, "targets"):
        return {}
    assert distiller.teacher is not None
    subclasses, digits = [], []
    for images, labels, digit in loaders["test"]:
        with capture_outputs(distiller.teacher, {"embedding": "embedding"}) as features:
            context = Context(None, distiller.teacher(images), labels, teacher_features=features)
        subclasses.append(distiller.method.targets(context).argmax(-1))
        digits.append(digit)
    return {"subclass and digit, bits": mutual_information(torch.cat(subclasses), torch.cat(digits))}


def mutual_information(a: torch.Tensor, b: torch.Tensor) -> float:
    """sum p(a, b) log2(p(a, b) / (p(a) p(b))) of two columns of integers, from their counts."""
    from sklearn.metrics import mutual_info_score

    return float(mutual_info_score(a, b)) / math.log(2)
