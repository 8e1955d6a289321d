"""The kernels of soft minima over points under Triton's interpreter: the CPU kernel's own tests, and what is special here."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tolerances import check_against_reference
from triton_mode import multiply_as_a_gpu, only, round_as_a_gpu, take_the_cpu

only("interpreted")

from losses.test_sinkhorn import clouds  # noqa: E402
from ops import test_sinkhorn_points as transport  # noqa: E402
from ops import test_softmin as cpu  # noqa: E402

import kdfast.losses.sinkhorn as loss  # noqa: E402
from kdfast.losses import sinkhorn_divergence  # noqa: E402
from kdfast.ops import pairwise_softmin, pairwise_softmin_reference, sinkhorn_cost_points  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import softmin as kernels  # noqa: E402

op = importlib.import_module("kdfast.ops.softmin")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
multiply_as_a_gpu()
take_the_cpu(op, {"_op": kernels.softmin, "_backward_op": kernels.softmin_backward})

# Here "cpu" is the Triton kernel.
test_by_hand = cpu.test_by_hand
test_agrees_with_cdist_and_tends_to_the_smallest_distance = (
    cpu.test_agrees_with_cdist_and_tends_to_the_smallest_distance
)
test_points_left_out_have_no_part_and_no_gradient = cpu.test_points_left_out_have_no_part_and_no_gradient
test_nan_stays_in_its_row = cpu.test_nan_stays_in_its_row
test_dtypes_and_empty_sides = cpu.test_dtypes_and_empty_sides
test_envelope_is_the_plan_and_refuses_weights = transport.test_envelope_is_the_plan_and_refuses_weights
test_all_masked_is_zero_and_nan_gives_nan = transport.test_all_masked_is_zero_and_nan_gives_nan


def test_these_tests_run_triton_kernels():
    """A launch a half-step and one for the mean cost; two each in the reverse, but nobody asks for the gradient of g = 0."""
    x, y, *_ = transport.problem(5, 7)
    with launch.recording() as forward:
        value = sinkhorn_cost_points(x, y, n_iters=3)
    with launch.recording() as backward:
        torch.autograd.grad(value, (x, y))
    with launch.recording() as envelope:
        torch.autograd.grad(sinkhorn_cost_points(x, y, n_iters=3, grad="envelope"), (x, y))
    assert (len(forward), len(backward), len(envelope)) == (7, 14, 7 + 2)
    assert [r.arguments["grad_potential"] is None for r in backward[-4:]] == [True, False, True, True]


# Products of points less y_0: up to some 1e-7 of the largest squared distance, 200 here, against that of a difference of 70
# squares; in units of epsilon = 30 that is 1e-6 of a weight. Halves: the gradient's own rounding.
BUDGETS = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (5e-6, 5e-6),
    torch.bfloat16: (8e-3, 5e-6),
    torch.float16: (1e-3, 5e-6),
}


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small tiles", "large tiles"])
def test_error_budget(dtype, large, monkeypatch):
    """Several blocks, tiles, steps of coordinates and parts of the gradient, far from zero where points are taken less y_0."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 0 if large else 132)
    x, y, h = cpu.points(70 if large else 20, 40, 70, 2)
    offset = 100.0 if dtype in (torch.float32, torch.float64) else 0.0
    x, y = ((t.detach() + offset).to(dtype).requires_grad_() for t in (x, y))
    check_against_reference(
        lambda *t: pairwise_softmin(*t, epsilon=30.0, backend="cpu"),
        lambda *t: pairwise_softmin_reference(*t, epsilon=30.0),
        (x, y, h.detach().to(dtype).requires_grad_()), floor=BUDGETS[torch.float64 if dtype == torch.float64 else torch.float32],
        gradient_floor=BUDGETS[dtype],
    )  # fmt: skip


def test_gradients_of_sums_and_mean_costs_together():
    for shape, wanted in (
        ((5, 7, 3, 2), range(3)),
        ((1, 1, 1, 1), range(3)),
        ((5, 7, 3, 2), (2,)),
        ((5, 7, 3, 2), (1,)),
    ):
        inputs = cpu.points(*shape)
        results = []
        for function in (op.softmin, whole_table):
            s, c = function(*inputs, 0.7, True)
            value = (s**2).sum() + (c**3).sum()
            results.append((s, c, *torch.autograd.grad(value, [inputs[i] for i in wanted])))
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def whole_table(x, y, h, scale, need_mean):
    cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    exponent = h.unsqueeze(-2) - scale * cost
    return exponent.logsumexp(-1), (exponent.softmax(-1) * cost).sum(-1)


@pytest.mark.parametrize(
    "options",
    [{"rho": (0.7, 0.2), "order": "columns_first"}, {"epsilon": [0.8, 0.2], "update": "average", "reg_type": "kl"}],
    ids=str,
)
def test_transport_is_that_of_the_table(options):
    transport.test_value_and_gradients_are_those_of_the_table({"n_iters": 2} | options)


def test_small_epsilon():
    """Costs of up to 1000 epsilon in float32: potentials are float64."""
    x, y, a, b = (t.detach() for t in transport.problem(6, 9, dtype=torch.float32))
    value = sinkhorn_cost_points(x, y, a, b, epsilon=2e-3, n_iters=20)
    want = sinkhorn_cost_points(x.double(), y.double(), a.double(), b.double(), epsilon=2e-3, n_iters=20)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=0)


def test_divergence_from_points(monkeypatch):
    x, y, a, b = clouds()
    want = sinkhorn_divergence(x, y, a, b, blur=0.3, reach=0.7)
    wanted = torch.autograd.grad(want, (x, y, a, b))
    monkeypatch.setattr(loss, "_streams", lambda *_: True)
    got = sinkhorn_divergence(x, y, a, b, blur=0.3, reach=0.7)
    torch.testing.assert_close((got, *torch.autograd.grad(got, (x, y, a, b))), (want, *wanted), rtol=1e-8, atol=1e-11)


def test_the_same_bits_again_and_infinite_points():
    x, y, h = cpu.points(20, 40, 5, dtype=torch.float32)
    first, second = (torch.autograd.grad(pairwise_softmin(x, y, h, epsilon=1.0).sum(), (x, y, h)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with torch.no_grad():
        y[3] = 1e30  # its distance is beyond float32: no part, no NaN
        h[0] = -math.inf
    grads = torch.autograd.grad(pairwise_softmin(x, y, h, epsilon=1.0).sum(), (x, y, h))
    assert all(g.isfinite().all() for g in grads)
