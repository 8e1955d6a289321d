"""The Sinkhorn kernels under Triton's interpreter: the CPU kernels' own tests, and what is special here."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from tolerances import check_against_reference
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from ops import test_sinkhorn as cpu  # noqa: E402

from kdfast.ops import sinkhorn, sinkhorn_cost, sinkhorn_reference  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import sinkhorn as kernels  # noqa: E402

op = importlib.import_module("kdfast.ops.sinkhorn")  # kdfast.ops.sinkhorn itself is the function
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(op, {"_op": kernels.solve, "_backward_op": kernels.backward})
# In one program's registers; in passes of several tiles. An interpreted launch takes milliseconds, so the problems are small.
FORMS = {"whole": 16384, "passes": 0}
FLOOR = (2e-5, 3e-6)  # as for the CPU kernels, with the reason (python_tests/ops/test_sinkhorn.py)
test_two_by_two_closed_form = cpu.test_two_by_two_closed_form  # here "cpu" is the Triton kernel


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    return use_form(request.param, monkeypatch)


def use_form(name, monkeypatch):
    monkeypatch.setattr(kernels, "SMALL", FORMS[name])
    monkeypatch.setattr(kernels, "TILE", 256)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 0)
    return name


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_these_tests_run_triton_kernels(form, tol):
    """Passes: two launches an iteration, plan and value; start twice, 2 n_iters - 1 steps, the cost's and two weights' gradients."""
    cost, a, b = (t.requires_grad_() for t in cpu.problem(2, 5, 7, dtype=torch.float32))
    with launch.recording() as forward:
        value = sinkhorn_cost(cost, a, b, n_iters=4, tol=tol)
    with launch.recording() as backward:
        torch.autograd.grad(value.sum(), (cost, a, b))
    assert (len(forward), len(backward)) == {"whole": (1, 1), "passes": (8 + 2, 2 + 7 + 1 + 2)}[form]


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("plan", o) for o in cpu.FUSED), ("cost", {}), ("cost", {"order": "columns_first"})],
    ids=str,
)
def test_error_budget_in_one_program(name, options):
    options = {"epsilon": 0.1, "n_iters": 4} | options
    inputs = [t.requires_grad_() for t in cpu.problem(3, 3, 7, dtype=torch.float32)]
    check_against_reference(*cpu.fused_and_reference(name, options), inputs, floor=FLOOR)


@pytest.mark.parametrize(
    ("name", "options"), [("plan", {"rho": (0.7, 0.2), "order": "columns_first"}), ("cost", {})], ids=str
)
def test_error_budget_in_passes(name, options, monkeypatch):
    use_form("passes", monkeypatch)
    options = {"epsilon": 0.1, "n_iters": 3} | options
    inputs = [t.requires_grad_() for t in cpu.problem(19, 37, dtype=torch.float32)]  # two blocks, three tiles
    check_against_reference(*cpu.fused_and_reference(name, options), inputs, floor=FLOOR)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 4, 1)], ids=str)
def test_sides_of_one_point(form, shape):
    inputs = [t.requires_grad_() for t in cpu.problem(*shape)]
    fused, reference = cpu.fused_and_reference("plan", {"n_iters": 1, "rho": 0.5})
    check_against_reference(fused, reference, inputs, floor=(1e-11, 1e-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_error_budget_of_other_dtypes(form, dtype):
    inputs = [t.requires_grad_() for t in cpu.problem(4, 6, dtype=dtype)]
    floor = {torch.float64: (2e-13, 2e-13)}.get(dtype, (1e-2 if dtype is torch.bfloat16 else 2e-3, 3e-6))
    check_against_reference(*cpu.fused_and_reference("cost", {"n_iters": 2}), inputs, floor=floor)


@pytest.mark.parametrize(("form", "scale"), [("whole", 0.03), ("whole", 2.0), ("passes", 2.0)], indirect=["form"])
def test_near_and_far_from_the_references(form, scale):
    """epsilon = 1e-3: max C / epsilon = 30 is done with products, 2000 begins with exponentials and new references."""
    inputs = [t.requires_grad_() for t in (cpu.problem(5, 6)[0] * scale, *cpu.problem(5, 6)[1:])]
    fused, reference = cpu.fused_and_reference("plan", {"epsilon": 1e-3, "n_iters": 5 if form == "whole" else 3})
    if form == "whole":
        check_against_reference(fused, reference, inputs, floor=(1e-9, 1e-9))
    single = [t.detach().float().requires_grad_() for t in inputs]
    # At C / epsilon = 2000 float32 holds the exponents to 1e-4 only; the reference keeps its own weights normalised.
    check_against_reference(fused, reference, single, floor=(2e-5, 2e-5) if scale < 1 else (1e-4, 5e-4))


def test_infinite_costs_masks_and_masked_nan(form):
    cost, a, b = cpu.problem(2, 5, 6)
    cost[0, 0, :3], cost[0, 4] = math.inf, math.inf  # the latter a row that reaches nothing
    a[0, 2], b[0, 3], a[1] = 0.0, 0.0, 0.0  # the second problem has no mass at all
    for epsilon in (0.1, 2e-3) if form == "whole" else (2e-3,):
        fused, reference = cpu.fused_and_reference("plan", {"epsilon": epsilon, "n_iters": 2})
        inputs = [cost.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        check_against_reference(fused, reference, inputs, floor=(1e-9, 1e-9))
    out = sinkhorn(cost, a, b, n_iters=1)
    assert (out.f[0] == -math.inf).tolist() == [False, False, True, False, True] and out.g[1].eq(-math.inf).all()
    poisoned = torch.where((a == 0)[..., None] | (b == 0)[:, None], math.nan, cost)
    assert all(torch.equal(x, y) for x, y in zip(out, sinkhorn(poisoned, a, b, n_iters=1)))


def test_nan_in_nan_out_of_its_own_problem_only(form):
    cost, a, b = cpu.problem(3, 3, 4, dtype=torch.float32)
    cost[1, 2, 3] = math.nan
    value = sinkhorn_cost(cost.requires_grad_(), a, b, n_iters=2)
    (grad,) = torch.autograd.grad(value.sum(), cost)
    assert value.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().any() and grad[::2].isfinite().all() and grad[::2].abs().max() > 0.01


@pytest.mark.parametrize(
    ("form", "order"),
    [("whole", "rows_first"), ("whole", "columns_first"), ("passes", "columns_first")],
    indirect=["form"],
)
def test_tol_freezes_on_the_device(form, order):
    """Iterations, plans and gradients of a problem are those of its own number of iterations."""
    cost, a, b = cpu.problem(3, 3, 4)
    cost = cost * torch.tensor([0.01, 0.1, 0.4], dtype=torch.float64)[:, None, None]
    inputs = [t.requires_grad_() for t in (cost, a, b)]
    options = {"n_iters": 8, "tol": 1e-2, "order": order}
    out, want = sinkhorn(*inputs, **options), sinkhorn_reference(*inputs, **options)
    assert torch.equal(out.iterations, want.iterations) and 1 < out.iterations.min() < out.iterations.max() < 8
    grads = torch.autograd.grad((out.plan**2).sum() + out.f.sum(), inputs)
    for got, expected in zip(grads, torch.autograd.grad((want.plan**2).sum() + want.f.sum(), inputs)):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_envelope_is_the_plan(form):
    cost, a, b = cpu.problem(2, 4, 5)
    factor = torch.tensor([1.0, 3.0], dtype=torch.float64)
    want = sinkhorn_reference(cost, a, b, n_iters=2).plan * factor[:, None, None]
    value = sinkhorn_cost(cost.requires_grad_(), a, b, n_iters=2, grad="envelope")
    torch.testing.assert_close(torch.autograd.grad(value @ factor, cost)[0], want, rtol=1e-12, atol=0)


def test_any_strides_and_batches(form):
    """Views are read in place, over up to three batch axes; the gradient has the view's shape."""
    cost, a, b = cpu.problem(2, 6, 5, dtype=torch.float32)
    want = sinkhorn_cost(cost.requires_grad_(), a, b, n_iters=1)
    (want_grad,) = torch.autograd.grad(want.sum(), cost)
    wide = torch.full((5, 7, 5), math.nan)
    wide[:, 1:, ::3] = cost.detach().permute(2, 1, 0)
    views = (cost.detach().mT.contiguous().mT, wide[:, 1:, ::3].permute(2, 1, 0), cost.detach()[:, None, None])
    for view in views if form == "whole" else views[1:2]:
        x, shape = view.detach().requires_grad_(), view.shape[:-2]
        got = sinkhorn_cost(x, a.view(*shape, 6), b.view(*shape, 5), n_iters=1)
        torch.testing.assert_close(got.view(2), want, rtol=1e-6, atol=0)
        grad = torch.autograd.grad(got.sum(), x)[0].reshape(2, 6, 5)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)
    one = cost[0].detach().expand(2, 6, 5)  # stride 0
    assert torch.equal(sinkhorn_cost(one, a, b, n_iters=1), sinkhorn_cost(one.clone(), a, b, n_iters=1))


