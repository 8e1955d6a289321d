"""The CUDA divergence, its binding and its kernels under the emulator, through the public functions, against the float64 reference.

Not the hardware: exp is the host's there, not the approximation of a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from cuda_emulation import CSRC, build
from tolerances import check_against_reference

from kdfast.cuda import divergence as kernels
from kdfast.ops.divergence import cross_entropy_rows, divergence, divergence_reference, divergence_total

op = importlib.import_module("kdfast.ops.divergence")  # kdfast.ops.divergence itself is the function
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers of the emulator: ucontext of Linux")
INF = math.inf
EVERY_KIND = ["forward_kl", "reverse_kl", "jeffreys", "js", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha"]
CASES = [(kind, 0.5) for kind in EVERY_KIND] + [
    ("js", 0.1), ("js", 0.0), ("js_rescaled", 0.9), ("skew_forward_kl", 0.1), ("skew_reverse_kl", 0.9), ("skew_forward_kl", 0.0),
    ("alpha", 1.0), ("alpha", 2.0), ("alpha", -1.0),
]  # fmt: skip
# As for the CPU and Triton kernels, with the reasons (python_tests/ops/test_divergence.py).
FLOORS = {
    torch.float32: ((1e-5, 1e-6), (1e-5, 2e-5)), torch.bfloat16: ((1e-5, 1e-6), (8e-3, 2e-5)),
    torch.float16: ((1e-5, 1e-6), (1e-3, 2e-5)),
}  # fmt: skip
# float32 rows of the emulated device: one block, a cluster of two, a cluster of four of which the last has little.
WIDTHS = (201, 14_101, 40_001)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "emulated_divergence.so"
    headers = (sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include"))  # torch brings pybind11's
    build(
        path, Path(__file__).parent / "divergence_module.cu", CSRC / "bind_cuda_divergence.cpp", CSRC / "cuda" / "divergence.cu",
        flags=tuple(flag for folder in headers for flag in ("-isystem", folder)),
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("emulated_divergence", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(autouse=True)
def on_the_emulator(module, monkeypatch):
    """backend="cpu" then runs the CUDA functions, their autograd and checks included."""
    monkeypatch.setattr(kernels, "core", lambda: module)
    monkeypatch.setattr(kernels, "call", lambda function, tensor, *args: function(0, *args))
    for name, kernel in {
        "_rows_op": kernels.rows, "_rows_backward_op": kernels.rows_backward, "_sum_op": kernels.weighted_sum,
    }.items():  # fmt: skip
        assert callable(getattr(op, name))
        monkeypatch.setattr(op, name, kernel)
    before = module.launches()
    yield
    module.set_order(0)
    assert module.launches() > before  # the test ran these kernels and no others


def logits(*shape, dtype=torch.float32, sigma=0.7, seed=0, scale=3.0):
    """A student, and a teacher at distance sigma from it, so that small and large differences both occur."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    teacher = student + sigma * torch.randn(shape, generator=g, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def cuda(*args, **options):
    return divergence(*args, **options, backend="cpu")


def against_reference(inputs, options):
    floor, gradient_floor = FLOORS[inputs[0].dtype]
    check_against_reference(
        lambda s, t: cuda(s, t, **options), lambda s, t: divergence_reference(s, t, **options), inputs, floor=floor,
        gradient_floor=gradient_floor,
    )  # fmt: skip


