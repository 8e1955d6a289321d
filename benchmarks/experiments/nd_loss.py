"""ND loss on shifted digits: does the term move norm and direction as it says, and does a small weight help KD?

400 training images, one random shift by up to a pixel per batch, teacher 64-256-64-10, students 64-12-64-10 and 64-32-64-10 of
the same feature width, SGD with momentum for 80 epochs. (a) CE + ND: the ratio of the norms and the cosine to the class mean grow
with the weight. (b) KD++ against KD and CE + ND against CE at the weight that is best on the validation split. The published weights
(0.5 to 4) belong to long convolutional training.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.experiments._common import best_on_val, measured, run_tasks, sentences
from kdfast.data import Task, load_task
from kdfast.data.digits import digit_mlp, digit_splits, shifted
from kdfast.experiment import Arm
from kdfast.nn import capture_outputs
from kdfast.train import Distiller

WEIGHTS = (0.1, 0.5, 2.0)
WIDTHS = (12, 32)
CE = {"kd_weight": 0.0, "nd_weight": 0.0}
KD = {"kd_weight": 1.0, "nd_weight": 0.0, "warmup_epochs": 8, "epochs": 80}
ARMS = (
    Arm("ce", "nd_loss", CE),
    *(Arm(f"ce_nd_{w:g}", "nd_loss", CE | {"nd_weight": w}) for w in WEIGHTS),
    Arm("kd", "nd_loss", KD),
    *(Arm(f"kd_nd_{w:g}", "nd_loss", KD | {"nd_weight": w}) for w in WEIGHTS),
)


def splits(seed: int) -> dict[str, Any]:
    found = digit_splits(seed, teacher=400, student=200)
    return found | {"student": found["teacher"]}


def shifted_digits(width: int) -> Task:
    steps = 560
    return dataclasses.replace(
        load_task("digits"),
        name=f"shifted_digits_{width}",
        title=f"handwritten digits (scikit-learn), 400 images shifted by up to a pixel, student 64-{width}-64-10",
        splits=splits,
        student=partial(digit_mlp, width, 64),
        teacher=partial(digit_mlp, 256, 64),
        widths={"embedding": (64, 64)},
        augment=shifted,
        steps=steps,
        teacher_steps=steps,
        eval_every=70,
        optimizer=lambda parameters: torch.optim.SGD(
            parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        scheduler=lambda optimizer, total: torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [total * 50 // 80, total * 65 // 80]
        ),
    )


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, tasks: list[Task] | None = None, work: Path | None = None
) -> dict[str, Any]:
    """Both students."""
    tasks = tasks or [shifted_digits(width) for width in WIDTHS]
    return run_tasks(
        out, "nd_loss", tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS, measure=mechanism
    )  # fmt: skip


def said(results: dict[str, Any]) -> list[str]:
    lines = [measured(results, "norm ratio"), measured(results, "cosine"), monotone(results)]
    for base in ("ce", "kd"):
        best, line = best_on_val(results, [f"{base}_nd_{w:g}" for w in WEIGHTS])
        lines += [line, *sentences(results, [(best, base)])]
    return lines + sentences(results, [("kd", "ce")])


@torch.no_grad()
def mechanism(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """On the test split: mean |s| / |t|, and the mean cosine of s to the teacher's mean of its class."""
    ratios, cosines = [], []
    for images, labels in loaders["test"]:
        features = []
        for model in (distiller.student, distiller.teacher):
            assert model is not None
            with capture_outputs(model, {"embedding": "embedding"}) as found:
                model(images)
            features.append(found["embedding"])
        s, t = features
        ratios.append(s.norm(dim=1) / t.norm(dim=1))
        cosines.append(F.cosine_similarity(s, distiller.method.class_means[labels], dim=1))
    return {"norm ratio": float(torch.cat(ratios).mean()), "cosine": float(torch.cat(cosines).mean())}


def monotone(results: Mapping[str, Any]) -> str:
    """From the numbers: whether both means grow from weight to weight, 0 included."""
    names = ["ce", *(f"ce_nd_{w:g}" for w in WEIGHTS)]
    grow = {}
    for measure in ("norm ratio", "cosine"):
        means = [sum(results["arms"][name]["measures"][measure]) for name in names]
        grow[measure] = all(a < b for a, b in itertools.pairwise(means))
    return "; ".join(
        f"the {name} {'grows' if up else 'does not grow'} with every step of the ND weight" for name, up in grow.items()
    )
