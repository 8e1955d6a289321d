"""The ways torch may run an op besides plain eager: one battery that every op's tests call.

    @pytest.mark.parametrize("mode", MODES)
    def test_modes(mode):
        check_mode(mode, lambda s, t: divergence(s, t, kind="js"), (student, teacher))

`function` takes the tensors of `inputs`, in order, and returns a Tensor or a tuple; those with requires_grad are
differentiated. Inputs that have to be valid (labels, masks) may be among them. Inductor is not here: it costs 10-30 s a
graph, so each op has one test of its own for it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from tolerances import float_outputs
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Any]
Inputs = Sequence[Tensor]


def check_mode(mode: str, function: Function, inputs: Inputs) -> None:
    """Runs one entry of MODES; the failure names what differed from eager."""
    assert any(t.requires_grad for t in inputs), "at least one input must require grad"
    MODES[mode](function, inputs)


# ---------------------------------------------------------------- helpers
def fresh(inputs: Inputs) -> list[Tensor]:
    """The same values as leaves without history; strides are kept."""
    return [t.detach().requires_grad_(t.requires_grad) for t in inputs]


def scalar(result: Any) -> Tensor:
    """A sum with a different upstream factor per element, so that an ignored grad_output shows."""
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(o for o in float_outputs(result) if o.requires_grad):
        factors = torch.linspace(0.5, 3.0, max(output.numel(), 1))[: output.numel()].reshape(output.shape)
        total = total + (output * factors).sum().double() * (i + 1)
    return total


def eager(function: Function, inputs: Inputs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    leaves = fresh(inputs)
    outputs = float_outputs(function(*leaves))
    grads = torch.autograd.grad(scalar(tuple(outputs)), [t for t in leaves if t.requires_grad])
    assert any(bool((g != 0).any()) for g in grads if g.numel()), "every gradient is zero: the comparison says nothing"
    return [o.detach() for o in outputs], grads


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    assert len(got) == len(want), f"{what}: {len(got)} tensors, eager has {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        torch.testing.assert_close(g.detach(), w, msg=lambda text, i=i: f"{what} {i}: {text}")


def assert_same_form(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    for i, (g, w) in enumerate(zip(got, want)):
        seen, expected = (tuple(g.shape), g.dtype, g.stride()), (tuple(w.shape), w.dtype, w.stride())
        assert seen == expected, f"{what} {i}: shape, dtype, strides {seen}, eager has {expected}"


# ---------------------------------------------------------------- the modes
def fake(function: Function, inputs: Inputs) -> None:
    """Shapes, dtypes and strides without data: what every tracer relies on. Strides of gradients may be normalised."""
    outputs, grads = eager(function, inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a function may close over a real constant
    leaves = [mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in inputs]
    with mode:
        got = float_outputs(function(*leaves))
        total = sum((o.sum().double() for o in got if o.requires_grad), start=torch.zeros((), dtype=torch.float64))
        got_grads = torch.autograd.grad(total, [t for t in leaves if t.requires_grad])
    assert_same_form(got, outputs, "output")
    for g, w in zip(got_grads, grads):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)


def meta(function: Function, inputs: Inputs) -> None:
    outputs, grads = eager(function, inputs)
    leaves = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in inputs]
    got = float_outputs(function(*leaves))
    assert all(o.device.type == "meta" for o in got)
    total = sum((o.sum() for o in got if o.requires_grad), start=torch.zeros((), device="meta"))
    got_grads = torch.autograd.grad(total, [t for t in leaves if t.requires_grad])
    assert [(o.shape, o.dtype) for o in got] == [(o.shape, o.dtype) for o in outputs]
    assert [(g.shape, g.dtype) for g in got_grads] == [(g.shape, g.dtype) for g in grads]


class _AsModule(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def export(function: Function, inputs: Inputs) -> None:
    outputs, _ = eager(function, inputs)
    plain = [t.detach() for t in inputs]
    with _quiet():
        program = torch.export.export(_AsModule(function), tuple(plain), strict=False)
        assert_same(float_outputs(program.module()(*plain)), outputs, "exported output")


def compiled(function: Function, inputs: Inputs) -> None:
    """One graph without a break, forward and backward (aot_eager: the tracing of compile without its code generator)."""
    outputs, grads = eager(function, inputs)
    torch._dynamo.reset()
    with _quiet():
        call = torch.compile(function, fullgraph=True, backend="aot_eager")
        leaves = fresh(inputs)
        got = float_outputs(call(*leaves))
        got_grads = torch.autograd.grad(scalar(tuple(got)), [t for t in leaves if t.requires_grad])
    assert_same(got, outputs, "compiled output")
    assert_same(got_grads, grads, "compiled gradient")


def func_grad(function: Function, inputs: Inputs) -> None:
    _, grads = eager(function, inputs)
    wanted = tuple(i for i, t in enumerate(inputs) if t.requires_grad)
    plain = [t.detach() for t in inputs]

    def total(*tensors: Tensor) -> Tensor:
        return scalar(function(*tensors))

    assert_same(torch.func.grad(total, argnums=wanted)(*plain), grads, "torch.func.grad")


def checkpoint(function: Function, inputs: Inputs) -> None:
    _, grads = eager(function, inputs)
    for reentrant in (False, True):
        leaves = fresh(inputs)
        again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=reentrant)
        got = torch.autograd.backward(scalar(again)) or [t.grad for t in leaves if t.requires_grad]
        assert_same(got, grads, f"gradient under checkpoint(use_reentrant={reentrant})")


def double_backward(function: Function, inputs: Inputs) -> None:
    """A second derivative raises and names the way out, also where the upstream gradient is a constant."""
    leaves = fresh(inputs)
    asked = [t for t in leaves if t.requires_grad]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grads = torch.autograd.grad(scalar(function(*leaves)), asked, create_graph=True)
        torch.autograd.grad(sum((g**2).sum() for g in grads), asked)

    wanted = tuple(i for i, t in enumerate(inputs) if t.requires_grad)
    gradient = torch.func.grad(lambda *x: scalar(function(*x)), argnums=wanted)

    def penalty(*tensors: Tensor) -> Tensor:
        return torch.stack([(g**2).sum() for g in gradient(*tensors)]).sum()

    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(penalty, argnums=wanted)(*(t.detach() for t in inputs))


def retain_graph(function: Function, inputs: Inputs) -> None:
    """Backwards through one graph give equal bits for equal upstream factors, and none touches what another handed out."""
    leaves = fresh(inputs)
    asked = [t for t in leaves if t.requires_grad]
    loss = scalar(function(*leaves))
    three = torch.tensor(3.0, dtype=loss.dtype)
    first = torch.autograd.grad(loss, asked, retain_graph=True)
    kept = [g.clone() for g in first]
    tripled = torch.autograd.grad(loss, asked, three, retain_graph=True)
    for g, k, t in zip(first, kept, tripled):
        assert torch.equal(g, k), "a later backward changed a gradient that was already handed out"
        torch.testing.assert_close(t, 3 * k)
        g.zero_()  # as an optimizer may
    second = torch.autograd.grad(loss, asked, retain_graph=True)
    last = torch.autograd.grad(loss, asked, three)  # without retain_graph: may use up what the graph stored
    for k, t, s, last_one in zip(kept, tripled, second, last):
        assert torch.equal(s, k), "the second backward differs from the first"
        assert torch.equal(last_one, t), "the last backward differs from one that keeps the graph"


def one_gradient(function: Function, inputs: Inputs) -> None:
    """Each gradient asked alone equals the one asked together, and nothing is asked under no_grad."""
    outputs, grads = eager(function, inputs)
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    for i, grad in zip(wanted, grads):
        leaves = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        (got,) = torch.autograd.grad(scalar(function(*leaves)), [leaves[i]])
        torch.testing.assert_close(got, grad)
    with torch.no_grad():
        silent = float_outputs(function(*fresh(inputs)))
    assert not any(o.requires_grad for o in silent)
    assert_same(silent, outputs, "output under no_grad")


def opcheck(function: Function, inputs: Inputs) -> None:
    """torch's own checks of schema, fake and dispatch, for every kdfast op that a forward and backward calls."""
    with _Recorder() as recorder:
        leaves = fresh(inputs)
        scalar(function(*leaves)).backward()
    assert recorder.calls, "no kdfast op was called"
    for op, args, kwargs in recorder.calls:
        with _quiet():
            torch.library.opcheck(op, args, kwargs)


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of each kdfast op that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "kdfast":
            detached = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
            self.calls.append((func, *detached))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's tracers warn about their own internals (deprecated calls inside dynamo); those are not ours to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


MODES: dict[str, Callable[[Function, Inputs], None]] = {
    "fake": fake,
    "meta": meta,
    "export": export,
    "compile": compiled,
    "func.grad": func_grad,
    "checkpoint": checkpoint,
    "double_backward": double_backward,
    "retain_graph": retain_graph,
    "one_gradient": one_gradient,
    "opcheck": opcheck,
}
