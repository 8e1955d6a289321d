"""selective_kl: hand-made numbers, closed-form gradient, invariants, error budget against float64, modes, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, _quiet, check_mode
from tolerances import check_against_reference

from kdfast import _core, debug
from kdfast.ops import selective_kl, selective_kl_reference

F64 = torch.float64
HAS_KERNEL = _core.core is not None
BACKENDS = ["reference", "cpu"] if HAS_KERNEL else ["reference"]
kernel = pytest.mark.skipif(not HAS_KERNEL, reason="needs the compiled core")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def maps(shape=(2, 5, 3, 4), *, dtype=F64, scale=2.0, seed=0, ignored=0.2, requires_grad=True):
    """Two random logit maps and labels, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    pixels = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], pixels, generator=generator)
    labels[torch.rand(pixels, generator=generator) < ignored] = 255
    return a.to(dtype).requires_grad_(requires_grad), b.to(dtype).requires_grad_(requires_grad), labels


def closed_form(a, b, labels, temperature=1.0, normalizer="valid"):
    """Losses and gradients from the closed form, one pixel at a time, in float64."""
    a, b = a.detach().double(), b.detach().double()
    valid = labels != 255
    safe = labels.where(valid, 0).unsqueeze(1)
    l_a, l_b = (-z.log_softmax(1).gather(1, safe).squeeze(1) for z in (a, b))
    chosen = (valid & (l_b < l_a), valid & (l_a < l_b))
    p = [(z / temperature).softmax(1) for z in (a, b)]
    losses, grads = [], []
    for student, teacher, mask in ((0, 1, chosen[0]), (1, 0, chosen[1])):
        count = {"valid": valid.sum(), "selected": mask.sum(), "all": torch.tensor(labels.numel())}[normalizer]
        z = max(1, int(count))
        rows = (p[teacher] * (p[teacher].log() - p[student].log())).sum(1)
        losses.append(rows[mask].sum() / z)
        grads.append((p[student] - p[teacher]) * mask.unsqueeze(1) / (temperature * z))
    return losses, grads, chosen


# ---------------------------------------------------------------- values
@both_backends
def test_by_hand(backend):
    # Two pixels, two classes. Pixel 0 (label 0): a says 1/2, b says 3/4: b teaches. Pixel 1 (label 1): a says 4/5, b 1/2: a teaches.
    a = torch.tensor([[[0.0, 0.0], [0.0, math.log(4)]]], dtype=F64, requires_grad=True)
    b = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=F64, requires_grad=True)
    out = selective_kl(a, b, torch.tensor([[0, 1]]), backend=backend)
    assert out.direction.tolist() == [[1, -1]] and out.direction.dtype == torch.int8
    assert out.valid.tolist() == [[True, True]]
    assert (int(out.num_valid), int(out.num_to_a), int(out.num_to_b)) == (2, 1, 1)
    to_a = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    to_b = (0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)) / 2
    assert out.loss_to_a.item() == pytest.approx(to_a, rel=1e-12)
    assert out.loss_to_b.item() == pytest.approx(to_b, rel=1e-12)
    torch.testing.assert_close(out.reliability_a, -torch.tensor([[0.5, 0.8]], dtype=F64).log())
    torch.testing.assert_close(out.reliability_b, -torch.tensor([[0.75, 0.5]], dtype=F64).log())
    (out.loss_to_a + out.loss_to_b).backward()
    torch.testing.assert_close(a.grad, torch.tensor([[[-0.125, 0.0], [0.125, 0.0]]], dtype=F64))
    torch.testing.assert_close(b.grad, torch.tensor([[[0.0, 0.15], [0.0, -0.15]]], dtype=F64))


@both_backends
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("normalizer", ["valid", "selected", "all"])
def test_closed_form(backend, temperature, normalizer):
    a, b, labels = maps((3, 7, 5, 9))
    losses, grads, chosen = closed_form(a, b, labels, temperature, normalizer)
    assert all(bool(mask.any()) for mask in chosen) and min(losses) > 0.01
    out = selective_kl(a, b, labels, temperature=temperature, normalizer=normalizer, backend=backend)
    torch.testing.assert_close(torch.stack(out[:2]), torch.stack(losses), rtol=1e-11, atol=1e-14)
    assert torch.equal(out.direction == 1, chosen[0]) and torch.equal(out.direction == -1, chosen[1])
    got = torch.autograd.grad(out.loss_to_a, (a, b), retain_graph=True, allow_unused=True)
    torch.testing.assert_close(got[0], grads[0], rtol=1e-11, atol=1e-15)
    assert got[1] is None or not got[1].any()  # the teaching side is under stop-gradient
    got = torch.autograd.grad(out.loss_to_b, (a, b), allow_unused=True)
    torch.testing.assert_close(got[1], grads[1], rtol=1e-11, atol=1e-15)
    assert got[0] is None or not got[0].any()


