"""kdfast.ops.sparse_divergence and the loss over it: closed forms, the full distribution, tails, samples, modes, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, check_mode
from tolerances import check_against_reference

import kdfast
from kdfast.losses import SparseKDLoss, divergence_loss, sparse_kd_loss
from kdfast.ops import SampledTeacher, TopKTeacher, divergence, sparse_divergence
from kdfast.ops.sparse_divergence import SPARSE_KINDS, TAIL_FLOOR, bucket_logits, bucket_logits_reference

HAS_CORE = kdfast.backend_info()["compiled"]
needs_core = pytest.mark.skipif(not HAS_CORE, reason="no compiled core")
BACKENDS = [None, "reference"]
N, C, K = 7, 29, 5


def pair(dtype=torch.float64, rows=(N,), classes=C, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def top_k(teacher, k=K, temperature=1.0):
    log_probs, ids = (teacher / temperature).log_softmax(-1).topk(k, -1)
    return TopKTeacher(ids, log_probs, -torch.expm1(log_probs.logsumexp(-1)), temperature)


def by_buckets(student, teacher, temperature=1.0):
    """(q, p) over K + 1 classes, from probabilities."""
    q = (student / temperature).softmax(-1)
    listed = q.gather(-1, teacher.ids)
    p = torch.cat((teacher.log_probs.exp(), teacher.tail.unsqueeze(-1)), -1)
    return torch.cat((listed, 1 - listed.sum(-1, keepdim=True)), -1), p


# ---------------------------------------------------------------- closed forms
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_kl_and_their_gradients_in_closed_form(temperature, backend):
    student, logits = pair()
    teacher = top_k(logits, temperature=temperature)
    q, p = by_buckets(student.detach(), teacher, temperature)
    full = (student.detach() / temperature).softmax(-1)
    outside = torch.ones(N, C, dtype=torch.bool).scatter(-1, teacher.ids, False)
    for kind, rows, bucket_grad in (
        ("forward_kl", (p * (p / q).log()).sum(-1), q - p),
        ("reverse_kl", (q * (q / p).log()).sum(-1), q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True))),
    ):
        got = sparse_divergence(student, teacher, kind=kind, temperature=temperature, backend=backend)
        torch.testing.assert_close(got, rows, rtol=1e-10, atol=0)
        (grad,) = torch.autograd.grad(got.sum(), student)
        want = torch.zeros_like(grad).scatter(-1, teacher.ids, bucket_grad[:, :-1] / temperature)
        # as in the docstrings: q_i (1 - t / q_tail) / T and q_i (log(q_tail / t) - KL) / T
        t, q_tail = p[:, -1:], q[:, -1:]
        slope = 1 - t / q_tail if kind == "forward_kl" else (q_tail / t).log() - rows.unsqueeze(-1)
        want = torch.where(outside, full * slope / temperature, want)
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(grad.sum(-1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_a_list_of_all_classes_is_the_dense_divergence(kind, backend):
    """k = C: no tail, whatever the rounding left of its mass."""
    student, logits = pair()
    teacher = top_k(logits, k=C)._replace(tail=torch.full((N,), 1e-4, dtype=torch.float64))
    got = sparse_divergence(student, teacher, kind=kind, beta=0.3, backend=backend)
    want = divergence(student, logits, kind=kind, beta=0.3, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    (grad,), (truth,) = (torch.autograd.grad(x.sum(), student) for x in (got, want))
    torch.testing.assert_close(grad, truth, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_buckets_hide_only_the_split_of_the_tail(kind):
    """At most the full divergence, and equal where student and teacher split the tail alike."""
    student, logits = pair()
    teacher = top_k(logits)
    sparse = sparse_divergence(student, teacher, kind=kind, beta=0.3)
    full = divergence(student, logits, kind=kind, beta=0.3)
    assert bool((sparse < full).all()) and bool((sparse > 0).all())
    same_tail = logits.scatter(-1, teacher.ids, student.detach()[:, :K])  # the student is the teacher but on the list
    torch.testing.assert_close(
        sparse_divergence(same_tail, teacher, kind=kind, beta=0.3),
        divergence(same_tail, logits, kind=kind, beta=0.3), rtol=1e-8, atol=1e-13,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_the_teacher_itself_gives_zero(kind, backend):
    _, logits = pair(torch.float32)
    rows = sparse_divergence(logits, top_k(logits), kind=kind, beta=0.3, backend=backend)
    torch.testing.assert_close(rows, torch.zeros(N), rtol=0, atol=2e-6)
    if HAS_CORE and backend is None:
        assert bool((rows >= 0).all())


def test_a_student_with_its_mass_elsewhere_is_seen():
    """The renormalised list of other libraries gives 0 here, and a truncated sum is negative."""
    teacher = TopKTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]))
    student = torch.tensor([[math.log(2.0), 0.0, 12.0, 12.0]], requires_grad=True)
    q = student.detach().softmax(-1)[:, :2]
    p = teacher.log_probs.exp()
    assert (q / q.sum()).sub(p / p.sum()).abs().max() < 1e-6 and q.sum() < 1e-5
    rows = sparse_divergence(student, teacher)
    assert rows.item() > 5
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert bool((grad[:, 2:] > 0.4).all()) and bool((grad[:, :2] < 0).all())
    close = torch.tensor([[1.0, 0.5, -3.0, -3.0]])  # truncated: sum_k p_k log(p_k / q_k) with q_k > p_k
    assert (p * (p / close.softmax(-1)[:, :2]).log()).sum() < 0 < sparse_divergence(close, teacher).item()


# ---------------------------------------------------------------- the tail
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tail_mass(backend):
    """Exact in the forward KL, 2^-25 where the kind would be infinite, finite gradients in all."""
    student, logits = pair()
    log_probs, ids = logits.topk(K, -1)
    teacher = TopKTeacher(ids, log_probs.log_softmax(-1), torch.zeros(N, dtype=torch.float64))
    p, log_q = teacher.log_probs.exp(), student.detach().log_softmax(-1).gather(-1, ids)
    got = sparse_divergence(student, teacher, backend=backend)
    torch.testing.assert_close(got, (p * (teacher.log_probs - log_q)).sum(-1), rtol=1e-10, atol=0)
    floored = teacher._replace(tail=torch.full((N,), TAIL_FLOOR, dtype=torch.float64))
    for kind in SPARSE_KINDS:
        for beta in (0.0, 0.3, 1.0):
            rows = sparse_divergence(student, teacher, kind=kind, beta=beta, backend=backend)
            assert bool(rows.isfinite().all()) and bool((rows >= -1e-12).all()), (kind, beta)
            if kind.startswith("skew") and beta == 1:
                continue  # identically 0, a constant to the reference
            (grad,) = torch.autograd.grad(rows.sum(), student)
            assert bool(grad.isfinite().all()), (kind, beta)
    torch.testing.assert_close(
        sparse_divergence(student, teacher, kind="reverse_kl", backend=backend),
        sparse_divergence(student, floored, kind="reverse_kl", backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_too_small_for_one_minus_the_rest(backend):
    """The student's tail of 1e-12 keeps its digits in float32: it is summed, not 1 - sum q."""
    student = torch.tensor([[30.0, 0.0, 1.0, 2.0]], requires_grad=True)
    teacher = TopKTeacher(torch.tensor([[0]]), torch.tensor([[-0.1]]), torch.tensor([-math.expm1(-0.1)]))
    got = sparse_divergence(student, teacher, backend=backend)
    x = student.detach().double()
    log_tail = x[:, 1:].logsumexp(-1) - x.logsumexp(-1)
    t = -math.expm1(-0.1)
    want = math.exp(-0.1) * (-0.1 - x.log_softmax(-1)[0, 0]) + t * (math.log(t) - log_tail[0])
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_a_rounded_list_is_renormalised():
    """Half-precision log-probabilities sum to 1.0003: still never negative, and close to the exact loss."""
    student, logits = pair(torch.float32, rows=(200,), scale=1.0)
    exact = top_k(logits)
    rounded = TopKTeacher(exact.ids, exact.log_probs.half(), exact.tail.half())
    total = rounded.log_probs.float().exp().sum(-1) + rounded.tail.float()
    assert (total - 1).abs().max() > 1e-4
    near = logits + 1e-3 * student.detach()
    for kind in ("forward_kl", "reverse_kl", "js"):
        assert sparse_divergence(near, rounded, kind=kind).min() >= (0 if HAS_CORE else -1e-6)
        torch.testing.assert_close(
            sparse_divergence(student, rounded, kind=kind), sparse_divergence(student, exact, kind=kind), rtol=1e-2, atol=1e-3
        )  # fmt: skip
    assert torch.equal(
        sparse_divergence(student, exact._replace(tail=None)), sparse_divergence(student, TopKTeacher(*exact[:2]))
    )
    torch.testing.assert_close(sparse_divergence(student, exact._replace(tail=None)), sparse_divergence(student, exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_minus_one_are_none(backend):
    student, logits = pair()
    teacher = top_k(logits, k=3)
    padded = TopKTeacher(
        torch.cat((torch.full((N, 1), -1), teacher.ids, torch.full((N, 1), -1)), -1),
        torch.nn.functional.pad(teacher.log_probs, (1, 1), value=7.0), teacher.tail,
    )  # fmt: skip
    weight = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    got, want = (sparse_divergence(student, t, kind="js", backend=backend) for t in (padded, teacher))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, student, weight), torch.autograd.grad(want, student, weight)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)
    nothing = TopKTeacher(torch.full((N, 2), -1), torch.zeros(N, 2), torch.ones(N))  # one bucket: nothing to learn
    rows = sparse_divergence(student, nothing, backend=backend)
    assert bool((rows == 0).all()) and bool((torch.autograd.grad(rows.sum(), student)[0].abs() < 1e-15).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes_of_the_student(backend):
    """-inf in the tail: as if the class were not there. On the list: +inf forward KL, finite gradient."""
    student, logits = pair()
    teacher = top_k(logits)
    outside = torch.ones(N, C, dtype=torch.bool).scatter(-1, teacher.ids, False)
    dropped = outside & (torch.arange(C) % 2 == 0)
    cut = student.detach().masked_fill(dropped, -math.inf).requires_grad_()
    rows = sparse_divergence(cut, teacher, backend=backend)
    (grad,) = torch.autograd.grad(rows.sum(), cut)
    assert bool(rows.isfinite().all()) and bool((grad[dropped] == 0).all()) and bool((grad[~dropped] != 0).all())
    listed = student.detach().scatter(-1, teacher.ids[:, :1], -math.inf).requires_grad_()
    rows = sparse_divergence(listed, teacher, backend=backend)
    assert bool((rows == math.inf).all()) and bool(torch.autograd.grad(rows.sum(), listed)[0].isfinite().all())


# ---------------------------------------------------------------- sampled tokens
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_their_empirical_distribution(backend):
    student, _ = pair(rows=(2,))
    teacher = SampledTeacher(torch.tensor([[3, 5, 3, 3], [9, -1, 0, 9]]))
    share = torch.zeros(2, C, dtype=torch.float64)
    share[0, 3], share[0, 5], share[1, 9], share[1, 0] = 0.75, 0.25, 2 / 3, 1 / 3
    log_q = student.log_softmax(-1)
    want = (torch.where(share > 0, share * (share.clamp_min(1e-300).log() - log_q), 0.0)).sum(-1)
    got = sparse_divergence(student, teacher, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(got.sum(), student)
    torch.testing.assert_close(grad, student.detach().softmax(-1) - share, rtol=1e-9, atol=1e-15)


def test_many_samples_have_the_gradient_of_the_full_distribution():
    student, logits = pair(rows=(1,), scale=1.0)
    g = torch.Generator().manual_seed(0)
    p = logits.softmax(-1)
    (truth,) = torch.autograd.grad(divergence(student, logits).sum(), student)
    proposal = (0.5 * logits).softmax(-1)  # drawn from something flatter, weighted by p / r
    for draw, weights in ((p, None), (proposal, p / proposal)):
        ids = torch.multinomial(draw, 200_000, True, generator=g)
        teacher = SampledTeacher(ids, None if weights is None else weights.gather(-1, ids))
        (grad,) = torch.autograd.grad(sparse_divergence(student, teacher).sum(), student)
        assert (grad - truth).abs().max() < 5e-3 < 0.05 < truth.abs().max()


# ---------------------------------------------------------------- accuracy, modes, any shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tvd"])
def test_error_budget(kind, dtype):
    student, logits = pair(dtype, classes=300)
    teacher = top_k(logits.float(), k=8)

    def run(backend):
        return lambda x: sparse_divergence(x, teacher, kind=kind, temperature=1.0, backend=backend)

    half = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
    check_against_reference(run(None), run("reference"), (student,), floor=(1e-5, 1e-6), gradient_floor=(half, 2e-5))


@needs_core
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    student, logits = pair(torch.float32)
    teacher = top_k(logits)

    def call(x, ids, log_probs, tail):
        return sparse_divergence(x, TopKTeacher(ids, log_probs, tail), kind="js")

    check_mode(mode, call, (student, *teacher[:3]))


def test_second_derivative_of_the_reference():
    student, logits = pair(rows=(2,), classes=6)
    teacher = top_k(logits, k=2)
    for kind in ("forward_kl", "reverse_kl"):
        call = lambda x, kind=kind: sparse_divergence(x, teacher, kind=kind, backend="reference")  # noqa: E731
        assert torch.autograd.gradcheck(call, student) and torch.autograd.gradgradcheck(call, student)


@given(
    rows=st.integers(0, 5), classes=st.integers(1, 30), k=st.integers(1, 30), missing=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 4.0]), scale=st.sampled_from([0.0, 1.0, 50.0]), seed=st.integers(0, 10_000),
    kind=st.sampled_from(SPARSE_KINDS),
)  # fmt: skip
def test_any_list(rows, classes, k, missing, temperature, scale, seed, kind):
    """The kernels' buckets against the reference's, and a divergence that is never negative."""
    g = torch.Generator().manual_seed(seed)
    student, logits = (torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(2))
    student.requires_grad_()
    teacher = top_k(logits, k=min(k, classes), temperature=temperature)
    if missing:
        teacher = teacher._replace(ids=torch.where(torch.rand(teacher.ids.shape, generator=g) < 0.3, -1, teacher.ids), tail=None)  # fmt: skip
    buckets = bucket_logits(student.detach(), teacher.ids, temperature)
    torch.testing.assert_close(buckets, bucket_logits_reference(student.detach(), teacher.ids, temperature))
    upstream = torch.rand(rows, generator=g, dtype=torch.float64)
    got, want = (
        sparse_divergence(student, teacher, kind=kind, beta=0.3, temperature=temperature, backend=b) for b in BACKENDS
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11 * (1 + scale))
    if HAS_CORE:
        assert bool((got >= 0).all())
    if kind == "tvd" and scale == 0:
        return  # equal distributions: the sign of q - p is that of a rounding
    for a, b in zip(torch.autograd.grad(got, student, upstream), torch.autograd.grad(want, student, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 * (1 + scale))


# ---------------------------------------------------------------- the loss
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_masks_weights_and_t2(backend):
    student, logits = pair(rows=(2, 6))
    teacher = top_k(logits, temperature=2.0)
    mask = torch.arange(12).reshape(2, 6) % 3 != 0
    weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).reshape(2, 6)
    rows = 4 * sparse_divergence(student, teacher, kind="js", temperature=2.0, backend=backend)
    want = torch.where(mask, rows * weight, 0.0)
    options = {"kind": "js", "temperature": 2.0, "scale_t2": True, "mask": mask, "weight": weight, "backend": backend}
    none, total, mean = (sparse_kd_loss(student, teacher, reduction=r, **options) for r in ("none", "sum", "mean"))
    torch.testing.assert_close(none, want)
    torch.testing.assert_close(total, want.sum())
    torch.testing.assert_close(mean, want.sum() / mask.sum())
    torch.testing.assert_close(
        torch.autograd.grad(mean, student)[0], torch.autograd.grad(want.sum() / mask.sum(), student)[0]
    )
    plain = sparse_kd_loss(student, teacher, temperature=2.0, backend=backend)
    torch.testing.assert_close(plain, sparse_divergence(student, teacher, temperature=2.0, backend=backend).mean())
    module = SparseKDLoss(kind="js", temperature=2.0, scale_t2=True)
    torch.testing.assert_close(module(student, teacher), rows.mean())
    assert abs(plain - mean) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_not_read_and_none_kept_is_zero(backend):
    student, logits = pair(torch.float32)
    teacher = top_k(logits)
    mask = torch.arange(N) != 2
    want = sparse_kd_loss(student[mask], TopKTeacher(*(t[mask] for t in teacher[:3])), backend=backend)
    student.data[2] = math.nan
    got = sparse_kd_loss(student, teacher, mask=mask, backend=backend)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, student)
    assert bool(grad.isfinite().all()) and bool((grad[2] == 0).all()) and bool((grad[mask] != 0).any())
    student.data[2] = 0.0
    loss = sparse_kd_loss(student, teacher, mask=torch.zeros(N, dtype=torch.bool), backend=backend)
    assert loss.item() == 0 and bool((torch.autograd.grad(loss, student)[0] == 0).all())


