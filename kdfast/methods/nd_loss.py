"""ND loss: the student's feature takes the direction of the teacher's class mean, and a norm up to the teacher's.

Paper: Improving Knowledge Distillation via Regularizing Feature Norm and Direction. Wang, Cheng, Duan, Zhang; 2023;
https://arxiv.org/abs/2305.17007
Based on: the authors' code, github.com/WangYZ1608/Knowledge-Distillation-via-ND at fc6f3f9 (CIFAR/utils.py DirectNormLoss, KDLoss).
With plain KD the paper calls it KD++, with decoupled KD DKD++ (kind="dkd").
Differs from the code: the class means keep full precision (there each feature and each mean is rounded to 4 decimals and stored as
    text); a sample whose two norms are 0 has ratio 0, loss 1 and no gradient (there NaN).
Differs from the paper: it first studies a direction term and a norm term apart; released is the joint one. mode="cosine" is the
    direction alone; the norm alone is left out, its exact form was not at hand.
Symbols: s [B, D] the student's feature before its classifier, t [B, D] the teacher's, M [C, D] the class means of t over the training
    set, y labels, e_i = M[y_i] / |M[y_i]|.

    L_nd = mean_i ( 1 - <s_i, e_i> / max(|s_i|, |t_i|) )             on a tie |s_i|
    loss = w_ce CE + r(epoch) w_kd T^2 KL + w_nd L_nd,               r(epoch) = min(1, epoch / warm-up epochs)

Where |s_i| >= |t_i| the gradient is of the direction alone, else also of the norm: it grows until the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_labels, check_number, check_pair
from kdfast._library import compute_dtype, readable
from kdfast.data.class_means import ClassMeans
from kdfast.losses import LossOutput, distillation_loss
from kdfast.losses.divergence import REDUCTIONS, reduce_rows
from kdfast.methods._protocol import Context, Setup, epoch_at
from kdfast.methods._protocol import Method as MethodBase

MODES = ("nd", "cosine")


# ---------------------------------------------------------------- the term
def norm_direction_loss(
    student: Tensor,
    teacher: Tensor,
    class_means: Tensor,
    labels: Tensor | None = None,
    *,
    mode: str = "nd",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """L_nd of the module docstring; mode="cosine": 1 - cos(s_i, M[y_i]).

    Args:
        student: features [B, D]. teacher: [B, D], a constant; only its norms are read.
        class_means: [C, D] with labels [B] in [0, C) or `ignore_index` (left out), or one mean per row [B, D] without labels.
    Returns:
        the mean over kept rows, their "sum", or rows [B] with "none". Differentiable in `student` only.
    Raises:
        ValueError: shapes; B = 0; on the CPU also labels outside [0, C) and a mean with norm 0 or not finite, naming the class.

    >>> loss = norm_direction_loss(student_feature, teacher_feature, class_means, labels)
    """
    check_choice("mode", mode, MODES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_pair(student, teacher)
    check_pair(student, class_means, ("student", "class_means"))
    if student.dim() != 2 or student.shape[0] == 0 or student.shape != teacher.shape:
        hint = " (use an adapter)" if student.shape[:1] == teacher.shape[:1] else ""
        raise ValueError(
            f"teacher: expected features [B, D] of the student's shape {tuple(student.shape)}, B > 0, got {tuple(teacher.shape)}{hint}"
        )
    if class_means.dim() != 2 or class_means.shape[1] != student.shape[1]:
        raise ValueError(f"class_means: expected [C, {student.shape[1]}], got {tuple(class_means.shape)}")
    s, dtype = student, compute_dtype(student, teacher)
    s, t = s.to(dtype), teacher.detach().to(dtype)
    means = class_means.detach().to(dtype)
    norms = torch.linalg.vector_norm(means, dim=1)  # [C]
    if readable(norms):
        bad = ~((norms > 0) & norms.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"class_means: expected finite means with a norm above 0, got {norms[bad][0]:g} for class {int(bad.int().argmax())}"
            )
    direction, keep = means / norms.unsqueeze(1), None
    if labels is None:
        if len(means) != len(s):
            raise ValueError(f"class_means: expected one row per sample ({len(s)}) without labels, got {len(means)}")
    else:
        check_labels(labels, student.shape[:1], student.device)
        keep = labels.long() != ignore_index
        index = torch.where(keep, labels.long(), 0)
        if readable(index) and not 0 <= int(index.min()) <= int(index.max()) < len(means):
            raise ValueError(
                f"labels: expected integers in [0, {len(means)}), got {int(index.min())} to {int(index.max())}"
            )
        direction = direction[index]  # e [B, D]
    s_norm = torch.linalg.vector_norm(s, dim=1)
    longest = s_norm
    if mode == "nd":
        t_norm = torch.linalg.vector_norm(t, dim=1)
        longest = torch.where(s_norm >= t_norm, s_norm, t_norm)
    some = longest > 0
    ratio = (s * direction).sum(1) / torch.where(some, longest, 1.0)
    return reduce_rows(1 - torch.where(some, ratio, 0.0), keep, None, reduction)


def warmup(epoch: float, warmup_epochs: float) -> float:
    """r(epoch) = min(1, epoch / warmup_epochs), epoch counted from 0: the KD term is off in the first epoch. 0 epochs: always 1.

    >>> [warmup(epoch, 4) for epoch in (0, 1, 4, 9)], warmup(0, 0)
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    check_number("warmup_epochs", warmup_epochs, low=0.0)
    return min(1.0, epoch / warmup_epochs) if warmup_epochs > 0 else 1.0


