"""The two ways Triton kernels are tested without a GPU, each in a pytest process of its own: `make test-triton` starts both.

TRITON_INTERPRET is read when a kernel is defined: with it the kernels of that process cannot be compiled, set later it does
nothing. So a test file says which process it belongs to, and is skipped in any other, the ordinary run among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

MODES = ("interpreted", "ahead")


def only(mode: str) -> None:
    """At the top of a test file, before it imports kernels."""
    assert mode in MODES
    asked = os.environ.get("KDFAST_TRITON_TESTS") or None
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if asked is not None and (asked not in MODES or interpreting != (asked == "interpreted")):
        raise pytest.UsageError(
            f"KDFAST_TRITON_TESTS={asked}, TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')}: expected interpreted with 1, "
            "or ahead without; `make test-triton` starts both processes"
        )
    if asked != mode:
        pytest.skip(f"Triton {mode}: run by make test-triton, in a process of its own", allow_module_level=True)
    if mode == "interpreted":
        _patch_once()


def _patch_once() -> None:
    """The interpreter patches triton.language when a kernel starts, and again at every call of a device function in it, which
    costs as much as the rest of the call. Here: once per kernel and module.
    """
    from triton.runtime import interpreter

    patched: set[int] = set()
    run = interpreter.GridExecutor.__call__

    def kernel(self, *args, **kwargs):
        patched.clear()  # the one before has taken its patches back
        return run(self, *args, **kwargs)

    def device_function(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = kernel
    interpreter.InterpretedFunction.__call__ = device_function


def take_the_cpu(module: ModuleType, kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Puts Triton functions in the place of what an op's module calls, by the names it calls them.

    From then on its public functions, their autograd and their checks run interpreted kernels under backend="cpu".
    """
    for name, kernel in kernels.items():
        assert callable(getattr(module, name))
        setattr(module, name, kernel)


def round_as_a_gpu() -> None:
    """Makes the interpreter round float32 to the nearest bfloat16 (ties to even) as GPUs do: Triton 3.9's cuts the bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cut(self, source, target)
        bits = source.data.astype(np.float32).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        quiet = ((bits >> 16) | 0x40).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(source.data), quiet, nearest), target.scalar)

    InterpreterBuilder.cast_impl = cast


def multiply_as_a_gpu() -> None:
    """Makes the interpreter's tl.dot multiply bfloat16: Triton 3.9's multiplies the integers that it stores them in."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    product = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return product(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
