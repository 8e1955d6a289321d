"""The token-graph kernels under Triton's interpreter: the CPU kernels' own tests, and what is special here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import check_against_reference
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from ops import test_token_graph as cpu  # noqa: E402

from kdfast.ops import knn_graph, knn_graph_reference, token_graph, token_graph_kl, token_graph_kl_reference  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import token_graph as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(
    token_graph,
    {
        "_knn_op": kernels.knn_graph, "_weights_op": kernels.edge_weights, "_weights_backward_op": kernels.edge_weights_backward,
        "_kl_op": kernels.sparse_softmax_kl, "_kl_backward_op": kernels.sparse_softmax_kl_backward,
    },
)  # fmt: skip

# Here "cpu" is the Triton kernel. Left out: threads, torch's modes, large graphs, and what reads values.
test_graph_by_hand = cpu.test_graph_by_hand
test_all_neighbours = cpu.test_all_neighbours
test_two_tokens = cpu.test_two_tokens
test_given_edges_by_hand = cpu.test_given_edges_by_hand
test_dense_formula_written_out = cpu.test_dense_formula_written_out
test_given_edges_equal_the_dense_formula = cpu.test_given_edges_equal_the_dense_formula
test_normalize_has_the_derivative_of_a_normalisation_also_for_tokens_below_the_floor = (
    cpu.test_normalize_has_the_derivative_of_a_normalisation_also_for_tokens_below_the_floor
)

# How neighbours are found: looking at all; from candidates, of one pass or of several; by sorting.
FORMS = {"all": (128, 64, 0), "candidates": (16, 64, 0), "split": (16, 64, 132), "sorted": (16, 1, 0)}


@pytest.fixture
def each_form(request, monkeypatch):
    return use_form(request.param, monkeypatch)


def use_form(name, monkeypatch):
    direct, tiled, multiprocessors = FORMS[name]
    monkeypatch.setattr(token_graph, "DIRECT_TOKENS", direct)
    monkeypatch.setattr(kernels, "MOST_TILED", tiled)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 0)  # 16 rows at a time
    monkeypatch.setattr(kernels, "OTHERS", 32)
    return name


def test_these_tests_run_triton_kernels(monkeypatch):
    """Launches of a graph, a loss and its gradients; no n x n tensor among their arguments."""
    counts = {}
    for name in FORMS:
        use_form(name, monkeypatch)
        with launch.recording() as launches:
            knn_graph(cpu.tokens(70, 3, torch.float32).detach(), 2, backend="cpu")
        counts[name] = [x.kernel.__name__.removesuffix("_kernel") for x in launches]
        tensors = [v for x in launches for v in x.arguments.values() if isinstance(v, torch.Tensor)]
        assert max(t.numel() for t in tensors) <= 70 * 4 * 4
    assert counts["all"] == ["rank"] and counts["candidates"] == counts["split"] == ["candidates", "rank"]
    assert counts["sorted"] == ["cost"] * 5 + ["weights"]
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    with launch.recording() as launches:
        rows = token_graph_kl(cpu.tokens(5, 3), cpu.tokens(5, 4), edges=edges, backend="cpu")
        rows.sum().backward()
    assert len(launches) == 2 + 1 + 1 + 2


@pytest.mark.parametrize(
    "dtype, orientation, direction, normalize",
    [
        (torch.float32, "row", "student_teacher", True),
        (torch.float64, "column", "teacher_student", False),
        (torch.bfloat16, "column", "student_teacher", False),
    ],
)
def test_error_budget(dtype, orientation, direction, normalize):
    s, t = cpu.tokens(14, 6, dtype, scale=0.5), cpu.tokens(14, 9, dtype, seed=1, scale=0.5)
    options = dict(k=4, direction=direction, orientation=orientation, normalize=normalize)
    # As for the CPU kernels: weights are float32, and half an eps of A (up to 3e-8) moves log P and every gradient.
    check_against_reference(
        lambda s, t: token_graph_kl(s, t, backend="cpu", **options), lambda s, t: token_graph_kl_reference(s, t, **options), (s, t),
        floor=(2e-6, 1e-6) if dtype != torch.float64 else (1e-11, 1e-13),
        gradient_floor={torch.float32: (2e-6, 1e-6), torch.float64: (1e-11, 1e-13), torch.bfloat16: None}[dtype],
    )  # fmt: skip


def test_nearly_equal_graphs_keep_their_digits():
    """As on the CPU: KL around 1e-11, where the float32 reference has no digit."""
    s = cpu.tokens(14, 4, torch.float32).detach()
    t = s + 1e-4 * cpu.tokens(14, 4, torch.float32, seed=2).detach()
    truth = token_graph_kl_reference(s.double(), t.double(), k=4)
    rows = token_graph_kl(s, t, k=4, backend="cpu")
    assert 1e-13 < truth.max() < 1e-8 and bool((rows >= 0).all())
    assert bool(((rows - truth).abs() <= 0.02 * truth + 1e-15).all())


# ---------------------------------------------------------------- the selection
@pytest.mark.parametrize(
    "kind, form",
    [("clusters", "split"), ("far", "split"), ("lattice", "split"), ("lattice", "candidates"), ("lattice", "sorted")],
)
def test_selection_is_that_of_exact_distances(kind, form, monkeypatch):
    """Cases where distances from products choose wrongly; a lattice has exact ties everywhere, and no proof."""
    use_form(form, monkeypatch)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(36, 12, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        x = torch.randn(4, 12, generator=generator, dtype=torch.float64)[torch.arange(36) % 4] + 1e-4 * x
    if kind == "lattice":
        x = (x * 1.2).round()[:, :2]
    if kind == "far":
        x = x + 300.0
    x = x.float()
    neighbours, weights = knn_graph(x, 3, backend="cpu")
    d2 = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    want, want_weights = knn_graph_reference(x.double(), 3)
    torch.testing.assert_close(d2.gather(1, neighbours.long()), d2.gather(1, want.long()), rtol=4e-6, atol=0)
    torch.testing.assert_close(weights.double(), want_weights, rtol=1e-5, atol=1e-7)
    assert all(len(set(row)) == 3 and i not in row for i, row in enumerate(neighbours.tolist()))
    if kind == "lattice":
        assert torch.equal(neighbours, want)
    if form == "split" and kind != "far":
        # the candidates hold the neighbours, and a bound that is too high would be believed
        _, candidates, bounds = kernels._candidates(x, None, 8)
        assert candidates.shape[1] == 2
        norms = (x.double() - x.double().mean(0)).square().sum(1)
        for i in range(0, 36, 7):
            for split in range(2):
                known = set(candidates[i, split].tolist())
                rest = [j for j in range(32 * split, min(32 * split + 32, 36)) if j not in known and j != i]
                assert all(float(d2[i, j] - norms[i]) >= float(bounds[i, split]) - 1e-9 for j in rest)


@pytest.mark.parametrize("each_form", FORMS, indirect=True)
def test_neighbours_in_float64_with_scales_and_strides(each_form):
    x = cpu.tokens(5, 27).detach().mT
    inverse = torch.linspace(0.5, 2.0, 27, dtype=torch.float64)
    got = kernels.knn_graph(x, inverse, 3, 0.7)
    want = knn_graph_reference(x * inverse.unsqueeze(1), 3, sigma=0.7)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("each_form", ["all", "candidates", "sorted"], indirect=True)
def test_equal_tokens_take_the_lower_index_and_nan_is_nobodys_neighbour(each_form):
    for x in (torch.ones(18, 3), cpu.tokens(18, 3, torch.float32).detach()):
        if not bool((x == 1).all()):
            x[4, 1] = math.nan
        neighbours, weights = knn_graph(x, 3, backend="cpu")
        want, want_weights = knn_graph_reference(x, 3)
        assert torch.equal(neighbours, want)
        torch.testing.assert_close(weights, want_weights, equal_nan=True, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- memory
def test_edges_out_of_range_address_nothing_and_give_nan():
    x = cpu.tokens(6, 3, torch.float32).detach()
    sources = torch.tensor([0, -1, 2, 2**30], dtype=torch.int32)
    targets = torch.tensor([1, 3, 6, 0], dtype=torch.int32)
    weights = kernels.edge_weights(x, None, sources, targets, 1.0)
    assert weights.isnan().tolist() == [False, True, True, True]
    grad = kernels.edge_weights_backward(torch.ones(4), weights, x, None, sources, targets, 1.0)
    assert grad[0].abs().max() > 0 and not grad[4:].any()
    rows = kernels.sparse_softmax_kl(sources, targets, weights, sources, targets, torch.ones(4), 6, False)
    assert rows[0] > 0 and rows[5] == 0


def test_strides_are_read_in_place():
    wide = cpu.tokens(12, 9)
    s, t = wide[:, ::3], wide.detach().mT.contiguous().mT
    rows = token_graph_kl(s, t, k=3, backend="cpu")
    (grad,) = torch.autograd.grad(rows.sum(), wide)
    want = token_graph_kl_reference(s, t, k=3)
    torch.testing.assert_close(rows, want, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), wide)[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("axis", [0, 1])
def test_tokens_and_columns_beyond_two_to_the_31_elements(axis, tmp_path, monkeypatch):
    """A third token, and in other memory a third column, past 2^31 elements: 32-bit offsets would read elsewhere."""
    from triton.runtime.interpreter import GridExecutor

    # the interpreter writes every argument's whole storage back onto itself: 8 GB here
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    step = 2**30 + 8
    memory = np.memmap(tmp_path / "sparse", dtype=np.float32, mode="w+", shape=(2 * step + 3,))
    far = torch.from_numpy(memory).as_strided((3, 3), (step, 1) if axis == 0 else (1, step))
    near = cpu.tokens(3, 3, torch.float32).detach()
    far.copy_(near)
    for got, want in zip(kernels.knn_graph(far, None, 2, 1.0), kernels.knn_graph(near, None, 2, 1.0)):
        assert torch.equal(got, want)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    weights = kernels.edge_weights(near, None, *ends, 1.0)
    assert torch.equal(kernels.edge_weights(far, None, *ends, 1.0), weights)
    got, want = (kernels.edge_weights_backward(weights, weights, x, None, *ends, 1.0) for x in (far, near))
    assert torch.equal(got, want) and want.abs().min() > 0
