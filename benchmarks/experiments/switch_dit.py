"""Switch-DiT on 8x8 digits: does the prior loss make near timesteps share experts, and do the experts help to find the noise?

Width 64, 4 layers, 3 experts of which 2 are active, 100 timesteps, 1000 steps of 64; arms: plain DiT, experts without the
prior loss, whole. The claim to look at: with the prior loss, the share of experts that two timesteps have in common falls with
their distance. The explained share of held-out noise (fixed timesteps and noise) and the Frechet distance of 1000 samples to
1000 digits, on the features of a small classifier, are reported as found, with parameters and operations of each arm.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiments._common import RUNS, run_own
from kdfast._files import write_text
from kdfast.data import Task, load_task
from kdfast.data.digits import digit_images
from kdfast.experiment import arms_of
from kdfast.methods.switch_dit import SwitchDiT
from kdfast.metrics import frechet_distance, mean_and_error
from kdfast.nn.diffusion import DiffusionSchedule

CLAIMS = (("whole", "no_prior"), ("whole", "dit"), ("no_prior", "dit"))
SAMPLES = 1000
BANDS = ((0, 10), (10, 30), (30, 60), (60, 100))  # distances between timesteps


def run(
    out: Path, *, seeds: int = 3, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    work = RUNS / "switch_dit" if work is None else work
    results = run_own(out, "digit_diffusion", "switch_dit", CLAIMS, seeds=seeds, steps=steps, task=task, work=work)
    if "shared_experts" not in results:
        arms = {arm.name: arm for arm in arms_of(task or load_task("digit_diffusion"), "switch_dit", {})}
        count = SAMPLES if steps is None else 20
        images, classes = digit_images()
        features = digit_features(2 * images - 1, classes)
        results |= {"parameters": {}, "mflop_per_sample": {}, "samples": count, "frechet": {}}
        shared = {}
        for name, arm in arms.items():
            assert arm.student is not None
            model = arm.student()
            assert isinstance(model, SwitchDiT)
            results["parameters"][name] = sum(p.numel() for p in model.parameters())
            results["mflop_per_sample"][name] = operations(model) / 1e6
            results["frechet"][name] = []
            if name != "dit":
                shared[name] = []
            for seed in results["seeds"]:
                load_model(model, work / "runs" / f"{name}-{seed}.safetensors")
                if name != "dit":
                    shared[name].append(shared_experts(model.expert_paths()))
                real = features(2 * images[:count] - 1)
                results["frechet"][name].append(frechet_distance(features(samples(model, classes[:count], seed)), real))
        results["shared_experts"] = {"distances": BANDS, **shared}
        results["sentences"] += [sentence(name, found) for name, found in shared.items()]
        results["sentences"].append(
            f"Frechet distance of {count} samples to as many digits (lower is better): "
            + ", ".join(f"{name} {mean_and_error(found)}" for name, found in results["frechet"].items())
        )
        results["sentences"].append(
            "thousand parameters / million multiply-adds of one sample: "
            + ", ".join(
                f"{n} {p / 1e3:.0f} / {results['mflop_per_sample'][n] / 2:.2f}"
                for n, p in results["parameters"].items()
            )
        )
        write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def operations(model: SwitchDiT) -> float:
    """Floating-point operations of the products of one sample's forward, of the experts that it uses."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(64, 1, 8, 8), torch.arange(64), torch.zeros(64, dtype=torch.long))
    return counter.get_total_flops() / 64


def samples(model: SwitchDiT, classes: Tensor, seed: int) -> Tensor:
    """One sample of each of `classes`, from the same noise for every arm."""
    schedule = DiffusionSchedule(model.table.waves.shape[0])
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    return schedule.sample(lambda x, t: model(x, t, classes).prediction, (len(classes), 1, 8, 8), generator=generator)


def digit_features(images: Tensor, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """The 32 hidden features of a small classifier of all digits, always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        head = nn.Linear(32, 10)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 3e-3)
        for _ in range(300):
            index = torch.randint(len(images), (128,))
            loss = nn.functional.cross_entropy(head(body(images[index])), classes[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda x: body(x).detach()


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
