"""RotNet on digits: are features learned from quarter turns better than random ones, and is a middle block the one to probe?

Turns of 1300 images without labels for 300 AdamW steps (15 epochs); then a linear probe on the frozen map of block 2, or of the last
block, with 5, 20 or 100 labels per class for 200 steps; the same on the random network; and the network trained on those labels from
scratch. The claims to look at: the turns are told apart in more than 80 % (0, 1 and 8 are nearly symmetric); block 2 above the
last block at 5 labels; block 2 not below random features over all label counts. Against labels from scratch: as found.
"""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, RandomSampler

import kdfast
from benchmarks.experiments._common import seed_rows, write
from kdfast.data import NamedRows
from kdfast.data.digit_turns import turn_splits
from kdfast.data.rotations import rotate4
from kdfast.data.task import as_read
from kdfast.experiment import commit
from kdfast.methods.rotnet import Method, RotNet, small_blocks
from kdfast.metrics import accuracy, mean_and_error, sentence, summary
from kdfast.train import Distiller

BATCH, LR, STEPS = 64, 2e-3, 300
COUNTS = (5, 20, 100)
NETWORKS: dict[str, dict[str, Any]] = {
    "rotnet": {"layer": 1}, "rotnet last": {"layer": 2}, "random": {"layer": 1}, "random last": {"layer": 2},
    "supervised": {"layer": 2, "freeze": False, "grid": 1},
}  # fmt: skip


def run(
    out: Path,
    *,
    seeds: int = 5,
    steps: int = 300,
    probe_steps: int = 200,
    work: Path | None = None,
    counts: Sequence[int] = COUNTS,
) -> dict[str, Any]:
    """Seeds that `work` holds are read, the others trained; returns and writes the results with their sentences."""
    steps = steps or STEPS
    settings = {"steps": steps, "probe_steps": probe_steps, "counts": list(counts), "batch": BATCH, "lr": LR}
    if out.exists() and (stored := json.loads(out.read_text()))["settings"] == settings and stored["n"] >= seeds:
        return stored
    key = f"{steps}-{probe_steps}-{'-'.join(map(str, counts))}"
    rows = seed_rows("rotnet", seeds, key, lambda seed: one_seed(seed, steps, probe_steps, counts), work)
    accuracies = {
        name: {str(count): [row["accuracy"][name][str(count)] for row in rows] for count in counts} for name in NETWORKS
    }
    results = {
        "settings": settings, "n": seeds, "turns": summary([row["turns"] for row in rows]), "accuracy": accuracies,
        "seconds": {key: [row["seconds"][key] for row in rows] for key in rows[0]["seconds"]},
        "peak_rss_mb": max(row["peak_rss_mb"] for row in rows),
        "summary": {f"{name}, {n} labels per class": summary(v) for name, found in accuracies.items() for n, v in found.items()},
        "versions": {"kdfast": kdfast.__version__, "torch": torch.__version__}, "commit": commit(),
    }  # fmt: skip
    return write(out, results | {"sentences": said([row["turns"] for row in rows], accuracies, counts)})


def said(turns: list[float], accuracies: dict[str, dict[str, list[float]]], counts: Sequence[int]) -> list[str]:
    lines = [f"turns told apart: {mean_and_error(turns)} (test accuracy in %, n = {len(turns)})"]
    for count in map(str, counts):
        for name, other in (
            ("rotnet", "random"),
            ("rotnet", "rotnet last"),
            ("rotnet last", "random last"),
            ("rotnet", "supervised"),
        ):
            line = sentence(
                f"{name} block" if "last" in name else name, accuracies[name][count], other, accuracies[other][count]
            )
            lines.append(f"{count} labels per class: {line}")
    over_all = {
        name: [sum(column) / len(column) for column in zip(*accuracies[name].values())] for name in ("rotnet", "random")
    }
    return [*lines, "all label counts: " + sentence("rotnet", over_all["rotnet"], "random", over_all["random"])]


def one_seed(seed: int, steps: int, probe_steps: int, counts: Sequence[int]) -> dict[str, Any]:
    splits = turn_splits(seed)
    torch.manual_seed(seed)
    fresh = RotNet(*small_blocks(), 10)
    turned = copy.deepcopy(fresh)
    seconds = {"turns": fit(turned, splits["student"], steps, steps, seed)}
    test = {name: splits["test"].tensors[name] for name in ("images", "labels")}
    images, turns = rotate4(test["images"])
    with torch.no_grad():
        predicted = turned.eval().turns(turned.features(images, 2)).argmax(-1)
    found: dict[str, dict[str, float]] = {name: {} for name in NETWORKS}
    for count in counts:
        rows = labelled(turn_splits(seed, per_class=count)["student"])
        for name, options in NETWORKS.items():
            torch.manual_seed(seed)
            model = RotNet(*small_blocks(), 10, **options)
            model.blocks.load_state_dict((turned if "rotnet" in name else fresh).blocks.state_dict())
            seconds[f"{name} {count}"] = fit(model, rows, 0, probe_steps, seed)
            with torch.no_grad():
                found[name][str(count)] = accuracy(model.eval()(test["images"]).argmax(-1), test["labels"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"turns": accuracy(predicted, turns), "accuracy": found, "seconds": seconds, "peak_rss_mb": memory}


def labelled(rows: NamedRows) -> NamedRows:
    keep: Tensor = rows.tensors["labels"] != -100
    return NamedRows(**{name: tensor[keep] for name, tensor in rows.tensors.items()})


def fit(model: RotNet, data: NamedRows, pretext_steps: int, steps: int, seed: int) -> float:
    """Trains in place; seconds."""
    start = time.perf_counter()
    sampler = RandomSampler(data, num_samples=steps * BATCH)  # type: ignore[arg-type]
    distiller = Distiller(
        model, None, Method(pretext_steps=pretext_steps), optimizer=lambda parameters: AdamW(parameters, lr=LR), seed=seed, progress=False
    )  # fmt: skip
    distiller.fit(DataLoader(data, BATCH, sampler=sampler, collate_fn=as_read), 1)
    return time.perf_counter() - start
