"""CNN and ViT on canvases of digits: does teaching only where one is better help, against labels alone and against teaching everywhere?

Two students trained together, 200 AdamW steps of batch 16; the score is the mean of their two test mIoU. Arms: each alone with
labels (ce); KL both ways at all labelled pixels (mutual); pixel-wise selective distillation alone (pixel); the whole method.
The settings are the method's defaults, nothing is tuned per arm. The claims to look at: the whole method above labels alone;
pixel not below mutual; and in every epoch each student teaches the other somewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdfast._files import write_text
from kdfast.data import Task, load_task
from kdfast.experiment import Arm
from kdfast.experiment import run as run_arms
from kdfast.metrics import mean_and_error

WORK = (
    Path(__file__).resolve().parents[2] / "runs" / "experiments" / "cnn_vit_bsd"
)  # finished arms and seeds, not committed
ARMS = (
    Arm("ce", None),
    Arm("mutual", "mutual", {"dim": 1, "ignore_index": 255}),
    Arm("pixel", "cnn_vit_bsd", {"w_hfd": 0.0, "w_region": 0.0}),
    Arm("cnn_vit_bsd", "cnn_vit_bsd"),
)
CLAIMS = (
    ("cnn_vit_bsd", "ce"),
    ("cnn_vit_bsd", "mutual"),
    ("pixel", "mutual"),
    ("mutual", "ce"),
    ("cnn_vit_bsd", "pixel"),
)


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path = WORK
) -> dict[str, Any]:
    """Runs what `work` does not hold yet; writes and returns the results with "selected" (see `selected`) and "sentences".

    A result of as many seeds that is there already is returned as it stands.
    """
    if out.exists():
        results = json.loads(out.read_text())
        if len(results["seeds"]) >= seeds:
            return results

    def tell(what: str, done: int, total: int) -> None:
        print(f"cnn_vit_bsd {done}/{total} {what}", flush=True)

    results = run_arms(
        task or load_task("canvases"), "cnn_vit_bsd", seeds=seeds, out=work, steps=steps, arms=ARMS, on_progress=tell
    )
    found = {(c["arm"], c["against"]): c for c in results["comparisons"]}
    results["sentences"] = [found[pair]["sentence"] for pair in CLAIMS]
    for name, arm in results["arms"].items():
        cnn, vit = zip(*arm["each"])
        results["sentences"].append(f"{name}: CNN {mean_and_error(cnn)}, ViT {mean_and_error(vit)}")
    results["selected"] = {
        name: selected(arm["counts"]) for name, arm in results["arms"].items() if "num_to_a" in arm["counts"][0]
    }
    results["sentences"] += [sentence(name, shares) for name, shares in results["selected"].items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def selected(counts: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Shares of the labelled pixels, {"to_cnn", "to_vit", "ties": {"mean", "least"}}, over the epochs of all seeds; they add up to 1."""
    shares: dict[str, list[float]] = {"to_cnn": [], "to_vit": [], "ties": []}
    for seed in counts:
        for valid, to_cnn, to_vit in zip(seed["num_valid"], seed["num_to_a"], seed["num_to_b"]):
            for name, number in (("to_cnn", to_cnn), ("to_vit", to_vit), ("ties", valid - to_cnn - to_vit)):
                shares[name].append(number / valid)
    return {name: {"mean": sum(found) / len(found), "least": min(found)} for name, found in shares.items()}


def sentence(name: str, shares: dict[str, dict[str, float]]) -> str:
    both = shares["to_cnn"]["least"] > 0 and shares["to_vit"]["least"] > 0
    mean = {key: f"{100 * share['mean']:.1f} %" for key, share in shares.items()}
    return (
        f"{name}: of the labelled pixels the ViT teaches the CNN {mean['to_cnn']}, the CNN the ViT {mean['to_vit']}, "
        f"ties are {mean['ties']}; both teach in {'every' if both else 'not every'} epoch"
    )
