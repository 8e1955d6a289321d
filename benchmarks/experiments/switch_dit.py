"""Switch-DiT on 8x8 digits: does the prior loss make near timesteps share experts, and do the experts help to find the noise?

Width 64, 4 layers, 3 experts of which 2 are active, 100 timesteps, 1000 steps of 64; arms: plain DiT, experts without the
prior loss, whole. The claim to look at: with the prior loss, the share of experts that two timesteps have in common falls with
their distance. The explained share of held-out noise (fixed timesteps and noise) is reported as found, with the number of
parameters of each arm.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor

from benchmarks.experiments._common import RUNS, run_own
from kdfast.data import Task, load_task
from kdfast.experiment import arms_of
from kdfast.methods.switch_dit import SwitchDiT
from kdfast.train.checkpoint import write_text

CLAIMS = (("whole", "no_prior"), ("whole", "dit"), ("no_prior", "dit"))
BANDS = ((0, 10), (10, 30), (30, 60), (60, 100))  # distances between timesteps


def run(
    out: Path, *, seeds: int = 3, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    work = RUNS / "switch_dit" if work is None else work
    results = run_own(out, "digit_diffusion", "switch_dit", CLAIMS, seeds=seeds, steps=steps, task=task, work=work)
    if "shared_experts" not in results:
        arms = {arm.name: arm for arm in arms_of(task or load_task("digit_diffusion"), "switch_dit", {})}
        results["parameters"], shared = {}, {}
        for name, arm in arms.items():
            assert arm.student is not None
            model = arm.student()
            results["parameters"][name] = sum(p.numel() for p in model.parameters())
            if name != "dit":
                shared[name] = []
                for seed in results["seeds"]:
                    load_model(model, work / "runs" / f"{name}-{seed}.safetensors")
                    assert isinstance(model, SwitchDiT)
                    shared[name].append(shared_experts(model.expert_paths()))
        results["shared_experts"] = {"distances": BANDS, **shared}
        results["sentences"] += [sentence(name, found) for name, found in shared.items()]
        write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def shared_experts(paths: Tensor) -> list[float]:
    """Mean share of experts in common between two timesteps, by their distance (BANDS); paths [T, D, k]."""
    steps, depth, k = paths.shape
    chosen = torch.zeros(steps, depth, int(paths.max()) + 1).scatter(2, paths.long(), 1.0).flatten(1)
    common = chosen @ chosen.t() / (depth * k)  # [T, T]
    distance = (torch.arange(steps).unsqueeze(0) - torch.arange(steps).unsqueeze(1)).abs()
    return [float(common[(distance > low) & (distance <= high)].mean()) for low, high in BANDS]


def sentence(name: str, found: list[list[float]]) -> str:
    """From the numbers: whether the share falls from band to band, in the mean over the seeds."""
    mean = [sum(column) / len(column) for column in zip(*found)]
    falls = all(a > b for a, b in itertools.pairwise(mean))
    shares = ", ".join(f"{100 * m:.0f}" for m in mean)
    return (
        f"{name}: two timesteps share {shares} % of their experts at growing distance (n = {len(found)}): "
        f"the share {'falls' if falls else 'does not fall'} with the distance."
    )
