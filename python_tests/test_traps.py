"""Mistakes other distillation libraries made, tried on ours. docs/traps.md lists all 25; the numbers here are its rows.

Both backends, so that the reference is no worse than the kernels.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.losses import DivergenceLoss, KDLoss, distillation_loss, divergence_loss, dkd_loss, kd_loss
from kdfast.ops import divergence

ROOT = Path(__file__).resolve().parent.parent
HAS_CORE = kdfast.backend_info()["compiled"]
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CORE, reason="no compiled core"))]
KINDS = (
    "forward_kl", "reverse_kl", "jeffreys", "js", "js_rescaled", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha",
)  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def value_and_gradient(function, student: Tensor, *rest, **options) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf, *rest, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


# ---------------------------------------------------------------- 1 to 5
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_01_half_precision_is_computed_in_float32(backend, kind, dtype):
    """Near agreement a softmax taken in bf16 makes the JS negative; ours equals float64 on the same inputs."""
    base = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    student, teacher = base.to(dtype), (base + 0.1 * noise).to(dtype)
    got, grad = value_and_gradient(divergence_loss, student, teacher, kind=kind, backend=backend)
    want, truth = value_and_gradient(
        divergence_loss, student.double(), teacher.double(), kind=kind, backend="reference"
    )
    assert got >= 0
    assert got.item() == pytest.approx(want.item(), rel=1e-3)
    torch.testing.assert_close(grad.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-3 * truth.abs().max().item())


@pytest.mark.skipif(not HAS_CORE, reason="the reference keeps what autograd keeps")
@pytest.mark.parametrize("kind", KINDS)
def test_02_no_hidden_logits_sized_buffer(kind):
    """The rows entry keeps its inputs and a few numbers per row for the backward; no float32 copy, no loss of size [N, C]."""
    student, teacher = pair(16, 4096, dtype=torch.bfloat16)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergence(student, teacher, kind=kind, backend="cpu")
    own = [t for t in saved if t.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert len(saved) - len(own) == 2
    assert sum(t.numel() for t in own) <= 8 * 16


def test_03_leading_axes_are_only_rows(backend):
    """[B, L, C] is B L rows whatever B: the same bits as flattened, so work is never cut along the batch."""
    student, teacher = pair(3, 5, 37)
    rows = divergence(student, teacher, kind="js", backend=backend)
    assert rows.shape == (3, 5)
    assert torch.equal(
        rows.flatten(), divergence(student.flatten(0, 1), teacher.flatten(0, 1), kind="js", backend=backend)
    )


def test_04_vocabularies_of_two_widths(backend):
    """Padding the shorter one with zeros or with the other's logits changes the loss. Ours asks, then cuts both."""
    student, _ = pair(6, 40)
    _, teacher = pair(6, 48, seed=1)
    for wider, narrower in ((teacher, student), (student, teacher)):
        with pytest.raises(ValueError, match=r"classes.*vocab_size"):
            divergence_loss(wider, narrower, backend=backend)
    got, grad = value_and_gradient(divergence_loss, student, teacher, vocab_size=40, backend=backend)
    want, truth = value_and_gradient(divergence_loss, student, teacher[:, :40].contiguous(), backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, truth)
    zero_padded = divergence_loss(F.pad(student.detach(), (0, 8)), teacher, backend=backend)
    assert abs(zero_padded - want) > 1e-2
    # the longer one gets no gradient for what is cut
    _, grad = value_and_gradient(divergence_loss, teacher, student.detach(), vocab_size=40, backend=backend)
    assert bool((grad[:, 40:] == 0).all()) and bool((grad[:, :40] != 0).all())


def test_05_ignored_labels_leave_numerator_and_denominator(backend):
    student, teacher = pair(10, 12)
    labels = torch.arange(10)
    labels[3:] = -100
    got = distillation_loss(student, teacher, labels, backend=backend).loss
    want = distillation_loss(student[:3], teacher[:3], labels[:3], backend=backend).loss
    torch.testing.assert_close(got, want)
    # dkd reads labels itself: -100 in a masked row is no index
    got = distillation_loss(student, teacher, labels, kind="dkd", beta=(1.0, 8.0), backend=backend).loss
    want = distillation_loss(student[:3], teacher[:3], labels[:3], kind="dkd", beta=(1.0, 8.0), backend=backend).loss
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- 6 to 9
@pytest.mark.parametrize("kind", KINDS)
def test_06_classes_masked_in_both_models(backend, kind):
    """-inf on both sides: as if the classes were not there, value and gradient; 0 x inf nowhere."""
    student, teacher = pair(5, 20)
    masked_s, masked_t = student.detach().clone(), teacher.clone()
    masked_s[:, 12:], masked_t[:, 12:] = -math.inf, -math.inf
    got, grad = value_and_gradient(divergence_loss, masked_s, masked_t, kind=kind, beta=0.3, backend=backend)
    want, truth = value_and_gradient(
        divergence_loss,
        student[:, :12].contiguous(),
        teacher[:, :12].contiguous(),
        kind=kind,
        beta=0.3,
        backend=backend,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad[:, :12], truth, rtol=1e-4, atol=1e-6)
    assert bool((grad[:, 12:] == 0).all())


