"""kdfast.ops.divergence: closed forms, the float64 reference by error budget, layouts, -inf rules, modes, bad input."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, check_mode
from tolerances import assert_within_budget, check_against_reference

import kdfast
from kdfast.ops.divergence import KINDS, _choose, divergence, divergence_reference, divergence_total

INF = math.inf
F_KINDS = [k for k in KINDS if k not in ("dkd", "binary")]
# every kind with a parameter off its default too
CASES = [(k, 0.5) for k in KINDS if k != "dkd"] + [
    ("dkd", (1.0, 8.0)), ("dkd", (0.7, 0.0)), ("jeffreys", 0.2), ("js", 0.1), ("js", 0.0), ("js", 1.0), ("js_rescaled", 0.9),
    ("skew_forward_kl", 0.1), ("skew_forward_kl", 0.0), ("skew_reverse_kl", 0.9), ("skew_reverse_kl", 0.0),
    ("alpha", 0.0), ("alpha", 1.0), ("alpha", 2.0), ("alpha", -1.0), ("alpha", 0.999),
]  # fmt: skip
FUSED = [name for name in ("cpu",) if kdfast.backend_info()[name]["available"]]


# Floors (relative, absolute as a share of the largest). The logits here reach 12, so x - lse is rounded by 6 eps and every
# probability carries that relative error whatever the formula. A divergence of 0.01 is the rest of terms of 0.2 that cancel,
# a gradient the rest of probabilities that do: float32 measured 6e-6 of an output, 2e-5 of the largest gradient. In
# float64 the reference is the truth itself and has the same cancellation: 1e-16 of a divergence of 2e-9, 2e-16 of a gradient of 3e-9.
FLOORS = {
    torch.float32: ((1e-5, 1e-6), (1e-5, 2e-5)), torch.float64: ((1e-7, 1e-13), (1e-6, 1e-13)),
    torch.bfloat16: ((1e-5, 1e-6), (8e-3, 2e-5)), torch.float16: ((1e-5, 1e-6), (1e-3, 2e-5)),
}  # fmt: skip


def logits(*shape, dtype=torch.float32, sigma=0.7, seed=0, scale=3.0):
    """A student, and a teacher at distance sigma from it, so that small and large differences both occur."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    teacher = student + sigma * torch.randn(shape, generator=g, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def some_labels(kind, shape, classes, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed)) if kind == "dkd" else None


