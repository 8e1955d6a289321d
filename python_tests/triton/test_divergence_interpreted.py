"""The divergence kernels under Triton's interpreter, through the public functions, against the float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import assert_within_budget, check_against_reference
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

import importlib  # noqa: E402

from kdfast.ops.divergence import (  # noqa: E402
    KINDS,
    cross_entropy_rows,
    divergence,
    divergence_reference,
    divergence_total,
)
from kdfast.triton import divergence as kernels  # noqa: E402
from kdfast.triton import launch  # noqa: E402

op = importlib.import_module("kdfast.ops.divergence")  # kdfast.ops.divergence itself is the function
# The interpreter computes with numpy, which warns of the infinities that masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
round_as_a_gpu()
take_the_cpu(
    op, {"_rows_op": kernels.rows, "_rows_backward_op": kernels.rows_backward, "_sum_op": kernels.weighted_sum}
)
INF = math.inf
CASES = [(k, 0.5) for k in KINDS if k != "dkd"] + [
    ("dkd", (1.0, 8.0)), ("dkd", (0.7, 0.0)), ("jeffreys", 0.2), ("js", 0.1), ("js", 0.0), ("js", 1.0), ("js_rescaled", 0.9),
    ("skew_forward_kl", 0.1), ("skew_forward_kl", 0.0), ("skew_reverse_kl", 0.9), ("skew_reverse_kl", 0.0),
    ("alpha", 0.0), ("alpha", 1.0), ("alpha", 2.0), ("alpha", -1.0), ("alpha", 0.999),
]  # fmt: skip
EVERY_KIND = [(k, (1.0, 2.0) if k == "dkd" else 0.3) for k in KINDS]
# As for the CPU kernels, with the reasons (python_tests/ops/test_divergence.py).
FLOORS = {
    torch.float32: ((1e-5, 1e-6), (1e-5, 2e-5)), torch.float64: ((1e-7, 1e-13), (1e-6, 1e-13)),
    torch.bfloat16: ((1e-5, 1e-6), (8e-3, 2e-5)), torch.float16: ((1e-5, 1e-6), (1e-3, 2e-5)),
}  # fmt: skip
# How a row is walked: whole in one tile; several tiles of one program; tiles of several programs, added afterwards.
FORMS = {"whole": (4096, 0), "tiles": (64, 0), "split": (64, 4)}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    return use_form(request.param, monkeypatch)


def use_form(name, monkeypatch):
    tile, multiprocessors = FORMS[name]
    monkeypatch.setattr(launch, "TILE", tile)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    return name


def logits(*shape, dtype=torch.float32, sigma=0.7, seed=0, scale=3.0):
    """A student, and a teacher at distance sigma from it, so that small and large differences both occur."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    teacher = student + sigma * torch.randn(shape, generator=g, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def some_labels(kind, shape, classes, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed)) if kind == "dkd" else None


def triton_rows(*args, **options):
    return divergence(*args, **options, backend="cpu")


# ---------------------------------------------------------------- what is being tested
def test_these_tests_run_triton_kernels(monkeypatch):
    """Rows, backward and sum, and the number of launches each form takes."""
    student, teacher = logits(2, 300)
    counts = {}
    for name in FORMS:
        use_form(name, monkeypatch)
        with launch.recording() as launches:
            triton_rows(student.detach(), teacher.detach())
            forward = len(launches)
            triton_rows(student, teacher.detach(), kind="js", row_weight=torch.ones(2))
        counts[name] = forward, len(launches) - forward
        assert launches[0].arguments["SINGLE" if name != "split" else "n_splits"] == {
            "whole": True,
            "tiles": False,
        }.get(name, 3)
    assert counts == {"whole": (1, 2), "tiles": (1, 2), "split": (3, 4)}


# ---------------------------------------------------------------- against the reference
WEIGHT = {"row_weight": torch.tensor([0.5, 0.0, 2.0])}


