"""Entropic Student on digits: is a latent that is trained for the teacher's features worth more than one of as many bytes trained for pixels?

Digits at 32x32, 900 of them; the teacher, a CNN of four stages, and students whose first stage is a light encoder, 4 channels of 7x7, and a
decoder. Stage 1: 200 Adam steps at 5e-3, stage 2: 100 at 1e-3, batch 64, the published milestones; the prior starts at scale 1. (Tried on
the validation split of one more seed: 1e-3 in stage 1, with a prior of scale 10 and of scale 1; the bytes then hardly depend on beta. A run
with betas 0.1, 0.3 and 1, and 200 steps of the teacher, had no features near the bytes of 2-bit pixels.) Arms: the teacher's features at
four betas; the same student whose stage 1 reconstructs the pixels (one transposed convolution on the decoder, dropped afterwards);
the teacher on 1-bit and 2-bit pixels of the 8x8 image, packed and compressed by zlib. At the bytes of each of the two the beta of the features is the
nearest of the list, that of the pixels is set to the same bytes by secant steps; both choices read the bytes of the validation split and
no accuracy. The claims to look at: bytes fall with beta; features above pixels at equal bytes; stage 2 raises accuracy and leaves the
bytes as they are; streams decode exactly and cost what the likelihoods say, within 2 % and 64 bits.
"""

from __future__ import annotations

import json
import math
import resource
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import kdfast
from benchmarks.experiments._common import seed_rows, write
from kdfast.data import models
from kdfast.data.large_digits import SCALE, large_digits_task
from kdfast.experiment import Labels, commit, threads
from kdfast.losses import LossOutput
from kdfast.methods import Context
from kdfast.methods.entropic_student import (
    EntropicOutput,
    EntropicStudent,
    Method,
    learning_rate_factor,
    rate_distortion_loss,
)
from kdfast.metrics import accuracy, mean_and_error, sentence, summary
from kdfast.train import Distiller

STEPS, RATES = 200, (5e-3, 1e-3)  # steps of stage 1, twice those of stage 2
BETAS, INPUT_BETAS = (0.1, 0.3, 0.6, 1.2), (0.05, 0.15, 0.5)
LEVELS = (1, 2)  # bits of a pixel
TASK = large_digits_task()


