"""Costs between all pairs of two point sets.

c_ij = sum_c |x_ic - y_jc|^p            p = 1 or 2 (2: the squared distance, no root)
dc_ij/dx_ic = sign(x_ic - y_jc), 0 at a tie, or 2 (x_ic - y_jc)
"""

from __future__ import annotations

from torch import Tensor

from kdfast._checks import check_pair
from kdfast._library import compute_dtype


# ---------------------------------------------------------------- references: the definitions, with every option
def pairwise_cost_reference(x: Tensor, y: Tensor, *, p: int) -> Tensor:
    """sum_c |x_ic - y_jc|^p in plain torch: [..., N, M]. Holds an [..., N, M, C] buffer; any order of derivative."""
    dtype = compute_dtype(x, y)
    difference = x.to(dtype).unsqueeze(-2) - y.to(dtype).unsqueeze(-3)  # [..., N, M, C]
    return (difference.abs() if p == 1 else difference.square()).sum(-1)


# ---------------------------------------------------------------- public
def pairwise_cost(x: Tensor, y: Tensor, *, p: int, backend: str | None = None) -> Tensor:
    """Cost between every row of x and every row of y: c_ij = sum_c |x_ic - y_jc|^p.

    Args:
        x: [..., N, C]. y: [..., M, C], the same leading shape; float16, bfloat16, float32 or float64.
        p: 1 (L1 distance, gradient sign(x - y) with 0 at ties) or 2 (SQUARED Euclidean distance).
        backend: "cpu", "reference" or None for the best that can run.
    Returns:
        [..., N, M], float32 (float64 for float64 input).
    Differentiable in x and y, once; `backend="reference"` gives every derivative.
    Raises:
        ValueError: unequal C or leading shapes, p other than 1 or 2.
    Source: the batch cost of SinKD (arXiv 2402.17110, p = 1).

    >>> cost = pairwise_cost(student.softmax(-1), teacher.softmax(-1), p=1)
    """
    _check_points(x, y)
    if p not in (1, 2) or isinstance(p, bool):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    return pairwise_cost_reference(x, y, p=p)


def _check_points(x: Tensor, y: Tensor) -> None:
    check_pair(x, y, ("x", "y"))
    if x.dim() < 2 or y.dim() != x.dim():
        raise ValueError(
            f"y: expected [..., points, width] tensors of equal rank >= 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected the width of x ({x.shape[-1]}), got {y.shape[-1]}")
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"y: expected the leading shape of x {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}")
