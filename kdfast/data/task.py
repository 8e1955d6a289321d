"""What a small offline problem tells the trainer: data, models, and where their features are. It knows no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, default_collate

from kdfast.metrics import accuracy


class Rows(Dataset):
    """Tensors of one length, read a batch at a time: on small problems the usual item-by-item collation costs more than the model."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


class NamedRows(Dataset):
    """Tensors of one length by name; batches are dicts, which a model takes as keyword arguments (but "labels")."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: tensor[indices] for name, tensor in self.tensors.items()}


def as_read(batch: Any) -> Any:
    """collate_fn for `Rows`, whose batches are tensors already (and, in a worker, must be importable)."""
    return batch


class Augmented:
    """collate_fn that changes each training batch, the same for student and teacher; `plain` is the batch without it."""

    def __init__(self, plain: Callable | None, change: Callable[[Any], Any]) -> None:
        self.plain, self.change = plain or default_collate, change

    def __call__(self, rows: Any) -> Any:
        return self.change(self.plain(rows))


@dataclass(frozen=True)
class Task:
    """A problem that a method can run on by name.

    splits: seed -> {"teacher", "student", "val", "test": Dataset of (inputs, labels)}; the networks train on the first two,
        settings are chosen on "val", figures are of "test"; "teacher_val", "teacher_test" where the teacher's task is another.
    student, teacher: make the networks, freshly initialised. peers: the second network is no trained teacher but learns too.
    score_both: of peers, whether the score is the mean of both or the student's alone.
    sizes: of the data, for a method that brings its own models (`Method.students(**sizes)`): then there is neither student nor
        teacher here, and batches are dicts. predict: output -> predictions for the metrics, default the greatest class.
    layers: {name: (student path, teacher path)}, None for neither, of features a method may read, widths: {name: their channels}.
    dim: class axis of the logits; ignore_index: of the labels; classes: how many, None where that says nothing.
    hints: more options that a method with a parameter of that name gets in a run by name.
    loss: (output, labels) -> scalar, where labels alone are not learned by cross-entropy: of the teacher and of the arm without a method;
        there is no plain KD then.
    columns: names of what follows inputs and labels in a training batch. metrics: {name: (predictions, labels) -> float}; the first counts.
    steps, eval_every, teacher_steps, batch_size, lr: optimizer steps of AdamW at a constant rate.
    optimizer, scheduler: as in `kdfast.train.Distiller`, in place of that; for the students. teacher_optimizer: for their teacher.
    patience: of every fit, in evaluations (`Distiller.fit`): teacher and students stop early and are those of their best evaluation.
    augment: (inputs, labels) -> the batch to train on, drawn anew for each batch. threads: of torch while it runs, None for as many as are set; tiny networks only wait for their threads.
    """

    name: str
    title: str
    splits: Callable[[int], Mapping[str, Dataset]]
    student: Callable[[], nn.Module] | None = None
    teacher: Callable[[], nn.Module] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    predict: Callable[[Any], Tensor] | None = None
    peers: bool = False
    score_both: bool = True
    layers: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    widths: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    dim: int = -1
    ignore_index: int = -100
    classes: int | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = field(default_factory=lambda: {"accuracy": accuracy})
    steps: int = 800
    eval_every: int = 40
    teacher_steps: int = 600
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: Callable[[Any], Any] | None = None
    scheduler: Callable[[Any, int], Any] | None = None
    teacher_optimizer: Callable[[Any], Any] | None = None
    patience: int | None = None
    augment: Callable[[Any], Any] | None = None
    threads: int | None = None

    def train_loader(self, data: Dataset, steps: int) -> DataLoader:
        """`steps` full batches per epoch, whatever the size of the data: it is gone through again and again, shuffled anew."""
        sampler = RandomSampler(data, num_samples=steps * self.batch_size)  # type: ignore[arg-type]
        collate = _collate(data) if self.augment is None else Augmented(_collate(data), self.augment)
        return DataLoader(data, self.batch_size, sampler=sampler, collate_fn=collate)

    def eval_loader(self, data: Dataset) -> DataLoader:
        return DataLoader(data, 4 * self.batch_size, collate_fn=_collate(data))


def _collate(data: Dataset) -> Callable | None:
    while isinstance(data, Subset):  # always has __getitems__, and passes the indices on
        data = data.dataset
    return as_read if hasattr(data, "__getitems__") else None


def models(task: Task, seed: int) -> tuple[nn.Module, nn.Module]:
    """Student and teacher of a seed: the same initial weights whoever asks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert task.student is not None and task.teacher is not None
        return task.student(), task.teacher()
