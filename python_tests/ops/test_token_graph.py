"""Token graphs: hand-made tables, the dense float64 formula as oracle, invariants, proofs of the selection, modes, errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, _quiet, check_mode
from tolerances import check_against_reference

from kdfast import _core
from kdfast.ops import knn_graph, knn_graph_reference, token_graph_kl, token_graph_kl_reference
from kdfast.ops.token_graph import DIRECT_TOKENS, DIRECTIONS, ORIENTATIONS

F64 = torch.float64
core = pytest.mark.skipif(_core.core is None, reason="needs the compiled core")
BACKENDS = [pytest.param("cpu", marks=core), "reference"]
LARGE = DIRECT_TOKENS + 60  # enough tokens for the path through Gram blocks


def tokens(n, d, dtype=F64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, d, generator=g, dtype=F64)).to(dtype).requires_grad_()


# ---------------------------------------------------------------- known values
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_by_hand(backend):
    x = torch.tensor([[0.0], [1.0], [3.0], [2.0]], dtype=F64)
    neighbours, weights = knn_graph(x, 2, sigma=0.5, backend=backend)
    assert neighbours.dtype == torch.int32
    assert neighbours.tolist() == [[1, 3], [0, 3], [3, 1], [1, 2]]  # token 1: 0 and 3 are equally far, 0 comes first
    want = torch.tensor([[1.0, 4.0], [1.0, 1.0], [1.0, 4.0], [1.0, 1.0]], dtype=F64).neg().exp()  # 2 sigma = 1
    torch.testing.assert_close(weights, want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [5, LARGE])
def test_equal_tokens_take_the_lower_index(n, backend):
    """Nothing but ties: no candidate list can prove anything, and the answer is still the first k others."""
    neighbours, weights = knn_graph(torch.ones(n, 3), 3, backend=backend)
    want = torch.tensor([[j for j in range(n) if j != i][:3] for i in range(n)])
    assert torch.equal(neighbours.long(), want)
    assert bool((weights == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_neighbours(backend):
    x = tokens(6, 2)
    neighbours, _ = knn_graph(x, 5, backend=backend)
    assert torch.equal(
        neighbours.sort(1).values.long(), torch.stack([torch.arange(6)[torch.arange(6) != i] for i in range(6)])
    )
    order = torch.cdist(x, x).detach().fill_diagonal_(math.inf).argsort(1)[:, :5]
    assert torch.equal(neighbours.long(), order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens(backend):
    """n = 2: one edge each; P = softmax(0, A), so the row is a KL of two coins."""
    s, t = torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor([[0.0], [2.0]], dtype=F64)
    p, q = 1 / (1 + math.exp(-math.exp(-0.5))), 1 / (1 + math.exp(-math.exp(-2)))
    want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    torch.testing.assert_close(token_graph_kl(s, t, k=1, backend=backend), torch.full((2,), want, dtype=F64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_edges_by_hand(backend):
    s, t = torch.tensor([[0.0], [1.0], [5.0]], dtype=F64), torch.tensor([[0.0], [0.0], [5.0]], dtype=F64)
    edges = torch.tensor(
        [[0, 2], [1, 2]]
    )  # row 0 sees token 1; row 2 sees itself with weight 1 in both models; row 1 nobody
    rows = token_graph_kl(s, t, edges=edges, backend=backend)
    z, y = 2 + math.exp(math.exp(-0.5)), 2 + math.e
    p = math.exp(math.exp(-0.5)) / z
    want = p * (math.exp(-0.5) - 1) + math.log(y / z)
    torch.testing.assert_close(rows, torch.tensor([want, 0, 0], dtype=F64), rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- against the dense float64 formula
@core
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n, k", [(2, 1), (7, 6), (40, 3), (LARGE, 8)])
def test_equals_the_dense_formula(n, k, normalize, direction, orientation):
    options = dict(k=k, sigma=0.7, orientation=orientation, direction=direction, normalize=normalize)
    up = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    results = []
    for call in (token_graph_kl, token_graph_kl_reference):
        s, t = tokens(n, 3), tokens(n, 5, seed=1, scale=0.5)
        rows = call(s, t, **options)
        (rows * up).sum().backward()
        results.append((rows, s.grad, t.grad))
    assert results[1][0].detach().abs().max() > 1e-7 and results[1][1].abs().max() > 1e-7
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-12)


@core
def test_dense_formula_written_out():
    """Not our reference: the matrix, its log_softmax and F.kl_div, as the paper prints them."""
    s, t = tokens(9, 3), tokens(9, 4, seed=1)
    log_softmaxes = []
    for x in (s, t):
        d2 = torch.cdist(x, x).square()
        nearest = (d2 + torch.diag(torch.full((9,), math.inf, dtype=F64))).topk(3, largest=False).indices
        a = torch.zeros(9, 9, dtype=F64).scatter(1, nearest, (-d2 / 2).exp().gather(1, nearest))
        log_softmaxes.append(a.log_softmax(1))
    want = torch.nn.functional.kl_div(*log_softmaxes[::-1], log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(token_graph_kl(s, t, k=3), want, rtol=1e-9, atol=1e-13)


@core
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_given_edges_equal_the_dense_formula(orientation):
    g = torch.Generator().manual_seed(4)
    pairs = torch.randperm(20 * 20, generator=g)[:70]
    edges = torch.stack((pairs // 20, pairs % 20))  # unsorted, some self-loops, some rows without an edge
    assert bool((edges[0] == edges[1]).any()) and len(edges[0].unique()) < 20
    results = []
    for call in (token_graph_kl, token_graph_kl_reference):
        s, t = tokens(20, 3), tokens(20, 5, seed=1)
        rows = call(s, t, edges=edges, orientation=orientation)
        (rows * torch.arange(20.0)).sum().backward()
        results.append((rows, s.grad, t.grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-13)


@core
@pytest.mark.parametrize(
    "options", [{}, {"direction": "teacher_student", "orientation": "column"}, {"normalize": True}]
)
def test_gradcheck(options):
    call = lambda s, t: token_graph_kl(s, t, k=2, backend="cpu", **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, (tokens(6, 3), tokens(6, 2, seed=1)))
    assert torch.autograd.gradcheck(lambda x: knn_graph(x, 2, sigma=2.0, backend="cpu")[1], (tokens(6, 3),))


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_error_budget(dtype, direction):
    s, t = tokens(60, 8, dtype, scale=0.5), tokens(60, 8, dtype, seed=1, scale=0.5)
    options = dict(k=5, direction=direction)
    # Weights are float32: half an eps of A (up to 3e-8) moves log P, and the gradient of a row is a difference of such.
    check_against_reference(
        lambda s, t: token_graph_kl(s, t, **options), lambda s, t: token_graph_kl_reference(s, t, **options), (s, t),
        gradient_floor=None if dtype != torch.float32 else (2e-6, 1e-6),
    )  # fmt: skip


@core
def test_nearly_equal_graphs_keep_their_digits():
    """KL around 1e-11, where the float32 reference has no digit: non-negative terms, log1p of the difference of Z."""
    s = tokens(50, 4, torch.float32)
    t = s.detach() + 1e-4 * tokens(50, 4, torch.float32, seed=2).detach()
    truth = token_graph_kl_reference(s.detach().double(), t.double(), k=4)
    rows = token_graph_kl(s.detach(), t, k=4)
    assert 1e-13 < truth.max() < 1e-9 and bool((rows >= 0).all())
    # What is left is the rounding of A: 6e-8 beside differences of some 1e-5.
    assert bool(((rows - truth).abs() <= 0.02 * truth + 1e-15).all())


# ---------------------------------------------------------------- the selection
@core
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["normal", "clusters", "lattice", "far"])
def test_selection_is_that_of_exact_distances(kind, dtype):
    """Cases where distances from a Gram matrix choose wrongly; a lattice has exact ties everywhere."""
    g = torch.Generator().manual_seed(3)
    n = 3 * LARGE
    x = torch.randn(n, 24, generator=g, dtype=F64)
    if kind == "clusters":
        x = torch.randn(6, 24, generator=g, dtype=F64)[torch.arange(n) % 6] + 1e-4 * x
    if kind == "lattice":
        x = (x * 1.2).round()[:, :3]
    if kind == "far":
        x = x + 300.0
    x = x.to(dtype)
    neighbours, _ = knn_graph(x, 8, backend="cpu")
    # The order of exact distances of the stored numbers, in float64; within it float32 rounding may swap near ties.
    d2 = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    exact = d2.gather(1, knn_graph_reference(x.double(), 8)[0].long())
    chosen = d2.gather(1, neighbours.long())
    torch.testing.assert_close(chosen, exact, rtol=4e-6 if dtype == torch.float32 else 1e-13, atol=0)
    if kind == "lattice" or dtype == F64:
        assert torch.equal(neighbours, knn_graph(x, 8, backend="reference")[0])
    assert all(len(set(row)) == 8 and i not in row for i, row in enumerate(neighbours.tolist()))


@core
def test_reduced_precision_products_do_not_change_the_choice():
    x = tokens(LARGE, 64, torch.float32).detach()
    want = knn_graph(x, 8)
    torch.set_float32_matmul_precision("medium")  # torch.mm may now round its operands to bfloat16
    try:
        got = knn_graph(x, 8)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@core
def test_several_blocks(monkeypatch):
    """The candidates do not depend on how the Gram matrix is cut."""
    from kdfast.ops import token_graph

    x = tokens(LARGE, 6).detach()
    whole = token_graph._candidates(x, None, 10)
    cuts = [0, 1, 40, 41, 170, LARGE]
    monkeypatch.setattr(token_graph, "row_blocks", lambda *_: list(itertools.pairwise(cuts)))
    cut = token_graph._candidates(x, None, 10)
    assert bool((cut[3] == 10).all()) and torch.equal(whole[2], cut[2])


# ---------------------------------------------------------------- invariants
@core
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10_000), st.data())
def test_invariants(n, d, seed, data):
    k = data.draw(st.integers(1, n - 1))
    x, y = tokens(n, d, seed=seed).detach(), tokens(n, d + 1, seed=seed + 1).detach()
    rows = token_graph_kl(x, y, k=k)
    assert bool((rows >= 0).all()) and bool((token_graph_kl(x, x, k=k) == 0).all())
    shift = torch.full((d,), 2.0, dtype=F64)
    torch.testing.assert_close(token_graph_kl(x + shift, y, k=k), rows, rtol=1e-6, atol=1e-12)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(token_graph_kl(x[order], y[order], k=k), rows[order], rtol=1e-6, atol=1e-12)
    neighbours, weights = knn_graph(x, k)
    assert bool((weights.diff(dim=1) <= 0).all()) and bool(((weights >= 0) & (weights <= 1)).all())
    assert neighbours.shape == (n, k)


@core
def test_same_bits_for_any_thread_count_and_call():
    s, t = tokens(700, 32, torch.float32, scale=0.3), tokens(700, 32, torch.float32, seed=1, scale=0.3)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        rows = token_graph_kl(s, t, k=8)
        results.append((rows.detach(), *torch.autograd.grad(rows.sum(), (s, t))))
    torch.set_num_threads(threads)
    assert results[0][1].abs().max() > 0
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@core
def test_strided_tokens():
    wide = tokens(50, 12)
    s, t = wide[:, ::3], wide.mT.contiguous().mT
    rows = token_graph_kl(s, t, k=3)
    torch.testing.assert_close(rows, token_graph_kl(s.contiguous(), t.contiguous(), k=3), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(rows.sum(), wide)
    (want,) = torch.autograd.grad(token_graph_kl_reference(s, t, k=3).sum(), wide)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-13)


@core
@pytest.mark.parametrize("n", [12, LARGE])
def test_nan_token_is_nobodys_neighbour_and_keeps_its_nan(n):
    x = tokens(n, 3, torch.float32).detach()
    x[4, 1] = math.nan
    neighbours, weights = knn_graph(x, 3)
    assert torch.equal(neighbours, knn_graph(x, 3, backend="reference")[0])
    rows = torch.arange(n) != 4
    assert bool((neighbours[rows] != 4).all()) and bool(weights[rows].isfinite().all())
    assert neighbours[4].tolist() == [0, 1, 2] and bool(weights[4].isnan().all())
    kl = token_graph_kl(x, tokens(n, 3, torch.float32, seed=1).detach(), k=3)
    assert kl.isnan().nonzero().flatten().tolist() == [4]


@core
def test_normalize_has_the_derivative_of_a_normalisation_also_for_tokens_below_the_floor():
    s, t = tokens(9, 3).detach(), tokens(9, 4, seed=1)
    s[2] = 0.0
    s[5] *= 1e-13  # shorter than the floor of 1e-12: scaled by a constant
    results = []
    for call in (token_graph_kl, token_graph_kl_reference):
        x = s.clone().requires_grad_()
        rows = call(x, t.detach(), k=8, normalize=True)  # all others: a zero token is equally far from all
        results.append((rows, *torch.autograd.grad(rows.sum(), x)))
    assert results[1][1][5].abs().max() > 1e6  # the constant is 1e12
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@core
def test_far_tokens_underflow_to_zero_loss():
    s, t = tokens(20, 16, torch.float32, scale=40), tokens(20, 16, torch.float32, seed=1, scale=40)
    rows = token_graph_kl(s, t, k=3)
    assert bool((rows == 0).all())
    rows.sum().backward()
    assert bool((s.grad == 0).all())
    assert token_graph_kl(s, t, k=3, normalize=True).min() > 0


# ---------------------------------------------------------------- modes
@core
@pytest.mark.parametrize("mode", MODES)
def test_kl_modes(mode):
    function = lambda s, t: token_graph_kl(s, t, k=2, normalize=True)  # noqa: E731
    check_mode(mode, function, (tokens(8, 3), tokens(8, 4, seed=1)))


@core
@pytest.mark.parametrize("mode", MODES)
def test_edges_modes(mode):
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    check_mode(mode, lambda s, t, e: token_graph_kl(s, t, edges=e), (tokens(5, 3), tokens(5, 4, seed=1), edges))


@core
@pytest.mark.parametrize("mode", MODES)
def test_graph_modes(mode):
    check_mode(mode, lambda x: knn_graph(x, 2)[1], (tokens(8, 3),))


@core
def test_inductor():
    s, t = tokens(9, 3, torch.float32), tokens(9, 4, torch.float32, seed=1)
    loss = lambda s, t: token_graph_kl(s, t, k=2, normalize=True).mean()  # noqa: E731
    want = torch.autograd.grad(loss(s, t), (s, t))
    with _quiet():
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(s, t), (s, t))
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=0), "k: expected 1 to 4 neighbours among 5 tokens, got 0"),
        (dict(k=5), "k: expected 1 to 4 neighbours among 5 tokens, got 5"),
        (dict(), "k: expected k or edges, got neither"),
        (dict(k=1, edges=torch.zeros(2, 1, dtype=torch.int64)), "k: expected k or edges, got both"),
        (dict(k=2, sigma=0.0), "sigma: expected a finite number"),
        (dict(k=2, orientation="rows"), "orientation: expected one of row, column"),
        (dict(k=2, direction="both"), "direction: expected one of"),
        (dict(k=2, backend="cuda"), "no cuda backend"),
        (dict(k=2, teacher=torch.zeros(4, 3)), "teacher: expected the 5 tokens of student, got 4"),
        (dict(k=2, teacher=torch.zeros(5, 0)), "teacher: expected .n, D. with n >= 2 and D >= 1"),
        (dict(edges=torch.tensor([[0, 1, 2]])), r"edges: expected \[2, M\]"),
        (dict(edges=torch.tensor([[0], [5]])), r"edges: expected node numbers in \[0, 5\), got 0 to 5"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        token_graph_kl(torch.zeros(5, 3), **{"teacher": torch.zeros(5, 3), **options})


@core
def test_edge_listed_twice():
    with pytest.raises(ValueError, match=r"edges: expected each edge once, got \(1, 2\) twice"):
        token_graph_kl(torch.zeros(5, 3), torch.zeros(5, 3), edges=torch.tensor([[1, 0, 1], [2, 1, 2]]))


def test_too_few_tokens_and_wrong_types():
    with pytest.raises(ValueError, match=r"tokens: expected \[n, D\] with n >= 2"):
        knn_graph(torch.zeros(1, 3), 1)
    with pytest.raises(TypeError, match="k: expected an int"):
        knn_graph(torch.zeros(3, 3), 1.5)
    with pytest.raises(TypeError, match="edges: expected an int64 or int32 Tensor"):
        token_graph_kl(torch.zeros(5, 3), torch.zeros(5, 3), edges=torch.zeros(2, 1))
