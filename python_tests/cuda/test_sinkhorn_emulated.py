"""The CUDA Sinkhorn kernels in the emulator: every way a problem is dealt to threads, against the float64 reference."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from cuda_emulation import emulated, take_the_cpu
from ops import test_sinkhorn as tests
from ops.test_sinkhorn import fused_and_reference, problem
from tolerances import check_against_reference

from kdfast.cuda import sinkhorn as kernels
from kdfast.ops import sinkhorn, sinkhorn_cost, sinkhorn_cost_reference

OP = sys.modules["kdfast.ops.sinkhorn"]  # the name in kdfast.ops is the function's
# As python_tests/ops/test_sinkhorn.py has it for machines without fused multiply-adds, which the emulator does not use.
FLOOR = (5e-5, 3e-6)
SMALL, GRID = 227 << 10, 2000  # shared memory of a block: with 2000 bytes every problem goes to the whole grid


@pytest.fixture(scope="module", autouse=True)
def cuda():
    with pytest.MonkeyPatch.context() as patch:
        take_the_cpu(patch, OP, kernels, {"_op": "solve", "_backward_op": "backward"})
        yield emulated()


@pytest.fixture(autouse=True)
def whole_device(cuda):
    yield
    cuda.set_order(0)
    cuda.set_shared(SMALL)


# Here "cpu" is the CUDA kernel.
test_one_by_one_is_the_weight = tests.test_one_by_one_is_the_weight
test_dtypes = tests.test_dtypes
test_error_budget_of_other_dtypes = tests.test_error_budget_of_other_dtypes

# 8 problems to a warp and one left over, 2 to a warp, a warp each, two lanes' worth of points in a block, a grid of several blocks
SHAPES = [((9, 4, 3), SMALL), ((5, 16, 11), SMALL), ((2, 27, 32), SMALL), ((40, 33), SMALL), ((2, 21, 18), GRID)]
OPTIONS = [
    {},
    {"order": "columns_first"},
    {"rho": (0.7, 0.2)},
    {"tol": 1e-2, "epsilon": 0.5, "order": "columns_first"},
    {"tol": 3e-3, "epsilon": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "shared"), SHAPES, ids=str)
def test_error_budget(cuda, shape, shared, options):
    cuda.set_shared(shared)
    inputs = [t.requires_grad_() for t in problem(*shape, dtype=torch.float32)]
    options = {"epsilon": 0.1, "n_iters": 8} | options
    check_against_reference(*fused_and_reference("plan", options), inputs, floor=FLOOR)


@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
@pytest.mark.parametrize(("shape", "shared"), SHAPES[1:5:3], ids=str)
def test_costs_and_the_envelope(cuda, shape, shared, order):
    cuda.set_shared(shared)
    cost, a, b = problem(*shape, dtype=torch.float32)
    options = {"epsilon": 0.1, "n_iters": 8, "order": order}
    check_against_reference(
        *fused_and_reference("cost", options), [t.requires_grad_() for t in (cost, a, b)], floor=FLOOR
    )
    a, b = a.detach(), b.detach()
    fused, reference = fused_and_reference("cost", options | {"grad": "envelope"})
    check_against_reference(
        lambda c: fused(c, a.to(c.dtype), b.to(c.dtype)),
        lambda c: reference(c, a.to(c.dtype), b.to(c.dtype)),
        [cost],
        floor=FLOOR,
    )


@pytest.mark.parametrize("shared", [SMALL, GRID])
@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
def test_small_epsilon(cuda, shared, order):
    """C / epsilon up to 2000: no exponential over- or underflows, and potentials of 1000 keep their digits."""
    cuda.set_shared(shared)
    cost, a, b = problem(2, 9, 12)
    inputs = [t.float().requires_grad_() for t in (2 * cost, a, b)]
    check_against_reference(
        *fused_and_reference("cost", {"epsilon": 1e-3, "n_iters": 15, "order": order}), inputs, floor=(1e-4, 5e-4)
    )


@pytest.mark.parametrize("shared", [SMALL, GRID])
@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
def test_forbidden_pairs_and_masked_points(cuda, shared, order):
    cuda.set_shared(shared)
    cost, a, b = problem(3, 10, 12, dtype=torch.float32)
    cost = torch.where(torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(5)) < 0.2, math.inf, cost)
    a[:, 2], b[1, 3] = 0.0, 0.0
    cost[0, 4] = math.inf  # a row that reaches nothing
    inputs = [cost.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    check_against_reference(
        *fused_and_reference("plan", {"epsilon": 0.1, "n_iters": 8, "order": order}), inputs, floor=FLOOR
    )


@pytest.mark.parametrize("shared", [SMALL, GRID])
def test_nan_in_gives_nan_out_of_its_problem_alone(cuda, shared):
    cuda.set_shared(shared)
    cost, a, b = problem(3, 6, 5, dtype=torch.float32)
    cost[1, 2, 3] = math.nan
    out = sinkhorn(cost, a, b, backend="cpu")
    assert out.plan[1].isnan().any() and out.plan[::2].isfinite().all()


@pytest.mark.parametrize(("shape", "shared"), SHAPES[1:], ids=str)
def test_every_bit_in_any_order_of_the_threads_and_one_launch(cuda, shape, shared):
    cuda.set_shared(shared)
    results = []
    for order in (0, 1, 2):
        cuda.set_order(order)
        leaf = problem(*shape, dtype=torch.float32)[0].requires_grad_()
        before = cuda.launches()
        value = sinkhorn_cost(leaf, n_iters=4, backend="cpu")
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert cuda.launches() == before + 2
        results.append((value.detach(), grad))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0]))


def test_strides_are_read_in_place(cuda):
    cost = problem(4, 7, 6, dtype=torch.float32)[0]
    for view in (cost.mT, cost[::2, 1:, ::2], cost[0].expand(3, 7, 6), cost.permute(1, 0, 2)):
        leaf = view.detach().requires_grad_()
        value = sinkhorn_cost(leaf, n_iters=5, backend="cpu")
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        again = view.double().requires_grad_()
        want = sinkhorn_cost_reference(again, n_iters=5)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), torch.autograd.grad(want.sum(), again)[0], rtol=1e-4, atol=1e-5)


def test_backend_cuda_reaches_the_op_that_has_kernels(monkeypatch):
    seen = []

    def watch(name):
        plain = getattr(OP, name)
        monkeypatch.setattr(OP, name, lambda *args: seen.append((name, args[-1])) or plain(*args[:-1]))

    watch("_op")
    watch("_backward_op")
    monkeypatch.setattr(OP, "cuda_reason", lambda op, *tensors: None)
    cost, a, b = problem(2, 5, 6, dtype=torch.float32)
    sinkhorn_cost(cost.requires_grad_(), a, b, n_iters=3, backend="cuda").sum().backward()
    with torch.no_grad():
        sinkhorn(cost, a, b, n_iters=3, backend="cuda")
    assert seen == [("_op", True), ("_backward_op", True), ("_op", True)]
    with pytest.raises(ValueError, match="float64"):
        sinkhorn_cost(cost.double(), backend="cuda")
