"""A trained student learns from several trained teachers: at once, one after the other, or each apart and the students averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from kdfast._checks import check_choice
from kdfast.methods.general_knowledge_transfer import Teachers
from kdfast.train.distiller import Distiller
from kdfast.weights import average

MODES = ("parallel", "sequential", "soup")
ORDERS = ("given", "asc", "desc")


def transfer(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    loader: DataLoader,
    epochs: int,
    *,
    mode: str = "parallel",
    order: str = "given",
    score: Callable[[nn.Module], float] | None = None,
    method: str = "general_knowledge_transfer",
    options: Mapping[str, Any] | None = None,
    **distiller: Any,
) -> nn.Module:
    """Distils the teachers into the student; returns the model to use (the student itself unless it is a soup or averaged).

    Args:
        mode: "parallel", one run in which the most confident teacher teaches each row; "sequential", one run per teacher, the
            student goes on from one to the next; "soup", the average of the weights of students taught by one teacher each.
        order: of a sequence: "given", or by `score` of the teacher, ascending or descending.
        method, options: the method and its options. distiller: further arguments of `Distiller` (optimizer, metrics, ...).
    Raises:
        ValueError: no teacher, an unknown mode or order, an order by score without `score`.

    >>> model = transfer(student, [vit, resnet], loader, 20, mode="sequential", order="asc", score=accuracy_of)
    """
    check_choice("mode", mode, MODES)
    check_choice("order", order, ORDERS)
    if not teachers:
        raise ValueError("teachers: expected at least one, got none")
    if order != "given" and score is None:
        raise ValueError(f"score: expected a function model -> number to order by, got None with order={order!r}")

    def run(start: nn.Module, teacher: nn.Module) -> nn.Module:
        job = Distiller(start, teacher, method, options=options, **{"progress": False, **distiller})
        job.fit(loader, epochs)
        return job.deploy()

    if mode == "parallel":
        return run(student, Teachers(teachers) if len(teachers) > 1 else teachers[0])
    if mode == "sequential":
        chosen = list(teachers)
        if score is not None and order != "given":
            chosen.sort(key=score, reverse=order == "desc")
        model = student
        for teacher in chosen:
            model = run(model, teacher)
        return model
    taught = [run(copy.deepcopy(student), teacher) for teacher in teachers]
    soup = copy.deepcopy(student)
    soup.load_state_dict(average([model.state_dict() for model in taught]))
    return soup
