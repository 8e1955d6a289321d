"""SinKD on digits: does the Sinkhorn term help labels alone, does it harm plain KD, and how large may it be?

Teacher 64-256-256-10 on 900 digits; student 64-16-16-10 on 200 of them, batches of 64, 800 Adam steps. L_sink is a sum over
the batch, so what counts is scale x batch size; the claim to look at is: labels + SinKD above labels at a scale up to 0.01,
labels + KD + SinKD not below labels + KD at 0.001, and a scale of 0.1 hurts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from benchmarks.experiments._common import write
from kdfast.data.digits import digit_mlp, digit_splits
from kdfast.experiment import commit, threads
from kdfast.methods.sinkd import sinkd_total
from kdfast.metrics import accuracy, compare, sentence, summary

CE = {"alpha": 0.0, "beta": 0.0}
KD = {"alpha": 0.9, "beta": 0.0, "kd_temperature": 4.0}
ARMS: dict[str, dict[str, float]] = {
    "labels": CE,
    "labels + SinKD 0.001": CE | {"beta": 1.0, "scale": 0.001},
    "labels + SinKD 0.01": CE | {"beta": 1.0, "scale": 0.01},
    "labels + SinKD 0.1": CE | {"beta": 1.0, "scale": 0.1},
    "labels + KD": KD,
    "labels + KD + SinKD 0.001": KD | {"beta": 1.0, "scale": 0.001},
    "labels + KD + SinKD 0.01": KD | {"beta": 1.0, "scale": 0.01},
    "labels + KD + SinKD 0.1": KD | {"beta": 1.0, "scale": 0.1},
}
BATCH, LR, TEACHER_STEPS = 64, 3e-3, 600


def run(out: Path, *, seeds: int = 10, steps: int = 800) -> dict[str, Any]:
    """Trains every arm and seed that `out` does not hold, writing after each; returns the results with their sentences."""
    settings = {"steps": steps, "batch": BATCH, "lr": LR, "teacher_steps": TEACHER_STEPS, "arms": ARMS}
    results = json.loads(out.read_text()) if out.exists() else {"settings": settings, "accuracy": {}, "teacher": {}}
    if results["settings"] != settings:
        raise ValueError(f"{out} holds an experiment with other settings; move it away")
    with threads(1):  # the networks are small: a second thread only waits
        for seed in range(seeds):
            missing = [arm for arm in ARMS if str(seed) not in results["accuracy"].get(arm, {})]
            if not missing:
                continue
            splits = {name: rows.tensors for name, rows in digit_splits(seed).items()}
            teacher = fit(digit_mlp(256), splits["teacher"], seed, TEACHER_STEPS, CE)
            results["teacher"][str(seed)] = score(teacher, splits["test"])
            for arm in missing:
                student = fit(digit_mlp(16), splits["student"], seed, steps, ARMS[arm], teacher)
                results["accuracy"].setdefault(arm, {})[str(seed)] = score(student, splits["test"])
                write(out, summarise(results))
    return results


def fit(
    model: nn.Module,
    data: tuple[Tensor, ...],
    seed: int,
    steps: int,
    options: dict,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """The same seed gives every arm the same weights at the start and the same batches."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        bound = 1.0 / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 8.0)
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    images, labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(steps):
        index = torch.randperm(len(labels), generator=generator)[:BATCH]
        logits = model(images[index])
        with torch.no_grad():
            target = teacher(images[index]) if teacher is not None else logits.detach()
        optimizer.zero_grad()
        sinkd_total(logits, target, labels[index], **options).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def score(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    images, labels = data
    return accuracy(model(images).argmax(-1), labels)


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers with sentences made from them: an arm is compared with the one that lacks its Sinkhorn term."""
    values = {
        arm: [found[key] for key in sorted(found, key=int)] for arm, found in results["accuracy"].items() if arm in ARMS
    }
    pairs = [(arm, arm.split(" + SinKD")[0]) for arm in values if " + SinKD" in arm]
    pairs = [(arm, base) for arm, base in pairs if len(values[arm]) == len(values[base])]
    results["summary"] = {arm: summary(v) for arm, v in values.items()}
    results["comparisons"] = {arm: compare(values[arm], values[base]) for arm, base in pairs}
    results["sentences"] = [sentence(arm, values[arm], base, values[base]) for arm, base in pairs]
    results["versions"] = {"kdfast": kdfast.__version__, "torch": torch.__version__, "commit": commit()}
    return results
