"""KD with data pruning: train on a small part of the data, while a teacher that saw all of it gives soft targets on that part.

Paper: Distilling the Knowledge in Data Pruning. Ben-Baruch, Botach, Kviatkovsky, Aggarwal, Medioni; 2024;
https://arxiv.org/abs/2403.07854
Based on: the paper and the standard definitions of the scores; no public code was found. Certain are: the setting, the convex sum of
    labels and KD, a teacher trained on the full data, random selection as the recommended one, a KD weight that is larger the fewer
    samples are kept, the ridge-regression argument.
Reconstruction, and therefore arguments: the factor T^2, how the scores are averaged, ties (the lower index is kept first).
Symbols: n samples, f the share kept, s, t [B, C] logits of student and teacher, alpha in [0, 1].

    L = (1 - alpha) CE(s, y) + alpha T^2 KL(softmax(t/T) || softmax(s/T))            alpha: near 1 for small f, moderate for large f

Scores and selection: `kdfast.data.pruning` (EL2N, GraNd, forgetting, memorisation, prototypes). Kept are the round(f n) hardest, the
easiest, or random ones, which with KD are as good as any.

Procedure: teacher on all data; scores; the part is chosen once, before the student's training; say whether epochs or steps are
kept equal. alpha is chosen per f on a validation split. Inference: the student alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from kdfast._checks import check_choice, check_float_tensor, check_number
from kdfast._library import compute_dtype
from kdfast.data.pruning import MODES, check_indices, select
from kdfast.losses import LossOutput, distillation_loss
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase


def pruned_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 4.0,
    ignore_index: int = -100,
) -> LossOutput:
    """(1 - alpha) CE + alpha T^2 KL, in one pass; parts "ce" and "kd" (with T^2) without their weights.

    >>> loss, parts = pruned_kd_loss(student(x), teacher(x), y, alpha=0.9)
    """
    check_number("alpha", alpha, low=0.0, high=1.0)
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    return distillation_loss(student, teacher, labels, ce_weight=1 - alpha, kd_weight=alpha, **options)


# ---------------------------------------------------------------- the argument for it
def ridge_student(
    x: Tensor, y: Tensor, keep: Tensor | Sequence[int], lam: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """(w_t, w_s) [D] of self-distilled ridge regression on a part of the data, x [D, n] with samples in columns, y [n].

        w_t = (X X^T + lam I)^-1 X y,   w_s = (X_f X_f^T + lam I)^-1 X_f (alpha X_f^T w_t + (1 - alpha) y_f)

    Raises:
        ValueError: lam < 0, or 0 with a singular Gram matrix; repeated or outlying indices; alpha outside [0, 1].
    """
    check_number("lam", lam, low=0.0)
    check_number("alpha", alpha, low=0.0, high=1.0)
    check_float_tensor("x", x)
    if x.dim() != 2 or y.shape != x.shape[1:]:
        raise ValueError(f"x, y: expected [D, n] and [n], got {tuple(x.shape)} and {tuple(y.shape)}")
    index = torch.as_tensor(keep, device=x.device)
    check_indices("keep", index, x.shape[1])

    def solve(columns: Tensor, target: Tensor) -> Tensor:
        gram = columns @ columns.T + lam * torch.eye(len(columns), dtype=x.dtype, device=x.device)
        if lam == 0 and int(torch.linalg.matrix_rank(gram, hermitian=True)) < len(gram):
            raise ValueError("lam: 0 with a singular Gram matrix has no solution")
        return torch.linalg.solve(gram, columns @ target)

    x, y = x.to(compute_dtype(x)), y.to(compute_dtype(x))
    teacher, part = solve(x, y), x[:, index]
    return teacher, solve(part, alpha * (part.T @ teacher) + (1 - alpha) * y[index])


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The loss, and the choice of the part for a run by name (`choose`); in your own loop the loader holds the part already.

    Args:
        keep: f. stratify: keep the shares of the classes. scores, mode: other selectors than random ones. alpha, temperature:
            `pruned_kd_loss`; choose alpha per f on a validation split.
    """

    def __init__(
        self, *, alpha: float = 0.75, temperature: float = 4.0, keep: float = 0.2, mode: str = "random", stratify: bool = False,
        scores: Sequence[float] | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "alpha": check_number("alpha", alpha, low=0.0, high=1.0), "ignore_index": ignore_index,
            "temperature": check_number("temperature", temperature, low=0.0, open_low=True),
        }  # fmt: skip
        self.keep = check_number("keep", keep, low=0.0, high=1.0, open_low=True)
        self.mode, self.stratify = check_choice("mode", mode, MODES), stratify
        self.scores = None if scores is None else torch.tensor(scores, dtype=torch.float64)

    def choose(self, data: Dataset, seed: int) -> Dataset:
        """The kept part of a data set of (inputs, labels), the same for the same seed."""
        n = len(data)  # type: ignore[arg-type]
        labels = torch.stack([torch.as_tensor(data[i][1]) for i in range(n)]) if self.stratify else None
        generator = torch.Generator().manual_seed(seed)
        index = select(self.scores, n, keep=self.keep, mode=self.mode, stratify=labels, generator=generator)
        return Subset(data, index.tolist())

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        return pruned_kd_loss(context.student, context.teacher, context.labels, **self.options)
