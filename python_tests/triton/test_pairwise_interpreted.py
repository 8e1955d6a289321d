"""The kernels of pairwise costs, InfoNCE and relations under Triton's interpreter: the CPU kernels' own tests, and what is
special here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import check_against_reference
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from ops import test_pairwise as cpu  # noqa: E402
from ops import test_relation as relations  # noqa: E402

from kdfast.ops import (  # noqa: E402
    pairwise,
    pairwise_cost,
    pairwise_cost_reference,
    pairwise_infonce,
    pairwise_infonce_reference,
    pairwise_mmd,
    pairwise_mmd_reference,
    relation,
    relation_kl,
    relation_kl_reference,
    relation_mse,
    relation_mse_reference,
)
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import pairwise as kernels  # noqa: E402
from kdfast.triton import relation as relation_kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(
    pairwise,
    {
        "_cost_op": kernels.cost, "_cost_backward_op": kernels.cost_backward, "_infonce_op": kernels.infonce_rows,
        "_infonce_backward_op": kernels.infonce_rows_backward,
    },
)  # fmt: skip
take_the_cpu(relation, {"_relation_op": relation_kernels.relation})

# Here "cpu" is the Triton kernel. Left out: threads, torch's modes, and what reads values.
test_cost_table_by_hand = cpu.test_cost_table_by_hand
test_cost_gradient_is_the_sign_and_zero_at_ties = cpu.test_cost_gradient_is_the_sign_and_zero_at_ties
test_infonce_by_hand = cpu.test_infonce_by_hand
test_infonce_equals_the_reference = cpu.test_infonce_equals_the_reference
test_infonce_nan_stays_in_its_row = cpu.test_infonce_nan_stays_in_its_row
test_gram_by_hand = relations.test_gram_by_hand
test_masked_tokens_are_not_read = relations.test_masked_tokens_are_not_read
test_no_kept_token_and_a_lone_token_give_exact_zero = relations.test_no_kept_token_and_a_lone_token_give_exact_zero
test_nan_token_propagates_in_the_mse = relations.test_nan_token_propagates_in_the_mse
test_relation_row_blocks_of_a_large_set = relations.test_row_blocks_of_a_large_set


def test_these_tests_run_triton_kernels(split):
    x, y = (t.detach() for t in cpu.random_pair(5, 7, 300, torch.float32))
    x.requires_grad_()
    with launch.recording() as launches:
        pairwise_cost(x, y, p=1).sum().backward()
        pairwise_infonce(x, y, tau=0.5)
        relation_mse(x, x.detach())
    names = [r.kernel.__name__.removesuffix("_kernel") for r in launches]
    costs = ["cost", "add", "cost_gradient"] if split else ["cost", "cost_gradient"]
    assert names == [*costs, "contrast", "relation"]


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request, monkeypatch):
    """Whether the GPU is so large that tiles are split and their parts added."""
    for module in (launch, kernels):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8 if request.param else 0)
    return request.param


# ---------------------------------------------------------------- costs
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 40), (5, 40, 33), (0, 3, 4), (2, 3, 0)])
def test_cost_equals_the_reference(shape, p, split, monkeypatch):
    monkeypatch.setattr(kernels, "OTHERS", 16)
    n, m, width = shape
    x, y = (torch.randn(2, k, width, dtype=torch.float64, requires_grad=True) for k in (n, m))
    up = torch.randn(m, 2, n, dtype=torch.float64).permute(1, 2, 0)  # a strided upstream gradient
    got, want = pairwise_cost(x, y, p=p, backend="cpu"), pairwise_cost_reference(x, y, p=p)
    assert got.shape == (2, n, m)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got, (x, y), up), torch.autograd.grad(want, (x, y), up)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("p", [1, 2])
def test_cost_error_budget(dtypes, p):
    x, y = (
        torch.randn(k, 90, generator=torch.Generator().manual_seed(k)).to(d).requires_grad_()
        for k, d in zip((5, 6), dtypes)
    )
    check_against_reference(
        lambda a, b: pairwise_cost(a, b, p=p, backend="cpu"), lambda a, b: pairwise_cost_reference(a, b, p=p), (x, y)
    )  # fmt: skip


def test_strides_are_read_in_place():
    wide = torch.randn(4, 6, 40, dtype=torch.float64)
    x, y = wide[:, ::2, 1::2].requires_grad_(), wide.transpose(0, 1)[:4, :3, :20].detach().requires_grad_()
    got, want = pairwise_cost(x, y, p=1, backend="cpu"), pairwise_cost_reference(x, y, p=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(c.sum(), (x, y)) for c in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_mmd_through_the_cost_kernels(monkeypatch):
    monkeypatch.setattr("kdfast.ops.mmd.row_blocks", lambda n, m, size: [(0, 3), (3, n)])
    options = dict(bandwidths=[0.5, 2.0], estimator="unbiased")
    results = []
    for function in (pairwise_mmd, pairwise_mmd_reference):
        x, y = cpu.random_pair(5, 4, 3, seed=4)
        value = function(x, y, **options)
        results.append((value, *torch.autograd.grad(value, (x, y))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("axis", [1, 2])
def test_points_and_columns_beyond_two_to_the_31_elements(axis, tmp_path, monkeypatch):
    """A third row, and in other memory a third column, past 2^31 elements: 32-bit offsets would read elsewhere."""
    from triton.runtime.interpreter import GridExecutor

    # the interpreter writes every argument's whole storage back onto itself: 8 GB here
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 0)
    step = 2**30 + 8
    memory = torch.from_numpy(np.memmap(tmp_path / "sparse", dtype=np.float32, mode="w+", shape=(2 * step + 3,)))
    far = memory.as_strided((1, 3, 3), (0, step, 1) if axis == 1 else (0, 1, step))
    near, other = (torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    far.copy_(near)
    for a, b, c, d in ((far, other, near, other), (other, far, other, near)):
        assert torch.equal(kernels.cost(a, b, 1), kernels.cost(c, d, 1))
        assert torch.equal(kernels.cost_backward(other, a, b, 2), kernels.cost_backward(other, c, d, 2))
    assert torch.equal(kernels.cost_backward(far, near, other, 1), kernels.cost_backward(near, near, other, 1))
    if axis == 1:  # rows of scores
        lse = torch.empty(3)
        positive, first, second = torch.tensor([2, 0, 1]), torch.empty(3), torch.empty(3)
        kernels._contrast(near[0].clone(), 0, 2.0, positive, False, lse, first)
        kernels._contrast(far[0], 0, 2.0, positive, False, lse, second)
        assert torch.equal(first, second)


# ---------------------------------------------------------------- InfoNCE
@pytest.mark.parametrize(
    "dtype, tiles", [(torch.float32, 1), (torch.float32, 3), (torch.float64, 1), (torch.bfloat16, 1)]
)
def test_infonce_error_budget(dtype, tiles, monkeypatch):
    """In one tile and in several, of several blocks of rows; as on the CPU, two orders of the sums of 96 terms."""
    if tiles > 1:
        tile = kernels.score_tile
        monkeypatch.setattr(
            kernels, "score_tile", lambda rows, columns, dtype: tile(rows, columns, dtype) | {"R": 4, "B": 32}
        )
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 0)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 16)
    positive = torch.arange(24).flip(0)
    options = dict(tau=0.1, positive=positive, exclude_self=True)
    check_against_reference(
        lambda x, y: pairwise_infonce(x, y, backend="cpu", **options),
        lambda x, y: pairwise_infonce_reference(x, y, **options),
        tuple(cpu.random_pair(24, 96, 16, dtype=dtype, seed=5)),
        floor=(2e-6, 5e-7) if dtype != torch.float64 else (1e-14, 1e-14),
        gradient_floor={torch.float32: (2e-6, 1e-6), torch.float64: (1e-14, 1e-14), torch.bfloat16: None}[dtype],
    )  # fmt: skip


def test_a_positive_out_of_range_addresses_nothing_and_gives_nan():
    x, y = (t.detach() for t in cpu.random_pair(4, 5, 3, torch.float32))
    positive = torch.tensor([0, -1, 2, 10**12])
    rows, lse, unit = kernels.infonce_rows(x, y, positive, 2.0, False, True)
    assert rows.isnan().tolist() == unit.isnan().all(1).tolist() == [False, True, False, True] and lse.isfinite().all()
    assert unit[0].isfinite().all() and unit[2].isfinite().all()


# ---------------------------------------------------------------- relations
@pytest.mark.parametrize(
    "options", [dict(masked=False, diagonal=True), dict(masked=True, diagonal=False)], ids=["all", "some"]
)
@pytest.mark.parametrize("compare", ["softmax", "gram", "js"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_relation_within_the_error_budget(compare, options, dtype):
    chosen = {"diagonal": options["diagonal"], "mask": relations.mask() if options["masked"] else None}
    function, reference = relation_mse, relation_mse_reference
    if compare == "js":
        function, reference, chosen = (
            relation_kl,
            relation_kl_reference,
            chosen | {"kind": "js", "similarity": "cosine"},
        )
    else:
        chosen["relation"] = compare
    weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    # As for the CPU kernels: the rounding of the scores, up to 1e-6 of a score, is what is left.
    wide = dtype == torch.float64
    for extra in ({}, {"row_weight": weight}):
        check_against_reference(
            lambda s, t, e=extra: function(s, t, backend="cpu", **chosen, **e),
            lambda s, t, e=extra: reference(s, t, **chosen, **e),
            tuple(relations.tokens(dtype=dtype)),
            floor=(1e-9, 1e-12) if wide else (5e-6, 1e-6),
            gradient_floor=(1e-9, 1e-12) if wide else (5e-6, 2e-6) if dtype == torch.float32 else None,
        )  # fmt: skip


def test_relation_of_several_tiles(monkeypatch):
    tile = kernels.score_tile
    monkeypatch.setattr(
        relation_kernels, "score_tile", lambda rows, columns, dtype: tile(rows, columns, dtype) | {"R": 2, "B": 2}
    )
    s, t = relations.tokens()
    for name in ("softmax", "gram"):
        got, want = (f(s, t, relation=name, diagonal=False) for f in (relation_mse, relation_mse_reference))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        grads = (torch.autograd.grad((r * torch.arange(10.0).reshape(2, 5)).sum(), (s, t)) for r in (got, want))
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)
