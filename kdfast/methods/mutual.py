"""Two students that teach each other everywhere: the plain form of mutual training, and the baseline of the selective ones.

Paper: Deep Mutual Learning. Zhang, Xiang, Hospedales, Lu; CVPR 2018; https://arxiv.org/abs/1706.00384
Based on: equations 4 and 5 of the paper, for two networks. Differs from the paper: the temperature is an option (there 1), and
both networks step on the same batch at the same time, where the paper updates them in turn.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast.losses import LossOutput, distillation_loss
from kdfast.methods._protocol import LogitMethod


def mutual_total(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    dim: int = -1,
) -> LossOutput:
    """CE(a) + w T^2 KL(b || a) + CE(b) + w T^2 KL(a || b), w = kd_weight, the teaching side of each KL detached.

    One backward gives each network its own loss: the two halves share no gradient.

    Args:
        a, b: logits of the two networks [..., C], or with the classes on axis `dim` (1 for maps [B, C, H, W]).
        labels: [...] integers or `ignore_index`; ignored rows are in none of the four terms.

    >>> Distiller(cnn, vit, "mutual", options={"dim": 1, "ignore_index": 255})
    """
    options: dict[str, Any] = {
        "temperature": temperature, "ce_weight": 1.0, "kd_weight": kd_weight, "ignore_index": ignore_index, "dim": dim,
    }  # fmt: skip
    to_a = distillation_loss(a, b, labels, **options)
    to_b = distillation_loss(b, a, labels, **options)
    parts = {f"{name}_{side}": value for side, loss in (("a", to_a), ("b", to_b)) for name, value in loss.parts.items()}
    return LossOutput(to_a.loss + to_b.loss, parts)


class Method(LogitMethod, function=mutual_total):
    trains_teacher = True