@pytest.mark.parametrize(
    ("kind", "beta", "dtype"),
    [(*case, torch.float32) for case in CASES]
    + [(*case, dtype) for case in EVERY_KIND for dtype in (torch.float64, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_within_the_error_budget(kind, beta, dtype, monkeypatch):
    """Each way to walk a row once: what the interpreter takes per program and tile is most of this folder's time."""
    for name, classes, temperature, extra in (
        ("whole", 37, 0.5, {}), ("tiles", 201, 2.0, WEIGHT), ("whole", 2, 1.0, WEIGHT), ("split", 330, 1.0, WEIGHT),
    ):  # fmt: skip
        if dtype not in (torch.float32, torch.float64) and (name, classes) not in (("whole", 37), ("tiles", 201)):
            continue  # a half type differs in what it loads and stores only
        use_form(name, monkeypatch)
        student, teacher = logits(3, classes, dtype=dtype, seed=classes)
        teacher.requires_grad_(kind != "dkd")
        options = dict(kind=kind, beta=beta, temperature=temperature, labels=some_labels(kind, (3,), classes)) | extra
        check_against_reference(
            lambda s, t, o=options: triton_rows(s, t, **o),
            lambda s, t, o=options: divergence_reference(s, t, **o),
            (student, teacher),
            floor=FLOORS[dtype][0],
            gradient_floor=FLOORS[dtype][1],
            allow_zero=classes == 2 and kind == "dkd" and beta[0] == 0,
        )


@pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
def test_one_gradient_asked_and_not_the_other(kind, beta, form):
    labels = some_labels(kind, (3,), 150)
    for wants in ((True, False), (False, True), (False, False)):
        if kind == "dkd" and wants[1]:
            continue
        student, teacher = (x.detach().requires_grad_(w) for x, w in zip(logits(3, 150), wants))
        options = dict(kind=kind, beta=beta, labels=labels, row_weight=torch.tensor([1.0, 3.0, 0.5]))
        check_against_reference(
            lambda s, t, o=options: triton_rows(s, t, **o),
            lambda s, t, o=options: divergence_reference(s, t, **o),
            (student, teacher),
            floor=FLOORS[torch.float32][0],
            gradient_floor=FLOORS[torch.float32][1],
        )


@pytest.mark.parametrize("kind", ["forward_kl", "js", "dkd", "binary"])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.1), (1.0, 0.2)])
def test_cross_entropy_in_the_same_pass(kind, temperature, smoothing, form):
    classes, n = 150, 4
    labels = torch.tensor([3, 149, -100, 0])
    weight = torch.tensor([0.3, 1.0, 0.0, 0.7])  # the label of a row of weight 0 is not read
    beta = (1.0, 2.0) if kind == "dkd" else 0.4

    def fused(s, t):
        loss, parts = divergence_total(
            s, t, kind=kind, beta=beta, temperature=temperature, labels=labels, vocab_size=None, row_weight=weight,
            kd_factor=0.6, ce_factor=0.4, label_smoothing=smoothing, backend="cpu",
        )  # fmt: skip
        assert not parts.requires_grad
        return loss, parts

    def by_parts(s, t):
        w = weight.to(torch.float64 if s.dtype == torch.float64 else torch.float32)
        target = torch.where(weight != 0, labels, 0) if kind == "dkd" else None
        rows = divergence_reference(s, t, kind=kind, beta=beta, temperature=temperature, labels=target)
        kd = (rows * w).sum()
        ce = (cross_entropy_rows(s, labels, weight != 0, classes, -1, smoothing) * w).sum()
        return 0.6 * kd + 0.4 * ce, torch.stack((kd, ce)).detach()

    student, teacher = logits(n, classes)
    check_against_reference(
        fused, by_parts, (student, teacher.detach()), floor=(1e-5, 1e-6), gradient_floor=(1e-5, 2e-5)
    )


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_small_divergence_keeps_its_digits_and_is_never_negative(kind, beta, offset, form):
    """Teacher = student + 1e-3 noise, a KL of 5e-7: float32's textbook sums have no digit left. Also far from 0."""
    if kind == "binary" and offset:
        return  # sigmoid(1e4) is 1 for both
    student, teacher = logits(3, 250, sigma=1e-3, scale=2.0)
    student, teacher = student.detach() + offset, teacher.detach() + offset
    labels = some_labels(kind, (3,), 250)
    got = triton_rows(student, teacher, kind=kind, beta=beta, labels=labels)
    want = divergence_reference(student.double(), teacher.double(), kind=kind, beta=beta, labels=labels)
    assert got.min() > 0 and want.max() < (1e-3 if kind in ("tvd", "binary") else 1e-4)
    torch.testing.assert_close(got.double(), want, rtol=2e-3 if kind == "dkd" else 1e-4, atol=0)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_model_against_itself_is_exactly_zero(kind, beta, form):
    for dtype in (torch.float32, torch.bfloat16) if form == "whole" else (torch.float32,):
        student, _ = logits(3, 150, dtype=dtype)
        rows = triton_rows(student, student.detach(), kind=kind, beta=beta, labels=some_labels(kind, (3,), 150))
        assert torch.equal(rows, torch.zeros(3))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys", "alpha", "js"])