def test_vocab_size_cuts_the_student():
    student, logits = pair()
    teacher = top_k(logits[:, :20])
    got = sparse_kd_loss(student, teacher, vocab_size=20)
    torch.testing.assert_close(got, sparse_kd_loss(student[:, :20].clone(), teacher))
    (grad,) = torch.autograd.grad(got, student)
    assert bool((grad[:, 20:] == 0).all()) and bool((grad[:, :20] != 0).all())
    assert abs(got - sparse_kd_loss(student, teacher)) > 1e-3


S, T = torch.randn(4, 9), torch.randn(4, 9)
TOP = top_k(T, k=2)
BAD = {
    "teacher": (lambda: sparse_kd_loss(S, T), TypeError, r"teacher: expected a TopKTeacher or a SampledTeacher, got Tensor"),
    "kind": (lambda: sparse_kd_loss(S, TOP, kind="dkd"), ValueError, r"kind: expected one of .*got 'dkd'"),
    "kind of samples": (lambda: sparse_kd_loss(S, SampledTeacher(TOP.ids), kind="js"), ValueError, r"forward KL only"),
    "temperature": (lambda: sparse_kd_loss(S, TOP, temperature=2.0), ValueError, r"temperature: expected 1.0, at which the teacher's list was taken, got 2.0"),
    "ids": (lambda: sparse_kd_loss(S, TOP._replace(ids=TOP.ids[:3])), ValueError, r"teacher.ids: expected shape \(4, 'K'\)"),
    "id": (lambda: sparse_kd_loss(S, TOP._replace(ids=TOP.ids + 8)), ValueError, r"teacher.ids: expected classes in \[0, 9\)"),
    "id and vocab_size": (lambda: sparse_kd_loss(S, TOP._replace(ids=torch.full((4, 2), 7)), vocab_size=5), ValueError, r"\[0, 5\).*got 7"),
    "log_probs": (lambda: sparse_kd_loss(S, TOP._replace(log_probs=TOP.log_probs[:, :1])), ValueError, r"teacher.log_probs: expected shape \(4, 2\)"),
    "tail": (lambda: sparse_kd_loss(S, TOP._replace(tail=torch.ones(3))), ValueError, r"teacher.tail: expected shape \(4,\)"),
    "integer ids": (lambda: sparse_kd_loss(S, TOP._replace(ids=TOP.ids.float())), TypeError, r"teacher.ids: expected integers"),
    "reduction": (lambda: sparse_kd_loss(S, TOP, reduction="avg"), ValueError, r"reduction: expected one of"),
    "gradient": (lambda: sparse_kd_loss(S, TOP._replace(log_probs=TOP.log_probs.clone().requires_grad_())), ValueError, r"requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_the_dense_loss_of_a_full_list():
    student, logits = pair()
    mask = torch.arange(N) % 2 == 0
    for kind in ("forward_kl", "reverse_kl"):
        torch.testing.assert_close(
            sparse_kd_loss(student, top_k(logits, k=C), kind=kind, mask=mask),
            divergence_loss(student, logits, kind=kind, mask=mask),
        )
