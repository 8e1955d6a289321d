"""Costs between all pairs: hand-made tables, torch.cdist as an outside oracle, gradients at ties, errors."""

import pytest
import torch

from kdfast.ops import pairwise_cost

F64 = torch.float64


def test_cost_table_by_hand():
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=F64)
    y = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, -2.0]], dtype=F64)
    assert pairwise_cost(x, y, p=1).tolist() == [[2, 0, 3], [3, 3, 0]]
    assert pairwise_cost(x, y, p=2).tolist() == [[2, 0, 5], [9, 5, 0]]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [((5, 7), (3, 7)), ((2, 1, 4), (2, 6, 4)), ((2, 3, 9, 33), (2, 3, 17, 33))])
def test_cost_agrees_with_cdist(p, shape):
    torch.manual_seed(0)
    x, y = (torch.randn(s, dtype=F64) for s in shape)
    want = torch.cdist(x, y, p=p) ** p
    torch.testing.assert_close(pairwise_cost(x, y, p=p), want, rtol=1e-12, atol=1e-12)


def test_cost_gradient_is_the_sign_and_zero_at_ties():
    x = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64, requires_grad=True)
    y = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 2.0]], dtype=F64, requires_grad=True)
    (pairwise_cost(x, y, p=1) * torch.tensor([[1.0, 10.0]], dtype=F64)).sum().backward()
    assert x.grad.tolist() == [[-10.0, -1.0, 1.0]]
    assert y.grad.tolist() == [[0.0, 1.0, -1.0], [10.0, 0.0, 0.0]]


@pytest.mark.parametrize("p", [1, 2])
def test_cost_gradcheck(p):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    y = torch.randn(2, 5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: pairwise_cost(a, b, p=p), (x, y))


@pytest.mark.parametrize(
    "x, y, p, message",
    [
        ((3, 4), (3, 5), 1, "y: expected the width of x"),
        ((2, 3, 4), (3, 3, 4), 1, "y: expected the leading shape"),
        ((4,), (4,), 1, "rank >= 2"),
        ((3, 4), (3, 4), 3, "p: expected 1 or 2, got 3"),
    ],
)
def test_cost_bad_input(x, y, p, message):
    with pytest.raises(ValueError, match=message):
        pairwise_cost(torch.zeros(x), torch.zeros(y), p=p)