@both_backends
def test_entropy_reliability(backend):
    a, b, labels = maps()
    out = selective_kl(a, b, labels, reliability="entropy", backend=backend)
    entropy = [torch.distributions.Categorical(logits=z.detach().movedim(1, -1)).entropy() for z in (a, b)]
    valid = labels != 255
    torch.testing.assert_close(out.reliability_a, entropy[0].where(valid, 0.0))
    torch.testing.assert_close(out.reliability_b, entropy[1].where(valid, 0.0))
    assert torch.equal(out.direction == 1, valid & (entropy[1] < entropy[0]))
    assert not torch.equal(out.direction, selective_kl(a, b, labels, backend=backend).direction)


@both_backends
def test_swapping_the_models_swaps_the_result(backend):
    a, b, labels = maps()
    one, two = selective_kl(a, b, labels, backend=backend), selective_kl(b, a, labels, backend=backend)
    assert torch.equal(one.loss_to_a, two.loss_to_b) and torch.equal(one.loss_to_b, two.loss_to_a)
    assert torch.equal(one.direction, -two.direction) and torch.equal(one.reliability_a, two.reliability_b)
    assert torch.equal(one.num_to_a, two.num_to_b)


@both_backends
def test_shift_of_the_logits_of_a_pixel_changes_nothing(backend):
    a, b, labels = maps()
    shift = torch.linspace(-30, 30, labels.numel(), dtype=F64).reshape(labels.shape).unsqueeze(1)
    one = selective_kl(a, b, labels, temperature=2.0, backend=backend)
    two = selective_kl(a + shift, b - 2 * shift, labels, temperature=2.0, backend=backend)
    torch.testing.assert_close(torch.stack(one[:2]), torch.stack(two[:2]), rtol=1e-11, atol=0)
    assert torch.equal(one.direction, two.direction)


@both_backends
@pytest.mark.parametrize("reliability", ["label", "entropy"])
def test_ties_move_nothing_and_counts_add_up(backend, reliability):
    a, b, labels = maps()
    with torch.no_grad():
        b[:, :, 1] = a[:, :, 1]  # one row of pixels is the same in both
    out = selective_kl(a, b, labels, reliability=reliability, backend=backend)
    assert not out.direction[:, 1].any() and out.direction[:, 0].any() and out.direction[:, 2].any()
    ties = int((out.valid & (out.direction == 0)).sum())
    assert ties == int((labels[:, 1] != 255).sum()) > 0
    assert int(out.num_to_a + out.num_to_b) + ties == int(out.num_valid) == int((labels != 255).sum())
    assert int(out.num_to_a) == int((out.direction == 1).sum())
    (out.loss_to_a + out.loss_to_b).backward()
    assert not a.grad[:, :, 1].any() and not b.grad[:, :, 1].any()


@both_backends
@pytest.mark.parametrize("normalizer", ["valid", "selected", "all"])
def test_no_valid_pixel_gives_exact_zeros(backend, normalizer):
    a, b, labels = maps()
    out = selective_kl(a, b, torch.full_like(labels, 255), normalizer=normalizer, backend=backend)
    (out.loss_to_a + out.loss_to_b).backward()
    assert out.loss_to_a.item() == out.loss_to_b.item() == 0.0
    assert int(out.num_valid) == 0 and not out.direction.any() and not out.reliability_a.any()
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


@both_backends
def test_ignored_pixels_may_hold_anything(backend):
    a, b, labels = maps()
    want = selective_kl(a, b, labels, backend=backend)
    dirty = [
        torch.where((labels == 255).unsqueeze(1), torch.tensor(bad, dtype=F64), z.detach()).requires_grad_()
        for z, bad in ((a, math.nan), (b, math.inf))
    ]
    out = selective_kl(*dirty, labels, backend=backend)
    assert torch.equal(out.loss_to_a, want.loss_to_a) and torch.equal(out.reliability_a, want.reliability_a)
    (out.loss_to_a + out.loss_to_b).backward()
    (want.loss_to_a + want.loss_to_b).backward()
    assert torch.equal(dirty[0].grad, a.grad) and torch.equal(dirty[1].grad, b.grad)