# ---------------------------------------------------------------- the total: KD++, DKD++
def nd_loss_total(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    student_feature: Tensor,
    teacher_feature: Tensor,
    class_means: Tensor,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    nd_weight: float = 2.0,
    temperature: float = 4.0,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    mode: str = "nd",
    epoch: float = 0,
    warmup_epochs: float = 0,
    ignore_index: int = -100,
) -> LossOutput:
    """w_ce CE + r(epoch) w_kd T^2 D(student, teacher) + w_nd L_nd. The warm-up multiplies the KD term, never the ND term.

    Published (w_kd, w_nd), CIFAR-100 at T = 4, 20 warm-up epochs: ResNet56-20 (1, 2), 32x4-8x4 (3.5, 2), WRN40-2-40-1 (1, 1.5),
    ResNet50-MobileNetV2 (3, 0.5), 32x4-ShuffleV1 (2.5, 1.5), 32x4-ShuffleV2 (4, 0.5). ImageNet at T = 1, 5 epochs: R34-R18
    (2.5, 1), R50-R18 (4, 1), R101-R18 (3.5, 4), R152-R18 (4, 2), R50-MobileNet (4, 1). COCO R101-R18: (1, 1.5).

    Args:
        student, teacher: logits [B, C]. labels: [B] integers or `ignore_index`, left out of all terms.
        student_feature, teacher_feature, class_means, mode: as in `norm_direction_loss` (the adapted feature where widths differ).
        kind, beta: of the divergence; "dkd" with beta=(alpha, beta) is DKD++. epoch, warmup_epochs: `warmup`.
    Returns:
        LossOutput(loss, {"ce", "kd", "nd"}), unweighted; kd carries T^2. With nd_weight = 0 the ND term is not computed.

    >>> loss, parts = nd_loss_total(zs, zt, labels, s, t, class_means, kd_weight=3.5, epoch=5, warmup_epochs=20)
    """
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight), ("nd_weight", nd_weight)):
        check_number(name, value, low=0.0)
    loss, parts = distillation_loss(
        student, teacher, labels, kind=kind, beta=beta, temperature=temperature, scale_t2=True, ce_weight=ce_weight,
        kd_weight=warmup(epoch, warmup_epochs) * kd_weight, ignore_index=ignore_index,
    )  # fmt: skip
    if nd_weight == 0:
        return LossOutput(loss, parts | {"nd": torch.zeros_like(parts["ce"])})
    nd = norm_direction_loss(
        student_feature, teacher_feature, class_means, labels, mode=mode, ignore_index=ignore_index
    )  # fmt: skip
    return LossOutput(loss + nd_weight * nd, parts | {"nd": nd.detach()})


