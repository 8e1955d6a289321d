"""Our first_derivative_only, and the stored gradient times the upstream factor."""

import pytest
import torch

from kdfast._library import first_derivative_only, scale_gradient


class Cube(torch.autograd.Function):
    """x^3, with a backward that no graph records."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def test_second_derivative_raises_although_the_upstream_gradient_is_a_constant():
    x = torch.tensor([2.0], requires_grad=True)
    (plain,) = torch.autograd.grad(Cube.apply(x).sum(), x)
    assert plain.item() == 12.0
    # torch's own decorator returns a gradient without a graph here: grad + penalty would be silently wrong
    with pytest.raises(RuntimeError, match=r"create_graph=True.*pass backend='reference'"):
        torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)


def test_scale_gradient_never_writes_to_the_stored_buffer():
    stored = torch.tensor([1.0, -2.0])
    assert scale_gradient(stored, torch.tensor(1.0)) is stored
    assert scale_gradient(stored, torch.tensor(3.0)).tolist() == [3.0, -6.0]
    assert stored.tolist() == [1.0, -2.0]


def test_scale_gradient_rounds_once():
    """bfloat16 gradient: the product in float32 is rounded once, the factor is not rounded to bfloat16 first."""
    stored, factor = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor(1 / 13)
    assert scale_gradient(stored, factor).item() == 0.23046875  # 3/13 = 0.230769, spacing 2^-10
    assert (stored * factor.bfloat16()).item() == 0.2314453125
