"""Kernel mean discrepancy between two samples, from squared distances d2 and a sum of Gaussian kernels.

k(a, b) = sum_r exp(-|a-b|^2 / bandwidth_r)                       a sum over bandwidths, no factor 2

full         mean k(x_i,x_j) + mean k(y_i,y_j) - 2 mean k(x_i,y_j)            over all pairs, i = j included; never negative
unbiased     the same without the pairs i = j in the first two means          may be negative
linear       1/n sum_i [k(x_i,x_i') + k(y_i,y_i') - k(x_i,y_i') - k(x_i',y_i)],  i' = (i+1) mod n; n = N = M; O(n D)
regulariser  1/(N+M) sum_{i<N} of the same four terms for N != M: partner rows y at 1 + (i mod M)...  (see `corrected`)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.ops.pairwise import _check_points, pairwise_cost, row_blocks

ESTIMATORS = ("full", "unbiased", "linear", "regulariser")


def pairwise_mmd_reference(
    x: Tensor,
    y: Tensor,
    *,
    bandwidths: Sequence[float] | Tensor,
    estimator: str = "full",
    corrected: bool = False,
) -> Tensor:
    """The estimators of this module read off the whole kernel matrix of the joint sample."""
    dtype = compute_dtype(x, y)
    n, m = len(x), len(y)
    joint = torch.cat((x, y)).to(dtype)
    d2 = (joint.unsqueeze(1) - joint.unsqueeze(0)).square().sum(-1)  # [N+M, N+M]
    kernel = torch.stack([(-d2 / b).exp() for b in bandwidths]).sum(0)
    xx, yy, xy = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    if estimator == "full":
        return xx.mean() + yy.mean() - 2 * xy.mean()
    if estimator == "unbiased":
        off_x, off_y = xx.sum() - xx.trace(), yy.sum() - yy.trace()
        return off_x / (n * (n - 1)) + off_y / (m * (m - 1)) - 2 * xy.mean()
    i, i_next, j, j_next = _partners(n, m, corrected, x.device)
    terms = kernel[i, i_next] + kernel[j, j_next] - kernel[i, j_next] - kernel[i_next, j]
    return terms.sum() / (n if estimator == "linear" else n + m)


def _partners(n: int, m: int, corrected: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the joint sample paired by the two linear estimators; N = M makes both forms the same."""
    i = torch.arange(n, device=device)
    i_next = (i + 1) % n
    if corrected:
        return i, i_next, n + i % m, n + (i + 1) % m
    return i, i_next, i + m, i_next + m  # the released code: offset M, which is the second sample only when N = M