# ---------------------------------------------------------------- closed forms and invariants
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_two_classes_by_hand(backend):
    """p = (3/4, 1/4), q = (1/2, 1/2): everything has a closed form."""
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)
    js = 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)) + 0.5 * (
        0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    )
    hellinger = 4 * (1 - math.sqrt(0.375) - math.sqrt(0.125))  # alpha = 1/2
    chi2 = (0.75**2 / 0.5 + 0.25**2 / 0.5 - 1) / 2  # alpha = 2
    skew = 0.75 * math.log(0.75 / (0.1 * 0.75 + 0.9 * 0.5)) + 0.25 * math.log(0.25 / (0.1 * 0.25 + 0.9 * 0.5))
    want = {
        ("forward_kl", 0.5): forward, ("reverse_kl", 0.5): reverse, ("jeffreys", 0.5): forward + reverse, ("js", 0.5): js,
        ("js_rescaled", 0.5): 4 * js, ("tvd", 0.5): 0.25, ("alpha", 0.5): hellinger, ("alpha", 2.0): chi2,
        ("skew_forward_kl", 0.1): skew, ("dkd", (2.0, 5.0)): 2 * forward,
        ("binary", 0.5): 0.75 * math.log(1.5) + 0.25 * math.log(0.5),  # the second class has logit 0 on both sides
    }  # fmt: skip
    for (kind, beta), value in want.items():
        labels = torch.tensor([0]) if kind == "dkd" else None
        got = divergence(student, teacher, kind=kind, beta=beta, labels=labels, backend=backend)
        assert got.item() == pytest.approx(value, rel=1e-13), kind


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("kind", F_KINDS)
def test_shifting_logits_changes_nothing_and_gradients_sum_to_zero(kind, backend):
    student, teacher = logits(4, 33, dtype=torch.float64)
    rows = divergence(student, teacher, kind=kind, beta=0.3, backend=backend)
    moved = divergence(student + 50.0, teacher - 70.0, kind=kind, beta=0.3, backend=backend)
    torch.testing.assert_close(moved, rows, rtol=1e-11, atol=0)
    assert rows.min() > 1e-3
    for grad in torch.autograd.grad(rows.sum(), (student, teacher)):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad.sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_swapping_the_sides(backend):
    s, t = logits(5, 17, dtype=torch.float64)

    def rows(a, b, kind, beta=0.5):
        return divergence(a, b, kind=kind, beta=beta, backend=backend)

    pairs = [
        (("forward_kl", 0.5), ("reverse_kl", 0.5)), (("js", 0.2), ("js", 0.8)), (("jeffreys", 0.2), ("jeffreys", 0.8)),
        (("skew_forward_kl", 0.2), ("skew_reverse_kl", 0.2)), (("tvd", 0.5), ("tvd", 0.5)), (("alpha", 0.3), ("alpha", 0.7)),
        (("js_rescaled", 0.1), ("js_rescaled", 0.9)),
    ]  # fmt: skip
    for (kind, beta), (other, other_beta) in pairs:
        torch.testing.assert_close(rows(s, t, kind, beta), rows(t, s, other, other_beta), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_model_against_itself_is_exactly_zero(kind, beta, backend):
    for dtype in (torch.float32, torch.bfloat16):
        student, _ = logits(3, 1025, dtype=dtype)
        rows = divergence(
            student, student.detach(), kind=kind, beta=beta, labels=some_labels(kind, (3,), 1025), backend=backend
        )
        assert torch.equal(rows, torch.zeros(3))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_js_rescaled_and_alpha_reach_their_limits_without_a_jump(backend):
    s, t = logits(3, 20, dtype=torch.float64)
    forward = divergence(s, t, backend=backend)
    reverse = divergence(s, t, kind="reverse_kl", backend=backend)
    for kind, beta, want in (
        ("js_rescaled", 0.0, forward),
        ("js_rescaled", 1.0, reverse),
        ("alpha", 1.0, forward),
        ("alpha", 0.0, reverse),
    ):
        at = divergence(s, t, kind=kind, beta=beta, backend=backend)
        near = divergence(s, t, kind=kind, beta=abs(beta - 1e-6), backend=backend)
        torch.testing.assert_close(at, want, rtol=1e-14, atol=0)
        torch.testing.assert_close(near, want, rtol=1e-5, atol=0)
    # js itself jumps there, as documented
    assert divergence(s, t, kind="js", beta=1e-6, backend=backend).max() < 1e-4 < forward.min()


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_gradcheck_of_the_reference(kind, beta):
    s, t = logits(2, 4, dtype=torch.float64)
    labels = some_labels(kind, (2,), 4)
    temperature = torch.tensor([1.5, 0.8], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = (s, temperature, weight) if kind == "tvd" else (s, t, temperature, weight)

    def rows(*args):
        a, b = (args[0], t) if kind == "tvd" else args[:2]
        return divergence(a, b, kind=kind, beta=beta, labels=labels, temperature=args[-2], backend="reference")

    def total(*args):
        a, b = (args[0], t) if kind == "tvd" else args[:2]
        return divergence(
            a, b, kind=kind, beta=beta, labels=labels, temperature=args[-2], row_weight=args[-1], backend="reference"
        )

    assert torch.autograd.gradcheck(rows, inputs)
    assert torch.autograd.gradcheck(total, inputs)
    if kind in ("forward_kl", "js", "alpha"):
        assert torch.autograd.gradgradcheck(rows, inputs)


# ---------------------------------------------------------------- fused against the reference
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("kind", "beta"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_within_the_error_budget(kind, beta, dtype, backend):
    for classes, temperature in ((2, 1.0), (10, 4.0), (37, 0.5), (1024, 1.0), (2500, 2.0)):
        student, teacher = logits(4, classes, dtype=dtype, seed=classes)
        teacher.requires_grad_(kind != "dkd")
        options = dict(kind=kind, beta=beta, temperature=temperature, labels=some_labels(kind, (4,), classes))
        zero = classes == 2 and kind == "dkd" and beta[0] == 0
        check_against_reference(
            lambda s, t, o=options: divergence(s, t, **o, backend=backend),
            lambda s, t, o=options: divergence_reference(s, t, **o),
            (student, teacher),
            floor=FLOORS[dtype][0],
            gradient_floor=FLOORS[dtype][1],
            allow_zero=zero,
        )
        weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
        check_against_reference(
            lambda s, t, o=options, w=weight: divergence(s, t, **o, row_weight=w, backend=backend),
            lambda s, t, o=options, w=weight: divergence_reference(s, t, **o, row_weight=w),
            (student, teacher),
            floor=FLOORS[dtype][0],
            gradient_floor=FLOORS[dtype][1],
            allow_zero=zero,
        )


def layouts(x):
    """The same values [6, 5, 40] in other memory: views that must be read in place."""
    wide = torch.zeros(6, 7, 43, dtype=x.dtype)
    wide[:, 1:6, 2:42] = x
    every_other = torch.zeros(12, 5, 80, dtype=x.dtype)
    every_other[::2, :, ::2] = x
    return {
        "contiguous": x.contiguous(),
        "slice": wide[:, 1:6, 2:42],
        "steps": every_other[::2, :, ::2],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "classes first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "classes in the middle": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["forward_kl", "js", "binary", "dkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(kind, dtype, backend):
    student, teacher = logits(6, 5, 40, dtype=dtype)
    beta = (1.0, 2.0) if kind == "dkd" else 0.4
    teacher = teacher.detach()
    labels = some_labels(kind, (6, 5), 40)
    weight = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    options = dict(kind=kind, beta=beta, temperature=2.0, labels=labels)
    truth_s = student.detach().double().requires_grad_()
    truth = divergence_reference(truth_s, teacher.double(), **options)
    (truth_grad,) = torch.autograd.grad((truth * weight).sum(), truth_s)
    same_s = student.detach().requires_grad_()
    same = divergence_reference(same_s, teacher, **options)
    (same_grad,) = torch.autograd.grad((same * weight).sum(), same_s)
    for name, s in layouts(student.detach()).items():
        for other, t in layouts(teacher).items():
            s = s.detach().requires_grad_()
            rows = divergence(s, t, **options, backend=backend)
            assert_within_budget(rows, truth, same, name=f"{name} / {other}", floor=FLOORS[dtype][0])
            (grad,) = torch.autograd.grad((rows * weight).sum(), s)
            assert_within_budget(grad, truth_grad, same_grad, name=f"grad {name} / {other}", floor=FLOORS[dtype][1])
            (grad,) = torch.autograd.grad(divergence(s, t, **options, row_weight=weight, backend=backend), s)
            assert_within_budget(grad, truth_grad, same_grad, name=f"sum {name} / {other}", floor=FLOORS[dtype][1])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", [*F_KINDS, "binary"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (1, 19, 40, 33), (3, 150, 6, 6), (2, 4, 3)])
def test_class_axis_one_is_read_in_place(kind, shape, backend):
    """NCHW maps, each lane one pixel, against the same numbers with the classes last."""
    student, teacher = logits(*shape)
    weight = (torch.rand(shape[:1] + shape[2:]) > 0.3) * 1.5
    got = divergence(student, teacher, kind=kind, beta=0.3, temperature=1.5, row_weight=weight, dim=1, backend=backend)
    grads = torch.autograd.grad(got, (student, teacher))
    last_s, last_t = (x.detach().movedim(1, -1).contiguous().requires_grad_() for x in (student, teacher))
    want = divergence(last_s, last_t, kind=kind, beta=0.3, temperature=1.5, row_weight=weight, backend=backend)
    want_grads = [g.movedim(-1, 1) for g in torch.autograd.grad(want, (last_s, last_t))]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for g, w in zip(grads, want_grads):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=1e-6)
    rows = divergence(student, teacher, kind=kind, beta=0.3, dim=1, backend=backend)
    assert rows.shape == weight.shape
    for memory in (torch.channels_last,) if len(shape) == 4 else ():
        other = divergence(
            student.contiguous(memory_format=memory), teacher, kind=kind, beta=0.3, dim=1, backend=backend
        )
        torch.testing.assert_close(other, rows, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_rows_beyond_two_to_the_31_elements(backend, tmp_path):
    """A row that starts past 2^31 elements, in a sparse file: 32-bit offsets would read the first one."""
    start = 2**31 + 8
    memory = np.memmap(tmp_path / "sparse", dtype=np.float32, mode="w+", shape=(start + 16,))
    storage = torch.from_numpy(memory)
    student, teacher = logits(2, 16)
    with torch.no_grad():
        storage[:16], storage[start:] = student[0], student[1]
    far = storage.as_strided((2, 16), (start, 1))
    assert torch.equal(
        divergence(far, teacher.detach(), backend=backend), divergence(student, teacher, backend=backend).detach()
    )


@pytest.mark.parametrize("backend", FUSED)
def test_two_dtypes_and_a_broadcast_teacher(backend):
    student, teacher = logits(4, 33, dtype=torch.bfloat16)
    got = divergence(student, teacher.float(), backend=backend)
    want = divergence(student.float(), teacher.float(), backend=backend)
    assert torch.equal(got, want)
    assert divergence(student, teacher.double(), backend=backend).dtype == torch.float64
    one = teacher[:1].detach().expand(4, 33)  # stride 0
    torch.testing.assert_close(
        divergence(student, one, backend=backend), divergence(student, one.clone(), backend=backend), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["forward_kl", "js", "tvd"])
def test_temperature_per_row(kind, backend):
    student, teacher = logits(3, 4, 12)
    temperature = torch.tensor([[0.5, 1.0, 2.0, 4.0]] * 3)
    rows = divergence(student, teacher, kind=kind, temperature=temperature, backend=backend)
    for column in range(4):
        alone = divergence(
            student[:, column],
            teacher[:, column],
            kind=kind,
            temperature=float(temperature[0, column]),
            backend=backend,
        )
        # twelve rows may run one per lane, three do not: sums in another order, of probabilities good to 1e-7 (tvd: 1e-7 apart)
        torch.testing.assert_close(rows[:, column], alone, rtol=1e-5, atol=5e-7)
    maps = divergence(
        student.movedim(-1, 1), teacher.movedim(-1, 1), kind=kind, temperature=temperature, dim=1, backend=backend
    )
    torch.testing.assert_close(maps, rows, rtol=1e-5, atol=1e-8)
    learnt = temperature.clone().requires_grad_()
    (grad,) = torch.autograd.grad(divergence(student, teacher, kind=kind, temperature=learnt).sum(), learnt)
    assert grad.abs().min() > 1e-5  # the reference gives it
    with pytest.raises(ValueError, match="a gradient for temperature comes from the reference only"):
        divergence(student, teacher, kind=kind, temperature=learnt, backend=backend)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_vocab_size_cuts_both_and_leaves_zero_gradient(backend):
    student, teacher = logits(3, 10)
    padded = torch.cat((student.detach(), torch.full((3, 6), math.nan)), -1).requires_grad_()
    wider = torch.cat((teacher.detach(), torch.full((3, 2), INF)), -1)
    want = divergence(student, teacher, backend=backend)
    rows = divergence(padded, wider, vocab_size=10, backend=backend)
    torch.testing.assert_close(rows, want)
    (grad,) = torch.autograd.grad(rows.sum(), padded)
    assert torch.equal(grad[:, 10:], torch.zeros(3, 6)) and grad[:, :10].abs().max() > 0
    (grad,) = torch.autograd.grad(
        divergence(padded, wider, vocab_size=10, row_weight=torch.ones(3), backend=backend), padded
    )
    assert torch.equal(grad[:, 10:], torch.zeros(3, 6))


# ---------------------------------------------------------------- the sum entry (DESIGN, decision 3)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_upstream_factors_and_repeated_backwards(kind, backend):
    student, teacher = logits(4, 30)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    loss = divergence(student, teacher, kind=kind, row_weight=weight, backend=backend)
    once = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    kept = [g.clone() for g in once]
    thrice = torch.autograd.grad(3.0 * loss, (student, teacher), retain_graph=True)
    again = torch.autograd.grad(loss, (student, teacher))
    for a, b, c, d in zip(once, kept, thrice, again):
        assert torch.equal(a, b) and torch.equal(a, d)
        torch.testing.assert_close(c, 3 * a)
    first, second = (divergence(student, teacher, kind=k, row_weight=weight, backend=backend) for k in (kind, "tvd"))
    (both,) = torch.autograd.grad(first + 2.0 * second, student)
    want = torch.autograd.grad(divergence(student, teacher, kind=kind, row_weight=weight, backend=backend), student)[0]
    want = (
        want
        + 2.0
        * torch.autograd.grad(divergence(student, teacher, kind="tvd", row_weight=weight, backend=backend), student)[0]
    )
    torch.testing.assert_close(both, want)
    rows = divergence(student, teacher, kind=kind, backend=backend)
    (recomputed,) = torch.autograd.grad((rows * weight).sum(), student)
    torch.testing.assert_close(recomputed, once[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_are_made_only_when_somebody_wants_them(backend, monkeypatch):
    module = sys.modules["kdfast.ops.divergence"]  # kdfast.ops.divergence itself is the function
    asked = []
    real = module._sum_op

    def spy(*args):
        asked.append(args[-2:])
        return real(*args)

    monkeypatch.setattr(module, "_sum_op", spy)
    student, teacher = logits(2, 8)
    weight = torch.ones(2)
    with torch.no_grad():
        divergence(student, teacher, row_weight=weight, backend=backend)
    divergence(student, teacher.detach(), row_weight=weight, backend=backend)
    divergence(student.detach(), teacher, row_weight=weight, backend=backend)
    assert asked == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dim", [-1, 1])
def test_rows_of_weight_zero_are_not_read(dim, backend):
    student, teacher = logits(2, 5, 32, 3) if dim == 1 else logits(6, 32)
    rows = student.movedim(dim, -1).shape[:-1]
    weight = torch.ones(rows)
    weight[0] = 0.0
    with torch.no_grad():
        student.movedim(dim, -1)[0] = math.nan
    loss = divergence(student, teacher, row_weight=weight, dim=dim, backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and loss > 0
    assert torch.equal(grad.movedim(dim, -1)[0], torch.zeros_like(grad.movedim(dim, -1)[0]))
    assert grad.movedim(dim, -1)[1].abs().min() > 0


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["forward_kl", "js", "dkd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_cross_entropy_in_the_same_pass(kind, temperature, dim, backend):
    shape = (3, 20, 4, 5)
    student, teacher = (x.detach().movedim(1, dim).contiguous() for x in logits(*shape))
    labels = torch.randint(20, (3, 4, 5), generator=torch.Generator().manual_seed(3))
    weight = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(4)) / 60
    options = dict(
        kind=kind, beta=(1.0, 2.0) if kind == "dkd" else 0.3, temperature=temperature, labels=labels, vocab_size=None,
        row_weight=weight, kd_factor=0.7, ce_factor=0.4, label_smoothing=0.1, dim=dim,
    )  # fmt: skip
    check_against_reference(
        lambda s: divergence_total(s, teacher, **options, backend=backend)[0],
        lambda s: divergence_total(s, teacher.to(s.dtype), **options, backend="reference")[0],
        (student.requires_grad_(),),
    )
    _, parts = divergence_total(student, teacher, **options, backend=backend)
    ce = F.cross_entropy(student.movedim(dim, 1), labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(parts[1], (ce * weight).sum().detach(), rtol=1e-5, atol=1e-6)
    assert not parts.requires_grad


# ---------------------------------------------------------------- -inf, extremes, empty
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize(("kind", "beta"), [c for c in CASES if c[0] != "dkd"])
@pytest.mark.parametrize("dim", [-1, 0])
def test_a_class_masked_in_both_models_counts_nothing(kind, beta, backend, dim):
    student, teacher = (x.detach() for x in logits(20, 21, dtype=torch.float64))
    masked_s, masked_t = student.clone(), teacher.clone()
    masked_s[:, 7] = masked_t[:, 7] = -INF
    keep = [i for i in range(21) if i != 7]
    inputs = [x.movedim(1, dim).requires_grad_() for x in (masked_s, masked_t)]
    rows = divergence(*inputs, kind=kind, beta=beta, dim=dim, backend=backend)
    want = divergence(student[:, keep], teacher[:, keep], kind=kind, beta=beta, backend=backend)
    # the reference's alpha divides two nearly equal numbers' difference by a - 1
    torch.testing.assert_close(rows, want, rtol=1e-9 if beta == 0.999 else 1e-12, atol=1e-15)
    grads = torch.autograd.grad(rows.sum(), inputs, allow_unused=True)
    for grad in (g.movedim(dim, 1) for g in grads if g is not None):
        assert torch.equal(grad[:, 7], torch.zeros(20, dtype=torch.float64))
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("dim", [-1, 0])
def test_a_class_masked_in_one_model(backend, dim):
    teacher = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = teacher.flip(-1).contiguous()
    student[:, 2] = -INF

    def rows(a, b, kind, beta=0.5):
        a, b = (x.movedim(1, dim) for x in (a, b))
        return divergence(a, b, kind=kind, beta=beta, dim=dim, backend=backend)

    leaf = student.clone().requires_grad_()
    infinite = rows(leaf, teacher, "forward_kl")
    assert (infinite == INF).all()
    (grad,) = torch.autograd.grad(infinite.sum(), leaf)  # q - p, finite although the loss is not
    torch.testing.assert_close(grad, student.softmax(-1) - teacher.softmax(-1))
    assert (rows(teacher, student, "reverse_kl") == INF).all()
    for kind, beta in (
        ("reverse_kl", 0.5),
        ("js", 0.3),
        ("skew_forward_kl", 0.1),
        ("skew_reverse_kl", 0.1),
        ("tvd", 0.5),
        ("alpha", 0.5),
    ):
        leaf = student.clone().requires_grad_()
        finite = rows(leaf, teacher, kind, beta)
        assert finite.isfinite().all() and (finite > 0).all(), kind
        (grad,) = torch.autograd.grad(finite.sum(), leaf)
        assert grad.isfinite().all(), kind


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize(("kind", "beta"), CASES)
@pytest.mark.parametrize("dim", [-1, 0])
def test_a_row_of_only_minus_infinity_is_ignored(kind, beta, backend, dim):
    student, teacher = (x.detach() for x in logits(20, 5))
    student[1], teacher[3] = -INF, -INF
    labels = some_labels(kind, (20,), 5)
    s, t = student.movedim(1, dim).requires_grad_(), teacher.movedim(1, dim)
    rows = divergence(s, t, kind=kind, beta=beta, labels=labels, dim=dim, backend=backend)
    assert rows[1] == 0 and rows[3] == 0 and rows.isfinite().all() and rows[0] > 0
    (grad,) = torch.autograd.grad(rows.sum(), s)
    assert torch.equal(grad.movedim(dim, 1)[[1, 3]], torch.zeros(2, 5)) and grad.isfinite().all()
    total = divergence(s, t, kind=kind, beta=beta, labels=labels, dim=dim, row_weight=torch.ones(20), backend=backend)
    torch.testing.assert_close(total, rows.sum())
    (grad,) = torch.autograd.grad(total, s)
    assert torch.equal(grad.movedim(dim, 1)[[1, 3]], torch.zeros(2, 5))


@pytest.mark.parametrize("backend", FUSED)
@given(
    rows=st.integers(1, 5), classes=st.integers(1, 70), scale=st.sampled_from([1e-4, 1.0, 30.0, 1e4]),
    sigma=st.sampled_from([0.0, 1e-5, 0.1, 5.0, 1e4]), temperature=st.sampled_from([0.05, 1.0, 20.0]),
    case=st.sampled_from(CASES), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
    along=st.booleans(),
)  # fmt: skip
def test_never_negative_and_always_finite(backend, rows, classes, scale, sigma, temperature, case, dtype, seed, along):
    kind, beta = case
    student, teacher = (x.detach() for x in logits(rows, classes, sigma=sigma, scale=scale, seed=seed))
    student, teacher = (x.clamp(-6e4, 6e4).to(dtype) for x in (student, teacher))
    dim = 0 if along else 1
    student, teacher = (x.t().contiguous() if along else x for x in (student, teacher))
    student.requires_grad_()
    options = dict(
        kind=kind,
        beta=beta,
        temperature=temperature,
        labels=some_labels(kind, (rows,), classes),
        dim=dim,
        backend=backend,
    )
    got = divergence(student, teacher, **options)
    assert (got >= 0).all(), got
    if kind == "alpha" and not 0 <= beta <= 1:
        return  # p^a q^(1-a) overflows for real
    assert got.isfinite().all()
    (grad,) = torch.autograd.grad(got.sum(), student)
    wide = student.detach().float().requires_grad_()
    (wide_grad,) = torch.autograd.grad(divergence(wide, teacher.float(), **options).sum(), wide)
    assert wide_grad.isfinite().all()
    # float16 ends at 65504: a gap of 1e4 at T = 0.05 has a larger gradient, which is infinite there and nowhere else
    assert torch.equal(grad.isfinite(), wide_grad.to(dtype).isfinite()) and not grad.isnan().any()


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_no_rows_one_row_one_class(backend):
    student = torch.empty(0, 7, requires_grad=True)
    rows = divergence(student, torch.empty(0, 7), backend=backend)
    assert rows.shape == (0,)
    assert torch.autograd.grad(rows.sum(), student)[0].shape == (0, 7)
    total = divergence(student, torch.empty(0, 7), row_weight=torch.empty(0), backend=backend)
    assert total == 0 and torch.autograd.grad(total, student)[0].shape == (0, 7)
    alone = divergence(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), backend=backend)
    assert alone.shape == () and alone > 0
    assert divergence(torch.tensor([[5.0]]), torch.tensor([[-3.0]]), backend=backend).abs() < 1e-6


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(513, 70), (3, 9000), (2, 19, 50, 41)])
def test_same_bits_for_any_number_of_threads(shape, backend):
    student, teacher = logits(*shape)
    weight = torch.rand(shape[:1] + shape[2:])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = divergence(student, teacher, kind="js", row_weight=weight, dim=1, backend=backend)
            results.append((loss, *torch.autograd.grad(loss, (student, teacher))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---------------------------------------------------------------- modes of torch
MODE_CALLS = {
    "rows": lambda s, t: divergence(s, t, kind="js", beta=0.3, temperature=2.0),
    "rows dim 0": lambda s, t: divergence(s, t, kind="reverse_kl", dim=0),
    "sum": lambda s, t: divergence(s, t, row_weight=torch.full((4,), 0.25, device=s.device)),
    "dkd": lambda s, t: divergence(s, t.detach(), kind="dkd", beta=(1.0, 2.0), labels=torch.arange(4, device=s.device)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", MODE_CALLS)
@pytest.mark.skipif(not FUSED, reason="no fused backend")
def test_modes(call, mode):
    student, teacher = (x[:, :4].detach() if call == "rows dim 0" else x.detach() for x in logits(4, 9))
    check_mode(mode, MODE_CALLS[call], (student.requires_grad_(), teacher.requires_grad_(call != "dkd")))


@pytest.mark.skipif(not FUSED, reason="no fused backend")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, about how it traces autograd functions
def test_inductor_and_dynamic_shapes():
    student, teacher = logits(4, 9)

    def loss(s, t):
        return divergence(s, t, kind="js", row_weight=torch.full((s.shape[0],), 0.5)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (4, 3):
        s, t = student[:n].detach().requires_grad_(), teacher[:n].detach()
        assert torch.equal(compiled(s, t), loss(s, t))
        torch.testing.assert_close(torch.autograd.grad(compiled(s, t), s), torch.autograd.grad(loss(s, t), s))


@pytest.mark.skipif(not FUSED, reason="no fused backend")
def test_autocast_takes_inputs_as_they_are():
    student, teacher = logits(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = divergence(student, teacher)
    assert torch.equal(rows, divergence(student, teacher)) and rows.dtype == torch.float32


# ---------------------------------------------------------------- choice of backend and bad input
def test_automatic_choice_and_its_reasons():
    student, teacher = logits(2, 3)
    args = (student, teacher, 1.0, None)
    assert _choose(*args, "forward_kl", 3, 1, None) == (FUSED[0] if FUSED else "reference")
    assert _choose(*args, "dkd", 3, 1, None) == "reference"  # the teacher wants a gradient
    with pytest.raises(
        ValueError, match=r"backend='cpu' cannot run.*no fused teacher gradient.*\(2, 3\).*float32.*reference"
    ):
        divergence(student, teacher, kind="dkd", beta=(1, 1), labels=torch.tensor([0, 1]), backend="cpu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        divergence(student, teacher, backend="fast")
    with pytest.raises(ValueError, match="backend='cuda' cannot run these inputs: the tensors are on cpu"):
        divergence(student, teacher, backend="cuda")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dim", [-1, 1])
def test_bad_values_raise_and_say_where(dim, backend):
    shape = (2, 4, 17) if dim == 1 else (2, 17, 4)
    for side, name in ((0, "student"), (1, "teacher")):
        for value in (math.nan, INF):
            pair = [x.detach() for x in logits(*shape)]
            pair[side].movedim(dim, -1)[1, 5, 2] = value
            with pytest.raises(ValueError, match=rf"{name}: expected finite logits .* got NaN or \+inf at row 22"):
                divergence(*pair, dim=dim, backend=backend)
            with pytest.raises(ValueError, match=rf"{name}: .* at row 22"):
                divergence(*pair, row_weight=torch.ones(2, 17), dim=dim, backend=backend)
    # a NaN in a row that is otherwise -inf must not pass as an ignored row
    student = torch.full((1, 40), -INF)
    student[0, 33] = math.nan
    with pytest.raises(ValueError, match="student: expected finite"):
        divergence(student, torch.zeros(1, 40), backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("label", [-1, 4, 10**12, -100])
def test_bad_labels_raise_and_name_the_value(label, backend):
    student, teacher = (x.detach() for x in logits(3, 4))
    labels = torch.tensor([0, 3, label])
    with pytest.raises(ValueError, match=rf"labels: expected integers in \[0, 4\), got {label} at row 2"):
        divergence(student, teacher, kind="dkd", beta=(1, 1), labels=labels, backend=backend)


def test_debug_reads_values_on_the_reference_too():
    student, teacher = (x.detach() for x in logits(2, 3))
    student[1, 1] = math.nan
    assert divergence(student, teacher, backend="reference").isnan().any()
    with kdfast.debug(), pytest.raises(ValueError, match="student: expected finite logits"):
        divergence(student, teacher, backend="reference")
    with kdfast.debug(), pytest.raises(ValueError, match="labels: expected integers in"):
        divergence(teacher, teacher, kind="dkd", beta=(1, 1), labels=torch.tensor([0, 7]), backend="reference")


S, T = torch.zeros(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((S.tolist(), T), {}, TypeError, "student: expected a Tensor, got list"),
        ((S, T.long()), {}, TypeError, "teacher: expected float16, bfloat16, float32 or float64, got torch.int64"),
        ((S, T[0]), {}, ValueError, r"teacher: expected as many dimensions as student .*\(2, 3\) and \(3,\)"),
        ((S.sum(), T.sum()), {}, ValueError, "at least 1"),
        ((S, torch.zeros(2, 4)), {}, ValueError, "teacher: expected 3 classes .* got 4; pass vocab_size"),
        ((S, torch.zeros(5, 3)), {}, ValueError, r"teacher: expected shape \(2, 3\), got \(5, 3\)"),
        ((S, torch.zeros(5, 4)), dict(vocab_size=3), ValueError, "teacher: expected the rows of student"),
        ((S, T), dict(vocab_size=4), ValueError, "vocab_size: expected an int from 1 to 3 .* got 4"),
        ((S, T), dict(vocab_size=0), ValueError, "vocab_size: expected an int from 1 to 3"),
        ((S[:, :0], T[:, :0]), {}, ValueError, "student: expected at least one class"),
        ((S, T), dict(kind="kl"), ValueError, "kind: expected one of forward_kl, .* got 'kl'"),
        ((S, T), dict(kind="js", beta=1.5), ValueError, r"beta: expected a finite number in \[0, 1\], got 1.5"),
        ((S, T), dict(kind="dkd", labels=torch.tensor([0, 1])), ValueError, "beta: expected a pair"),
        ((S, T), dict(kind="dkd", beta=(1, 1)), ValueError, "labels: expected a Tensor for kind='dkd', got None"),
        ((S, T), dict(kind="dkd", beta=(1, 1), labels=torch.tensor([0.0, 1.0])), TypeError, "labels: expected integers, got torch.float32"),
        ((S, T), dict(kind="dkd", beta=(1, 1), labels=torch.tensor([0])), ValueError, r"labels: expected shape \(2,\), got \(1,\)"),
        ((S, T), dict(labels=torch.tensor([0, 1])), ValueError, "labels: only kind='dkd' reads them"),
        ((S, T), dict(temperature=0.0), ValueError, r"temperature: expected a finite number in \(0, inf\), got 0.0"),
        ((S, T), dict(temperature=math.nan), ValueError, "temperature: expected a finite number"),
        ((S, T), dict(temperature="1"), TypeError, "temperature: expected a number, got str"),
        ((S, T), dict(temperature=torch.ones(3)), ValueError, r"temperature: expected shape \(2,\)"),
        ((S, T), dict(row_weight=torch.ones(2, 3)), ValueError, r"row_weight: expected shape \(2,\)"),
        ((S, T), dict(row_weight=2.0), TypeError, "row_weight: expected a Tensor, got float"),
        ((S, T), dict(dim=2), ValueError, "dim: expected an axis of a 2-dimensional tensor, got 2"),
        ((S, T.to("meta")), {}, ValueError, r"teacher: expected the device of student \(cpu\), got meta"),
    ],
)  # fmt: skip
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        divergence(*args, **options)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_a_gradient_larger_than_the_caches(kind, backend):
    """Beyond 32 MB the gradient is written past the caches; the odd start keeps some rows from being aligned."""
    student, teacher = (x[:, 1:].detach() for x in logits(264, 32065))
    student.requires_grad_()
    loss = divergence(student, teacher, kind=kind, row_weight=torch.linspace(0.0, 1.0, 264), backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    rows = divergence(student[-3:], teacher[-3:], kind=kind, backend=backend)
    (want,) = torch.autograd.grad((rows * torch.linspace(0.0, 1.0, 264)[-3:]).sum(), student)
    torch.testing.assert_close(grad[-3:], want[-3:], rtol=1e-5, atol=1e-9)
    assert grad[1:].abs().amax(-1).min() > 0 and torch.equal(grad[0], torch.zeros(32064))


@pytest.mark.parametrize("backend", FUSED)
def test_float16_gradients_survive_until_the_loss_scaler_speaks(backend):
    """A mean over many rows is below float16's smallest number; a GradScaler's factor lifts it, if nobody rounded before."""
    student, teacher = logits(16, 64, dtype=torch.float16)
    weight = torch.full((16,), 1e-9)
    for entry in ("sum", "rows"):
        options = dict(kind="js", backend=backend)
        if entry == "sum":
            loss = divergence(student, teacher, **options, row_weight=weight)
        else:
            loss = (divergence(student, teacher, **options) * weight).sum()
        (grad,) = torch.autograd.grad(loss * 2.0**24, student)
        wide = student.detach().float().requires_grad_()
        (want,) = torch.autograd.grad(
            (divergence(wide, teacher.float(), kind="js", backend=backend) * weight).sum() * 2.0**24, wide
        )
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.float(), want, rtol=1e-3, atol=1e-7)
        assert want.abs().max() > 1e-5
