"""Sigmoid cross-entropy over many classes, summed over them: dense targets, or sparse ones that are never made dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor
from kdfast._library import compute_dtype, readable
from kdfast.losses.divergence import REDUCTIONS, check_mask, reduce_rows
from kdfast.losses.module import LossModule


def multi_label_loss(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """-sum_j [ z_ij log sig(x_ij) + (1 - z_ij) log(1 - sig(x_ij)) ]: a SUM over the classes, the mean over kept rows.

    Args: logits: [..., C]. targets: [..., C] in [0, 1], a multi-hot label or probabilities, no gradient. mask, weight, reduction: of rows,
        as in `kd_loss`; dropped rows may hold anything.
    Raises:
        ValueError: shapes; where values can be read (on the CPU) also targets outside [0, 1] and logits that are not finite.

    >>> round(multi_label_loss(torch.zeros(2, 3), torch.ones(2, 3)).item(), 4)
    2.0794
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_float_tensor("logits", logits)
    if not isinstance(targets, Tensor) or targets.shape != logits.shape or targets.device != logits.device:
        got = f"{tuple(targets.shape)} on {targets.device}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: expected shape {tuple(logits.shape)} on {logits.device}, got {got}")
    logits, targets = _kept(logits, mask), _kept(targets, mask)
    if readable(logits):
        if not bool(logits.isfinite().all()):
            raise ValueError("logits: expected finite numbers")
        check_probabilities("targets", targets)
    dtype = compute_dtype(logits)
    rows = F.binary_cross_entropy_with_logits(logits.to(dtype), targets.detach().to(dtype), reduction="none").sum(-1)
    return reduce_rows(rows, mask, weight, reduction)


def sparse_multi_label_loss(
    logits: Tensor, index: Tensor, value: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """`multi_label_loss` with the target `value` at the classes `index` of each row and 0 elsewhere:

        sum_j softplus(x_ij) - sum_k z_ik x_i,index_ik

    Args: logits: [N, C]. index: [N, K] integers in [0, C), none twice in a row; -1 where there are fewer. value: [N, K] in [0, 1].
    Raises:
        ValueError: where values can be read (on the CPU), of dropped rows the index alone: index outside [-1, C) or twice in a row, value outside [0, 1],
            logits that are not finite.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_float_tensor("logits", logits)
    check_float_tensor("value", value)
    if index.shape != value.shape or index.dim() != 2 or logits.dim() != 2 or len(index) != len(logits):
        raise ValueError(
            f"index, value: expected [{len(logits)}, K] for logits [N, C], got {tuple(index.shape)}, {tuple(value.shape)} for {tuple(logits.shape)}"
        )
    logits, value = _kept(logits, mask), _kept(value, mask)
    kept = index >= 0
    if readable(logits):
        if not bool(logits.isfinite().all()):
            raise ValueError("logits: expected finite numbers")
        check_probabilities("value", torch.where(kept, value, 0.0))
        if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < logits.shape[1]:
            raise ValueError(
                f"index: expected -1 or a class in [0, {logits.shape[1]}), got {int(index.min())} to {int(index.max())}"
            )
        order = index.sort(1).values
        if bool(((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any()):
            raise ValueError("index: expected each class once in a row, got one twice")
    x = logits.to(compute_dtype(logits))
    positive = x.gather(1, index.clamp_min(0)) * torch.where(kept, value.detach(), 0.0).to(x.dtype)
    rows = -F.logsigmoid(-x).sum(1) - positive.sum(1)
    return reduce_rows(rows, mask, weight, reduction)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Dropped rows as 0: the gradient of a NaN is NaN whatever its factor."""
    if mask is None:
        return values
    check_mask(mask, values.shape[:-1], values.device)
    return torch.where(mask.unsqueeze(-1), values, 0.0)


def check_probabilities(name: str, values: Tensor) -> None:
    """Values that may be read must lie in [0, 1]."""
    if readable(values) and values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"{name}: expected probabilities in [0, 1], got {float(values.min()):g} to {float(values.max()):g}; are these raw logits? apply a sigmoid first"
        )


class MultiLabelLoss(LossModule, function=multi_label_loss): ...


class SparseMultiLabelLoss(LossModule, function=sparse_multi_label_loss): ...
