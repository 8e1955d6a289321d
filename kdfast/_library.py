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


NO_SECOND_DERIVATIVE = (
    "kdfast: the fused backends have no second derivative (create_graph=True asks for one); "
    "pass backend='reference' or set KDFAST_BACKEND=reference, which gives every order"
)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a fused op: a second derivative raises and names the way out.

    torch's once_differentiable lets the usual case through: after `g, = grad(loss, student, create_graph=True)` the
    incoming gradient requires no grad and the logits may not be saved, so a penalty on g is silently taken as a constant.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiled graph refuses by itself
            return backward(ctx, *grads)
        if not transforms_active():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        with torch.no_grad():  # torch.func always builds the graph: refuse when it is used
            results = backward(ctx, *grads)
        outputs = results if isinstance(results, tuple) else (results,)
        outputs = _Refuse.apply(len(outputs), *outputs, *ctx.saved_tensors)
        return outputs if isinstance(results, tuple) else outputs[0]

    return wrapper


def eager_form(form: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The `forward(ctx, ...)` form of a Function written as forward + setup_context; `apply_function` chooses.

    torch.func needs the second form, which binds its arguments by inspect: 30-50 us a call that eager need not pay.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = form.forward(*args)
            form.setup_context(ctx, args, output)
            return output

        backward = staticmethod(form.backward)

    Eager.__name__ = Eager.__qualname__ = form.__name__
    return Eager


def apply_function(form: type[torch.autograd.Function], eager: type[torch.autograd.Function], *args: Any) -> Any:
    return (form if transforms_active() else eager).apply(*args)


class _Refuse(torch.autograd.Function):
    """The identity on its first n tensors, which depend on all the others; its derivative raises."""

    @staticmethod
    def forward(n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def scale_gradient(grad: Tensor, upstream: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A stored final gradient times the upstream factor, never in place: with retain_graph the buffer is used again.

    On the CPU a factor of exactly 1 (the usual case) costs nothing. The result is rounded to `dtype` (else grad's) last.
    """
    dtype = dtype or grad.dtype
    if readable(upstream) and upstream.item() == 1.0:
        return grad.to(dtype)
    return grad * upstream.to(dtype) if grad.dtype == torch.float64 else (grad * upstream).to(dtype)


def readable(tensor: Tensor) -> bool:
    """Whether a value may be read at no cost: on the CPU, and neither fake nor being traced."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


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


def final_gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """The buffer of a gradient that is stored before the upstream factor is known: float32 for float16, where a mean over many
    rows underflows until a loss scaler's factor comes.
    """
    if needed and tensor.dtype == torch.float16:
        return torch.empty_like(tensor, dtype=torch.float32)
    return gradient_like(tensor, needed)


def gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """The gradient's buffer: the input's dtype and, when the input is dense, its layout. An op cannot return None."""
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)
