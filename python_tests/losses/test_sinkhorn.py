"""sinkhorn_kd_loss against the plain program, sinkhorn_divergence against geomloss; masks, reductions, twins, bad input."""

import math
import pickle

import pytest
import torch
from modes import MODES, check_mode
from tolerances import check_against_reference

import kdfast
import kdfast.losses.sinkhorn as module
from kdfast.losses import SinkhornDivergence, SinkhornKDLoss, sinkhorn_divergence, sinkhorn_kd_loss

needs_core = pytest.mark.skipif(not kdfast.backend_info()["compiled"], reason="no compiled core")


def logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def plain(student, teacher, temperature=2.0, epsilon=0.1, n_iters=20, p=1.0, first=-1):
    """What one would write: the kernel's rows and columns normalised in turn."""
    q, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    w = torch.cdist(q, t, p=p)
    x = torch.exp(-w / epsilon)
    for _ in range(n_iters):
        x = x / x.sum(first, keepdim=True)
        x = x / x.sum(-3 - first, keepdim=True)
    return (x * w).sum((-1, -2))


@pytest.mark.parametrize("shape", [(2, 2), (5, 4), (16, 3), (7, 1000)])
@pytest.mark.parametrize("p", [1, 2])
def test_equals_the_plain_program(shape, p):
    student, teacher = logits(*shape)
    loss = sinkhorn_kd_loss(student, teacher, p=p)
    want = 1e-3 * plain(student, teacher, p=float(p))
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    got, expected = torch.autograd.grad(3 * loss, student)[0], torch.autograd.grad(3 * want, student)[0]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)
    assert expected.abs().max() > 1e-6


def test_rectangular_and_options():
    student, _ = logits(5, 4)
    _, teacher = logits(8, 4, seed=1)
    options = {"temperature": 1.5, "epsilon": 0.05, "n_iters": 7}
    loss = sinkhorn_kd_loss(student, teacher, scale=0.8, **options)
    torch.testing.assert_close(loss, 0.8 * plain(student, teacher, **options), rtol=1e-9, atol=0)
    mean = sinkhorn_kd_loss(student, teacher, scale=0.8, reduction="mean", **options)
    torch.testing.assert_close(mean, loss / 8, rtol=1e-12, atol=0)


def test_sequences_are_separate_problems():
    """Multi-Level-OT's form: [B, L, k], rows = the teacher's tokens, so the columns of ours come first."""
    student, teacher = logits(3, 6, 5)
    rows = sinkhorn_kd_loss(student, teacher, n_iters=10, order="columns_first", reduction="none")
    assert rows.shape == (3,)
    for i in range(3):
        want = 1e-3 * plain(teacher[i], student[i], n_iters=10)
        torch.testing.assert_close(rows[i], want, rtol=1e-9, atol=0)
    total = sinkhorn_kd_loss(student, teacher, n_iters=10, order="columns_first")
    torch.testing.assert_close(total, rows.sum())
    mean = sinkhorn_kd_loss(student, teacher, n_iters=10, order="columns_first", reduction="mean")
    torch.testing.assert_close(mean, rows.sum() / 18)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mask_drops_samples_of_both(reduction):
    student, teacher = logits(8, 4)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool()
    poisoned = torch.where(mask[:, None], teacher, math.nan)
    loss = sinkhorn_kd_loss(student, poisoned, mask=mask, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, student)
    small = student.detach()[mask].requires_grad_()
    want = sinkhorn_kd_loss(small, teacher[mask], reduction=reduction)
    (expected,) = torch.autograd.grad(want, small)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad[mask], expected, rtol=1e-8, atol=1e-14)
    assert (grad[~mask] == 0).all()


def test_no_kept_row_is_zero():
    student, teacher = logits(4, 3)
    for reduction in ("sum", "mean"):
        loss = sinkhorn_kd_loss(student, teacher, mask=torch.zeros(4, dtype=torch.bool), reduction=reduction)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0.0 and (grad == 0).all()


