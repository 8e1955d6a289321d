"""sinkhorn and sinkhorn_cost: closed forms, marginals, symmetries, other packages' answers, gradients, masks, bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, check_mode
from tolerances import check_against_reference

import kdfast
from kdfast.ops import sinkhorn, sinkhorn_cost, sinkhorn_cost_reference, sinkhorn_reference

OPTIONS = [
    {},
    {"order": "columns_first"},
    {"update": "average"},
    {"rho": 0.5},
    {"rho": (None, 0.3)},
    {"rho": (0.7, 0.2), "order": "columns_first"},
    {"rho": 0.5, "update": "average"},
    {"reg_type": "kl", "rho": 0.5},
    {"reg_type": "kl", "rho": (0.4, None), "order": "columns_first"},
    {"reg_type": "kl", "update": "average"},
    {"epsilon": [0.8, 0.4, 0.3, 0.2]},
    {"epsilon": [0.8, 0.4, 0.2], "update": "average", "rho": 1.0, "reg_type": "kl"},
    {"tol": 1e-2, "epsilon": 0.5},
]


def problem(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    *batch, n, m = shape
    cost = torch.rand(*shape, generator=generator, dtype=torch.float64)
    a = torch.rand(*batch, n, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(*batch, m, generator=generator, dtype=torch.float64) + 0.1
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return cost.to(dtype), a.to(dtype), b.to(dtype)


# ---------------------------------------------------------------- closed forms and invariants
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
def test_one_by_one_is_the_weight(order, dtype, tolerance):
    """Balanced 1 x 1: the plan is b whatever the cost. The value is b C and its derivative in C is b.

    float32: terms of size b C / epsilon = 2.8 cancel, 40 times, so 3e-5 of the result is 1e-7 of what is added.
    """
    cost = torch.tensor([[0.7]], dtype=dtype, requires_grad=True)
    b = torch.tensor([0.4], dtype=dtype)
    value = sinkhorn_cost(cost, b, b, epsilon=0.1, order=order)
    value.backward()
    assert value.item() == pytest.approx(0.28, rel=1e-6 if dtype is torch.float32 else 1e-12)
    assert cost.grad.item() == pytest.approx(0.4, rel=tolerance)


def test_two_by_two_closed_form():
    """Doubly stochastic 2 x 2 with cost c off the diagonal: P = [[1, e], [e, 1]] / (1 + e), e = exp(-c / epsilon)."""
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    cost = c * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    e = torch.exp(-c / 0.2)
    value = sinkhorn_cost(cost, epsilon=0.2, n_iters=3)
    want = 2 * c * e / (1 + e)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    got, expected = torch.autograd.grad(value, c, retain_graph=True), torch.autograd.grad(want, c)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_unbalanced_one_by_one_fixed_point():
    """KL-relaxed 1 x 1: the optimum of C p + eps p (log p - 1) + 2 rho KL(p | 1) is p = exp(-C / (eps + 2 rho))."""
    cost = torch.tensor([[0.7]], dtype=torch.float64)
    plan = sinkhorn(cost, epsilon=0.1, n_iters=500, rho=0.4).plan
    assert plan.item() == pytest.approx(math.exp(-0.7 / 0.9), rel=1e-10)


@pytest.mark.parametrize(("order", "exact"), [("rows_first", -2), ("columns_first", -1)])
def test_marginals_hold(order, exact):
    cost, a, b = problem(3, 5, 8)
    plan = sinkhorn(cost, a, b, epsilon=0.05, n_iters=400, order=order).plan
    torch.testing.assert_close(plan.sum(-1), a, rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(-2), b, rtol=1e-6, atol=0)
    short = sinkhorn(cost, a, b, epsilon=0.05, n_iters=2, order=order).plan
    want, other = (b, a) if exact == -2 else (a, b)
    torch.testing.assert_close(short.sum(exact), want, rtol=1e-12, atol=0)
    assert (short.sum(-1 if exact == -2 else -2) - other).abs().max() > 1e-4


def test_potentials_make_the_plan():
    cost, a, b = problem(4, 6)
    for reg_type in ("entropy", "kl"):
        out = sinkhorn(cost, a, b, epsilon=0.2, n_iters=7, reg_type=reg_type, rho=0.8)
        plan = ((out.f[:, None] + out.g - cost) / 0.2).exp()
        plan = plan * a[:, None] * b if reg_type == "kl" else plan
        torch.testing.assert_close(plan, out.plan, rtol=1e-12, atol=0)


def test_permutation_and_transposition():
    cost, a, b = problem(2, 5, 7)
    rows, columns = torch.randperm(5), torch.randperm(7)
    value = sinkhorn_cost(cost, a, b)
    permuted = sinkhorn_cost(cost[:, rows][:, :, columns], a[:, rows], b[:, columns])
    torch.testing.assert_close(permuted, value, rtol=1e-12, atol=0)
    turned = sinkhorn_cost(cost.mT, b, a, order="columns_first")
    torch.testing.assert_close(turned, value, rtol=1e-12, atol=0)
    constant = sinkhorn(cost + 3.0, a, b).plan  # a constant in the cost moves no mass
    torch.testing.assert_close(constant, sinkhorn(cost, a, b).plan, rtol=1e-10, atol=0)


def test_balanced_reg_types_agree_at_convergence():
    cost, a, b = problem(4, 6)
    one = sinkhorn(cost, a, b, n_iters=500)
    two = sinkhorn(cost, a, b, n_iters=500, reg_type="kl")
    torch.testing.assert_close(one.plan, two.plan, rtol=1e-8, atol=1e-12)


def test_plain_domain_program():
    """The program a user would write: X = exp(-C / eps), divided by its row and its column sums in turn."""
    cost, _, _ = problem(6, 6)
    x = torch.exp(-cost / 0.1)
    for _ in range(20):
        x = x / x.sum(-1, keepdim=True)
        x = x / x.sum(-2, keepdim=True)
    torch.testing.assert_close(sinkhorn(cost).plan, x, rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_equals_single_problems(options):
    cost, a, b = problem(2, 3, 4, 5)
    together = sinkhorn(cost, a, b, **options)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(cost[i, j], a[i, j], b[i, j], **options)
            for got, want in zip(together, alone):
                torch.testing.assert_close(got[i, j], want, rtol=1e-9, atol=1e-12)


def test_one_cost_many_marginals():
    cost, _, _ = problem(4, 5)
    _, a, b = problem(3, 4, 5)
    value = sinkhorn_cost(cost.expand(3, 4, 5), a, b)
    torch.testing.assert_close(value, torch.stack([sinkhorn_cost(cost, a[i], b[i]) for i in range(3)]))


def test_tol_freezes_each_problem_by_itself():
    cost, a, b = problem(4, 5, 5)
    cost = cost * torch.tensor([0.01, 1.0, 4.0, 8.0], dtype=torch.float64)[:, None, None]
    out = sinkhorn(cost, a, b, n_iters=2000, tol=1e-6)
    assert out.iterations.dtype == torch.int64
    assert out.iterations[0] < out.iterations[1] < out.iterations[3] < 2000
    for i in range(4):
        alone = sinkhorn(cost[i], a[i], b[i], n_iters=int(out.iterations[i]))
        torch.testing.assert_close(out.plan[i], alone.plan, rtol=1e-9, atol=1e-15)
        assert ((out.plan[i].sum(-1) - a[i]) / a[i]).abs().max() < 1e-6
        earlier = sinkhorn(cost[i], a[i], b[i], n_iters=int(out.iterations[i]) - 2).plan
        assert ((earlier.sum(-1) - a[i]) / a[i]).abs().max() > 1e-7


# ---------------------------------------------------------------- other packages
@pytest.mark.filterwarnings("ignore")
def test_pot_balanced():
    ot = pytest.importorskip("ot")
    cost, a, b = problem(5, 7)
    want = ot.sinkhorn(a, b, cost, 0.1, numItermax=5000, stopThr=1e-14)
    torch.testing.assert_close(
        sinkhorn(cost, a, b, n_iters=2000, order="columns_first").plan, want, rtol=1e-9, atol=1e-14
    )
    # ten iterations: POT has the columns first and starts at u = 1/N, a constant the first half-step removes
    few = ot.sinkhorn(a, b, cost, 0.1, numItermax=10, stopThr=0, warn=False)
    torch.testing.assert_close(sinkhorn(cost, a, b, n_iters=10, order="columns_first").plan, few, rtol=1e-9, atol=1e-14)
    many = torch.stack([b, b.flip(0)], 1)  # [M, H]: H problems against one cost
    value = ot.sinkhorn2(a, many, cost, 0.1, numItermax=5000, stopThr=1e-14)
    ours = sinkhorn_cost(cost.expand(2, 5, 7), a, many.T, n_iters=2000, order="columns_first")
    torch.testing.assert_close(ours, value, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_pot_gradient():
    ot = pytest.importorskip("ot")
    cost, a, b = problem(4, 5)
    leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
    value = (ot.sinkhorn(leaves[1], leaves[2], leaves[0], 0.2, numItermax=30, stopThr=0, warn=False) * leaves[0]).sum()
    want = torch.autograd.grad(value, leaves)
    ours = torch.autograd.grad(sinkhorn_cost(*leaves, epsilon=0.2, n_iters=30, order="columns_first"), leaves)
    for got, expected in zip(ours, want):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("reg_m", [0.5, (0.3, 2.0)])
def test_pot_unbalanced(reg_type, reg_m):
    ot = pytest.importorskip("ot")
    cost, a, b = problem(5, 7)
    b = 1.7 * b
    want = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, 0.1, reg_m, reg_type=reg_type, numItermax=5000, stopThr=1e-15)
    ours = sinkhorn(cost, a, b, n_iters=3000, rho=reg_m, reg_type=reg_type).plan
    torch.testing.assert_close(ours, want, rtol=1e-8, atol=1e-14)


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    leaves = [t.requires_grad_() for t in problem(2, 3, 4)]
    options = {"epsilon": 0.3, "n_iters": 4} | options
    torch.autograd.gradcheck(lambda c, a, b: sinkhorn_cost(c, a, b, **options), leaves)
    torch.autograd.gradcheck(lambda c, a, b: sinkhorn(c, a, b, **options)[:3], leaves)


def test_envelope_is_the_plan_and_refuses_weights():
    cost, a, b = problem(2, 4, 5)
    cost.requires_grad_()
    plan = sinkhorn(cost.detach(), a, b).plan
    (grad,) = torch.autograd.grad(sinkhorn_cost(cost, a, b, grad="envelope").sum(), cost)
    torch.testing.assert_close(grad, plan, rtol=1e-12, atol=0)
    by_hand = (sinkhorn(cost, a, b, grad="envelope").plan * cost).sum()
    torch.testing.assert_close(torch.autograd.grad(by_hand, cost)[0], plan, rtol=1e-12, atol=0)
    (unrolled,) = torch.autograd.grad(sinkhorn_cost(cost, a, b).sum(), cost)
    assert (unrolled - plan).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"a: grad='envelope' gives no gradient"):
        sinkhorn_cost(cost, a.requires_grad_(), b, grad="envelope")


# ---------------------------------------------------------------- masks, limits, shapes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zero_weight_is_absence(options):
    cost, a, b = problem(5, 6)
    keep_a, keep_b = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    masked = [t.requires_grad_() for t in (cost.clone(), torch.where(keep_a, a, 0.0), torch.where(keep_b, b, 0.0))]
    out = sinkhorn(*masked, **options)
    small = [t.requires_grad_() for t in (cost[keep_a][:, keep_b].clone(), a[keep_a], b[keep_b])]
    want = sinkhorn(*small, **options)
    torch.testing.assert_close(out.plan[keep_a][:, keep_b], want.plan, rtol=1e-9, atol=1e-13)
    assert (out.plan[~keep_a] == 0).all() and (out.plan[:, ~keep_b] == 0).all()
    assert (out.f[~keep_a] == -math.inf).all() and (out.g[~keep_b] == -math.inf).all()
    grads = torch.autograd.grad(sinkhorn_cost(*masked, **options), masked)
    expected = torch.autograd.grad(sinkhorn_cost(*small, **options), small)
    torch.testing.assert_close(grads[0][keep_a][:, keep_b], expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(grads[1][keep_a], expected[1], rtol=1e-7, atol=1e-12)
    assert (grads[0][~keep_a] == 0).all() and (grads[0][:, ~keep_b] == 0).all()
    assert (grads[1][~keep_a] == 0).all() and (grads[2][~keep_b] == 0).all()


def test_all_masked_is_zero():
    cost, _, b = problem(3, 4)
    cost.requires_grad_()
    value = sinkhorn_cost(cost, torch.zeros(3, dtype=torch.float64), b)
    value.backward()
    assert value.item() == 0.0 and (cost.grad == 0).all()


def test_forbidden_pairs():
    cost, _, _ = problem(4, 4)
    cost[0, 1:] = math.inf
    cost[2, 3] = math.inf
    cost.requires_grad_()
    out = sinkhorn(cost, n_iters=50)
    assert out.plan[0, 1:].eq(0).all() and out.plan[2, 3] == 0 and out.plan[0, 0] > 0.5
    value = sinkhorn_cost(cost, n_iters=50)
    value.backward()
    assert math.isfinite(value.item()) and cost.grad.isfinite().all() and cost.grad[0, 1:].eq(0).all()
    large = cost.detach().clamp_max(40.0).requires_grad_()
    again = sinkhorn_cost(large, n_iters=50)
    torch.testing.assert_close(value, again, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-3, 5e-3, 0.02])
def test_small_epsilon_has_no_nan(epsilon, dtype):
    cost, a, b = problem(2, 9, 12, dtype=dtype)
    leaf = (2 * cost).requires_grad_()
    out = sinkhorn(leaf, a, b, epsilon=epsilon, n_iters=200)
    value = (out.plan * leaf).sum((-1, -2))
    value.sum().backward()
    assert out.plan.isfinite().all() and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0.01
    torch.testing.assert_close(out.plan.sum(-2), b, rtol=2e-3 if dtype is torch.float32 else 1e-9, atol=0)
    assert (value >= 0).all() and (value <= 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    cost, a, b = problem(2, 6, 5, dtype=dtype)
    leaf = cost.clone().requires_grad_()
    value = sinkhorn_cost(leaf, a, b)
    value.sum().backward()
    assert value.dtype is torch.float32 and leaf.grad.dtype is dtype
    want = sinkhorn_cost(cost.double(), a.double(), b.double())
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)


def test_strided_and_empty_batch():
    cost, _, _ = problem(3, 8, 5)
    view = cost.mT[:, ::2, 1::2]
    torch.testing.assert_close(sinkhorn_cost(view), sinkhorn_cost(view.contiguous()), rtol=1e-12, atol=0)
    none = torch.empty(0, 4, 5, requires_grad=True)
    value = sinkhorn_cost(none)
    value.sum().backward()
    assert value.shape == (0,) and none.grad.shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.ones(3)}, r"cost: expected \[..., N, M\], at least 2 dimensions, got shape \(3,\)"),
        ({"cost": torch.ones(0, 3)}, "cost: expected at least one row and one column"),
        ({"cost": torch.ones(2, 2, dtype=torch.long)}, "cost: expected float16"),
        ({"a": torch.ones(4)}, r"a: expected shape \(3,\).*got \(4,\)"),
        ({"b": torch.ones(2, 2, 5)}, r"b: expected shape \(5,\)"),
        ({"epsilon": 0.0}, r"epsilon: expected a finite number in \(0"),
        ({"epsilon": []}, "epsilon: expected a number or at least one value"),
        ({"epsilon": [0.1, -1.0]}, r"epsilon\[1\]: expected a finite number"),
        ({"epsilon": [0.1, 0.1], "tol": 1e-3}, "tol: expected None with an epsilon per iteration"),
        ({"n_iters": 0}, "n_iters: expected an int >= 1, got 0"),
        ({"order": "rows"}, "order: expected one of rows_first, columns_first, got 'rows'"),
        ({"update": "both"}, "update: expected one of alternate, average"),
        ({"reg_type": "l2"}, "reg_type: expected one of entropy, kl"),
        ({"grad": "implicit"}, "grad: expected one of unrolled, envelope"),
        ({"rho": -1.0}, "rho: expected a finite number"),
        ({"rho": (1.0, 1.0, 1.0)}, "rho: expected None, a number or a pair"),
        ({"tol": -1.0}, "tol: expected a finite number"),
        ({"backend": "triton"}, "sinkhorn: backend='triton' cannot run these inputs: the tensors are on cpu"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    arguments = {"cost": torch.ones(3, 5)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sinkhorn(**arguments)


# ---------------------------------------------------------------- compiled kernels against the reference
# What the kernels take; tol is left to test_tol, since in another precision a problem may freeze an iteration later.
FUSED = [options for options in OPTIONS if not {"update", "reg_type", "epsilon"} & set(options)]
# A softmax weight is a product of three exponentials of 2 ULP each and the reverse chains 2 n_iters of them: measured up to
# 1.6e-5 (2 x 2 weights' gradients, where a constant added to f and taken from g is never damped). One row or one column:
# gradients cancel to nothing, see test_one_by_one. Without fused multiply-adds (the baseline set; the sanitized core, which is
# optimised less and comes from a folder of its own) the same case has 4.0e-5.
FUSED_ADDS = kdfast.backend_info()["cpu"].get("isa") != "baseline" and "/" not in os.environ.get(
    "KDFAST_EXPECT_CORE", ""
)
FLOOR = (2e-5 if FUSED_ADDS else 5e-5, 3e-6)


def fused_and_reference(name, options):
    functions = {"cost": (sinkhorn_cost, sinkhorn_cost_reference), "plan": (sinkhorn, sinkhorn_reference)}
    op, reference = functions[name]

    def finite(result):
        return tuple(t.masked_fill(t == -math.inf, 0.0) for t in result[:3]) if isinstance(result, tuple) else result

    return (
        lambda *x: finite(op(*x, backend="cpu", **options)),
        lambda *x: finite(reference(*x, **options)),
    )


@pytest.mark.parametrize("name", ["cost", "plan"])
@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("shape", [(2, 2), (3, 4, 7), (2, 16, 16), (37, 5, 11), (40, 33), (150, 130)], ids=str)
def test_error_budget(shape, options, name):
    options = {"epsilon": 0.1} | options
    inputs = [t.requires_grad_() for t in problem(*shape, dtype=torch.float32)]
    check_against_reference(*fused_and_reference(name, options), inputs, floor=FLOOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_error_budget_of_other_dtypes(dtype):
    inputs = [t.requires_grad_() for t in problem(2, 9, 14, dtype=dtype)]
    floor = {torch.float64: (2e-13, 2e-13)}.get(dtype, (1e-2 if dtype is torch.bfloat16 else 2e-3, 3e-6))
    check_against_reference(*fused_and_reference("cost", {}), inputs, floor=floor)


@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
@pytest.mark.parametrize("shape", [(2, 9, 12), (140, 150)])
@pytest.mark.parametrize("scale", [0.03, 2.0])
def test_both_sides_of_the_plain_rule(scale, shape, order):
    """epsilon = 1e-3: max C / epsilon = 30 runs on exp(-C / epsilon) as it is, 2000 on kernels built around potentials."""
    cost, a, b = problem(*shape)
    inputs = [(scale * cost).requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    options = {"epsilon": 1e-3, "n_iters": 30, "order": order}
    fused, reference = fused_and_reference("cost", options)
    check_against_reference(fused, reference, inputs, floor=(1e-9, 1e-9))
    single = [t.detach().float().requires_grad_() for t in inputs]
    # At C / epsilon = 2000 float32 holds the exponents to 1e-4 only; the reference keeps its own weights normalised.
    check_against_reference(fused, reference, single, floor=(2e-5, 2e-5) if scale < 1 else (1e-4, 5e-4))


def test_infinite_costs_and_masks_in_both_rules():
    cost, a, b = problem(3, 10, 12)
    cost = torch.where(torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(5)) < 0.2, math.inf, cost)
    a[:, 2], b[1, 3] = 0.0, 0.0
    cost[0, 4] = math.inf  # a row that reaches nothing
    for epsilon in (0.1, 2e-3):
        inputs = [cost.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        check_against_reference(*fused_and_reference("plan", {"epsilon": epsilon}), inputs, floor=(1e-9, 1e-9))


def test_thousands_of_problems():
    cost, a, b = problem(3000, 6, 5, dtype=torch.float32)
    leaf = cost.requires_grad_()
    value = sinkhorn_cost(leaf, a, b, backend="cpu")
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    for i in (0, 1499, 2999):
        one = cost[i].detach().requires_grad_()
        alone = sinkhorn_cost(one, a[i], b[i], backend="cpu")  # with its own kernel matrix and order of sums
        torch.testing.assert_close(alone, value[i], rtol=2e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(alone, one)[0], grad[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["rows_first", "columns_first"])
@pytest.mark.parametrize("grad", ["unrolled", "envelope"])
def test_groups_with_and_without_a_problem_that_leaves_its_lane(order, grad):
    """70 problems: whatever a vector holds, some group is plain, some has one that is not, and some are left over."""
    cost, a, b = problem(70, 6, 9, dtype=torch.float32)
    cost[3] *= 60  # C / epsilon = 600
    cost[20, 1, 2] = math.inf
    a[37, 4], b[37, 0] = 0.0, 0.0
    cost[55] = torch.where(torch.arange(9) < 4, 3.9, 0.0)  # plain to begin with; its factors still stay in range
    b[55] = torch.tensor([1e-30] * 4 + [0.2] * 5)  # and here they do not
    if grad == "envelope":
        inputs = [cost.requires_grad_(), a, b]
        options = {"epsilon": 0.1, "order": order, "grad": grad}
        check_against_reference(*fused_and_reference("cost", options), inputs, floor=FLOOR)
    else:
        inputs = [t.requires_grad_() for t in (cost, a, b)]
        check_against_reference(*fused_and_reference("plan", {"epsilon": 0.1, "order": order}), inputs, floor=FLOOR)


def test_lanes_read_and_write_any_strides():
    cost, a, b = problem(40, 6, 9, dtype=torch.float32)
    wide = torch.zeros(9, 6, 80)
    wide[:, :, ::2] = cost.permute(2, 1, 0)
    strided = wide[:, :, ::2].permute(2, 1, 0).requires_grad_()
    plain = cost.clone().requires_grad_()
    value, other = sinkhorn_cost(strided, a, b, backend="cpu"), sinkhorn_cost(plain, a, b, backend="cpu")
    assert torch.equal(value, other)
    assert torch.equal(torch.autograd.grad(value.sum(), strided)[0], torch.autograd.grad(other.sum(), plain)[0])


@pytest.mark.parametrize("shape", [(60, 8, 9), (300, 310)])
def test_same_bits_for_any_number_of_threads(shape):
    def run():
        cost, a, b = (t.requires_grad_() for t in problem(*shape, dtype=torch.float32))
        out = sinkhorn(cost, a, b, epsilon=0.01, backend="cpu")
        value = sinkhorn_cost(cost, a, b, epsilon=0.01, backend="cpu").sum()
        return [*out, value, *torch.autograd.grad(value + out.f.sum() + (out.plan**2).sum(), (cost, a, b))]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["cost", "plan"])
def test_modes(mode, name):
    inputs = [t.requires_grad_() for t in problem(2, 4, 5, dtype=torch.float32)]
    function = {"cost": sinkhorn_cost, "plan": lambda *x: tuple(sinkhorn(*x))[:3]}[name]
    check_mode(mode, function, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
def test_inductor():
    inputs = [t.requires_grad_() for t in problem(2, 4, 5, dtype=torch.float32)]
    want = torch.autograd.grad(sinkhorn_cost(*inputs).sum(), inputs)
    got = torch.autograd.grad(torch.compile(sinkhorn_cost, fullgraph=True)(*inputs).sum(), inputs)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


def test_bad_values_on_the_cpu():
    cost = torch.rand(3, 4, 5)
    cost[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"cost: expected finite values .* in row 2 of problem 1"):
        sinkhorn_cost(cost)
    a = torch.ones(3, 4)
    a[2, 1] = -0.1
    with pytest.raises(ValueError, match=r"a, b: expected weights >= 0, .* in problem 2"):
        sinkhorn_cost(torch.rand(3, 4, 5), a)
    a[1, 2], a[2, 1] = 0.0, 0.1
    assert sinkhorn_cost(cost, a).isfinite().all()  # a masked row may hold anything


@given(
    n=st.integers(2, 20), m=st.integers(2, 20), epsilon=st.floats(2e-3, 3.0), n_iters=st.integers(1, 12), seed=st.integers(0, 99),
    order=st.sampled_from(["rows_first", "columns_first"]), rho=st.sampled_from([None, 0.5, (None, 0.1), (3.0, 0.02)]),
    weights=st.booleans(),
)  # fmt: skip
def test_random_problems(n, m, epsilon, n_iters, seed, order, rho, weights):
    cost, a, b = problem(n, m, seed=seed)
    inputs = [cost.requires_grad_(), *((a, b) if weights else ())]
    options = {"epsilon": epsilon, "n_iters": n_iters, "order": order, "rho": rho}
    fused, reference = fused_and_reference("cost", options)
    check_against_reference(fused, reference, inputs, floor=(1e-8, 1e-9))
    if (
        weights
    ):  # terms of the size of the cost may cancel to nothing in the weights' gradients, so there an absolute bound
        leaves = a.requires_grad_(), b.requires_grad_()
        got, want = (torch.autograd.grad(f(*inputs), leaves) for f in (fused, reference))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
    out = sinkhorn(*(t.detach() for t in inputs), backend="cpu", **options)
    assert (out.plan >= 0).all() and out.plan.isfinite().all()
    if rho is None:  # the side that moved last has its marginals
        last, want = (-2, b) if order == "rows_first" else (-1, a)
        want = want.detach() if weights else torch.ones_like(want)
        torch.testing.assert_close(out.plan.sum(last), want, rtol=1e-10, atol=0)