def test_a_teacher_far_from_the_student(kind, form):
    """A constant between the models changes nothing, and must not cost the digits of the sums either."""
    student, teacher = logits(3, 200)
    shifted = (teacher.detach() + 4096.0).requires_grad_()  # rounds the teacher, so the truth is taken from it
    weight = torch.tensor([1.0, 0.5, 2.0])
    got = torch.autograd.grad(triton_rows(student, shifted, kind=kind, beta=0.3, row_weight=weight), (student, shifted))
    wide = tuple(x.detach().double().requires_grad_() for x in (student, shifted))
    want = torch.autograd.grad(divergence_reference(*wide, kind=kind, beta=0.3, row_weight=weight.double()), wide)
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=2e-5 * float(w.abs().max()))


# ---------------------------------------------------------------- rules: -inf, NaN, labels, weights, empty
@pytest.mark.parametrize("kind", [k for k, _ in EVERY_KIND if k != "dkd"])
def test_masked_classes(kind, form):
    """-inf in both models counts nothing; a row of only -inf is ignored; only the student's makes forward KL infinite."""
    student, teacher = (x.detach() for x in logits(4, 150))
    student[:, 20:90] = teacher[:, 20:90] = -INF
    student[1] = -INF
    teacher[2, :-1] = -INF
    weight = torch.tensor([1.0, 1.0, 0.5, 2.0])
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    options = dict(kind=kind, beta=0.3)
    for extra in ({}, {"row_weight": weight}):
        got = triton_rows(*inputs, **options, **extra)
        want = divergence_reference(*inputs, **options, **extra)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)
        finite = bool(want.isfinite().all())
        assert finite or kind in ("reverse_kl", "jeffreys", "binary")
        if finite:
            gradient = torch.autograd.grad(got.sum(), inputs)
            for g, w in zip(gradient, torch.autograd.grad(want.sum(), inputs)):
                torch.testing.assert_close(g, w, rtol=2e-5, atol=1e-6)
            assert not gradient[0][1].any() and gradient[0][0].abs().max() > 1e-3
    student = student.detach().clone()
    student[0, 3] = -INF
    if kind == "forward_kl":
        student.requires_grad_()
        rows = triton_rows(student, teacher.detach(), kind=kind)
        (gradient,) = torch.autograd.grad(rows[0], student)
        assert rows[0] == INF and gradient.isfinite().all() and gradient[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "dkd"])
def test_an_infinite_divergence_of_factor_0_leaves_the_gradient_of_cross_entropy(kind, form):
    student, teacher = logits(4, 150)
    (student if kind == "forward_kl" else teacher).data[:, 7] = -INF
    teacher.requires_grad_(kind != "dkd")
    labels, weight = torch.tensor([3, 149, 20, 0]), torch.full((4,), 0.25)
    loss, parts = divergence_total(
        student, teacher, kind=kind, beta=(1.0, 2.0) if kind == "dkd" else 0.5, temperature=2.0, labels=labels, vocab_size=None,
        row_weight=weight, kd_factor=0.0, ce_factor=1.0, backend="cpu",
    )  # fmt: skip
    want = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(loss, want)
    assert kind == "dkd" or parts[0] == INF
    grads = torch.autograd.grad(loss, (student, teacher) if kind != "dkd" else (student,))
    torch.testing.assert_close(grads[0], torch.autograd.grad(want, student)[0], rtol=1e-5, atol=1e-7)
    assert not any(g.any() for g in grads[1:]) and grads[0].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["forward_kl", "js", "dkd"])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_in_gives_nan_out_in_that_row_alone(kind, value, form):
    labels = some_labels(kind, (3,), 150)
    beta = (1.0, 2.0) if kind == "dkd" else 0.3
    for side in (0, 1):
        pair = [x.detach() for x in logits(3, 150)]
        pair[side][1, 140] = value
        student, teacher = pair[0].requires_grad_(), pair[1]
        rows = triton_rows(student, teacher, kind=kind, beta=beta, labels=labels)
        (gradient,) = torch.autograd.grad(rows, student, torch.ones(3))
        assert rows.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False] and not gradient[::2].isnan().any()
        weights = torch.tensor([1.0, 0.0, 1.0])  # a row of weight 0 is not read
        loss = triton_rows(student, teacher, kind=kind, beta=beta, labels=labels, row_weight=weights)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[1].any()
        assert triton_rows(student, teacher, kind=kind, beta=beta, labels=labels, row_weight=torch.ones(3)).isnan()