def test_masked_classes_and_masked_rows():
    student, teacher = logits(5, 4)
    hole = torch.tensor([[0.0, 0.0, -math.inf, 0.0]], dtype=torch.float64)
    loss = sinkhorn_kd_loss(student + hole, teacher + hole)
    want = sinkhorn_kd_loss(student[:, [0, 1, 3]], teacher[:, [0, 1, 3]])
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    gone = student.detach().clone()
    gone[1] = -math.inf
    gone.requires_grad_()
    value = sinkhorn_kd_loss(gone, teacher)
    (grad,) = torch.autograd.grad(value, gone)
    keep = [0, 2, 3, 4]
    torch.testing.assert_close(value, 1e-3 * plain(student[keep], teacher), rtol=1e-9, atol=0)
    assert (grad[1] == 0).all() and grad.isfinite().all()


def test_ties_and_teacher_grad():
    student, _ = logits(4, 3)
    teacher = student.detach().clone().requires_grad_()
    sinkhorn_kd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.isfinite().all()
    both = sinkhorn_kd_loss(student, teacher, teacher_grad=True)
    assert torch.autograd.grad(both, teacher)[0].abs().max() > 1e-7
    for p in (1, 2):  # every pair a tie: zero gradient, not the NaN of a root at 0
        twice = student[:1].expand(2, 3)
        loss = sinkhorn_kd_loss(twice, twice.detach(), p=p)
        assert loss.item() == 0.0 and (torch.autograd.grad(loss, student)[0] == 0).all()


def test_dtypes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher = logits(9, 6, dtype=dtype)
        loss = sinkhorn_kd_loss(student, teacher)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.dtype is torch.float32 and grad.dtype is dtype
        want = 1e-3 * plain(student.double(), teacher.double())
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=0)


