"""What the loss of a distillation step costs beside the plain PyTorch loss: the same models, batch and optimizer, only the loss differs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from kdfast.integrations.causal_lm import States, model_inputs, next_labels
from kdfast.lm_loss import LanguageLoss, logits_of, plain_loss
from kdfast.lm_report import OURS, PLAIN
from kdfast.metrics.memory import peak_memory

ROUNDS = 7
AGREE = 2e-2  # relative; the plain form rounds to the models' own dtype


def compare_cost(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], classes: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """{"parts": {part: {form: {"ms", "tokens_per_second", "peak_mb"}}}}: "training step", and "heads and loss" of given hidden states.

    Half cross-entropy, half forward KL. Forms take turns, one call each a round; the median is reported. Peak memory is what a call needs
    above what the models, the optimizer and the batch hold.
    """
    device = next(student.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = next_labels(batch)
    teacher.eval()
    ours = LanguageLoss("forward_kl", vocab_size=classes)

    def loss_of(form: str, model: nn.Module) -> Tensor:
        """Forward of both models and the loss."""
        if form == OURS:
            with torch.no_grad():
                taught = ours.teacher_forward(teacher, batch)
            return ours.criterion.compare(ours.student_forward(model, batch), taught, labels).loss
        inputs = {**model_inputs(batch), "use_cache": False}
        with torch.no_grad():
            z = teacher(**inputs).logits[..., :classes]
        return plain_loss(model(**inputs).logits[..., :classes], z, labels)

    def step(form: str) -> Callable[[], Tensor]:
        model = copy.deepcopy(student).train()
        optimizer = AdamW(model.parameters(), lr=1e-4)

        def once() -> Tensor:
            loss = loss_of(form, model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return once

    with torch.no_grad():
        given, taught = ours.student_forward(student, batch), ours.teacher_forward(teacher, batch)

    def heads(form: str) -> Callable[[], Tensor]:
        assert given.head is not None
        rows, weight = (tensor.detach().clone().requires_grad_() for tensor in (given.rows, given.head.weight))
        mine = States(rows, given.head._replace(weight=weight))

        def once() -> Tensor:
            if form == OURS:
                loss = ours.criterion.compare(mine, taught, labels).loss
            else:
                with torch.no_grad():
                    z = logits_of(taught)[..., :classes]
                loss = plain_loss(logits_of(mine)[..., :classes], z, labels)
            loss.backward()
            rows.grad = weight.grad = None
            return loss.detach()

        return once

    parts = {}
    measured: dict[str, Callable[[str], Callable[[], Tensor]]] = {"training step": step}
    if given.head is not None and taught.head is not None:
        measured["heads and loss"] = heads
    for part, make in measured.items():
        calls = {form: make(form) for form in (OURS, PLAIN)}
        values = {form: float(call()) for form, call in calls.items()}  # the first call; both see the same weights
        if abs(values[OURS] - values[PLAIN]) > AGREE * abs(values[PLAIN]):
            raise RuntimeError(f"cost: expected one loss from both forms, got {values}")
        times: dict[str, list[float]] = {form: [] for form in calls}
        for _ in range(rounds):
            for form, call in calls.items():
                times[form].append(_timed(call, device))
        parts[part] = {
            form: _row(median(times[form]), batch["labels"].numel(), peak_memory(calls[form], device)) for form in calls
        }
    return {"parts": parts, "rows": batch["labels"].numel(), "classes": classes, "rounds": rounds}


def _timed(call: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _row(seconds: float, tokens: int, peak: int | None) -> dict[str, float | None]:
    return {
        "ms": 1000 * seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mb": None if peak is None else peak / 2**20,
    }
