"""MIX-KD: on mixed images a fixed temperature makes the teacher too flat; each row's own standard deviation takes its place.

Paper: Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study. Choi, Jeon, Shukla, Turaga; WACV 2023;
https://arxiv.org/abs/2211.03946
Based on: the authors' code, github.com/hchoi71/MIX-KD at 6e8c149: distiller_zoo/MIXSTD.py, helper/loops_mixstd.py.
Differs from the code: any number of classes and any input size; mixing on the device in the inputs' precision. Its unmixed positions
    are drawn with replacement, so that more pairs are mixed than the stated 10 % (`sampling="with_replacement"` does that; the
    default is exact). A constant row is NaN there; here its deviation is clamped (`eps=0`: as there).
Symbols: s, t [B, C] logits on the same mixed images; yt [B, C] soft labels; sd(v) the deviation of a row, with C - 1.

    a = s / sd(s),  b = t / sd(t)                                           the gradient flows through sd(s)
    loss = w_ce mean_i sum_c -yt_ic log softmax(a_i)_c + w_kd mean_i KL(softmax(b_i) || softmax(a_i))      no T^2
    x~_i = lam_i x[pi1_i] + (1 - lam_i) x[pi2_i],  lam_i ~ Beta(1, 1) for each row;  lam_i = 1 on a share r of them (partial mixup)
    baseline: w_ce CE(s, yt) + w_kd T^2 KL(softmax(t/T) || softmax(s/T))                                    `temperature=T`

Teacher and student see only the mixed (or passed-through) images. The teacher may itself be trained with mixup
(`kdfast.data.mixing.MixedRows`). Inference: argmax of s; confidences are those of s / sd(s).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_float_tensor, check_number
from kdfast._dispatch import debugging
from kdfast._library import compute_dtype
from kdfast.data.mixing import draw_mixup, mix
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase

MixedLabels = tuple[Tensor, Tensor, Tensor]


def row_deviation(logits: Tensor) -> Tensor:
    """sd = sqrt(sum_c (v_c - mean v)^2 / (C - 1)): [B, 1] of logits [B, C], C >= 2."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected [B, C] with C >= 2, got shape {tuple(logits.shape)}")
    return logits.to(compute_dtype(logits)).std(-1, keepdim=True)


def std_scaled(logits: Tensor, *, eps: float = 1e-8) -> Tensor:
    """v / sd(v), row by row, up to a constant per row that no softmax sees (the mean is taken off, so that digits stay).

    A row with sd < eps is divided by eps, without gradient; eps=0 divides by the deviation itself, and a constant row is NaN.
    Under `kdfast.debug()` a constant row raises.
    """
    check_number("eps", eps, low=0.0)
    v = logits.to(compute_dtype(logits))
    sd = row_deviation(v.detach())
    if debugging() and bool((sd == 0).any()):
        raise ValueError(f"logits: row {int((sd == 0).flatten().int().argmax())} is constant: it has no deviation")
    flat = sd < eps
    v = torch.where(flat, v.detach(), v)
    centred = v - v.mean(-1, keepdim=True)
    # the deviation of a clamped row would have an infinite gradient even where it is not used
    sd = row_deviation(torch.where(flat, torch.arange(v.shape[1], device=v.device).to(v), v))
    return centred / torch.where(flat, eps, sd)


