"""sinkhorn_cost_points: the same number and the same gradients as sinkhorn_cost over the table of squared distances."""

import math

import pytest
import torch
from modes import MODES, check_mode
from ops.test_sinkhorn import OPTIONS

from kdfast import _core
from kdfast.ops import pairwise_cost, pairwise_cost_reference, sinkhorn, sinkhorn_cost, sinkhorn_cost_points

F64 = torch.float64
core = pytest.mark.skipif(_core.core is None, reason="needs the compiled core")


def problem(n, m, *batch, width=3, dtype=F64):
    """x, y, a, b; squared distances of some 0 to 2."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(*batch, k, width, generator=g, dtype=F64) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=g, dtype=F64) + 0.1 for k in (n, m))
    weights = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return [t.to(dtype).requires_grad_() for t in (x, y, *weights)]


def test_two_by_two_closed_form():
    """Doubly stochastic 2 x 2 with cost c off the diagonal: 2 c e / (1 + e), e = exp(-c / epsilon)."""
    x = torch.tensor([[0.0], [0.5]], dtype=F64)
    c, e = 0.25, math.exp(-0.25 / 0.1)
    assert sinkhorn_cost_points(x, x + 0.0, n_iters=50).item() == pytest.approx(2 * c * e / (1 + e), rel=1e-12)


@core
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradients_are_those_of_the_table(options):
    """Also with points of weight 0, which may hold anything."""
    inputs = problem(5, 7, 2)
    with torch.no_grad():
        inputs[2][0, 1] = inputs[3][1, 2] = inputs[3][1, 6] = 0.0
    options = {"epsilon": 0.2, "n_iters": 4} | options
    factor = torch.tensor([1.0, -2.0], dtype=F64)
    x, y, a, b = inputs
    want = sinkhorn_cost(pairwise_cost_reference(x, y, p=2), a, b, backend="reference", **options)
    want_grads = torch.autograd.grad(want @ factor, inputs)
    with torch.no_grad():
        x[0, 1] = y[1, 2] = math.nan
    got = sinkhorn_cost_points(x, y, a, b, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)
    for g, w in zip(torch.autograd.grad(got @ factor, inputs), want_grads):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
        assert w.abs().max() > 1e-4
    reference = sinkhorn_cost_points(*problem(5, 7, 2), backend="reference", **options)
    table = sinkhorn_cost(pairwise_cost_reference(*problem(5, 7, 2)[:2], p=2), *problem(5, 7, 2)[2:], **options)
    torch.testing.assert_close(reference, table, rtol=1e-10, atol=0)


@core
def test_envelope_is_the_plan_and_refuses_weights():
    x, y, a, b = problem(4, 6, 2)
    a, b = a.detach(), b.detach()
    plan = sinkhorn(pairwise_cost(x, y, p=2).detach(), a, b, n_iters=3).plan
    want = torch.autograd.grad((plan * pairwise_cost(x, y, p=2)).sum(), (x, y))
    value = sinkhorn_cost_points(x, y, a, b, n_iters=3, grad="envelope")
    torch.testing.assert_close(value, (plan * pairwise_cost(x, y, p=2)).sum((-1, -2)), rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), (x, y)), want, rtol=1e-9, atol=1e-13)
    unrolled = torch.autograd.grad(sinkhorn_cost_points(x, y, a, b, n_iters=3).sum(), x)[0]
    assert (unrolled - want[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"b: grad='envelope' gives no gradient"):
        sinkhorn_cost_points(x, y, a, b.requires_grad_(), grad="envelope")


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_epsilon_in_other_dtypes(dtype):
    """Costs of up to 1000 epsilon: the marginals hold, so the potentials are exact where they cancel."""
    x, y, a, b = problem(6, 9, dtype=dtype)
    value = sinkhorn_cost_points(x, y, a, b, epsilon=2e-3, n_iters=300)
    wide = [t.detach().double().requires_grad_() for t in (x, y, a, b)]
    want = sinkhorn_cost_points(*wide, epsilon=2e-3, n_iters=300)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=0)
    grads, wanted = (torch.autograd.grad(v, t)[:2] for v, t in ((value, (x, y, a, b)), (want, wide)))
    for g, w in zip(grads, wanted):
        torch.testing.assert_close(g.double(), w, rtol=2e-2, atol=2e-2 * w.abs().max().item())


def test_batches_broadcast_weights_and_empty_batch():
    x, y, a, _ = problem(4, 5, 2, 3)
    want = torch.stack([sinkhorn_cost_points(x[i, j], y[i, j], a[0, 0], n_iters=2) for i in range(2) for j in range(3)])
    got = sinkhorn_cost_points(x, y, a[0, 0], n_iters=2)
    torch.testing.assert_close(got.flatten(), want, rtol=1e-12, atol=0)
    assert sinkhorn_cost_points(x.float(), y.float(), a, n_iters=2).dtype == F64
    none = torch.zeros(0, 4, 2, requires_grad=True)
    value = sinkhorn_cost_points(none, torch.zeros(0, 3, 2))
    value.sum().backward()
    assert value.shape == (0,) and none.grad.shape == (0, 4, 2)


def test_all_masked_is_zero_and_nan_gives_nan():
    x, y, a, b = problem(3, 4)
    value = sinkhorn_cost_points(x, y, torch.zeros(3, dtype=F64), b)
    assert value.item() == 0.0 and all((g == 0).all() for g in torch.autograd.grad(value, (x, y, b)))
    with torch.no_grad():
        x[0, 0] = math.nan
    assert sinkhorn_cost_points(x, y, a, b).isnan()


@core
@pytest.mark.parametrize("grad", ["unrolled", "envelope"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, grad):
    inputs = problem(4, 5, 2, dtype=torch.float32)
    if grad == "envelope":
        inputs = [*inputs[:2], *(t.detach() for t in inputs[2:])]
    check_mode(mode, lambda *t: sinkhorn_cost_points(*t, n_iters=2, grad=grad), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(5, 3)}, r"y: expected the width of x \(2\), got 3"),
        ({"x": torch.zeros(0, 2)}, "x: expected at least one point on each side"),
        ({"a": torch.ones(3)}, r"a: expected shape \(4,\)"),
        ({"epsilon": 0.0}, "epsilon: expected a finite number"),
        ({"n_iters": 0}, "n_iters: expected"),
        ({"update": "both"}, "update: expected"),
        ({"backend": "cuda"}, "sinkhorn_cost_points has no cuda backend"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 2), "y": torch.zeros(5, 2)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sinkhorn_cost_points(**arguments)