def test_single_sample_warns_once(monkeypatch):
    monkeypatch.setattr(module, "_warned_single", False)
    student, teacher = logits(1, 4)
    with pytest.warns(UserWarning, match="one sample on each side"):
        loss = sinkhorn_kd_loss(student, teacher)
    q, t = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    torch.testing.assert_close(loss, 1e-3 * (q - t).abs().sum())
    sinkhorn_kd_loss(student, teacher)  # a second warning would be an error here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(4, 5)}, "teacher: expected the 3 classes of the student, got 5"),
        ({"teacher": torch.zeros(2, 4, 3)}, "teacher: expected .* the rank of student"),
        ({"student": torch.zeros(4, 3, dtype=torch.long)}, "student: expected float16"),
        ({"student": torch.zeros(0, 3), "teacher": torch.zeros(0, 3)}, "student: expected at least one sample"),
        ({"temperature": 0.0}, r"temperature: expected a finite number in \(0"),
        ({"epsilon": -0.1}, "epsilon: expected a finite number"),
        ({"n_iters": 0}, "n_iters: expected an int >= 1"),
        ({"p": 3}, "p: expected 1 or 2, got 3"),
        ({"mask": torch.ones(4)}, "mask: expected bool"),
        ({"mask": torch.ones(3).bool()}, r"mask: expected shape \(4,\)"),
        ({"mask": torch.ones(4).bool(), "teacher": torch.zeros(5, 3)}, "mask: drops a sample of both models"),
        ({"reduction": "batchmean"}, "reduction: expected one of"),
        ({"scale": math.inf}, "scale: expected a finite number"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    arguments = {"student": torch.zeros(4, 3), "teacher": torch.zeros(4, 3)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sinkhorn_kd_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_twins():
    student, teacher = logits(5, 4)
    loss = SinkhornKDLoss(temperature=3.0, scale=1.0)
    torch.testing.assert_close(loss(student, teacher), sinkhorn_kd_loss(student, teacher, temperature=3.0, scale=1.0))
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(again(student, teacher, scale=2.0), 2 * loss(student, teacher))
    with pytest.raises(TypeError, match="unknown option temprature"):
        SinkhornKDLoss(temprature=3.0)
    x, y = torch.rand(4, 2), torch.rand(5, 2)
    torch.testing.assert_close(SinkhornDivergence(blur=0.2)(x, y), sinkhorn_divergence(x, y, blur=0.2))


# ---------------------------------------------------------------- Sinkhorn divergence
def clouds(*batch):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(*batch, 7, 2, generator=generator, dtype=torch.float64).requires_grad_()
    y = (torch.rand(*batch, 9, 2, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
    a = torch.rand(*batch, 7, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(*batch, 9, generator=generator, dtype=torch.float64) + 0.1
    return x, y, (a / a.sum(-1, keepdim=True)).requires_grad_(), (b / b.sum(-1, keepdim=True)).requires_grad_()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("scaling", [0.5, 0.9])
def test_geomloss(batch, p, reach, debias, scaling):
    geomloss = pytest.importorskip("geomloss")
    x, y, a, b = clouds(*batch)
    options = {"p": p, "blur": 0.1, "reach": reach, "debias": debias, "scaling": scaling}
    theirs = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)(a, x, b, y)
    ours = sinkhorn_divergence(x, y, a, b, **options)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-8, atol=1e-12)
    want = torch.autograd.grad(theirs.sum(), (x, y, a, b))
    got = torch.autograd.grad(ours.sum(), (x, y, a, b))
    for mine, other in zip(got, want):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("debias", [True, False])
def test_exact_unbalanced_gradient_is_the_derivative(debias):
    x, y, a, b = clouds()
    x, a = x[:3].detach().requires_grad_(), (1.3 * a[:3]).detach().requires_grad_()
    y, b = y[:4].detach(), b[:4].detach()
    # The derivative supposes converged potentials; they lag behind the falling eps by O(1 - scaling), the tolerance here.
    # The package's factor is 10% off.
    options = {"blur": 0.4, "reach": 0.8, "scaling": 0.99, "debias": debias, "diameter": 2.0}

    def value(x, a):
        return sinkhorn_divergence(x, y, a, b, exact_unbalanced_grad=True, **options)

    torch.autograd.gradcheck(value, (x, a), rtol=1e-2, atol=1e-5)
    exact = torch.autograd.grad(value(x, a), x)[0]
    package = torch.autograd.grad(sinkhorn_divergence(x, y, a, b, **options), x)[0]
    eps, rho = 0.4**2, 0.8**2
    torch.testing.assert_close(exact, package * (rho + eps) / (rho + eps / 2))


def test_divergence_is_zero_on_itself_and_positive():
    x, y, a, b = clouds()
    assert sinkhorn_divergence(x, x, a, a, blur=0.1).abs() < 1e-12
    assert sinkhorn_divergence(x, y, a, b, blur=0.1) > 0.01
    moved = sinkhorn_divergence(x, x + torch.tensor([3.0, 4.0], dtype=torch.float64), scaling=0.9)
    assert moved.item() == pytest.approx(12.5, rel=1e-3)  # |shift|^2 / 2
    point = torch.ones(2, 3)
    assert sinkhorn_divergence(point, point).item() == 0.0  # diameter 0


def test_divergence_points_of_weight_zero_are_absent():
    x, y, a, b = clouds()
    with torch.no_grad():
        a[2] = 0.0
    keep = [0, 1, 3, 4, 5, 6]
    got = sinkhorn_divergence(x, y, a, b, blur=0.2, diameter=2.0)
    want = sinkhorn_divergence(x[keep], y, a[keep], b, blur=0.2, diameter=2.0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    assert torch.autograd.grad(got, x)[0].isfinite().all()


@needs_core
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("options", [{}, {"reach": 0.7}, {"reach": 0.7, "debias": False}], ids=str)
def test_divergence_from_points_is_that_of_the_tables(batch, options, monkeypatch):
    """What runs on a GPU, here with the CPU's kernels."""
    x, y, a, b = clouds(*batch)
    with torch.no_grad():
        a[..., 2] = b[..., 0] = 0.0
    results = []
    for streamed in (False, True):
        monkeypatch.setattr(module, "_streams", lambda *_, streamed=streamed: streamed)
        value = sinkhorn_divergence(x, y, a, b, blur=0.1, **options)
        results.append((value, *torch.autograd.grad(value.sum(), (x, y, a, b))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert all(t.abs().max() > 1e-3 for t in results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(5, 3)}, "y: expected the batch and the width of x"),
        ({"y": torch.zeros(1, 5, 2)}, r"y: expected points \[M, D\]"),
        ({"x": torch.zeros(0, 2)}, "x: expected at least one point"),
        ({"a": torch.ones(3)}, r"a: expected one weight per point \(4,\), got \(3,\)"),
        ({"p": 3}, "p: expected 1 or 2"),
        ({"blur": 0.0}, "blur: expected a finite number"),
        ({"reach": -1.0}, "reach: expected a finite number"),
        ({"scaling": 1.0}, "scaling: expected a number below 1"),
        ({"diameter": 0.0}, "diameter: expected a finite number"),
    ],
    ids=str,
)
def test_divergence_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 2), "y": torch.zeros(5, 2)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        sinkhorn_divergence(**arguments)


# ---------------------------------------------------------------- the fused op
FUSED = [
    {},
    {"p": 2},
    {"order": "columns_first", "n_iters": 10},
    {"reduction": "mean", "temperature": 1.0, "scale": 1.0},
    {"reduction": "none", "epsilon": 0.05},
    {"epsilon": 2e-3, "n_iters": 8},
]


@needs_core
@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("shape", [(2, 2), (16, 3), (5, 1000), (3, 7, 4), (2, 2, 6, 5), (140, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_within_the_budget_of_the_reference(dtype, shape, options):
    student, teacher = logits(*shape, dtype=dtype)
    inputs = (student, teacher.requires_grad_())

    def loss(backend):
        return lambda s, t: sinkhorn_kd_loss(s, t, teacher_grad=True, backend=backend, **options)

    # epsilon = 2e-3: exponents of 1000, which float32 holds to 6e-5; 2 x 2: gradients are small differences
    floor = (1e-8, 1e-9) if dtype is torch.float64 else (2e-4, 2e-4) if options.get("epsilon") == 2e-3 else (3e-5, 1e-5)
    check_against_reference(loss("cpu"), loss("reference"), inputs, floor=floor)


@needs_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_half_precision_strided_and_masked(dtype):
    student, teacher = logits(2, 24, 12, dtype=dtype)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.7

    def loss(backend):
        return lambda s, t: sinkhorn_kd_loss(
            s.mT[..., ::2], t.mT[..., ::2], mask=mask, reduction="mean", backend=backend
        )

    floor = (1e-2 if dtype is torch.bfloat16 else 2e-3, 1e-5)
    check_against_reference(loss("cpu"), loss("reference"), (student, teacher), floor=floor)


@needs_core
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_modes(mode, reduction):
    student, teacher = logits(2, 5, 4, dtype=torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False

    def loss(s, t, mask):
        return sinkhorn_kd_loss(s, t, mask=mask, scale=1.0, reduction=reduction)

    check_mode(mode, loss, (student, teacher, mask))


@needs_core
def test_upstream_factor_and_bits():
    student, teacher = logits(64, 200, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = sinkhorn_kd_loss(student, teacher)
            (once,) = torch.autograd.grad(loss, student, retain_graph=True)
            (thrice,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
            assert torch.equal(thrice, 3 * once)
            results.append((loss.detach(), once))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1]) for loss, grad in results)
    two = sinkhorn_kd_loss(student, teacher) + 2 * sinkhorn_kd_loss(student, teacher)
    torch.testing.assert_close(torch.autograd.grad(two, student)[0], 3 * results[0][1])


def test_empty_batch_of_problems():
    student = torch.zeros(0, 4, 3, requires_grad=True)
    loss = sinkhorn_kd_loss(student, torch.zeros(0, 4, 3))
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 4, 3)


@needs_core
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_on_the_cpu(which, value):
    student, teacher = (t.detach() for t in logits(5, 4))
    {"student": student, "teacher": teacher}[which][3, 1] = value
    with pytest.raises(ValueError, match=f"{which}: expected finite logits .* at row 3"):
        sinkhorn_kd_loss(student, teacher)
    mask = torch.tensor([1, 1, 1, 0, 1]).bool()
    assert sinkhorn_kd_loss(student, teacher, mask=mask).isfinite()