@pytest.mark.parametrize("label", [-1, 150, 10**12, -100])
def test_a_label_out_of_range_addresses_nothing_and_gives_nan(label, form):
    student, teacher = logits(3, 150)
    labels = torch.tensor([0, 3, label])
    rows = triton_rows(student, teacher.detach(), kind="dkd", beta=(1.0, 1.0), labels=labels)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert rows.isnan().tolist() == [False, False, True] and gradient.isnan().all(1).tolist() == [False, False, True]
    loss, _ = divergence_total(
        student, teacher.detach(), kind="js", beta=0.5, temperature=1.0, labels=labels, vocab_size=None, row_weight=None,
        kd_factor=1.0, ce_factor=1.0, backend="cpu",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isnan() and gradient.isnan().all(1).tolist() == [False, False, True]


def test_empty_and_single():
    student, teacher = torch.zeros(0, 7, requires_grad=True), torch.zeros(0, 7)
    assert triton_rows(student, teacher).shape == (0,)
    total = triton_rows(student, teacher, row_weight=torch.zeros(0))
    assert total == 0 and torch.autograd.grad(total, student)[0].shape == (0, 7)
    alone = triton_rows(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert alone.shape == () and alone == pytest.approx(math.tanh(0.5), rel=1e-6)
    assert triton_rows(torch.tensor([[5.0]]), torch.tensor([[-3.0]])).abs() < 1e-6


def test_upstream_factors_and_repeated_backwards():
    student, teacher = logits(3, 40)
    for options in ({}, {"row_weight": torch.tensor([1.0, 2.0, 0.5])}):
        loss = triton_rows(student, teacher.detach(), kind="js", **options).sum()
        (once,) = torch.autograd.grad(loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(loss * 3.0, student)
        torch.testing.assert_close(again, 3.0 * once, rtol=1e-6, atol=1e-12)
        assert once.abs().max() > 1e-3


def test_float16_gradients_survive_until_the_loss_scaler_speaks():
    student, teacher = logits(4, 64, dtype=torch.float16)
    loss = triton_rows(student, teacher.detach(), kind="js", row_weight=torch.full((4,), 1e-9))
    (gradient,) = torch.autograd.grad(loss * 2.0**24, student)
    wide = student.detach().float().requires_grad_()
    rows = divergence_reference(wide, teacher.detach().float(), kind="js")
    (want,) = torch.autograd.grad((rows * 1e-9).sum() * 2.0**24, wide)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.float(), want, rtol=1e-3, atol=1e-7)
    assert want.abs().max() > 1e-5


# ---------------------------------------------------------------- memory
def layouts(x):
    """The same values [3, 5, 40] in other memory: views that must be read in place."""
    wide = torch.full((3, 7, 43), math.nan, dtype=x.dtype)
    wide[:, 1:6, 2:42] = x
    every_other = torch.full((6, 5, 80), math.nan, dtype=x.dtype)
    every_other[::2, :, ::2] = x
    return {
        "contiguous": x.contiguous(),
        "slice": wide[:, 1:6, 2:42],
        "steps": every_other[::2, :, ::2],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "classes first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "classes in the middle": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("kind", ["js", "dkd"])
@pytest.mark.parametrize("tile", [4096, 16])
def test_any_strides(kind, tile, monkeypatch):
    monkeypatch.setattr(launch, "TILE", tile)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 0)
    student, teacher = (x.detach() for x in logits(3, 5, 40))
    weight = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    options = dict(
        kind=kind, beta=(1.0, 2.0) if kind == "dkd" else 0.4, temperature=2.0, labels=some_labels(kind, (3, 5), 40)
    )
    truth_s, same_s = student.double().requires_grad_(), student.clone().requires_grad_()
    truth, same = (
        divergence_reference(truth_s, teacher.double(), **options),
        divergence_reference(same_s, teacher, **options),
    )
    (truth_grad,) = torch.autograd.grad((truth * weight).sum(), truth_s)
    (same_grad,) = torch.autograd.grad((same * weight).sum(), same_s)
    teachers = layouts(teacher)
    for i, (name, s) in enumerate(layouts(student).items()):
        other = list(teachers)[-i]
        s, t = s.detach().requires_grad_(), teachers[other]
        rows = triton_rows(s, t, **options)
        assert_within_budget(rows, truth, same, name=f"{name} / {other}", floor=FLOORS[torch.float32][0])
        (grad,) = torch.autograd.grad((rows * weight).sum(), s)
        assert_within_budget(grad, truth_grad, same_grad, name=f"grad {name}", floor=FLOORS[torch.float32][1])
        (grad,) = torch.autograd.grad(triton_rows(s, t, **options, row_weight=weight), s)
        assert_within_budget(grad, truth_grad, same_grad, name=f"sum {name}", floor=FLOORS[torch.float32][1])


@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (1, 19, 5, 33), (2, 70, 6, 6), (2, 4, 3), (2, 3, 2, 5, 4)])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_class_axis_one_is_read_in_place(kind, shape, monkeypatch):
    """NCHW maps, channels_last and crops of maps, in tiles of pixels x classes, against the classes last."""
    monkeypatch.setattr(launch, "TILE", 512)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
    student, teacher = logits(*shape)
    weight = (torch.rand(shape[:1] + shape[2:]) > 0.3) * 1.5
    last = [x.detach().movedim(1, -1).contiguous().requires_grad_() for x in (student, teacher)]
    want = divergence_reference(*last, kind=kind, beta=0.3, temperature=1.5, row_weight=weight)
    want_grads = [g.movedim(-1, 1) for g in torch.autograd.grad(want, last)]
    forms = {
        "contiguous": student,
        "crop": torch.nn.functional.pad(student.detach(), (1, 2))[..., 1:-2].requires_grad_(),
    }
    if len(shape) == 4:
        forms["channels_last"] = student.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for s in forms.values():
        got = triton_rows(s, teacher, kind=kind, beta=0.3, temperature=1.5, row_weight=weight, dim=1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        for g, w in zip(torch.autograd.grad(got, (s, teacher)), want_grads):
            torch.testing.assert_close(g, w, rtol=2e-5, atol=1e-6)
    rows = triton_rows(student, teacher, kind=kind, beta=0.3, dim=1)
    truth = divergence_reference(*(x.double() for x in last), kind=kind, beta=0.3)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-8)


