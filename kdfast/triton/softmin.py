"""`kdfast.ops.softmin` on a GPU: one launch for the rows, one for the gradient of each side. No table of pairs, no wait for the GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype
from kdfast.ops.softmin import _gradients, _outputs, row_terms
from kdfast.triton import softmin_kernels as kernels
from kdfast.triton.launch import DTYPES, launch, multiprocessors, power_of_two

OWN, OWN_IN_REVERSE, LEAST = (
    64,
    32,
    16,
)  # points of a program: at most, and at least while the GPU has room for more programs
OTHERS = 32  # points of the other side at a time
STEP = {
    2: 64,
    4: 16,
    8: 16,
}  # coordinates of a product at a time, by bytes: with no tensor cores a thread holds all of them
COLUMNS = 64  # coordinates of a gradient that a program owns; 16 is the least that tl.dot takes


def _points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, row after row; an operand of tl.dot each."""
    dtype = x.dtype if x.dtype == y.dtype else compute_dtype(x, y)
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


def _walk(kernel: Any, own: Tensor, other: Tensor, scale: float, most: int, parts: int, /, **arguments: Any) -> None:
    """A launch whose programs own up to `most` points of own [batch, n, width], a part of them each, and walk the other side."""
    batch, n, width = own.shape
    R = most
    while R > LEAST and batch * parts * -(-n // R) < 2 * multiprocessors(own.device):
        R //= 2
    K = min(max(power_of_two(width), 16), STEP[own.element_size()])
    num_warps = 4 if R == LEAST and own.dtype != torch.float64 else 8
    launch(
        kernel, batch * -(-n // R) * parts, num_warps, own.device, n=n, m=other.shape[1], width=width, blocks=-(-n // R),
        scale=float(scale), DTYPE=DTYPES[compute_dtype(own)], CENTRED=own.dtype in DTYPES, ONE=width <= K, R=R, B=OTHERS, K=K,
        **arguments,
    )  # fmt: skip


def _gradient(own: Tensor, other: Tensor, scale: float, grad: Tensor | None, **arguments: Any) -> None:
    W = min(max(power_of_two(own.shape[2]), 16), COLUMNS)
    parts = 1 if grad is None else max(-(-own.shape[2] // W), 1)
    _walk(
        kernels.softmin_gradient_kernel, own, other, scale, OWN_IN_REVERSE, parts, own=own, other=other, grad=grad, W=W, **arguments
    )  # fmt: skip


def softmin(x: Tensor, y: Tensor, h: Tensor, scale: float, need_mean: bool) -> tuple[Tensor, Tensor]:
    """kdfast::softmin: s and c."""
    s, c = _outputs(x, need_mean)
    x, y = _points(x, y)
    h, c_or_none = h.contiguous(), c if need_mean else None
    _walk(kernels.softmin_kernel, x, y, scale, OWN, 1, x=x, y=y, h=h, s=s, c=c_or_none)
    return s, c


def softmin_backward(
    grad_s: Tensor, grad_c: Tensor | None, x: Tensor, y: Tensor, h: Tensor, s: Tensor, c: Tensor, scale: float,
    need_x: bool, need_y: bool, need_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kdfast::softmin_backward: the gradients of x, y and h."""
    p, q = row_terms(grad_s, grad_c, c)
    grad_x, grad_y, grad_h = _gradients(x, y, h, need_x, need_y, need_h)
    x, y = _points(x, y)
    rows, h = torch.where(s == -math.inf, s, -s), h.contiguous()  # a row without a sum stays out
    shared = {"origin": y, "p": p.contiguous(), "q": None if q is None else q.contiguous()}
    if need_x:
        _gradient(x, y, scale, grad_x, own_potential=rows, other_potential=h, grad_potential=None, ROWS=True, **shared)
    if need_y or need_h:
        _gradient(
            y, x, scale, grad_y if need_y else None, own_potential=h, other_potential=rows,
            grad_potential=grad_h if need_h else None, ROWS=False, **shared,
        )  # fmt: skip
    return grad_x, grad_y, grad_h
