"""Losses late in training, when teacher and student nearly agree: correct digits where the textbook sums have none.

Teacher logits = student + sigma noise, V = 131072, float32, against float64. Bounds: 1e-4 relative at sigma = 1e-3, where
the KL is 5e-7, and 1e-5 at 1e-2; never negative. The table with other forms: `python -m benchmarks.accuracy`.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.losses import distillation_loss, divergence_loss
from kdfast.ops import divergence

pytestmark = pytest.mark.skipif(not kdfast.backend_info()["compiled"], reason="a property of the compiled core")

CLASSES, ROWS = 131072, 8
BOUNDS = {1e-3: 1e-4, 1e-2: 1e-5, 0.3: 1e-5}


@functools.cache
def logits(sigma: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(ROWS, CLASSES, generator=generator)
    return student, student + sigma * torch.randn(ROWS, CLASSES, generator=generator)


def truth(kind: str, sigma: float) -> Tensor:
    student, teacher = logits(sigma)
    return divergence(student.double(), teacher.double(), kind=kind, backend="reference")


@pytest.mark.parametrize("sigma", BOUNDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "jeffreys"])
def test_rows_near_agreement(kind, sigma):
    student, teacher = logits(sigma)
    want = truth(kind, sigma)
    got = divergence(student, teacher, kind=kind, backend="cpu")
    assert ((got.double() - want) / want).abs().max() <= BOUNDS[sigma]
    assert bool((got > 0).all())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_reduced_loss_near_agreement(kind):
    """The entry that makes its gradient in the forward has its own sums."""
    student, teacher = logits(1e-3)
    got = divergence_loss(student.clone().requires_grad_(), teacher, kind=kind, backend="cpu")
    assert got.item() == pytest.approx(truth(kind, 1e-3).mean().item(), rel=1e-4)


def test_the_textbook_form_has_no_digits_here():
    """Why the bounds are not trivial: F.kl_div misses them by four orders of magnitude on the same inputs."""
    student, teacher = logits(1e-3)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    want = truth("forward_kl", 1e-3)
    assert ((rows.double() - want) / want).abs().max() > 0.1


@pytest.mark.parametrize(
    "kind",
    ["forward_kl", "reverse_kl", "js", "js_rescaled", "jeffreys", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_negative_and_zero_for_equal_logits(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(64, 4099, generator=generator) * 4
    for sigma in (1e-6, 1e-4, 1e-2, 1.0, 20.0):
        student = (base + sigma * torch.randn(base.shape, generator=generator)).to(dtype)
        assert bool((divergence(student, base.to(dtype), kind=kind, backend="cpu") >= 0).all())
    same = base.to(dtype)
    assert bool((divergence(same, same.clone(), kind=kind, backend="cpu") == 0).all())


@pytest.mark.parametrize("shape", [(64, 1000), (2, 7, 9, 9)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "alpha"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_logits_far_from_zero(shape, kind, temperature):
    """A constant added to a row changes nothing, and should cost no digits either: exp(x - lse) with lse = 1e4 in float32
    would lose four of them. The teacher is far from the student, too."""
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(shape, generator=generator) * 3 + 1e4
    teacher = student - 1.5e4 + torch.randn(shape, generator=generator)
    options = {"kind": kind, "temperature": temperature, "dim": 1}
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    got = divergence(leaf, teacher, backend="cpu", **options)
    want = divergence(exact, teacher.double(), backend="reference", **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (grad,), (truth,) = torch.autograd.grad(got.sum(), leaf), torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 100), (2, 7, 9, 9)])
def test_cross_entropy_far_from_zero(shape):
    generator = torch.Generator().manual_seed(6)
    student = torch.randn(shape, generator=generator) * 3 + 1e4
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    for smoothing in (0.0, 0.1):
        leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": smoothing, "dim": 1}
        got = distillation_loss(leaf, student + 1, labels, backend="cpu", **options).loss
        want = F.cross_entropy(exact, labels, label_smoothing=smoothing)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        (grad,), (truth,) = torch.autograd.grad(got, leaf), torch.autograd.grad(want, exact)
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-8)