# ---------------------------------------------------------------- against the reference
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_within_the_error_budget(kind, beta):
    for classes, temperature in ((201, 2.0), (2, 1.0)):
        inputs = logits(3, classes, seed=classes)
        for extra in ({}, {"row_weight": torch.tensor([0.5, 0.0, 2.0])}):
            against_reference(inputs, dict(kind=kind, beta=beta, temperature=temperature, **extra))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_rows_over_a_cluster(kind, order, module):
    """Whatever order the threads take their turns in: a missing barrier would show."""
    module.set_order(order)
    for classes in WIDTHS[1:]:
        against_reference(logits(2, classes), dict(kind=kind, row_weight=torch.tensor([1.5, 0.5])))
        against_reference(logits(1, classes), dict(kind=kind, temperature=torch.tensor([2.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_packs_of_every_dtype(dtype):
    for classes in (200, 40000):
        inputs = logits(2, classes, dtype=dtype)
        for extra in ({}, {"row_weight": torch.tensor([0.7, 1.3])}):
            against_reference(inputs, dict(kind="forward_kl", temperature=2.0, **extra))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_gradient_asked_and_not_the_other(kind):
    for wants in ((True, False), (False, True), (False, False)):
        inputs = tuple(x.detach().requires_grad_(w) for x, w in zip(logits(3, 150), wants))
        against_reference(inputs, dict(kind=kind, beta=0.3, row_weight=torch.tensor([1.0, 3.0, 0.5])))


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.1), (1.0, 0.2)])
@pytest.mark.parametrize("classes", WIDTHS[:2])
def test_cross_entropy_in_the_same_pass(kind, temperature, smoothing, classes):
    labels = torch.tensor([3, classes - 1, -100, 0])
    weight = torch.tensor([0.3, 1.0, 0.0, 0.7])  # the label of a row of weight 0 is not read

    def fused(s, t):
        return divergence_total(
            s, t, kind=kind, beta=0.4, temperature=temperature, labels=labels, vocab_size=None, row_weight=weight, kd_factor=0.6,
            ce_factor=0.4, label_smoothing=smoothing, backend="cpu",
        )  # fmt: skip

    def by_parts(s, t):
        w = weight.to(s.dtype)
        kd = (divergence_reference(s, t, kind=kind, beta=0.4, temperature=temperature) * w).sum()
        ce = (cross_entropy_rows(s, labels, weight != 0, classes, -1, smoothing) * w).sum()
        return 0.6 * kd + 0.4 * ce, torch.stack((kd, ce)).detach()

    student, teacher = logits(4, classes)
    check_against_reference(
        fused, by_parts, (student, teacher.detach()), floor=(1e-5, 1e-6), gradient_floor=(1e-5, 2e-5)
    )


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_small_divergence_keeps_its_digits_and_is_never_negative(kind, offset):
    student, teacher = logits(3, 700, sigma=1e-3, scale=2.0)
    student, teacher = student.detach() + offset, teacher.detach() + offset
    got = torch.stack([cuda(s, t, kind=kind, beta=0.3) for s, t in zip(student[:, :699], teacher[:, :699])])
    want = divergence_reference(student.double(), teacher.double(), kind=kind, beta=0.3, vocab_size=699)
    assert got.min() > 0 and want.max() < (1e-3 if kind == "tvd" else 1e-4)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_model_against_itself_is_exactly_zero(kind, beta):
    student, _ = logits(3, 251)
    assert torch.equal(cuda(student, student.detach(), kind=kind, beta=beta), torch.zeros(3))


# ---------------------------------------------------------------- rules: -inf, NaN, labels, empty, vocabularies, strides
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_masked_classes(kind):
    """-inf in both models counts nothing; a row of only -inf is ignored; only the student's makes forward KL infinite."""
    student, teacher = (x.detach() for x in logits(4, 151))
    student[:, 20:90] = teacher[:, 20:90] = -INF
    student[1] = -INF
    teacher[2, :-1] = -INF
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    for extra in ({}, {"row_weight": torch.tensor([1.0, 1.0, 0.5, 2.0])}):
        got = cuda(*inputs, kind=kind, beta=0.3, **extra)
        want = divergence_reference(*inputs, kind=kind, beta=0.3, **extra)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)
        finite = bool(want.isfinite().all())
        assert finite or kind in ("reverse_kl", "jeffreys")
        if finite:
            gradient = torch.autograd.grad(got.sum(), inputs)
            for g, w in zip(gradient, torch.autograd.grad(want.sum(), inputs)):
                torch.testing.assert_close(g, w, rtol=2e-5, atol=1e-6)
            assert not gradient[0][1].any() and gradient[0][0].abs().max() > 1e-3
    if kind == "forward_kl":
        student = student.detach().clone()
        student[0, 3] = -INF
        rows = cuda(student.requires_grad_(), teacher.detach(), kind=kind)
        (gradient,) = torch.autograd.grad(rows[0], student)
        assert rows[0] == INF and gradient.isfinite().all() and gradient[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_in_gives_nan_out_in_that_row_alone(kind, value):
    for side in (0, 1):
        pair = [x.detach() for x in logits(3, 151)]
        pair[side][1, 140] = value
        student, teacher = pair[0].requires_grad_(), pair[1]
        rows = cuda(student, teacher, kind=kind)
        (gradient,) = torch.autograd.grad(rows, student, torch.ones(3))
        assert rows.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False] and not gradient[::2].isnan().any()
        loss = cuda(
            student, teacher, kind=kind, row_weight=torch.tensor([1.0, 0.0, 1.0])
        )  # a row of weight 0 is not read
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[1].any()
        assert cuda(student, teacher, kind=kind, row_weight=torch.ones(3)).isnan()