@both_backends
@pytest.mark.parametrize("normalizer", ["valid", "selected", "all"])
def test_a_pixel_of_only_minus_infinity_does_not_count(backend, normalizer):
    a, b, labels = maps((1, 4, 2, 3), ignored=0.0)
    with torch.no_grad():
        a[0, :, 0, 1] = -math.inf
        b[0, :, 1, 2] = -math.inf
    without = labels.clone()
    without[0, 0, 1] = without[0, 1, 2] = 255
    out = selective_kl(a, b, labels, normalizer=normalizer, backend=backend)
    want = selective_kl(a, b, without, normalizer=normalizer, backend=backend)
    for name, got, expected in zip(out._fields, out, want):
        assert torch.equal(got, expected), name
    assert int(out.num_valid) == 4
    (out.loss_to_a + out.loss_to_b).backward()
    assert a.grad.isfinite().all() and not a.grad[0, :, 0, 1].any() and not b.grad[0, :, 1, 2].any()


@both_backends
def test_single_minus_infinities_are_legal(backend):
    # Class 2 is impossible for both at pixel 0, for the teacher alone at pixel 1.
    a = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [-math.inf, 0.5]]], dtype=F64, requires_grad=True)
    b = torch.tensor([[[2.0, 2.0], [0.0, 0.0], [-math.inf, -math.inf]]], dtype=F64, requires_grad=True)
    out = selective_kl(a, b, torch.tensor([[0, 0]]), backend=backend)
    assert out.direction.tolist() == [[1, 1]]
    p, q = b.detach().softmax(1), a.detach().softmax(1)
    want = (p[:, :2] * (p[:, :2] / q[:, :2]).log()).sum() / 2
    torch.testing.assert_close(out.loss_to_a.detach(), want)
    out.loss_to_a.backward()
    torch.testing.assert_close(a.grad, (q - p) / 2)