def test_vocab_size_cuts_both_and_leaves_zero_gradient(form):
    student, teacher = logits(3, 150)
    padded = torch.cat((student.detach(), torch.full((3, 90), math.nan)), -1).requires_grad_()
    wider = torch.cat((teacher.detach(), torch.full((3, 2), INF)), -1).requires_grad_()
    want = triton_rows(student, teacher)
    rows = triton_rows(padded, wider, vocab_size=150)
    torch.testing.assert_close(rows, want)
    for total in (rows.sum(), triton_rows(padded, wider, vocab_size=150, row_weight=torch.ones(3))):
        grads = torch.autograd.grad(total, (padded, wider))
        assert not grads[0][:, 150:].any() and not grads[1][:, 150:].any()
        for got, wanted in zip(grads, torch.autograd.grad(want.sum(), (student, teacher), retain_graph=True)):
            torch.testing.assert_close(got[:, :150], wanted, rtol=1e-5, atol=1e-7)


def test_two_dtypes_a_broadcast_teacher_and_a_temperature_per_row(form):
    student, teacher = logits(3, 150, dtype=torch.bfloat16)
    assert torch.equal(triton_rows(student, teacher.float()), triton_rows(student.float(), teacher.float()))
    assert triton_rows(student, teacher.double()).dtype == torch.float64
    one = teacher[:1].detach().expand(3, 150)  # stride 0
    torch.testing.assert_close(triton_rows(student, one), triton_rows(student, one.clone()), rtol=0, atol=0)
    temperature = torch.tensor([0.5, 1.0, 4.0])
    rows = triton_rows(student, teacher, kind="js", temperature=temperature)
    for i in range(3):
        alone = triton_rows(student[i : i + 1], teacher[i : i + 1], kind="js", temperature=float(temperature[i]))
        torch.testing.assert_close(rows[i : i + 1], alone, rtol=1e-5, atol=1e-9)
    assert rows.unique().numel() == 3


@pytest.mark.parametrize("form", ["whole", "split"])
def test_rows_and_classes_beyond_two_to_the_31_elements(form, tmp_path, monkeypatch):
    """A second row, and in other memory a second class, that start past 2^31 elements: 32-bit offsets would read elsewhere."""
    use_form(form, monkeypatch)
    # the interpreter writes every argument's whole storage back onto itself: 8 GB here
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    start, classes = 2**31 + 8, 130
    memory = np.memmap(tmp_path / "sparse", dtype=np.float32, mode="w+", shape=(start + classes,))
    storage = torch.from_numpy(memory)
    student, teacher = (x.detach() for x in logits(2, classes))
    with torch.no_grad():
        storage[:classes], storage[start:] = student[0], student[1]
    far = storage.as_strided((2, classes), (start, 1))
    assert torch.equal(triton_rows(far, teacher), triton_rows(student, teacher))
    columns, other = far.T, teacher.T.contiguous()  # [130, 2]: two classes, 2^31 apart
    want = divergence_reference(columns.contiguous(), other)
    torch.testing.assert_close(triton_rows(columns, other), want, rtol=1e-5, atol=1e-7)