def mix_kd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | MixedLabels, *, ce_weight: float = 0.1, kd_weight: float = 0.9,
    temperature: float | None = None, eps: float = 1e-8,
) -> LossOutput:  # fmt: skip
    """w_ce CE + w_kd KD of the module docstring; with `temperature` the baseline on the same mixed images.

    Args:
        student, teacher: logits [B, C], C >= 2. temperature: None for the deviations, or a fixed T > 0 (then with T^2).
        labels: [B, C] soft labels; or (labels_a [B], labels_b [B], lam [B]), the same without the table; or [B] integers.
        eps: `std_scaled`.
    Returns:
        LossOutput(loss, {"ce", "kd"}), the parts without their weights; kd with T^2 where there is a T.
    Raises:
        ValueError: C < 2, shapes that differ, a label outside [0, C), a negative weight, T <= 0. Under `kdfast.debug()` soft
            labels that are negative or do not add up to 1 warn.

    >>> loss, parts = mix_kd_loss(student(x), teacher(x), (mixed.labels_a, mixed.labels_b, mixed.lam))
    """
    check_number("ce_weight", ce_weight, low=0.0)
    check_number("kd_weight", kd_weight, low=0.0)
    check_float_tensor("student", student)
    check_float_tensor("teacher", teacher)
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1] < 2:
        raise ValueError(
            f"student, teacher: expected [B, C] with C >= 2, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if temperature is None:
        a, b = std_scaled(student, eps=eps), std_scaled(teacher.detach(), eps=eps)
        kd = divergence_loss(
            a, b, backend="reference" if eps == 0 else None
        )  # eps = 0 asks for NaN, which the core refuses
    else:
        a = student
        kd = divergence_loss(a, teacher, temperature=temperature, scale_t2=True)
    ce = _mixed_cross_entropy(a, labels)
    loss = ce_weight * ce + kd_weight * kd
    return LossOutput(loss, {"ce": ce.detach(), "kd": kd.detach()})


def _mixed_cross_entropy(logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    if isinstance(labels, tuple):
        first, second, lam = labels
        return cross_entropy_loss(logits, first, ignore_index=None, weight=lam) + cross_entropy_loss(
            logits, second, ignore_index=None, weight=1 - lam
        )
    if not labels.is_floating_point():
        return cross_entropy_loss(logits, labels, ignore_index=None)
    if labels.shape != logits.shape:
        raise ValueError(f"labels: expected soft labels {tuple(logits.shape)}, got {tuple(labels.shape)}")
    labels = labels.detach()
    if debugging() and bool(((labels < 0).any(-1) | ((labels.sum(-1) - 1).abs() > 1e-3)).any()):
        warnings.warn("labels: expected soft labels >= 0 that add up to 1 in each row", RuntimeWarning, stacklevel=3)
    dtype = compute_dtype(logits)
    return F.cross_entropy(logits.to(dtype), labels.to(dtype))


class Method(MethodBase):
    """Mixes each training batch (inputs, labels) before both models see it, then takes the loss.

    Args:
        temperature: None, the method; a number, the baseline on mixed images; "teacher", the baseline at the teacher's mean
            deviation over the training data as it is, found before the first step and saved.
        mixup: False leaves the images alone. beta, unmixed_fraction, sampling: `kdfast.data.mixing.draw_mixup` (the paper: r = 0.9).
        Others: `mix_kd_loss`.
    """

    def __init__(
        self, *, ce_weight: float = 0.1, kd_weight: float = 0.9, temperature: float | str | None = None, mixup: bool = True,
        beta: float = 1.0, unmixed_fraction: float = 0.9, sampling: str = "exact", eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(temperature, str) and temperature != "teacher":
            raise ValueError(f'temperature: expected None, a number > 0 or "teacher", got {temperature!r}')
        if isinstance(temperature, (int, float)):
            check_number("temperature", temperature, low=0.0, open_low=True)
        self.temperature, self.mixup = temperature, mixup
        self.options = {"ce_weight": ce_weight, "kd_weight": kd_weight, "eps": eps}
        for name, value in self.options.items():
            check_number(name, value, low=0.0)
        self.draw: dict[str, Any] = {"beta": beta, "unmixed_fraction": unmixed_fraction, "sampling": sampling}
        draw_mixup(1, **self.draw, generator=torch.Generator())  # a wrong option is refused now
        self.mean_deviation: Tensor
        self.register_buffer("mean_deviation", torch.ones((), dtype=torch.float64))

    def start(self, setup: Setup) -> None:
        if self.temperature == "teacher" and not setup.resumed:
            rows = torch.cat([row_deviation(context.teacher) for context in setup.sweep("train")])
            self.mean_deviation.fill_(float(rows.double().mean()))

    def prepare(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            raise TypeError("batch: expected (inputs, labels) to mix, got a mapping")
        if not self.mixup:
            return batch
        inputs, labels = batch[:2]
        return tuple(mix(inputs, labels, draw_mixup(len(inputs), **self.draw)))

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        labels = tuple(context.batch[1:4]) if self.mixup else context.labels
        temperature = float(self.mean_deviation) if self.temperature == "teacher" else self.temperature
        return mix_kd_loss(context.student, context.teacher, labels, temperature=temperature, **self.options)  # type: ignore[arg-type]
