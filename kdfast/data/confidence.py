"""Which images of an unlabelled pool are kept: those that teacher and student together are sure of, by a threshold of their class."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor, check_number
from kdfast._library import compute_dtype


class Selection(NamedTuple):
    """rows: those kept, ascending. threshold [C] of each class. pseudo_label [n], the predicted classes."""

    rows: Tensor
    threshold: Tensor
    pseudo_label: Tensor


def teacher_share(epoch: int, *, max_epoch: int = 120, scale: int = 160, factor: float = 5.0) -> float:
    """a(e) = 1 - exp(-5 ((e + 1) / scale - 1)^2) for e < max_epoch, else 0; e counts from 1.

    >>> [round(teacher_share(epoch), 3) for epoch in (1, 119, 120)]
    [0.992, 0.268, 0.0]
    """
    check_number("scale", scale, low=0.0, open_low=True)
    return 1 - math.exp(-factor * ((epoch + 1) / scale - 1) ** 2) if epoch < max_epoch else 0.0


def adaptive_confidence(teacher: Tensor, student: Tensor, share: float, *, cutoff: float = 0.95) -> Selection:
    """Rows whose greatest probability exceeds the threshold of their class.

        q = softmax(a z_t + (1 - a) z_s);  c = argmax q (the first of equals);  r_c = n_c / max_c n_c;  th_c = cutoff r_c / (2 - r_c)

    The class predicted most often has th = cutoff, a class never predicted 0. Kept are the rows with max q > th_c.

    Args: teacher, student: logits [n, C]. share: a in [0, 1], of the teacher. cutoff: in (0, 1].
    Raises:
        ValueError: an empty pool, other class counts, a cutoff outside (0, 1].
    """
    check_number("share", share, low=0.0, high=1.0)
    check_number("cutoff", cutoff, low=0.0, high=1.0, open_low=True)
    check_float_tensor("teacher", teacher)
    if teacher.dim() != 2 or teacher.shape != student.shape:
        raise ValueError(
            f"student: expected logits [n, C] as the teacher's {tuple(teacher.shape)}, got {tuple(student.shape)}"
        )
    if not len(teacher):
        raise ValueError("teacher: expected a pool of at least one image, got none")
    dtype = compute_dtype(teacher, student)
    q = torch.softmax(share * teacher.to(dtype) + (1 - share) * student.to(dtype), -1)
    sure, predicted = q.amax(-1), q.argmax(-1)
    counts = predicted.bincount(minlength=q.shape[1]).to(dtype)
    often = counts / counts.max()
    threshold = cutoff * often / (2 - often)
    return Selection((sure > threshold[predicted]).nonzero().flatten(), threshold, predicted)