# ---------------------------------------------------------------- shapes, strides, dtypes
@both_backends
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (3, 4), (2, 3, 7), (1, 19, 5, 33), (2, 150, 3, 11), (1, 2, 3, 4, 5), (1, 1100, 2, 3)]
)
def test_any_number_of_axes_and_odd_sizes(backend, shape):
    a, b, labels = maps(shape, ignored=0.0)
    losses, grads, _ = closed_form(a, b, labels)
    out = selective_kl(a, b, labels, backend=backend)
    torch.testing.assert_close(torch.stack(out[:2]), torch.stack(losses), rtol=1e-11, atol=1e-14)
    (out.loss_to_a + out.loss_to_b).backward()
    torch.testing.assert_close(a.grad, grads[0], rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(b.grad, grads[1], rtol=1e-11, atol=1e-15)


@both_backends
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(backend, shape):
    a, b = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    out = selective_kl(a, b, torch.zeros(shape[0], *shape[2:], dtype=torch.long), backend=backend)
    (out.loss_to_a + out.loss_to_b).backward()
    assert out.loss_to_a.item() == 0 and a.grad.shape == shape and int(out.num_valid) == 0


LAYOUTS = {
    "channels_last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "slice": lambda z: torch.stack((z, z + 1), -1)[..., 0],
    "cut": lambda z: F.pad(z, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "transposed": lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda z: z[:, :, :1].expand(-1, -1, z.shape[2], -1),
}


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_strides_are_read_in_place(backend, layout, dtype):
    a, b, labels = maps((2, 19, 6, 9), dtype=dtype, requires_grad=False)
    a = LAYOUTS[layout](a)
    x, y = (z.detach().contiguous().requires_grad_() for z in (a, b))
    a, b = a.detach().requires_grad_(), b.requires_grad_()
    out, want = selective_kl(a, b, labels, backend=backend), selective_kl(x, y, labels, backend=backend)
    (out.loss_to_a + out.loss_to_b).backward()
    (want.loss_to_a + want.loss_to_b).backward()
    exact = {"rtol": 1e-6, "atol": 0} if dtype != F64 else {"rtol": 1e-13, "atol": 0}
    torch.testing.assert_close(torch.stack(out[:2]), torch.stack(want[:2]), **exact)
    assert torch.equal(out.direction, want.direction)
    torch.testing.assert_close(a.grad, x.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
    torch.testing.assert_close(b.grad, y.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
    if layout == "channels_last" and backend == "cpu":
        assert a.grad.is_contiguous(memory_format=torch.channels_last)


@both_backends
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_dtypes_and_strides(backend, labels_dtype):
    a, b, labels = maps()
    want = selective_kl(a, b, labels, backend=backend)
    strided = torch.stack((labels, labels), -1).to(labels_dtype)[..., 1]
    assert torch.equal(selective_kl(a, b, strided, backend=backend).loss_to_a, want.loss_to_a)
    other = torch.where(labels == 255, -1, labels).to(torch.int8)
    assert torch.equal(selective_kl(a, b, other, ignore_index=-1, backend=backend).loss_to_a, want.loss_to_a)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature, scale", [(1.0, 2.0), (3.0, 10.0), (1.0, 0.5)])
@pytest.mark.parametrize("options", [{}, {"normalizer": "selected"}, {"reliability": "entropy"}], ids=str)
@kernel
def test_error_budget_against_float64(dtype, temperature, scale, options):
    a, b, labels = maps((2, 19, 16, 16), dtype=dtype, scale=scale)
    options = options | {"temperature": temperature}
    # The direction is a comparison of two numbers; where rounding decides it, there is nothing to compare.
    truth = selective_kl_reference(a.detach().double(), b.detach().double(), labels, **options)
    gap = (truth.reliability_a - truth.reliability_b).abs()
    labels = labels.where(gap > 3e-6 * (1 + truth.reliability_a), 255)
    assert int((labels != 255).sum()) > 380
    check_against_reference(
        lambda a, b: selective_kl(a, b, labels, backend="cpu", **options),
        lambda a, b: selective_kl_reference(a, b, labels, **options),
        (a, b),
    )
    got = selective_kl(a, b, labels, backend="cpu", **options)
    assert torch.equal(got.direction, selective_kl_reference(a.double(), b.double(), labels, **options).direction)


@kernel
def test_small_losses_keep_their_digits():
    """Two models that nearly agree: the plain float32 form loses the KL to cancellation, the kernel must not."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1, 19, 32, 32, generator=generator)
    b = a + 1e-3 * torch.randn(a.shape, generator=generator)
    got = selective_kl(a, b, torch.randint(19, (1, 32, 32), generator=generator), backend="cpu")
    # the truth with the kernel's own directions: with so small a gap a few pixels are ties in float32
    for loss, side, student, teacher in ((got.loss_to_a, 1, a, b), (got.loss_to_b, -1, b, a)):
        kl = F.kl_div(
            student.double().log_softmax(1), teacher.double().log_softmax(1), reduction="none", log_target=True
        )
        want = kl.sum(1)[got.direction == side].sum().item() / 1024
        assert 1e-7 < want < 1e-6 and abs(loss.item() - want) < 1e-4 * want


@both_backends
def test_two_dtypes(backend):
    a, b, labels = maps()
    out = selective_kl(a, b.float().detach().requires_grad_(), labels, backend=backend)
    assert out.loss_to_a.dtype == F64
    half = selective_kl(a.half().detach(), b.float().detach(), labels, backend=backend)
    assert half.loss_to_a.dtype == torch.float32
    want = selective_kl(a.half().double().detach(), b.float().double().detach(), labels, backend=backend)
    torch.testing.assert_close(half.loss_to_a.double(), want.loss_to_a, rtol=1e-5, atol=0)


@both_backends
def test_float16_gradients_survive_a_large_map_under_a_loss_scaler(backend):
    """1/|V| times a small difference is below half precision; times the scaler's factor it is not."""
    a, b, labels = maps((1, 3, 128, 256), dtype=torch.float16, scale=0.05, ignored=0.0)
    upstream = 65536.0
    out = selective_kl(a, b, labels, backend=backend)
    ((out.loss_to_a + out.loss_to_b) * upstream).backward()
    x, y = (z.detach().float().requires_grad_() for z in (a, b))
    want = selective_kl(x, y, labels, backend="reference")
    ((want.loss_to_a + want.loss_to_b) * upstream).backward()
    same = (out.direction == want.direction).unsqueeze(1).expand_as(x)
    assert int(same.sum()) > 0.99 * same.numel()
    torch.testing.assert_close(a.grad.float()[same], x.grad[same], rtol=4e-3, atol=1e-6)
    assert float((a.grad != 0).sum()) > 0.4 * a.numel()


# ---------------------------------------------------------------- gradients and modes
@both_backends
def test_upstream_factors_two_backwards_and_two_losses(backend):
    a, b, labels = maps()
    _, grads, _ = closed_form(a, b, labels)
    out = selective_kl(a, b, labels, backend=backend)
    (3.0 * out.loss_to_a - 2.0 * out.loss_to_b).backward(retain_graph=True)
    torch.testing.assert_close(a.grad, 3 * grads[0])
    torch.testing.assert_close(b.grad, -2 * grads[1])
    (out.loss_to_a + out.loss_to_b).backward(retain_graph=True)
    torch.testing.assert_close(a.grad, 4 * grads[0])  # a stored gradient scaled in place would give 12
    (out.loss_to_a + out.loss_to_b).backward()
    torch.testing.assert_close(a.grad, 5 * grads[0])
    torch.testing.assert_close(b.grad, 0 * grads[1])


@both_backends
def test_one_model_frozen(backend):
    a, b, labels = maps()
    _, grads, _ = closed_form(a, b, labels)
    out = selective_kl(a, b.detach(), labels, backend=backend)
    (out.loss_to_a + out.loss_to_b).backward()
    torch.testing.assert_close(a.grad, grads[0])


def test_reference_gradcheck_and_second_derivative():
    a, b, labels = maps((1, 3, 2, 2), ignored=0.1, seed=3)

    # one argument at a time: as a teacher, the other would also move the loss
    def loss(x):
        return selective_kl(x, b.detach(), labels, temperature=2.0, backend="reference").loss_to_a

    assert torch.autograd.gradcheck(loss, (a,)) and torch.autograd.gradgradcheck(loss, (a,))
    assert loss(a).item() > 0


@kernel
def test_no_gradient_is_made_under_no_grad(monkeypatch):
    a, b, labels = maps()
    asked = []
    real = torch.ops.kdfast.selective_kl.default
    import kdfast.ops.selective as module

    monkeypatch.setattr(module, "_op", lambda *args: asked.append(args[-2:]) or real(*args))
    with torch.no_grad():
        selective_kl(a, b, labels, backend="cpu")
    selective_kl(a.detach(), b.detach(), labels, backend="cpu")
    selective_kl(a.detach(), b, labels, backend="cpu")
    assert asked == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "normalizer": "selected"}], ids=str)
@kernel
def test_modes(mode, options):
    a, b, labels = maps()
    check_mode(mode, lambda a, b, labels: selective_kl(a, b, labels, backend="cpu", **options), (a, b, labels))


@kernel
def test_inductor():
    a, b, labels = maps()

    def step(a, b, labels):
        out = selective_kl(a, b, labels, backend="cpu")
        return out.loss_to_a + 2 * out.loss_to_b, out.direction

    with _quiet():
        loss, direction = torch.compile(step, fullgraph=True)(a, b, labels)
        got = torch.autograd.grad(loss, (a, b))
    want, same = step(a, b, labels)
    torch.testing.assert_close(loss, want)
    assert torch.equal(direction, same)
    torch.testing.assert_close(got, torch.autograd.grad(want, (a, b)))


@kernel
def test_the_same_bits_for_any_number_of_threads():
    a, b, labels = maps((2, 19, 96, 64), dtype=torch.float32)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = selective_kl(a, b, labels, backend="cpu")
            seen.append([*out[:2], *torch.autograd.grad(out.loss_to_a + out.loss_to_b, (a, b))])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other))