def test_06_dkd_with_masked_classes(backend):
    student, teacher = pair(5, 20)
    labels = torch.arange(5)
    masked_s, masked_t = student.detach().clone(), teacher.clone()
    masked_s[:, 12:], masked_t[:, 12:] = -math.inf, -math.inf
    got, grad = value_and_gradient(dkd_loss, masked_s, masked_t, labels, backend=backend)
    want, truth = value_and_gradient(dkd_loss, student[:, :12], teacher[:, :12], labels, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, :12], truth, rtol=1e-4, atol=1e-5)
    assert bool((grad[:, 12:] == 0).all())


@pytest.mark.parametrize("kind", [*KINDS, "dkd"])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 200.0), (torch.float32, 1e4), (torch.float16, 60.0)])
def test_07_large_gaps_do_not_underflow(backend, kind, dtype, gap):
    """log of a mixture or of 1 - p_target at a gap of 200 is log 0 when it is not taken in log space."""
    student = torch.tensor([[gap, 0.0, -gap, 1.0], [0.0, gap, 1.0, 2.0]], dtype=dtype)
    teacher = torch.tensor([[0.0, gap, 1.0, -gap], [0.0, gap, 2.0, 1.0]], dtype=dtype)
    options: dict = {"kind": kind, "backend": backend}
    if kind == "dkd":
        options |= {"beta": (1.0, 8.0), "labels": torch.tensor([1, 1])}
    got, grad = value_and_gradient(divergence, student, teacher, **options)
    want, truth = value_and_gradient(
        divergence, student.double(), teacher.double(), **(options | {"backend": "reference"})
    )
    assert bool(want.isfinite().all()) and bool(truth.isfinite().all())
    # the reference of dkd in float32 renormalises logs of size `gap`, which carry gap eps each
    slack = 8 * gap * torch.finfo(torch.float32).eps if kind == "dkd" and backend == "reference" else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=1e-6)
    torch.testing.assert_close(
        grad.double(), truth, rtol=max(slack, 1e-3), atol=slack * max(1.0, truth.abs().max().item())
    )


def test_08_reverse_kl_at_low_temperature(backend):
    """F.kl_div(target=student's probabilities) has NaN gradients here: xlogy where the target underflows."""
    student, teacher = pair(8, 50, scale=4.0)
    got, grad = value_and_gradient(
        divergence_loss, student, teacher, kind="reverse_kl", temperature=0.05, backend=backend
    )
    want, truth = value_and_gradient(
        divergence_loss, student.double(), teacher.double(), kind="reverse_kl", temperature=0.05, backend="reference"
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-3, atol=2e-5 * truth.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_09_equal_models_give_zero(backend, kind):
    """A "KL" without the teacher's entropy gives 3.42 here."""
    student, _ = pair(6, 30)
    rows, grad = value_and_gradient(divergence, student, student.detach().clone(), kind=kind, backend=backend)
    torch.testing.assert_close(rows, torch.zeros(6), rtol=0.0, atol=2e-6)
    torch.testing.assert_close(grad, torch.zeros(6, 30), rtol=0.0, atol=1e-6)


# ---------------------------------------------------------------- 10 to 14
def test_10_the_mean_does_not_grow_with_the_map(backend):
    """batchmean on [N, C, H, W] gives 4 times the loss on a map of twice the side."""
    student, teacher = pair(2, 7, 16, 16)
    small = divergence_loss(student, teacher, dim=1, backend=backend)
    large = divergence_loss(student.repeat(1, 1, 2, 2), teacher.repeat(1, 1, 2, 2), dim=1, backend=backend)
    torch.testing.assert_close(small, large)
    batchmean = F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")
    torch.testing.assert_close(small * 256, batchmean)


def test_11_reductions_differ(backend):
    """dkd of a peer returns the sum for every reduction."""
    student, teacher = pair(6, 9)
    labels = torch.arange(6)
    none, total, mean = (
        dkd_loss(student, teacher, labels, reduction=r, backend=backend) for r in ("none", "sum", "mean")
    )
    assert none.shape == (6,) and total.shape == mean.shape == ()
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / 6, mean)
    assert abs(total - mean) > 1e-2


