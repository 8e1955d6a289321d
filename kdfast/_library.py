"""The one torch.library handle that every op registers on, and small helpers the ops share."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import _core

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


def direct(op: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`op` for callers inside an autograd.Function: straight to its CPU kernel where nothing watches the dispatcher.

    Parsing some twenty arguments twice costs as much as a small kernel. Traced, fake, profiled calls go through the op.
    """

    def call(first: Tensor, *rest: Any) -> Any:
        return (kernel if readable(first) and not torch.autograd._profiler_enabled() else op)(first, *rest)

    return call


def applied(form: type[torch.autograd.Function]) -> Callable[..., Any]:
    """form.apply for a Function written as forward + setup_context, at the price of one written as forward(ctx, ...).

    torch.func needs the first form, which binds its arguments by inspect: 30-50 us a call that eager need not pay.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = form.forward(*args)
            form.setup_context(ctx, args, output)
            return output

        backward = staticmethod(form.backward)

    Eager.__name__ = Eager.__qualname__ = form.__name__

    def call(*args: Any) -> Any:
        return (form if transforms_active() else Eager).apply(*args)

    return call


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
    """A stored final gradient times the upstream factor, rounded to `dtype` (else grad's) last.

    When this backward is the last one through the graph the buffer itself is given away, scaled in place; a factor of
    exactly 1 (the usual case) then costs nothing. With retain_graph the caller gets a buffer of his own.
    """
    dtype = dtype or grad.dtype
    if readable(upstream):
        factor = upstream.item()  # a number times a bfloat16 tensor is vectorised, a float32 tensor times it is not
        if _keeps_graph():
            return (grad * factor).to(dtype)
        return (grad if factor == 1.0 else grad.mul_(factor)).to(dtype)
    return grad * upstream.to(dtype) if grad.dtype == torch.float64 else (grad * upstream).to(dtype)


# Inside a backward: whether it was called with retain_graph. Where torch cannot tell, the buffer is never given away.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def readable(tensor: Tensor) -> bool:
    """Whether a value may be read at no cost: on the CPU, and neither fake nor being traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and not transforms_active()
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
    return gradient_like(tensor, needed, torch.float32 if tensor.dtype == torch.float16 else None)


def gradient_like(tensor: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient's buffer: the input's dtype and, when the input is dense, its layout. An op cannot return None."""
    if not needed:
        return tensor.new_empty(0)
    dtype = dtype or tensor.dtype
    if _comes_back(tensor, tensor.numel() * dtype.itemsize):
        strides = torch.empty_like(tensor, dtype=dtype, device="meta").stride()
        return _kept(tensor.shape, strides, dtype)
    return torch.empty_like(tensor, dtype=dtype)


def new_empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype) for a kernel's output."""
    dtype = dtype or like.dtype
    if _comes_back(like, math.prod(shape) * dtype.itemsize):
        return _kept(shape, torch.empty(shape, device="meta").stride(), dtype)
    return like.new_empty(shape, dtype=dtype)


# Smaller buffers are recycled by the system's allocator itself.
KEPT_BYTES = 16 << 20


def _comes_back(like: Tensor, size: int) -> bool:
    """Whether the core holds the memory (csrc/memory.h): large, on the CPU, and neither fake nor being traced."""
    return size >= KEPT_BYTES and _core.core is not None and readable(like)


def _kept(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_dlpack(_core.core.kept_tensor(shape, strides, DTYPE_CODES[dtype]))


def release_memory() -> None:
    """Frees the large buffers that kdfast keeps between steps on the CPU: at most KDFAST_KEEP_MB, 512 unless set."""
    if _core.core is not None:
        _core.core.release_kept()


def _set_kept_limit() -> None:
    text = os.environ.get("KDFAST_KEEP_MB") or "512"
    if not text.isdecimal():
        raise ValueError(f"KDFAST_KEEP_MB: expected a whole number of MB, 0 to keep nothing, got {text!r}")
    if _core.core is not None:
        _core.core.set_kept_limit(int(text) << 20)


_set_kept_limit()
