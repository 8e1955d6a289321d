"""The one torch.library handle that every op registers on, and small helpers the ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

lib = torch.library.Library("kdfast", "FRAGMENT")


def transforms_active() -> bool:
    """True under torch.func transforms (grad, vmap, jvp), which need the `setup_context` form of a Function."""
    return torch._C._are_functorch_transforms_active()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Sums and losses: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scale_gradient(grad: Tensor, upstream: Tensor) -> Tensor:
    """A stored final gradient times the upstream factor, never in place: with retain_graph the buffer is used again.

    On the CPU a factor of exactly 1 (the usual case) costs nothing. The factor is rounded to the gradient's dtype last.
    """
    if not torch.compiler.is_compiling() and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return grad
    return grad * upstream.to(grad.dtype) if grad.dtype == torch.float64 else (grad * upstream).to(grad.dtype)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a fused op: a second derivative raises, naming the reference backend.

    torch's once_differentiable looks at the upstream gradient alone. Behind an op that is differentiable twice (a
    normalisation, a projection) that gradient may be a constant while the inputs are not: the second derivative would then
    be silently wrong. Here it raises in that case too.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or transforms_active() or torch.compiler.is_compiling():
            return results
        outputs = results if isinstance(results, tuple) else (results,)
        message = "kdfast: the fused backends have no second derivative; pass backend='reference'"
        fail = torch._C._functions.DelayedError(message.encode(), len(outputs))
        outputs = fail(*(g if g is None else g.detach().requires_grad_() for g in outputs))
        return outputs if isinstance(results, tuple) else outputs[0]

    return wrapper


# ---------------------------------------------------------------- what the core takes: addresses, dtype codes, strides
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


def operand(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """What the core needs of a tensor it reads or writes in place: address, dtype code, strides in elements."""
    return address(tensor), DTYPE_CODES[tensor.dtype], tensor.stride()


def contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Per-row tensors are small next to the logits; the core reads them flat in one dtype."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """The gradient's buffer: the input's dtype and, when the input is dense, its layout. An op cannot return None."""
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)
