"""The row losses: what stands around the op (T^2, reductions, masks, weights, labels, twins). The op itself: ops/test_divergence.py.

Truth is written out here in float64 with torch's own functions, never with the op.
"""

from __future__ import annotations

import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import losses
from kdfast.losses import (
    DistillationLoss,
    DivergenceLoss,
    DKDLoss,
    KDLoss,
    LossModule,
    LossOutput,
    distillation_loss,
    divergence_loss,
    dkd_loss,
    kd_loss,
)

INFO = kdfast.backend_info()
HAS_CORE = INFO["compiled"]
FUSED = HAS_CORE and INFO["forced_backend"] != "reference"  # what backend=None takes
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CORE, reason="no compiled core"))]
N, C = 7, 11


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student (a leaf) and teacher logits that differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def classes(*shape: int, count: int = C, seed: int = 0) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def kl_rows(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def dkd_rows(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Target and rest as two classes, and the rest renormalised by leaving the target's column out."""
    total = []
    for s, t, y in zip(student / temperature, teacher / temperature, labels.tolist()):
        q, p = s.softmax(-1), t.softmax(-1)
        pair_q, pair_p = torch.stack((q[y], 1 - q[y])), torch.stack((p[y], 1 - p[y]))
        rest = [i for i in range(len(s)) if i != y]
        log_q, log_p = s[rest].log_softmax(-1), t[rest].log_softmax(-1)
        target = (pair_p * (pair_p.log() - pair_q.log())).sum()
        total.append(alpha * target + beta * (log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(total)


def gradient(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def same(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    assert want.abs().max() > 1e-3, "a trivial expected value proves nothing"
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


# ---------------------------------------------------------------- T^2 and defaults
def test_kd_loss_is_the_formula_everybody_writes(backend):
    student, teacher = pair(N, C)
    want = 16 * F.kl_div(F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1), reduction="batchmean")
    got = kd_loss(student, teacher, backend=backend)
    same(got, want)
    same(*gradient(got, student), *gradient(want, student))


def test_t2_only_where_asked(backend):
    student, teacher = pair(N, C)
    rows = kl_rows(student, teacher, 3.0).mean()
    same(divergence_loss(student, teacher, temperature=3.0, backend=backend), rows)
    same(divergence_loss(student, teacher, temperature=3.0, scale_t2=True, backend=backend), 9 * rows)
    same(kd_loss(student, teacher, temperature=3.0, scale_t2=False, backend=backend), rows)
    out = distillation_loss(
        student, teacher, classes(N), temperature=3.0, ce_weight=0.0, kd_weight=1.0, backend=backend
    )
    same(out.loss, 9 * rows)
    same(out.parts["kd"], 9 * rows)


def test_gradient_keeps_its_size_with_t2(backend):
    """The reason for T^2: as T grows the gradient of the scaled loss tends to a constant, of the plain one to 0."""
    student, teacher = pair(N, C)
    norms = {
        t: gradient(kd_loss(student, teacher, temperature=t, backend=backend), student)[0].norm() for t in (50.0, 100.0)
    }
    torch.testing.assert_close(norms[50.0], norms[100.0], rtol=0.05, atol=0.0)
    plain = [
        gradient(divergence_loss(student, teacher, temperature=t, backend=backend), student)[0].norm()
        for t in (50.0, 100.0)
    ]
    assert plain[0] / plain[1] == pytest.approx(4, rel=0.05)


def test_temperature_per_row(backend):
    student, teacher = pair(N, C)
    temperature = torch.linspace(0.5, 5.0, N, dtype=torch.float64)
    want = torch.stack([kl_rows(student[i], teacher[i], float(t)) * t**2 for i, t in enumerate(temperature)])
    got = kd_loss(student, teacher, temperature=temperature, reduction="none", backend=backend)
    same(got, want)
    mean = kd_loss(student, teacher, temperature=temperature, backend=backend)
    same(mean, want.mean())
    same(*gradient(mean, student), *gradient(want.mean(), student))


# ---------------------------------------------------------------- reductions, masks, weights
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduction(backend, reduction, masked, weighted):
    student, teacher = pair(2, N, C)
    mask = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    weight = torch.linspace(0.1, 2.0, 2 * N, dtype=torch.float64).reshape(2, N) if weighted else None
    rows = kl_rows(student, teacher)
    count = 2 * N
    if weight is not None:
        rows = rows * weight
    if mask is not None:
        rows, count = torch.where(mask, rows, 0.0), int(mask.sum())
        assert 0 < count < 2 * N
    want = {"mean": rows.sum() / count, "sum": rows.sum(), "none": rows}[reduction]
    got = divergence_loss(student, teacher, mask=mask, weight=weight, reduction=reduction, backend=backend)
    assert got.shape == want.shape
    same(got, want)
    upstream = torch.linspace(-1.0, 2.0, want.numel(), dtype=torch.float64).reshape(want.shape)
    same(*torch.autograd.grad(got, student, upstream), *torch.autograd.grad(want, student, upstream))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_kept_row_is_exactly_zero(backend, reduction):
    student, teacher = pair(N, C)
    nothing = torch.zeros(N, dtype=torch.bool)
    labels = classes(N)
    for got in (
        kd_loss(student, teacher, mask=nothing, reduction=reduction, backend=backend),
        dkd_loss(student, teacher, labels, mask=nothing, reduction=reduction, backend=backend),
        distillation_loss(student, teacher, labels, mask=nothing, reduction=reduction, backend=backend).loss,
        distillation_loss(student, teacher, torch.full((N,), -100), reduction=reduction, backend=backend).loss,
    ):
        assert bool((got == 0).all())
        (grad,) = gradient(got.sum(), student)  # the graph is there: backward must not raise
        assert bool((grad == 0).all())


def test_masked_rows_may_hold_anything(backend):
    """-inf and NaN in rows that are not kept, and NaN as their weight, change neither the loss nor the gradient."""
    student, teacher = pair(N, C)
    mask = torch.arange(N) % 2 == 0
    want = kl_rows(student, teacher)[mask].mean()
    (want_grad,) = gradient(want, student)
    dirty_s, dirty_t = student.detach().clone(), teacher.clone()
    dirty_s[~mask], dirty_t[~mask] = -math.inf, math.nan
    dirty_s.requires_grad_()
    weight = torch.where(mask, 1.0, math.nan)
    got = divergence_loss(dirty_s, dirty_t, mask=mask, weight=weight, backend=backend)
    same(got, want)
    same(*gradient(got, dirty_s), want_grad)


def test_empty_batch(backend):
    student = torch.zeros(0, C, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = kd_loss(student, torch.zeros(0, C), reduction=reduction, backend=backend)
        assert loss.item() == 0.0
        assert gradient(loss, student)[0].shape == (0, C)
    assert kd_loss(student, torch.zeros(0, C), reduction="none", backend=backend).shape == (0,)


def test_mean_is_over_rows_whatever_the_shape(backend):
    student, teacher = pair(2, 3, 5, C)
    flat = divergence_loss(student.reshape(-1, C), teacher.reshape(-1, C), backend=backend)
    same(divergence_loss(student, teacher, backend=backend), flat)


def test_dim_1_reads_maps(backend):
    student, teacher = pair(2, C, 3, 5)
    labels, mask = classes(2, 3, 5), classes(2, 3, 5, count=2).bool()
    moved_s, moved_t = student.movedim(1, -1), teacher.movedim(1, -1)
    same(
        kd_loss(student, teacher, dim=1, mask=mask, backend=backend),
        16 * kl_rows(moved_s, moved_t, 4.0)[mask].mean(),
    )
    out = distillation_loss(student, teacher, labels, dim=1, backend=backend)
    want = 0.5 * F.cross_entropy(student, labels) + 0.5 * kl_rows(moved_s, moved_t).mean()
    same(out.loss, want)
    same(*gradient(out.loss, student), *gradient(want, student))


def test_vocab_size_cuts_both(backend):
    student, _ = pair(N, C)
    _, teacher = pair(N, C + 5, seed=1)
    size = C - 2
    labels = classes(N, count=size)
    cut_s, cut_t = student[:, :size], teacher[:, :size]
    for got, want in (
        (kd_loss(student, teacher, vocab_size=size, backend=backend), 16 * kl_rows(cut_s, cut_t, 4.0).mean()),
        (
            distillation_loss(student, teacher, labels, vocab_size=size, backend=backend).loss,
            0.5 * F.cross_entropy(cut_s, labels) + 0.5 * kl_rows(cut_s, cut_t).mean(),
        ),
    ):
        same(got, want)
        (grad,) = gradient(got, student)
        same(grad, *gradient(want, student))
        assert bool((grad[:, size:] == 0).all())


def test_teacher_gradient_only_on_demand(backend):
    student, teacher = pair(N, C)
    teacher.requires_grad_()
    silent = kd_loss(student, teacher, backend=backend)
    assert torch.autograd.grad(silent, teacher, allow_unused=True)[0] is None
    got = kd_loss(student, teacher, teacher_grad=True, backend=backend)
    want = 16 * kl_rows(student, teacher, 4.0).mean()
    for grad, wanted in zip(gradient(got, student, teacher), gradient(want, student, teacher)):
        same(grad, wanted)


def test_upstream_factor_and_second_backward(backend):
    """The gradient may be stored in the forward; it must survive a factor, a second backward and a second loss."""
    student, teacher = pair(N, C)
    labels = classes(N)
    for loss, want in (
        (kd_loss(student, teacher, backend=backend), 16 * kl_rows(student, teacher, 4.0).mean()),
        (
            distillation_loss(student, teacher, labels, backend=backend).loss,
            0.5 * F.cross_entropy(student, labels) + 0.5 * kl_rows(student, teacher).mean(),
        ),
    ):
        (wanted,) = gradient(want, student)
        for factor in (1.0, 3.0, 1.0):
            got = torch.autograd.grad(loss, student, torch.tensor(factor, dtype=torch.float64), retain_graph=True)[0]
            same(got, factor * wanted)
        leaf = student.detach().requires_grad_()
        (
            kd_loss(leaf, teacher, backend=backend) + divergence_loss(leaf, teacher, kind="js", backend=backend)
        ).backward()
        alone = (
            gradient(kd_loss(student, teacher, backend=backend), student)[0]
            + gradient(divergence_loss(student, teacher, kind="js", backend=backend), student)[0]
        )
        same(leaf.grad, alone)


# ---------------------------------------------------------------- dkd
@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 2.0, 1.0), (3.0, 0.0, 0.7)])
def test_dkd_loss(backend, alpha, beta, temperature):
    student, teacher = pair(N, C)
    labels = classes(N)
    got = dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature, backend=backend)
    want = temperature**2 * dkd_rows(student, teacher, labels, alpha, beta, temperature).mean()
    same(got, want)
    same(*gradient(got, student), *gradient(want, student))


def test_dkd_with_beta_one_minus_target_is_kd(backend):
    """Zhao et al., eq. 6: KD = TCKD + (1 - p_target) NCKD. One row at a time, since that weight differs by row."""
    student, teacher = pair(N, C)
    labels = classes(N)
    rest = 1 - (teacher / 4).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    for i in range(N):
        got = dkd_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], beta=float(rest[i]), backend=backend)
        torch.testing.assert_close(got, 16 * kl_rows(student[i], teacher[i], 4.0), rtol=1e-9, atol=1e-12)