def test_13_saturated_softmax_needs_no_eps(backend):
    """1 - p is 0 in float32 here; clamping it at 1 - 1e-8 (which is 1) gives log 0."""
    teacher = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([0])
    assert (1 - teacher.softmax(-1).max()).item() == 0.0
    got, grad = value_and_gradient(dkd_loss, student, teacher, labels, temperature=1.0, backend=backend)
    want, truth = value_and_gradient(
        dkd_loss, student.double(), teacher.double(), labels, temperature=1.0, backend="reference"
    )
    # the reference in float32 renormalises logs of size 40: 40 eps
    assert got.item() == pytest.approx(want.item(), rel=1e-6 if backend == "cpu" else 5e-6)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "dkd"])
def test_14_nothing_kept_is_zero_with_a_graph(backend, kind):
    student, teacher = pair(4, 9)
    options: dict = {"beta": (1.0, 8.0), "labels": torch.full((4,), -100)} if kind == "dkd" else {}
    if kind == "dkd" and backend == "reference":
        options["labels"] = torch.zeros(4, dtype=torch.long)
    got, grad = value_and_gradient(
        divergence_loss, student, teacher, kind=kind, mask=torch.zeros(4, dtype=torch.bool), backend=backend, **options
    )
    assert got.item() == 0.0 and bool((grad == 0).all())
    # half of it masked: the other half must not notice
    mask = torch.tensor([False, False, True, True])
    rest = {"beta": (1.0, 8.0), "labels": torch.arange(4)} if kind == "dkd" else {}
    cut = {k: v[2:] if k == "labels" else v for k, v in rest.items()}
    torch.testing.assert_close(
        divergence_loss(student, teacher, kind=kind, mask=mask, backend=backend, **rest),
        divergence_loss(student[2:], teacher[2:], kind=kind, backend=backend, **cut),
    )


# ---------------------------------------------------------------- 15 to 21
@pytest.mark.parametrize("classes", [1, 15, 16, 17, 1023, 1024, 1025, 2049, 4097])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_15_no_seam_between_blocks(backend, classes, kind):
    """Sizes around every block of the kernels; labels and rows are cut together or not at all."""
    rows = 11
    student, teacher = pair(rows, classes)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(5))
    labels[::3] = -100
    got = distillation_loss(student, teacher, labels, kind=kind, backend=backend)
    one_by_one = [
        distillation_loss(
            student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], kind=kind, backend="reference"
        ).loss
        for i in range(rows)
        if labels[i] != -100
    ]
    torch.testing.assert_close(got.loss, torch.stack(one_by_one).mean(), rtol=1e-5, atol=1e-6)


def test_16_t2_does_not_depend_on_the_weights(backend):
    """A peer drops T^2 when the weight of the cross-entropy is 0 or None."""
    student, teacher = pair(6, 10)
    labels = torch.arange(6)
    want = 16 * divergence_loss(student, teacher, temperature=4.0, backend=backend)
    torch.testing.assert_close(kd_loss(student, teacher, backend=backend), want)
    for ce_weight in (0.0, 1e-12, 1.0):
        out = distillation_loss(
            student, teacher, labels, temperature=4.0, ce_weight=ce_weight, kd_weight=1.0, backend=backend
        )
        torch.testing.assert_close(out.parts["kd"], want)
        torch.testing.assert_close(out.loss, want + ce_weight * F.cross_entropy(student, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_17_temperature_is_used(backend, kind):
    student, teacher = pair(6, 10)
    cool = divergence_loss(student, teacher, kind=kind, temperature=2.0, backend=backend)
    torch.testing.assert_close(
        cool, divergence_loss(student / 2, teacher / 2, kind=kind, backend=backend), rtol=1e-5, atol=1e-7
    )
    assert abs(cool - divergence_loss(student, teacher, kind=kind, backend=backend)) > 1e-3


def test_18_beta_at_its_ends(backend):
    """js means forward and reverse KL at 0 and 1 and tends to 0 beside them; js_rescaled has no jump."""
    student, teacher = pair(6, 10)

    def at(kind: str, beta: float) -> float:
        return divergence_loss(student, teacher, kind=kind, beta=beta, backend=backend).item()

    forward, reverse = at("forward_kl", 0.5), at("reverse_kl", 0.5)
    for kind in ("js", "js_rescaled"):
        assert at(kind, 0.0) == pytest.approx(forward) and at(kind, 1.0) == pytest.approx(reverse)
    assert at("js", 1e-4) < 1e-3 * forward and at("js", 1 - 1e-4) < 1e-3 * reverse
    assert at("js_rescaled", 1e-4) == pytest.approx(forward, rel=1e-2)
    assert at("js_rescaled", 1 - 1e-4) == pytest.approx(reverse, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_19_a_subset_of_the_classes_is_renormalised(backend, kind):
    """A KL over part of the classes without a new softmax is no KL: it was -0.32. Cutting comes before the softmax here."""
    student, teacher = pair(20, 30)
    rows = divergence(student, teacher, kind=kind, vocab_size=7, backend=backend)
    assert bool((rows > 0).all())
    p, q = teacher.softmax(-1)[:, :7], student.detach().softmax(-1)[:, :7]
    assert bool(((p * (p / q).log()).sum(-1) < 0).any())


def test_20_labels_are_not_shifted(backend):
    """The label of position t drops position t: shifting is the caller's, once."""
    student, teacher = pair(1, 6, 11)
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100]])
    _, grad = value_and_gradient(lambda s: distillation_loss(s, teacher, labels, backend=backend).loss, student)
    assert (grad != 0).any(-1).tolist() == [[False, False, True, True, True, False]]