# ---------------------------------------------------------------- by name
class FeatureAdapter(nn.Sequential):
    """BatchNorm1d, Dropout, Linear with zero bias at the start, [B, in] -> [B, out]; feeds the ND term alone."""

    def __init__(self, in_features: int, out_features: int, *, dropout: float = 0.5) -> None:
        linear = nn.Linear(in_features, out_features)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(in_features), nn.Dropout(dropout), linear)


class Method(MethodBase):
    """KD++ with its class means, taken from the teacher over the training set before the first step, and saved.

    Reads the features "embedding" of both models: [B, D], or maps [B, D, h, w], averaged over positions. Where the widths
    differ an adapter maps the student's to the teacher's; it and the means are not part of the student.

    Args:
        widths: {"embedding": (student, teacher)}. dropout: of the adapter.
        epochs: the run is counted as so many epochs for the warm-up, epoch = floor(step epochs / total_steps); with the
            length unknown there is no warm-up. Others: `nd_loss_total`.
    """

    captures = ("embedding",)
    class_means: Tensor

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        nd_weight: float = 2.0,
        temperature: float = 4.0,
        kind: str = "forward_kl",
        beta: float | tuple[float, float] = 0.5,
        mode: str = "nd",
        warmup_epochs: float = 20,
        epochs: int = 240,
        dropout: float = 0.5,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        check_int("epochs", epochs, low=1)
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight), ("nd_weight", nd_weight)):
            check_number(name, value, low=0.0)
        check_number("warmup_epochs", warmup_epochs, low=0.0)
        self.epochs, self.ignore_index = epochs, ignore_index
        self.options: dict[str, Any] = {
            "ce_weight": ce_weight, "kd_weight": kd_weight, "nd_weight": nd_weight, "temperature": temperature, "kind": kind,
            "beta": tuple(beta) if isinstance(beta, (tuple, list)) else beta, "mode": mode, "warmup_epochs": warmup_epochs,
            "ignore_index": ignore_index,
        }  # fmt: skip
        own, wanted = widths["embedding"]
        self.adapter = nn.Identity() if own == wanted else FeatureAdapter(own, wanted, dropout=dropout)
        self.register_buffer("class_means", torch.empty(0, wanted))

    def start(self, setup: Setup) -> None:
        if setup.resumed:
            return
        means: ClassMeans | None = None
        for context in setup.sweep("train"):
            assert context.labels is not None
            means = means or ClassMeans(context.teacher.shape[-1])
            feature = _pooled(context.teacher_features["embedding"])
            means.update(feature, context.labels, ignore_index=self.ignore_index)
        if means is None:
            raise ValueError("loader: expected at least one batch for the class means, got none")
        self.class_means = means.compute().to(feature.dtype)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        if not self.class_means.numel():
            raise ValueError(
                "class_means: not there yet; Distiller.fit computes them, in your own loop set method.class_means"
            )
        s, t = (_pooled(f["embedding"]) for f in (context.student_features, context.teacher_features))
        epoch = epoch_at(context.step, context.total_steps, self.epochs, unknown=self.epochs)
        return nd_loss_total(
            context.student, context.teacher, context.labels, self.adapter(s), t, self.class_means, epoch=epoch, **self.options
        )  # fmt: skip


def _pooled(feature: Tensor) -> Tensor:
    return feature.mean((2, 3)) if feature.dim() == 4 else feature