def test_neighbours_do_not_change_a_problem_and_the_same_bits_again():
    """Near and far problems share a program; each has the bits it has alone."""
    cost, a, b = cpu.problem(3, 4, 4, dtype=torch.float32)
    cost[1] *= 60
    together, again = sinkhorn(cost, a, b, n_iters=3), sinkhorn(cost, a, b, n_iters=3)
    assert all(torch.equal(x, y) for x, y in zip(together, again))
    for i in range(3):
        alone = sinkhorn(cost[i], a[i], b[i], n_iters=3)
        assert all(torch.equal(x, y[i]) for x, y in zip(alone, together))


def test_problems_rows_and_columns_beyond_two_to_the_31_elements(form, tmp_path, monkeypatch):
    """A second problem, row or column that starts past 2^31 elements: 32-bit offsets would read elsewhere."""
    # the interpreter writes every argument's whole storage back onto itself: 8 GB here
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    start, size = 2**31 + 8, 12
    memory = np.memmap(tmp_path / "sparse", dtype=np.float32, mode="w+", shape=(start + size,))
    storage = torch.from_numpy(memory)
    near = torch.rand(2, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        storage[:size], storage[start:] = near[0], near[1]
    problems = storage.as_strided((2, 3, 4), (start, 4, 1))
    assert torch.equal(sinkhorn_cost(problems, n_iters=1), sinkhorn_cost(near.view(2, 3, 4), n_iters=1))
    rows = storage.as_strided((2, size), (start, 1))
    for far, want in ((rows, near), (rows.T, near.T)):
        pair = far.detach().requires_grad_(), want.detach().clone().requires_grad_()
        values = [sinkhorn_cost(cost, n_iters=1) for cost in pair]
        grads = [torch.autograd.grad(value, cost)[0] for value, cost in zip(values, pair)]
        torch.testing.assert_close(*values, rtol=1e-6, atol=0)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
        assert grads[0].abs().max() > 0.01


def test_empty_batch(form):
    none = torch.empty(0, 4, 5, requires_grad=True)
    value = sinkhorn_cost(none)
    value.sum().backward()
    assert value.shape == (0,) and none.grad.shape == (0, 4, 5)