class PixelMethod(Method):
    """Stage 1 reconstructs the images instead of the teacher's features."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], **options: Any) -> None:
        super().__init__(widths, **options)
        self.up = nn.ConvTranspose2d(widths["stage1"][1], 1, SCALE, SCALE)

    def first_loss(self, context: Context, out: EntropicOutput) -> LossOutput:
        assert out.likelihood is not None
        pixels = self.up(context.student_features["stage1"])
        return rate_distortion_loss(
            [pixels], [context.batch[0]], out.likelihood, beta=self.beta, reduction=self.reduction
        )


KINDS: dict[str, type[Method]] = {"features": Method, "pixels": PixelMethod}


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, work: Path | None = None, betas: Sequence[float] = BETAS,
    input_betas: Sequence[float] = INPUT_BETAS,
) -> dict[str, Any]:  # fmt: skip
    """Seeds that `work` holds are read, the others trained; returns and writes the results with their sentences."""
    steps = steps or STEPS
    settings = {
        "steps": steps,
        "betas": list(betas),
        "input_betas": list(input_betas),
        "batch": TASK.batch_size,
        "lr": list(RATES),
    }
    if out.exists() and (stored := json.loads(out.read_text()))["settings"] == settings and stored["n"] >= seeds:
        return stored
    key = "-".join([str(steps), *("_".join(f"{value:g}" for value in values) for values in (betas, input_betas))])
    with threads(1):
        make = partial(one_seed, steps=steps, grids={"features": betas, "pixels": input_betas})
        rows = seed_rows("entropic_student", seeds, key, make, work)
    results = {
        "settings": settings, "n": seeds, "rows": rows, "versions": {"kdfast": kdfast.__version__, "torch": torch.__version__},
        "machine": {"threads": 1, "peak_rss_mb": max(row["peak_rss_mb"] for row in rows)}, "commit": commit(),
    }  # fmt: skip
    return write(out, results | said(rows))


def said(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"summary", "sentences"}."""
    lines, table = [], {"teacher": summary([row["teacher"] for row in rows])}
    whole = [one for row in rows for kind in KINDS for one in (*row["grid"][kind], *row["matched"][kind])]
    for kind in KINDS:
        grid = [row["grid"][kind] for row in rows]
        for found in zip(*grid):
            bytes_ = mean_and_error([one["bytes"] for one in found], scale=1.0)
            table[f"{kind}, beta {found[0]['beta']:g}, {bytes_} bytes"] = summary([one["test"] for one in found])
        falls = sum(all(a["bytes"] > b["bytes"] for a, b in pairwise(one)) for one in grid)
        lines.append(f"{kind}: bytes fall with every step of beta in {falls} of {len(rows)} seeds")
    for i, level in enumerate(LEVELS):
        features, pixels = ([row["matched"][kind][i] for row in rows] for kind in KINDS)
        zipped = [row["zlib"][i] for row in rows]
        shown = {
            name: f"{name} at {mean_and_error([one['bytes'] for one in found], scale=1.0)} bytes"
            for name, found in (("features", features), ("pixels", pixels), (f"zlib of {level}-bit pixels", zipped))
        }
        test = [[one["test"] for one in found] for found in (features, pixels, zipped)]
        table |= {f"{name}, matched": summary(values) for name, values in zip(shown.values(), test)}
        names = list(shown.values())
        lines += [sentence(names[0], test[0], other, values) for other, values in zip(names[1:], test[1:])]
    for found in zip(*(row["grid"]["features"] for row in rows)):
        after, before = [one["test"] for one in found], [one["before"] for one in found]
        lines.append(sentence(f"features, beta {found[0]['beta']:g}: after stage 2", after, "before", before))
    same, exact = (sum(one[name] for one in whole) for name in ("same_bytes", "exact"))
    lines.append(f"the bytes of all test images are the same after stage 2 in {same} of {len(whole)} runs")
    lines.append(
        f"all test images decode to the rounded latent, and to the student's logits, in {exact} of {len(whole)} runs"
    )
    near = sum(one["bits"] - 1 <= 8 * one["bytes"] <= 1.02 * one["bits"] + 64 for one in whole)
    extra = max(8 * one["bytes"] / one["bits"] - 1 for one in whole)
    lines.append(
        f"mean coded bits within 2 % and 64 bits of the likelihoods' in {near} of {len(whole)} runs; the largest excess is {100 * extra:.1f} %"
    )
    return {"summary": table, "sentences": lines}


