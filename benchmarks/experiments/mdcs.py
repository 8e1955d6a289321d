"""MDCS on long-tailed digits: what the prior, three experts and the consistency of two views add to plain cross-entropy.

150 training images of digit 0 down to 3 of digit 9 in two views, a small CNN with shared first layers, 600 AdamW steps; the test
split holds 25 images of every class. Few-shot are classes 5 to 9 (at most 17 images), rare 7 to 9, frequent 0 to 2. The claims
to look at: the whole method above plain cross-entropy, also on the few-shot classes; the last expert better on rare classes
than the first, and worse on frequent ones. Against three experts without consistency and against one adjusted expert: as found.
The settings are the method's defaults but for the number of epochs; nothing is tuned per arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import run_own, write
from kdfast.data import Task
from kdfast.metrics import compare, mean_and_error, sentence
from kdfast.train import Distiller

# (arm, against): what each comparison isolates
CLAIMS = (("mdcs", "ce"), ("mdcs", "diversity"), ("mdcs", "adjusted"), ("diversity", "adjusted"))
FEW, RARE, FREQUENT = range(5, 10), range(7, 10), range(3)


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    results = run_own(
        out, "digit_tail", "mdcs", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, measure=by_class
    )
    if "experts" not in results:
        few = {name: arm["measures"]["few"] for name, arm in results["arms"].items()}
        results["sentences"].append(sentence("mdcs", few["mdcs"], "ce", few["ce"], score="few-shot accuracy"))
        measures = results["arms"]["mdcs"]["measures"]
        results["experts"] = {
            classes: compare(measures[f"{classes}_2"], measures[f"{classes}_0"]) for classes in ("rare", "frequent")
        }
        results["sentences"] += [
            sentence("last expert", measures[f"{classes}_2"], "first", measures[f"{classes}_0"], score=f"{classes} accuracy")
            for classes in results["experts"]
        ]  # fmt: skip
        spread = {name: mean_and_error(results["arms"][name]["test"], digits=2) for name in ("diversity", "mdcs")}
        results["sentences"].append(
            f"over the seeds: {spread['diversity']} without consistency, {spread['mdcs']} with it"
        )
        write(out, results)
    return results


def by_class(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Test accuracy on the few-shot classes; of each expert's raw logits on rare and on frequent classes."""
    model = distiller.student
    found: dict[str, list[torch.Tensor]] = {"mean": [], "experts": [], "labels": []}
    with torch.no_grad():
        for batch in loaders["test"]:
            shared = model.stem(batch["images"])
            logits = torch.stack([expert(shared) for expert in model.experts])  # [M, N, C]
            found["experts"].append(logits.argmax(-1))
            found["mean"].append(logits.mean(0).argmax(-1))
            found["labels"].append(batch["labels"])
    labels, mean, experts = torch.cat(found["labels"]), torch.cat(found["mean"]), torch.cat(found["experts"], 1)

    def share(predictions: torch.Tensor, classes: range) -> float:
        chosen = (labels >= classes.start) & (labels < classes.stop)
        return float((predictions == labels)[chosen].double().mean())

    scores = {"few": share(mean, FEW)}
    for m, predictions in enumerate(experts):
        scores |= {f"rare_{m}": share(predictions, RARE), f"frequent_{m}": share(predictions, FREQUENT)}
    return scores