def test_21_classes_are_the_last_axis_and_options_have_names(backend):
    """A softmax over axis 1 of [B, L, V] runs over time; an option passed by position lands in another one."""
    student, teacher = pair(2, 5, 13)
    last = divergence_loss(student, teacher, backend=backend)
    torch.testing.assert_close(last, divergence_loss(student.flatten(0, 1), teacher.flatten(0, 1), backend=backend))
    assert abs(last - divergence_loss(student, teacher, dim=1, backend=backend)) > 1e-2
    one = divergence_loss(student[:1, :1], teacher[:1, :1], backend=backend)  # no axis of size 1 is squeezed away
    torch.testing.assert_close(one, divergence_loss(student[0, 0], teacher[0, 0], backend=backend))
    for call in (lambda: KDLoss("sum"), lambda: DivergenceLoss("js"), lambda: kd_loss(student, teacher, 4.0)):
        with pytest.raises(TypeError):
            call()


# ---------------------------------------------------------------- 23 and 24
def test_23_tvd_at_equality_and_gradients_of_both(backend):
    """The subgradient of |p - q| at 0 is 0, and the second argument gets a gradient when it is asked for."""
    student, teacher = pair(4, 8)
    teacher[0] = student.detach()[0]
    teacher.requires_grad_()
    loss = divergence_loss(student, teacher, kind="tvd", teacher_grad=True, backend=backend)
    grad_s, grad_t = torch.autograd.grad(loss, (student, teacher))
    torch.testing.assert_close(grad_s[0], torch.zeros(8), rtol=0.0, atol=1e-8)
    assert bool((grad_s[1:] != 0).any()) and bool((grad_t[1:] != 0).any())
    other = divergence_loss(teacher.detach(), student, kind="tvd", teacher_grad=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(other, student)[0], grad_s, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not HAS_CORE, reason="about the kernels")
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_24_gradients_are_rounded_once_and_threads_change_nothing(kind):
    """Adding parts of a gradient in bf16 loses digits with every part. Ours is made in float32 and rounded once."""
    student, teacher = pair(64, 3000, dtype=torch.bfloat16)
    exact = student.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(divergence_loss(exact, teacher.double(), kind=kind, backend="reference"), exact)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradient(divergence_loss, student, teacher, kind=kind, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])
        slack = torch.finfo(torch.bfloat16).eps / 2
        torch.testing.assert_close(grad.double(), truth, rtol=slack * 1.01, atol=1e-6 * truth.abs().max().item())


# ---------------------------------------------------------------- the page
def test_the_page_has_25_rows_and_its_tests_exist():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*?) \|$", (ROOT / "docs" / "traps.md").read_text(), flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for number, answer in rows:
        names = re.findall(r"`([\w/]+\.py)::(\w+)`", answer)
        assert names or answer.startswith("No test:"), f"row {number} has neither a test nor a reason"
        for file, name in names:
            source = (ROOT / "python_tests" / file).read_text()
            assert f"def {name}(" in source, f"row {number}: {file} has no {name}"