@pytest.mark.parametrize("label", [-1, 151, 10**12, -100])
def test_a_label_out_of_range_addresses_nothing_and_gives_nan(label):
    student, teacher = logits(3, 151)
    loss, _ = divergence_total(
        student, teacher.detach(), kind="js", beta=0.5, temperature=1.0, labels=torch.tensor([0, 3, label]), vocab_size=None,
        row_weight=None, kd_factor=1.0, ce_factor=1.0, backend="cpu",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isnan() and gradient.isnan().all(1).tolist() == [False, False, True]


def test_empty_and_single():
    student, teacher = torch.zeros(0, 7, requires_grad=True), torch.zeros(0, 7)
    assert cuda(student, teacher).shape == (0,)
    total = cuda(student, teacher, row_weight=torch.zeros(0))
    assert total == 0 and torch.autograd.grad(total, student)[0].shape == (0, 7)
    alone = cuda(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert alone.shape == () and alone == pytest.approx(math.tanh(0.5), rel=1e-6)
    assert cuda(torch.tensor([[5.0]]), torch.tensor([[-3.0]])).abs() < 1e-6


def test_vocabularies_of_two_widths():
    """Only the first classes are compared; the gradient of the others is zero."""
    student, teacher = logits(3, 160)[0], logits(3, 151, seed=1)[1]
    for extra in ({}, {"row_weight": torch.rand(3)}):
        against_reference((student, teacher), dict(kind="js", vocab_size=147, **extra))
        (gradient,) = torch.autograd.grad(cuda(student, teacher, kind="js", vocab_size=147, **extra).sum(), student)
        assert not gradient[:, 147:].any() and gradient[:, :147].abs().min() > 0


@pytest.mark.parametrize("classes", [151, 152])
def test_rows_read_in_place(classes):
    """Slices of a batch of sequences, rows in another order, rows that do not begin at a whole pack."""
    wide = torch.full((3, 7, 170), math.nan)
    student, teacher = (x.detach() for x in logits(3, 5, classes))
    views = {"batch": wide[:, 1:6, 4 : 4 + classes], "odd": wide[:, 1:6, 3 : 3 + classes]}
    want = divergence_reference(student.double(), teacher.double())
    for name, view in views.items():
        wide.fill_(math.nan)
        view.copy_(student)
        assert not view.is_contiguous(), name
        torch.testing.assert_close(cuda(view, teacher).double(), want, rtol=1e-5, atol=1e-7)
    swapped = student.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    against_reference((swapped, teacher), dict(kind="forward_kl", row_weight=torch.rand(3, 5)))


def test_float16_gradients_survive_until_the_loss_scaler_speaks():
    student, teacher = logits(4, 64, dtype=torch.float16)
    loss = cuda(student, teacher.detach(), row_weight=torch.full((4,), 1e-9))
    (gradient,) = torch.autograd.grad(loss * 2.0**24, student)
    wide = student.detach().float().requires_grad_()
    (want,) = torch.autograd.grad((divergence_reference(wide, teacher.detach().float()) * 1e-9).sum() * 2.0**24, wide)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.float(), want, rtol=1e-3, atol=1e-7)
    assert want.abs().max() > 1e-5


def test_the_same_bits_every_time_and_in_any_order_of_threads(module):
    student, teacher = logits(2, WIDTHS[2])
    results = []
    for order in (0, 2):
        module.set_order(order)
        loss = cuda(student, teacher.detach(), kind="js", row_weight=torch.tensor([0.3, 0.7]))
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_upstream_factors_and_repeated_backwards():
    student, teacher = logits(3, 41)
    for options in ({}, {"row_weight": torch.tensor([1.0, 2.0, 0.5])}):
        loss = cuda(student, teacher.detach(), kind="js", **options).sum()
        (once,) = torch.autograd.grad(loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(loss * 3.0, student)
        torch.testing.assert_close(again, 3.0 * once, rtol=1e-6, atol=1e-12)
        assert once.abs().max() > 1e-3


def test_a_row_that_does_not_fit_is_refused_before_any_launch(module):
    most = module.cuda_divergence_most(0, 4)
    assert most % 8 == 0 and 131072 < most < 16 * 32768  # float32, of at most 227 KB a block
    before = module.launches()
    student = torch.zeros(1, most + 1)
    with pytest.raises(ValueError, match=f"student: {most + 1} classes do not fit the shared memory of a cluster"):
        cuda(student, student)
    assert module.launches() == before
    cuda(torch.zeros(1, 8), torch.zeros(1, 8))
