"""sinkhorn_kd_loss as one op of Triton kernels under the interpreter: what is around `pairwise_cost` and `sinkhorn`."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tolerances import check_against_reference
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from losses.test_sinkhorn import logits  # noqa: E402

from kdfast.losses import sinkhorn_kd_loss  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import sinkhorn_kd as kernels  # noqa: E402

op = importlib.import_module("kdfast.ops.sinkhorn_kd")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(op, {"_op": kernels.sinkhorn_kd})
SHORT = {"n_iters": 2, "scale": 1.0}  # an interpreted launch takes milliseconds


def loss(backend, **options):
    return lambda s, t: sinkhorn_kd_loss(s, t, teacher_grad=True, backend=backend, **SHORT | options)


def test_these_tests_run_triton_kernels():
    """Softened rows twice, cost, transport there and back, the cost's gradient and the rows' for each model."""
    student, teacher = logits(5, 40, dtype=torch.float32)
    with launch.recording() as launches:
        sinkhorn_kd_loss(student, teacher)
    names = [made.kernel.__name__ for made in launches]
    assert names[:2] == ["soften_kernel"] * 2 and names[-1] == "soften_backward_kernel"
    assert names.count("solve_kernel") == names.count("reverse_kernel") == names.count("cost_kernel") == 1
    with launch.recording() as launches, torch.no_grad():
        sinkhorn_kd_loss(student, teacher)
    assert [made.kernel.__name__ for made in launches] == names[: names.index("solve_kernel") + 1]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 40), {}),
        ((5, 40), {"p": 2, "order": "columns_first", "temperature": 1.5}),
        ((2, 3, 7), {"reduction": "none"}),
    ],
    ids=str,
)
def test_within_the_budget_of_the_reference(shape, options, monkeypatch):
    monkeypatch.setattr(launch, "TILE", 16)  # several tiles of classes
    student, teacher = logits(*shape, dtype=torch.float32)
    inputs = (student, teacher.requires_grad_())
    check_against_reference(loss("cpu", **options), loss("reference", **options), inputs, floor=(3e-5, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_strided_masked_and_rows_of_minus_infinity(dtype):
    student, teacher = logits(2, 12, 6, dtype=dtype)
    with torch.no_grad():
        student[0, :, 2] = -math.inf  # a row of s below
        student[1, 4, 0] = -math.inf  # one class of a row
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def strided(backend):
        return lambda s: loss(backend, mask=mask, reduction="mean")(s.mT[:, ::2], teacher.mT[:, ::2])

    floor = (1e-2 if dtype is torch.bfloat16 else 2e-3, 1e-5)
    check_against_reference(strided("cpu"), strided("reference"), (student,), floor=floor)


def test_masked_nan_is_not_read_and_nan_stays_in_its_problem():
    student, teacher = logits(2, 4, 5, dtype=torch.float32)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = False
    poisoned = teacher.clone()
    poisoned[0, 1] = math.nan
    got, want = (sinkhorn_kd_loss(student, t, mask=mask, backend="cpu", **SHORT) for t in (poisoned, teacher))
    assert torch.equal(got, want) and torch.equal(*(torch.autograd.grad(x, student)[0] for x in (got, want)))
    poisoned[0, 0, 3] = math.nan
    rows = sinkhorn_kd_loss(student, poisoned, mask=mask, reduction="none", backend="cpu", **SHORT)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert rows.isnan().tolist() == [True, False] and grad[1].isfinite().all() and not grad[0, 1].any()


def test_no_kept_row_is_zero():
    student, teacher = logits(3, 4, dtype=torch.float32)
    value = sinkhorn_kd_loss(student, teacher, mask=torch.zeros(3).bool(), reduction="mean", backend="cpu", **SHORT)
    assert value.item() == 0.0 and not torch.autograd.grad(value, student)[0].any()
