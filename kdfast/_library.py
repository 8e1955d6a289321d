"""The one torch.library handle that every op registers on, and small helpers the ops share."""

from __future__ import annotations

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