# ---------------------------------------------------------------- property test
@both_backends
@given(
    batch=st.integers(1, 3), classes=st.integers(2, 40), height=st.integers(1, 5), width=st.integers(1, 37),
    scale=st.sampled_from([1e-6, 1.0, 30.0, 3e4]), temperature=st.sampled_from([0.3, 1.0, 5.0]),
    normalizer=st.sampled_from(["valid", "selected", "all"]), reliability=st.sampled_from(["label", "entropy"]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]), holes=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_extreme_logits(
    backend, batch, classes, height, width, scale, temperature, normalizer, reliability, ignored, holes, seed
):
    a, b, labels = maps((batch, classes, height, width), scale=scale, seed=seed, ignored=ignored)
    if holes:
        with torch.no_grad():
            hole = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
            a[hole] = -math.inf
    options = {"temperature": temperature, "normalizer": normalizer, "reliability": reliability}
    out = selective_kl(a, b, labels, backend=backend, **options)
    grads = torch.autograd.grad(out.loss_to_a + out.loss_to_b, (a, b))
    assert all(g.isfinite().all() for g in grads)
    assert out.loss_to_a >= -1e-12 and out.loss_to_b >= -1e-12
    assert int(out.num_to_a + out.num_to_b) <= int(out.num_valid) <= labels.numel()
    for grad, side in zip(grads, (1, -1)):  # a gradient over the classes of a pixel sums to 0; only learners have one
        assert float(grad.sum(1).abs().max()) < 1e-9
        assert not grad.movedim(1, -1)[out.direction != side].any()
    want = selective_kl_reference(a.detach(), b.detach(), labels, **options)
    tie = (want.reliability_a - want.reliability_b).abs() <= 1e-9 * (1 + want.reliability_a.abs())
    assert torch.equal(out.direction[~tie], want.direction[~tie])
    if torch.equal(out.direction, want.direction):
        torch.testing.assert_close(torch.stack(out[:2]).detach(), torch.stack(want[:2]), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- bad input
Z, Y = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "call, error, message",
    [
        ((Z, Z[:, :2], Y), ValueError, r"logits_b: expected the shape of logits_a \(1, 3, 2, 2\), got \(1, 2, 2, 2\)"),
        ((Z[0, 0, 0], Z[0, 0, 0], Y), ValueError, r"logits_a: expected \[B, K, ...\]"),
        ((Z[:, :1], Z[:, :1], Y), ValueError, "logits_a: expected at least 2 classes"),
        ((Z, Z, Y[:, :1]), ValueError, r"labels: expected shape \(1, 2, 2\), got \(1, 1, 2\)"),
        ((Z, Z, Y.float()), TypeError, "labels: expected integers, got torch.float32"),
        ((Z, Z.long(), Y), TypeError, "logits_b: expected float16"),
        ((Z, Z.to("meta"), Y), ValueError, "logits_b: expected the device of logits_a"),
    ],
)
def test_bad_tensors(call, error, message):
    with pytest.raises(error, match=message):
        selective_kl(*call)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a finite number"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"normalizer": "mean"}, ValueError, "normalizer: expected one of valid, selected, all, got 'mean'"),
        ({"reliability": "margin"}, ValueError, "reliability: expected one of label, entropy, got 'margin'"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
        ({"backend": "cuda"}, ValueError, "selective_kl has no cuda backend"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        selective_kl(Z, Z, Y, **options)


@both_backends
@pytest.mark.parametrize("bad", [3, -1, 254])
def test_a_bad_label_is_named(backend, bad):
    labels = Y.clone()
    labels[0, 1, 0] = bad
    with pytest.raises(
        ValueError, match=rf"labels: expected integers in \[0, 3\) or ignore_index=255, got {bad} at pixel 2"
    ):
        selective_kl(Z, Z, labels, backend=backend)


def test_where_values_are_not_read_a_bad_label_makes_the_losses_nan():
    a, b, labels = maps((1, 3, 2, 2), ignored=0.0)
    labels[0, 0, 0] = 3
    out = selective_kl_reference(a, b, labels)
    assert out.loss_to_a.isnan() and out.loss_to_b.isnan() and out.reliability_a[0, 0, 0].isnan()
    assert not out.reliability_a[0, 1].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_not_hidden(bad):
    a, b, labels = maps((1, 3, 2, 2), ignored=0.0)
    with torch.no_grad():
        b[0, 1, 1, 1] = bad
    out = selective_kl_reference(a, b, labels)
    assert out.loss_to_a.isnan() and out.loss_to_b.isnan()
    if HAS_KERNEL:
        with pytest.raises(ValueError, match=r"logits_b: expected finite logits .* at row 3"):
            selective_kl(a, b, labels, backend="cpu")


def test_debug_checks_nothing_that_is_right():
    with debug():
        assert selective_kl(Z, Z, Y, backend="reference").loss_to_a == 0