def test_dkd_with_two_classes_has_no_other_part(backend):
    student, teacher = pair(N, 2)
    labels = classes(N, count=2)
    got = dkd_loss(student, teacher, labels, backend=backend)
    same(got, 16 * kl_rows(student, teacher, 4.0).mean())
    assert dkd_loss(student, teacher, labels, alpha=0.0, backend=backend).item() == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------- cross-entropy and divergence in one pass
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_distillation_loss(backend, reduction, smoothing, kind):
    student, teacher = pair(N, C)
    labels = classes(N)
    labels[2] = labels[5] = -100
    out = distillation_loss(
        student, teacher, labels, kind=kind, temperature=2.0, ce_weight=0.3, kd_weight=0.9, label_smoothing=smoothing,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    keep = labels != -100
    ce = F.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
    kd = 4 * (kl_rows(student, teacher, 2.0) if kind == "forward_kl" else kl_rows(teacher, student, 2.0))
    kd = torch.where(keep, kd, 0.0)
    if reduction != "none":
        count = int(keep.sum()) if reduction == "mean" else 1
        ce, kd = ce.sum() / count, kd.sum() / count
    want = 0.3 * ce + 0.9 * kd
    assert isinstance(out, LossOutput) and set(out.parts) == {"ce", "kd"}
    same(out.loss, want)
    same(out.parts["ce"], ce.detach())
    same(out.parts["kd"], kd.detach())
    assert not out.parts["ce"].requires_grad and not out.parts["kd"].requires_grad
    same(*gradient(out.loss.sum(), student), *gradient(want.sum(), student))


def test_both_terms_drop_the_same_rows(backend):
    student, teacher = pair(N, C)
    labels = classes(N)
    labels[0] = 255
    mask = torch.arange(N) != 3
    weight = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    out = distillation_loss(student, teacher, labels, ignore_index=255, mask=mask, weight=weight, backend=backend)
    keep = (torch.arange(N) != 0) & mask
    ce = F.cross_entropy(student[keep], labels[keep], reduction="none") * weight[keep]
    kd = kl_rows(student[keep], teacher[keep]) * weight[keep]
    same(out.loss, 0.5 * ce.mean() + 0.5 * kd.mean())


def test_one_pass_equals_two_losses(backend):
    student, teacher = pair(2, N, C)
    labels = classes(2, N)
    out = distillation_loss(student, teacher, labels, kind="js", backend=backend)
    two = 0.5 * F.cross_entropy(student.reshape(-1, C), labels.reshape(-1)) + 0.5 * divergence_loss(
        student, teacher, kind="js", backend=backend
    )
    same(out.loss, two)
    same(*gradient(out.loss, student), *gradient(two, student))


def test_distillation_with_dkd(backend):
    student, teacher = pair(N, C)
    labels = classes(N)
    labels[1] = -100
    keep = labels != -100
    out = distillation_loss(student, teacher, labels, kind="dkd", beta=(1.0, 8.0), temperature=4.0, backend=backend)
    kd = 16 * dkd_rows(student[keep], teacher[keep], labels[keep], 1.0, 8.0, 4.0).mean()
    want = 0.5 * F.cross_entropy(student, labels) + 0.5 * kd
    same(out.loss, want)
    same(*gradient(out.loss, student), *gradient(want, student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_float32_and_gradients_have_the_inputs_dtype(backend, dtype):
    student, teacher = pair(N, C, dtype=dtype)
    labels = classes(N)
    truth_s, truth_t = student.detach().double().requires_grad_(), teacher.double()
    for got, want in (
        (kd_loss(student, teacher, backend=backend), 16 * kl_rows(truth_s, truth_t, 4.0).mean()),
        (
            distillation_loss(student, teacher, labels, backend=backend).loss,
            0.5 * F.cross_entropy(truth_s, labels) + 0.5 * kl_rows(truth_s, truth_t).mean(),
        ),
    ):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        (grad,) = gradient(got, student)
        assert grad.dtype == dtype
        # One rounding to the input's dtype: half a unit in the last place, plus float32 arithmetic. Autograd of the reference
        # rounds each of the two terms and their sum, and the terms may cancel: a unit of the largest entry.
        (truth,) = gradient(want, truth_s)
        atol = 1e-6 if backend == "cpu" else torch.finfo(dtype).eps * truth.abs().max().item()
        torch.testing.assert_close(grad.double(), truth, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=atol)


# ---------------------------------------------------------------- twins
TWINS = [
    (DivergenceLoss, divergence_loss),
    (KDLoss, kd_loss),
    (DKDLoss, dkd_loss),
    (DistillationLoss, distillation_loss),
]


@pytest.mark.parametrize(("twin", "function"), TWINS)
def test_twin(twin: type[LossModule], function):
    student, teacher = pair(N, C)
    tensors = (student, teacher, classes(N))[: 3 if "labels" in list(inspect.signature(function).parameters)[:3] else 2]
    got, want = twin(temperature=2.0, reduction="sum")(*tensors), function(*tensors, temperature=2.0, reduction="sum")
    got, want = (x.loss if isinstance(x, LossOutput) else x for x in (got, want))
    assert torch.equal(got, want)
    assert not torch.equal(got, torch.as_tensor(0.0))

    with pytest.raises(TypeError, match=r"temprature.*expected some of .*temperature"):
        twin(temprature=2.0)
    with pytest.raises(TypeError):
        twin(2.0)  # options are keyword-only

    keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert list(inspect.signature(twin).parameters.values()) == keyword_only
    assert function.__name__ in twin.__doc__ and inspect.getdoc(function) in twin.__doc__
    assert "temperature=2.0" in repr(twin(temperature=2.0))


def test_every_loss_has_its_twin():
    functions = {twin.function for name in losses.__all__ if isinstance(twin := getattr(losses, name), type)
                 and issubclass(twin, LossModule) and twin is not LossModule}  # fmt: skip
    public = {getattr(losses, name) for name in losses.__all__ if name.endswith("_loss")}
    assert public and public == functions & public


def test_twin_call_options_win():
    student, teacher = pair(N, C)
    module = KDLoss(temperature=2.0, scale_t2=False)
    assert torch.equal(
        module(student, teacher, temperature=5.0), kd_loss(student, teacher, temperature=5.0, scale_t2=False)
    )
    assert torch.equal(module(student, teacher), kd_loss(student, teacher, temperature=2.0, scale_t2=False))


def test_twin_tensor_options_are_buffers():
    student, teacher = pair(N, C)
    weight = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    module = KDLoss(weight=weight)
    assert "weight" in dict(module.named_buffers()) and "weight" in module.state_dict()
    assert torch.equal(module(student, teacher), kd_loss(student, teacher, weight=weight))
    assert module.to(torch.float32).weight.dtype == torch.float32
    assert list(module.parameters()) == []


@pytest.mark.parametrize("twin", [twin for twin, _ in TWINS])
def test_twin_pickles(twin):
    student, teacher = pair(N, C)
    labels = () if twin in (DivergenceLoss, KDLoss) else (classes(N),)
    module = twin(temperature=2.5, weight=torch.linspace(0.1, 1.0, N, dtype=torch.float64))
    again = pickle.loads(pickle.dumps(module))
    got, want = again(student, teacher, *labels), module(student, teacher, *labels)
    got, want = (x.loss if isinstance(x, LossOutput) else x for x in (got, want))
    assert torch.equal(got, want)


# ---------------------------------------------------------------- bad input
S, T, Y = torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)
BAD = {
    "reduction": (lambda: kd_loss(S, T, reduction="batchmean"), ValueError, r"reduction: expected one of mean, sum, none, got 'batchmean'"),
    "kind": (lambda: divergence_loss(S, T, kind="kl"), ValueError, r"kind: expected one of forward_kl.*got 'kl'"),
    "temperature zero": (lambda: kd_loss(S, T, temperature=0.0), ValueError, r"temperature: .*got 0"),
    "temperature negative": (lambda: kd_loss(S, T, temperature=-1.0), ValueError, r"temperature: .*got -1"),
    "temperature infinite": (lambda: kd_loss(S, T, temperature=math.inf), ValueError, r"temperature: .*got inf"),
    "temperature text": (lambda: kd_loss(S, T, temperature="4"), TypeError, r"temperature: expected a number, got str"),
    "temperature shape": (lambda: kd_loss(S, T, temperature=torch.ones(3)), ValueError, r"temperature: expected shape \(4,\).*got \(3,\)"),
    "beta": (lambda: divergence_loss(S, T, kind="js", beta=1.5), ValueError, r"beta: .*got 1\.5"),
    "beta pair": (lambda: divergence_loss(S, T, kind="dkd", beta=2.0, labels=Y), ValueError, r"beta: expected a pair"),
    "teacher shape": (lambda: kd_loss(S, torch.zeros(3, 5)), ValueError, r"teacher: expected shape \(4, 5\), got \(3, 5\)"),
    "teacher width": (lambda: kd_loss(S, torch.zeros(4, 6)), ValueError, r"teacher: expected 5 classes.*got 6.*vocab_size"),
    "vocab_size large": (lambda: kd_loss(S, torch.zeros(4, 6), vocab_size=6), ValueError, r"vocab_size: expected an int from 1 to 5.*got 6"),
    "vocab_size zero": (lambda: kd_loss(S, T, vocab_size=0), ValueError, r"vocab_size: expected an int from 1 to 5.*got 0"),
    "student type": (lambda: kd_loss([1.0], T), TypeError, r"student: expected a Tensor, got list"),
    "teacher type": (lambda: kd_loss(S, [1.0]), TypeError, r"teacher: expected a Tensor, got list"),
    "student dtype": (lambda: kd_loss(S.long(), T), TypeError, r"student: expected float16.*got torch\.int64"),
    "mask dtype": (lambda: kd_loss(S, T, mask=Y), TypeError, r"mask: expected bool \(True = keep\), got torch\.int64"),
    "mask shape": (lambda: kd_loss(S, T, mask=torch.ones(3, dtype=torch.bool)), ValueError, r"mask: expected shape \(4,\).*got \(3,\)"),
    "mask type": (lambda: kd_loss(S, T, mask=[True] * 4), TypeError, r"mask: expected a Tensor, got list"),
    "weight shape": (lambda: kd_loss(S, T, weight=torch.ones(4, 5)), ValueError, r"weight: expected shape \(4,\).*got \(4, 5\)"),
    "weight shape with mask": (
        lambda: kd_loss(S, T, weight=torch.ones(5), mask=Y == 0), ValueError, r"weight: expected shape \(4,\).*got \(5,\)",
    ),
    "labels missing": (lambda: divergence_loss(S, T, kind="dkd", beta=(1.0, 8.0)), ValueError, r"labels: expected a Tensor for kind='dkd'"),
    "labels unread": (lambda: divergence_loss(S, T, labels=Y), ValueError, r"labels: only kind='dkd' reads them"),
    "labels dtype": (lambda: dkd_loss(S, T, Y.float()), TypeError, r"labels: expected integers, got torch\.float32"),
    "labels shape": (lambda: dkd_loss(S, T, Y[:3]), ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
    "labels shape, distillation": (lambda: distillation_loss(S, T, Y[:3]), ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
    "labels list, distillation": (lambda: distillation_loss(S, T, [0] * 4), TypeError, r"labels: expected a Tensor of integers, got list"),
    "label_smoothing": (lambda: distillation_loss(S, T, Y, label_smoothing=1.5), ValueError, r"label_smoothing: .*got 1\.5"),
    "ce_weight": (lambda: distillation_loss(S, T, Y, ce_weight=math.nan), ValueError, r"ce_weight: .*got nan"),
    "dim": (lambda: kd_loss(S, T, dim=2), ValueError, r"dim: expected an axis of a 2-dimensional tensor, got 2"),
    "negative dim": (lambda: kd_loss(S, T, dim=-3), ValueError, r"dim: expected an axis of a 2-dimensional tensor, got -3"),
    "no class": (lambda: kd_loss(torch.zeros(4, 0), torch.zeros(4, 0)), ValueError, r"student: expected at least one class"),
    "no dimension": (lambda: kd_loss(torch.tensor(1.0), torch.tensor(1.0)), ValueError, r"dim: expected an axis of a 0-dimensional tensor"),
    "backend": (lambda: kd_loss(S, T, backend="gpu"), ValueError, r"backend: expected one of .*got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not HAS_CORE, reason="values are checked by the compiled core")
@pytest.mark.parametrize("label", [-1, 5, 10**12])
def test_labels_out_of_range_raise(label):
    labels = Y.clone()
    labels[2] = label
    for call in (
        lambda: dkd_loss(S, T, labels, backend="cpu"),
        lambda: distillation_loss(S, T, labels, backend="cpu"),
    ):
        with pytest.raises(ValueError, match="labels"):
            call()


@pytest.mark.skipif(not HAS_CORE, reason="values are checked by the compiled core")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_bad_logits_raise(value, which):
    pair_of = [torch.randn(4, 5), torch.randn(4, 5)]
    pair_of[which][1, 3] = value
    with pytest.raises(ValueError, match=("student", "teacher")[which]):
        kd_loss(*pair_of, backend="cpu")


# ---------------------------------------------------------------- hypothesis
@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    offset=st.sampled_from([0.0, -50.0, 1e4]),
    masked=st.booleans(),
    kind=st.sampled_from(
        ["forward_kl", "reverse_kl", "js", "tvd", "alpha", "jeffreys", "skew_forward_kl", "skew_reverse_kl"]
    ),
    seed=st.integers(0, 10_000),
)
def test_any_shape_against_float64(rows, width, temperature, spread, offset, masked, kind, seed):
    """The chosen backend in float32 against the reference in float64; never negative; gradient rows sum to 0."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, width, generator=generator) * 3 + offset
    student = (base + spread * torch.randn(rows, width, generator=generator)).requires_grad_()
    mask = torch.rand(rows, generator=generator) < 0.5 if masked else None
    options = {"kind": kind, "temperature": temperature, "mask": mask, "scale_t2": True}
    got = divergence_loss(student, base, **options)
    truth_leaf = student.detach().double().requires_grad_()
    want = divergence_loss(truth_leaf, base.double(), **options, backend="reference")
    (grad,) = gradient(got, student)
    (truth,) = gradient(want, truth_leaf)
    # float32 carries logits / T to eps relative, which is eps times their size in log q: nothing can be closer than that.
    # The reference in float32, where it runs, rounds once more and loses the small divergences to cancellation.
    size = 1 + max((float(x.detach().abs().max()) for x in (student, base)), default=0.0) / temperature if rows else 1.0
    slack = 8 * torch.finfo(torch.float32).eps * size
    # tvd is of first order in the difference of the log-sum-exps, so its absolute error is eps like theirs; the kinds of
    # second order keep their digits (ops/test_accuracy.py).
    floor = 1e-3 if FUSED and kind != "tvd" else 1.0
    assert got.item() == pytest.approx(want.item(), rel=slack, abs=slack * floor * temperature**2)
    if rows:
        largest = max(float(truth.abs().max()), temperature)  # T q and T p are subtracted
        torch.testing.assert_close(grad.double(), truth, rtol=slack, atol=slack * largest)
        assert grad.sum(-1).abs().max() <= slack * largest * width
    if FUSED:
        assert got.item() >= 0.0


# ---------------------------------------------------------------- found by review: one rule on every path
PATHS = [dict(reduction="mean"), dict(reduction="none"), dict(reduction="mean", backend="reference")]


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_a_masked_row_of_minus_infinity_or_a_bad_label_never_spoils_the_rest(options):
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    student[1] = -math.inf
    loss = distillation_loss(student, teacher, torch.tensor([0, 1, 2]), **options).loss
    assert loss.isfinite().all() and loss.max() > 0
    mask = torch.tensor([True, True, False])
    assert dkd_loss(teacher, teacher + 1, torch.tensor([1, 0, -100]), mask=mask, **options).isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_masked_rows_are_not_read_by_a_mean(backend):
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    want = kd_loss(student[1:], teacher[1:], backend=backend)
    student[0] = math.nan
    student.requires_grad_()
    got = kd_loss(student, teacher, mask=torch.tensor([False, True, True]), backend=backend)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_term_of_weight_zero_is_left_out_even_when_infinite(backend):
    student = torch.randn(2, 4)
    student[:, 0] = -math.inf
    labels = torch.tensor([1, 2])
    for reduction in ("mean", "none"):
        loss = distillation_loss(
            student, torch.randn(2, 4), labels, kd_weight=0.0, reduction=reduction, backend=backend
        ).loss
        assert loss.isfinite().all() and loss.max() > 0


def test_narrow_types_of_labels_weights_and_temperatures():
    student, teacher = torch.randn(70000, 4), torch.randn(70000, 4)
    mask, weight = torch.ones(70000, dtype=torch.bool), torch.full((70000,), 1e-3)
    want = kd_loss(student, teacher, mask=mask, weight=weight)
    torch.testing.assert_close(kd_loss(student, teacher, mask=mask, weight=weight.half()), want, rtol=1e-3, atol=0)
    wide = torch.randn(2, 200), torch.randn(2, 200)
    labels = torch.tensor([156, 3])  # as uint8, 156 is -100
    torch.testing.assert_close(
        distillation_loss(*wide, labels.to(torch.uint8)).loss, distillation_loss(*wide, labels).loss
    )
    hot = torch.full((2,), 300.0)
    torch.testing.assert_close(kd_loss(*wide, temperature=hot.half()), kd_loss(*wide, temperature=hot))


def test_learned_and_wrong_options():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    module = KDLoss(temperature=torch.nn.Parameter(torch.full((3,), 2.0)))
    (parameter,) = module.parameters()
    module(student, teacher).backward()
    assert parameter.grad is not None and parameter.grad.abs().max() > 0
    with pytest.raises(ValueError, match="temperature: expected positive finite values"):
        kd_loss(student, teacher, temperature=torch.tensor([-2.0, 1.0, 1.0]))
    with pytest.raises(TypeError, match="temperature: expected a number, got str"):
        distillation_loss(student, teacher, torch.zeros(3).long(), temperature="4")
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\)"):
        distillation_loss(student, teacher, torch.zeros(3).long(), mask=torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match="dim: expected an int, got str"):
        kd_loss(student, teacher, dim="c")
    many = torch.randn(2, 1, 1, 1, 1, 1, 1, 1, 1, 4)
    assert kd_loss(many, many + 1).isfinite()  # more axes than the core takes: the reference


@pytest.mark.parametrize("width", [12, 70])  # rows one per lane, and vectors along the classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_divergence_of_weight_0_leaves_the_gradient_of_cross_entropy(backend, width, dtype):
    student, teacher = (t.to(dtype) for t in pair(40, width))
    teacher[:, 3] = -math.inf  # reverse KL is infinite
    student, labels = student.detach().requires_grad_(), torch.arange(40) % 3
    out = distillation_loss(
        student, teacher, labels, kind="reverse_kl", ce_weight=1.0, kd_weight=0.0, backend=backend
    )  # fmt: skip
    want = F.cross_entropy(student, labels)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (out.loss, want)))


def test_a_module_takes_one_tensor_for_two_options():
    student, teacher = pair(N, C)
    both = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    twin = losses.KDLoss(temperature=both, weight=both)
    torch.testing.assert_close(twin(student, teacher), kd_loss(student, teacher, temperature=both, weight=both))