def one_seed(seed: int, *, steps: int, grids: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    start = time.perf_counter()
    splits: dict[str, tuple[Tensor, ...]] = {name: rows.tensors for name, rows in TASK.splits(seed).items()}  # type: ignore[attr-defined]
    teacher = models(TASK, seed)[1]
    labels = Distiller(
        teacher, None, Labels(), optimizer=partial(torch.optim.Adam, lr=TASK.lr), seed=seed, progress=False
    )
    labels.fit(TASK.train_loader(TASK.splits(seed)["teacher"], min(2 * steps, TASK.teacher_steps)), 1)
    zipped = [low_bits(teacher, splits, level) for level in LEVELS]
    grid: dict[str, list[dict[str, Any]]] = {}
    for kind, betas in grids.items():
        grid[kind] = [whole(kind, beta, teacher, seed, splits, steps) for beta in betas]
    matched: dict[str, list[dict[str, Any]]] = {kind: [] for kind in grids}
    for one in zipped:
        nearest = min(grid["features"], key=lambda found: abs(math.log(found["val_bytes"] / one["val_bytes"])))
        matched["features"].append(nearest)
        beta = same_bytes(nearest["val_bytes"], grid["pixels"], teacher, seed, splits, steps)
        matched["pixels"].append(whole("pixels", beta, teacher, seed, splits, steps))
    return {
        "teacher": right(teacher, splits["test"]), "zlib": zipped, "grid": grid, "matched": matched, "seconds": time.perf_counter() - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def whole(
    kind: str, beta: float, teacher: nn.Module, seed: int, splits: Mapping[str, tuple[Tensor, ...]], steps: int
) -> dict[str, Any]:
    """Both stages, and what the bytes are before and after the second."""
    images = splits["test"][0]
    student = train(kind, beta, 1, None, teacher, seed, steps)
    before, streams = right(student, splits["test"]), student.compress(images)
    student = train(kind, beta, 2, student, teacher, seed, steps)
    strings, shape = student.compress(images)
    with torch.no_grad():
        y_hat = student.entropy.quantize(student.encoder(images))
        exact = torch.equal(student.entropy.decompress(strings, shape), y_hat)
        exact &= torch.equal(student.decompress(strings, shape), student(images))
    return {
        "beta": beta, "bytes": mean_bytes(strings), "bits": float(student.bits(images).mean()), "val_bytes": mean_bytes(student.compress(splits["val"][0])[0]),
        "before": before, "test": right(student, splits["test"]), "val": right(student, splits["val"]),
        "same_bytes": strings == streams[0], "exact": exact,
    }  # fmt: skip


def train(
    kind: str, beta: float, stage: int, student: EntropicStudent | None, teacher: nn.Module, seed: int, steps: int
) -> EntropicStudent:
    """One stage; the first makes its student."""
    epochs, lr = ((10, 0), RATES[0]) if stage == 1 else ((0, 10), RATES[1])
    torch.manual_seed(seed)
    method = KINDS[kind](TASK.widths, beta=beta, stage1_epochs=epochs[0], stage2_epochs=epochs[1], **TASK.hints)
    distiller = Distiller(
        student or models(TASK, seed)[0], teacher, method, capture=TASK.layers, optimizer=partial(torch.optim.Adam, lr=lr),
        scheduler=lambda optimizer, total: LambdaLR(optimizer, partial(learning_rate_factor, total_steps=total, epochs=epochs)),
        seed=seed, progress=False,
    )  # fmt: skip
    distiller.fit(TASK.train_loader(TASK.splits(seed)["student"], steps if stage == 1 else max(1, steps // 2)), 1)
    return distiller.student.eval()


def same_bytes(
    wanted: float, grid: Sequence[Mapping[str, Any]], teacher: nn.Module, seed: int, splits: Mapping[str, Any], steps: int,
    tries: int = 2,
) -> float:  # fmt: skip
    """The beta of the pixels at which the validation images take the wanted bytes: secant steps in log beta and log bytes, by stage 1 alone."""
    seen = {math.log(one["beta"]): math.log(one["val_bytes"] / wanted) for one in grid}
    for _ in range(tries):
        (x0, y0), (x1, y1) = sorted(seen.items(), key=lambda pair: abs(pair[1]))[:2]
        if abs(y0) < 0.02 or y0 == y1:
            break
        x = min(max(x0 - y0 * (x1 - x0) / (y1 - y0), x0 - 1.5), x0 + 1.5)
        student = train("pixels", math.exp(x), 1, None, teacher, seed, steps)
        seen[x] = math.log(mean_bytes(student.compress(splits["val"][0])[0]) / wanted)
    return math.exp(min(seen, key=lambda x: abs(seen[x])))


def low_bits(teacher: nn.Module, splits: Mapping[str, tuple[Tensor, ...]], level: int) -> dict[str, float]:
    """Pixels of `level` bits: mean bytes of zlib on the packed bits of each 8x8 image, and the teacher's accuracy on them."""
    found = {}
    for part in ("val", "test"):
        images, labels = splits[part]
        codes = (images[:, :, ::SCALE, ::SCALE] * 2**level).floor().clamp_max(2**level - 1)
        planes = np.unpackbits(codes.flatten(1).numpy().astype(np.uint8)[..., None], axis=-1)[..., -level:]
        sizes = [len(zlib.compress(np.packbits(image).tobytes(), 9)) for image in planes]
        back = ((codes + 0.5) / 2**level).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
        found[part] = sum(sizes) / len(sizes), right(teacher, (back, labels))
    return {"bytes": found["test"][0], "val_bytes": found["val"][0], "test": found["test"][1]}


@torch.no_grad()
def right(model: nn.Module, rows: tuple[Tensor, ...]) -> float:
    model.eval()
    return accuracy(model(rows[0]).argmax(-1), rows[1])


def mean_bytes(strings: Sequence[bytes]) -> float:
    return sum(map(len, strings)) / len(strings)
