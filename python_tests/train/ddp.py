"""One rank of the two-process test, or the one-process run: ddp.py <out> with torchrun's variables in the environment, or none."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from kdfast.train import Distiller

sys.path.insert(0, str(Path(__file__).parent))
import toy


def run(out: str) -> None:
    student, teacher = toy.models(dropout=0.0)
    student[1] = nn.Identity()  # batch statistics are those of a process
    torch.manual_seed(7)
    data = toy.Noisy(size=42, noise=0.0)
    data.points, data.labels = data.points.double(), data.labels.clone()
    data.labels[::5] = -100  # so the two halves of a batch keep different numbers of rows
    distiller = Distiller(
        student.double(), teacher.double(), toy.Projected({"hidden": (8, 16)}).double(), capture={"hidden": ("2", "1")},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9), accumulate=2, max_grad_norm=1.0,
        out=out, log_every=1, progress=False,
    )  # fmt: skip
    distiller.fit(DataLoader(data, batch_size=8, shuffle=True, drop_last=True), 2)
    scores = distiller.evaluate(DataLoader(data, batch_size=8))
    distiller.save(Path(out) / "student.safetensors")
    if distiller.accelerator.is_main_process:
        losses = [row["loss"] for row in distiller.history.rows]
        report = {"processes": distiller.accelerator.num_processes, "losses": losses, **scores}
        (Path(out) / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    run(sys.argv[1])
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
