"""All pairs: costs, InfoNCE and MMD against hand-made tables, outside oracles, the float64 reference and finite differences."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from modes import MODES, _quiet, check_mode
from tolerances import check_against_reference

from kdfast import _core
from kdfast.ops import (
    mmd_bandwidths,
    pairwise_cost,
    pairwise_infonce,
    pairwise_infonce_reference,
    pairwise_mmd,
    pairwise_mmd_reference,
)

F64 = torch.float64


# ---------------------------------------------------------------- cost
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


core = pytest.mark.skipif(_core.core is None, reason="needs the compiled core")
# Tile borders (32 rows, 64 others), panel borders (512 columns), narrow (<= 64) and wide, a width cut into parts.
SHAPES = [(1, 1, 1), (3, 5, 64), (33, 65, 65), (70, 130, 10), (31, 64, 513), (2, 3, 20000), (0, 3, 4), (2, 3, 0)]


@core
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n, m, width", SHAPES)
def test_cost_kernel_equals_the_reference(n, m, width, p):
    results = []
    up = torch.randn(2, n, m, dtype=F64, generator=torch.Generator().manual_seed(3))
    for backend in ("cpu", "reference"):
        g = torch.Generator().manual_seed(4)
        x = torch.randn(2, n, width, dtype=F64, generator=g).requires_grad_()
        y = torch.randn(2, m, width, dtype=F64, generator=g).requires_grad_()
        cost = pairwise_cost(x, y, p=p, backend=backend)
        (cost * up).sum().backward()
        results.append((cost, x.grad, y.grad))
    assert results[0][0].shape == (2, n, m)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@core
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [1, 2])
def test_cost_kernel_error_budget(x_dtype, y_dtype, p):
    """The kernel may err as the same-dtype reference does, plus four units of the largest value; gradients likewise.

    With vectors of 4 lanes (the baseline) a lane adds 128 terms one after the other, where torch sums pairwise: 2 units seen.
    """
    values = []
    for cast in (False, True):
        g = torch.Generator().manual_seed(5)
        x = torch.randn(9, 700, generator=g).to(x_dtype)
        y = torch.randn(11, 700, generator=g).to(y_dtype)
        up = torch.rand(9, 11, generator=g, dtype=F64)
        x, y = (t.double() if cast else t for t in (x, y))
        for backend in ("reference",) if cast else ("cpu", "reference"):
            a, b = (t.detach().clone().requires_grad_() for t in (x, y))
            cost = pairwise_cost(a, b, p=p, backend=backend)
            (cost * up).sum().backward()
            assert a.grad.dtype == a.dtype and b.grad.dtype == b.dtype
            values.append((cost, a.grad, b.grad))
    for fused, reference, truth in zip(*values):
        unit = max(torch.finfo(fused.dtype).eps, 1e-7) * truth.abs().max()
        assert bool(((fused - truth).abs() <= (reference - truth).abs() + 4 * unit).all())


@core
def test_cost_kernel_reads_strides_in_place():
    wide = torch.randn(4, 6, 200, dtype=F64)
    x, y = wide[:, ::2, 1::2], wide.transpose(0, 1)[:4, :3, :100]
    up = torch.randn(3, 3, 4, dtype=F64).permute(2, 0, 1)  # a strided upstream gradient too
    results = []
    for backend in ("cpu", "reference"):
        a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
        cost = pairwise_cost(a, b, p=1, backend=backend)
        results.append((cost, *torch.autograd.grad(cost, (a, b), up)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@core
def test_cost_kernel_has_the_same_bits_for_any_thread_count():
    x, y = torch.randn(70, 20000), torch.randn(3, 20000)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        a = x.clone().requires_grad_()
        cost = pairwise_cost(a, y, p=1)
        cost.sum().backward()
        results.append((cost.detach(), a.grad))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][i], other[i]) for other in results[1:] for i in (0, 1))


@core
def test_cost_kernel_does_not_allocate_all_pairs_of_columns():
    """A 400 x 300 table over 5000 columns: the broadcast buffer would be 2.4 GB."""
    code = (
        "import resource, torch, kdfast\n"
        "x, y = torch.randn(400, 5000, requires_grad=True), torch.randn(300, 5000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "kdfast.ops.pairwise_cost(x, y, p=1).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100_000  # KB


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


# ---------------------------------------------------------------- InfoNCE
def random_pair(n, m, d, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=F64).to(dtype).requires_grad_() for n in (n, m))


def test_infonce_is_cross_entropy_of_the_score_table():
    x, y = random_pair(5, 7, 3)
    scores = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    want = F.cross_entropy(scores / 0.2, torch.arange(5), reduction="none")
    torch.testing.assert_close(pairwise_infonce(x, y, tau=0.2), want, rtol=1e-12, atol=1e-12)


def test_infonce_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64)
    rows = pairwise_infonce(x, x, tau=0.5, similarity="dot")
    torch.testing.assert_close(rows, torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(-8))], dtype=F64))
    # Without its own column each row has one candidate left, the positive: exactly 0.
    assert pairwise_infonce(x, x, tau=0.5, positive=torch.tensor([1, 0]), exclude_self=True).tolist() == [0, 0]
    assert pairwise_infonce(x[:1], x[:1], tau=0.5).tolist() == [0]


OPTIONS = {
    "cosine": dict(tau=0.3),
    "dot": dict(tau=2.0, similarity="dot"),
    "positive": dict(tau=0.5, positive=torch.tensor([3, 3, 0, 1])),
    "exclude_self": dict(tau=0.5, positive=torch.tensor([3, 2, 0, 1]), exclude_self=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_infonce_gradcheck(options):
    x, y = random_pair(4, 5, 3)
    assert torch.autograd.gradcheck(lambda a, b: pairwise_infonce(a, b, **options), (x, y))


@core
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_infonce_equals_the_reference(options, blocks, monkeypatch):
    if blocks > 1:  # several row blocks, the last one short
        monkeypatch.setattr("kdfast.ops.pairwise.row_blocks", lambda *_: [(0, 2), (2, 3), (3, 4)])
    up = torch.tensor([3.0, 0.0, -1.0, 0.5], dtype=F64)
    results = []
    for backend in ("cpu", "reference"):
        x, y = random_pair(4, 6, 5, seed=3)
        rows = pairwise_infonce(x, y, backend=backend, **options)
        (rows * up).sum().backward()
        results.append((rows, x.grad, y.grad))
    assert float(results[0][0].detach().abs().max()) > 0.1
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_infonce_row_blocks_cut_large_tables():
    from kdfast.ops.pairwise import BLOCK_BYTES, row_blocks

    blocks = row_blocks(10_000, 50_000, 4)
    assert blocks[0][0] == 0 and blocks[-1][1] == 10_000
    assert all(a[1] == b[0] for a, b in pairwise(blocks))
    assert all((stop - start) * 50_000 * 4 <= BLOCK_BYTES for start, stop in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infonce_error_budget(dtype):
    inputs = tuple(random_pair(64, 96, 32, dtype=dtype, seed=5))
    # The log-sum-exp is a sum of 96 terms taken in two orders: a few roundings of the largest row, seen 4e-7.
    check_against_reference(
        lambda x, y: pairwise_infonce(x, y, tau=0.1),
        lambda x, y: pairwise_infonce_reference(x, y, tau=0.1),
        inputs,
        floor=(2e-6, 5e-7),
        gradient_floor=None if dtype != torch.float32 else (2e-6, 1e-6),
    )


def test_infonce_reference_has_second_derivatives():
    x, y = random_pair(4, 4, 3)
    rows = pairwise_infonce(x, y.detach(), tau=0.5, backend="reference")
    (grad,) = torch.autograd.grad(rows.sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0


@core
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_infonce_modes(mode, exclude_self):
    def rows(x, y, positive):
        return pairwise_infonce(x, y, tau=0.5, positive=positive, exclude_self=exclude_self)

    check_mode(mode, rows, (*random_pair(4, 5, 3), torch.tensor([3, 2, 0, 1])))


@core
@pytest.mark.parametrize("mode", MODES)
def test_cost_modes(mode):
    check_mode(mode, lambda x, y: pairwise_cost(x, y, p=1), tuple(random_pair(4, 5, 70, torch.float32)))


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("double_backward", "opcheck")])
def test_mmd_modes(mode):
    """A composition: every derivative exists in its linear forms, and the full form recomputes its blocks."""
    function = lambda x, y: pairwise_mmd(x, y, bandwidths=[1.0, 2.0], estimator="linear")  # noqa: E731
    check_mode(mode, function, tuple(random_pair(4, 4, 3)))


@core
def test_inductor():
    """One graph holds both ops, forward and backward."""

    def loss(x, y):
        return pairwise_infonce(x, y, tau=0.5).sum() + pairwise_cost(x, y, p=1).mean()

    x, y = random_pair(6, 8, 70, torch.float32)
    want = torch.autograd.grad(loss(x, y), (x, y))
    with _quiet():
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, y), (x, y))
    torch.testing.assert_close(got, want)


def test_infonce_nan_stays_in_its_row():
    x, y = random_pair(3, 3, 4)
    with torch.no_grad():
        x[1, 0] = math.nan
    rows = pairwise_infonce(x, y, tau=0.5)
    assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "n, m, options, message",
    [
        (3, 2, {}, "y: expected at least the 3 rows of x"),
        (3, 3, {"tau": 0.0}, "tau: expected a finite number"),
        (3, 3, {"similarity": "l2"}, "similarity: expected one of cosine, dot"),
        (3, 3, {"positive": torch.tensor([0, 1, 3])}, r"positive: expected integers in \[0, 3\), got 0 to 3"),
        (3, 3, {"positive": torch.tensor([0, 1])}, "positive: expected shape"),
        (3, 3, {"exclude_self": True}, "positive: expected the column of each positive"),
        (3, 3, {"exclude_self": True, "positive": torch.tensor([1, 1, 0])}, "another column than the row's own"),
        (3, 3, {"backend": "triton"}, "the tensors are on cpu"),
    ],
)
def test_infonce_bad_input(n, m, options, message):
    with pytest.raises(ValueError, match=message):
        pairwise_infonce(torch.randn(n, 4), torch.randn(m, 4), **{"tau": 0.5, **options})


# ---------------------------------------------------------------- MMD
def test_mmd_by_hand():
    x, y = torch.tensor([[0.0]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    assert mmd_bandwidths(x, y, num_kernels=3).tolist() == [0.5, 1, 2]  # mean squared distance 1
    assert mmd_bandwidths(x, y, num_kernels=1, sigma=1.68).tolist() == [1.68]
    assert mmd_bandwidths(x, x, num_kernels=2).tolist() == [5e-13, 1e-12]  # all rows equal: the floor
    torch.testing.assert_close(
        pairwise_mmd(x, y, bandwidths=[2.0]), torch.tensor(2 - 2 * math.exp(-0.5), dtype=F64), rtol=1e-14, atol=0
    )


def test_mmd_bandwidth_is_the_mean_squared_distance_far_from_the_origin():
    torch.manual_seed(2)
    x, y = torch.randn(6, 3, dtype=F64) + 1e6, torch.randn(5, 3, dtype=F64) + 1e6
    joint = torch.cat((x, y))
    want = torch.cdist(joint, joint, compute_mode="donot_use_mm_for_euclid_dist").square().sum() / (11 * 10)
    torch.testing.assert_close(mmd_bandwidths(x, y, num_kernels=1)[0], want, rtol=1e-9, atol=0)


ESTIMATORS = [("full", 5, 4), ("unbiased", 5, 4), ("linear", 5, 5), ("regulariser", 5, 4), ("regulariser", 3, 6)]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator, n, m", ESTIMATORS)
def test_mmd_equals_the_reference(estimator, n, m, corrected):
    options = dict(bandwidths=[0.5, 2.0], estimator=estimator, corrected=corrected)
    results = []
    for function in (pairwise_mmd, pairwise_mmd_reference):
        x, y = random_pair(n, m, 3, seed=4)
        value = function(x, y, **options)
        value.backward()
        results.append((value, x.grad, y.grad))
    assert float(results[0][0].detach().abs()) > 1e-3
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_mmd_full_through_several_blocks(monkeypatch):
    x, y = random_pair(5, 4, 3, seed=4)
    want = pairwise_mmd(x, y, bandwidths=[1.0])
    monkeypatch.setattr("kdfast.ops.mmd.row_blocks", lambda n, m, size: [(0, 3), (3, n)])
    torch.testing.assert_close(pairwise_mmd(x, y, bandwidths=[1.0]), want, rtol=1e-13, atol=0)
    assert pairwise_mmd(x, x, bandwidths=[1.0]).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bandwidths": []}, "bandwidths: expected at least one"),
        ({"bandwidths": [0.0]}, "bandwidths: expected a finite number"),
        ({"estimator": "linear"}, "expected the 3 rows of x for estimator='linear', got 2"),
        ({"estimator": "median"}, "estimator: expected one of"),
    ],
)
def test_mmd_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pairwise_mmd(torch.randn(3, 2), torch.randn(2, 2), **{"bandwidths": [1.0], **options})


def test_strided_positives_are_read_by_their_strides():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 4, generator=g) for _ in range(2))
    positive = torch.randint(6, (6, 3), generator=g)[:, 0]
    got = pairwise_infonce(x, y, tau=0.5, positive=positive)
    torch.testing.assert_close(got, pairwise_infonce(x, y, tau=0.5, positive=positive, backend="reference"))