def pairwise_mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidths: Sequence[float] | Tensor,
    estimator: str = "full",
    corrected: bool = False,
) -> Tensor:
    """Kernel mean discrepancy of two samples; the estimators stand at the top of this module.

    Args:
        x: [N, D], y: [M, D]; float16, bfloat16, float32 or float64.
        bandwidths: positive numbers, or a Tensor [R] of them as `mmd_bandwidths` returns (no gradient flows into them).
        estimator: "full", "unbiased" (N, M >= 2), "linear" (N = M) or "regulariser" (any N, M).
        corrected: for "regulariser" with N != M: False as the released GDCAN code, which takes the partner rows at offset M
            of the joint sample and so mixes the samples; True takes row i mod M of y.
    Returns:
        a scalar, float32 (float64 for float64 input).
    Differentiable in x and y. The linear forms cost O(N D); the others work through blocks of rows and compute each again in
    the backward, so no [N, M] table is kept.
    Source: GDCAN (arXiv 2103.12339), linear and regulariser forms; Gretton et al. 2012, eq. 3 and 5 (full, unbiased).

    >>> loss = pairwise_mmd(source, target, bandwidths=mmd_bandwidths(source, target, num_kernels=5))
    """
    _check_points(x, y)
    check_choice("estimator", estimator, ESTIMATORS)
    n, m = len(x), len(y)
    least = 2 if estimator == "unbiased" else 1
    if x.dim() != 2 or n < least or m < least:
        raise ValueError(f"x, y: expected [N, D] with at least {least} rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    if estimator == "linear" and n != m:
        raise ValueError(f"y: expected the {n} rows of x for estimator='linear', got {m}")
    if not isinstance(bandwidths, Tensor):
        bandwidths = [check_number("bandwidths", b, low=0.0, open_low=True) for b in bandwidths]
    if len(bandwidths) == 0:
        raise ValueError("bandwidths: expected at least one, got none")
    if estimator in ("linear", "regulariser"):
        joint = torch.cat((x, y)).to(compute_dtype(x, y))
        i, i_next, j, j_next = _partners(n, m, corrected, x.device)
        pairs = ((i, i_next, 1.0), (j, j_next, 1.0), (i, j_next, -1.0), (i_next, j, -1.0))
        total = joint.new_zeros(())
        for a, b, sign in pairs:
            total = total + sign * _kernel((joint[a] - joint[b]).square().sum(-1), bandwidths).sum()
        return total / (n if estimator == "linear" else n + m)
    xx, yy, xy = (_kernel_sum(a, b, bandwidths) for a, b in ((x, x), (y, y), (x, y)))
    if estimator == "unbiased":
        own = len(bandwidths)  # k(a, a)
        return (xx - n * own) / (n * (n - 1)) + (yy - m * own) / (m * (m - 1)) - 2 * xy / (n * m)
    return xx / n**2 + yy / m**2 - 2 * xy / (n * m)


def mmd_bandwidths(
    x: Tensor, y: Tensor, *, num_kernels: int = 5, multiplier: float = 2.0, sigma: float | None = None
) -> Tensor:
    """The geometric family of bandwidths around the mean squared distance, without gradient.

        bandwidth_r = s / multiplier^floor(R/2) * multiplier^r,  r = 0..R-1,      s = sigma or sum d2 / (n^2 - n)

    over the n rows of x and y together. s is at least 1e-12 (all rows equal). The sum of distances is taken in closed form
    from the centred rows, 2 n sum |z|^2, so it costs O(n D).

    >>> mmd_bandwidths(torch.zeros(1, 1), torch.ones(1, 1), num_kernels=3).tolist()
    [0.5, 1.0, 2.0]
    """
    _check_points(x, y)
    check_int("num_kernels", num_kernels, low=1)
    check_number("multiplier", multiplier, low=0.0, open_low=True)
    joint = torch.cat((x, y)).detach().to(compute_dtype(x, y))
    if sigma is None:
        n = len(joint)
        if n < 2:
            raise ValueError(f"x, y: expected at least 2 rows in all for the automatic bandwidth, got {n}")
        middle = (2 * (joint - joint.mean(0)).square().sum() / (n - 1)).clamp_min(1e-12)
    else:
        middle = joint.new_tensor(check_number("sigma", sigma, low=0.0, open_low=True))
    powers = torch.arange(num_kernels, device=joint.device, dtype=joint.dtype) - num_kernels // 2
    return middle * multiplier**powers


def _kernel(d2: Tensor, bandwidths: Sequence[float] | Tensor) -> Tensor:
    total = (-d2 / bandwidths[0]).exp()
    for bandwidth in bandwidths[1:]:
        total = total + (-d2 / bandwidth).exp()
    return total


def _kernel_sum(x: Tensor, y: Tensor, bandwidths: Sequence[float] | Tensor) -> Tensor:
    """Sum of k over all pairs. Each block of rows is computed again in the backward instead of being kept."""
    total = x.new_zeros((), dtype=compute_dtype(x, y))
    for start, stop in row_blocks(len(x), len(y), total.element_size()):
        total = total + checkpoint(
            _block_sum, x[start:stop], y, bandwidths, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _block_sum(x: Tensor, y: Tensor, bandwidths: Sequence[float] | Tensor) -> Tensor:
    return _kernel(pairwise_cost(x, y, p=2), bandwidths).sum()
