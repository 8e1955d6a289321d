"""A small problem with everything that could make a resume inexact; also the program of the killed process."""

import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kdfast.losses import LossOutput
from kdfast.methods import Context, Method, load
from kdfast.train import Distiller, checkpoint


class Noisy(Dataset):
    """Points with labels; noise drawn anew at each read, so the order of random numbers matters."""

    def __init__(self, size=44, noise=0.1):
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(size, 6, generator=generator)
        self.labels = (self.points[:, 0] > 0).long() + (self.points[:, 1] > 0).long()
        self.noise = noise

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index] + self.noise * torch.randn(6), self.labels[index]


def models(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    teacher = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    return student, teacher


class Projected(Method):
    """KD plus a learned projection: a method with its own parameters."""

    captures = ("hidden",)

    def __init__(self, widths):
        super().__init__()
        self.kd, self.project = load("kd")(temperature=2.0), nn.Linear(*widths["hidden"])

    def forward(self, context: Context):
        loss, parts = self.kd(context)
        gap = (self.project(context.student_features["hidden"]) - context.teacher_features["hidden"]).square().mean(-1)
        keep = context.labels != -100  # a mean over the counted rows, as the Distiller takes it to be
        gap = (gap * keep).sum() / keep.sum().clamp_min(1)
        return LossOutput(loss + gap, {**parts, "gap": gap.detach()})


def distiller(out, **changes):
    student, teacher = models()
    torch.manual_seed(7)
    method = changes.pop("method", None) or Projected({"hidden": (8, 16)})
    options = dict(
        capture={"hidden": ("2", "1")},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
        accumulate=2, out=out, save_every=2, log_every=3, progress=False,
    )  # fmt: skip
    return Distiller(student, teacher, method, **(options | changes))


def loader(workers=0, **options):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers, **options)


def kill_at(run, step):
    """SIGKILL after optimizer step `step`, as kill -9 does it: no cleanup, no exit handler."""
    run.method.after_step = lambda student, teacher, now: now == step and os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # toy.py <out> step|write <workers>
    folder, moment, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run = distiller(folder)
    if moment == "step":
        kill_at(run, 9)  # epochs have 6 steps: 9 is inside the second, its last checkpoint at 8
    else:
        rename = checkpoint.publish

        def publish(temporary, final):
            if run.step == 10:  # everything is written but the rename
                os.kill(os.getpid(), signal.SIGKILL)
            rename(temporary, final)

        checkpoint.publish = publish
    run.fit(loader(workers), 3)
