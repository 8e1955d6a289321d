"""Our first_derivative_only, the stored gradient times the upstream factor, and the memory of large gradients."""

import gc
import threading

import pytest
import torch
from test_core import run

import kdfast
from kdfast import _core
from kdfast._library import KEPT_BYTES, first_derivative_only, gradient_like, scale_gradient


class Cube(torch.autograd.Function):
    """x^3, with a backward that no graph records."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def test_second_derivative_raises_although_the_upstream_gradient_is_a_constant():
    x = torch.tensor([2.0], requires_grad=True)
    (plain,) = torch.autograd.grad(Cube.apply(x).sum(), x)
    assert plain.item() == 12.0
    # torch's own decorator returns a gradient without a graph here: grad + penalty would be silently wrong
    with pytest.raises(RuntimeError, match=r"create_graph=True.*pass backend='reference'"):
        torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)


class Stored(torch.autograd.Function):
    """sum(c x), whose gradient c is stored by the forward, as the fused sums do."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(c)
        return (c * x).sum()

    @staticmethod
    def backward(ctx, upstream):
        return scale_gradient(ctx.saved_tensors[0], upstream), None


def test_scale_gradient_gives_its_buffer_away_only_with_the_graph():
    x, c, three = torch.ones(2, requires_grad=True), torch.tensor([1.0, -2.0]), torch.tensor(3.0)
    loss = Stored.apply(x, c)
    for upstream, expected in ((None, [1.0, -2.0]), (three, [3.0, -6.0])):
        (kept,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        assert kept.tolist() == expected and kept.data_ptr() != c.data_ptr() and c.tolist() == [1.0, -2.0]
    (last,) = torch.autograd.grad(loss, x, three)
    assert last.tolist() == [3.0, -6.0] and last.data_ptr() == c.data_ptr()


def test_scale_gradient_rounds_once():
    """bfloat16 gradient: the product in float32 is rounded once, the factor is not rounded to bfloat16 first."""
    stored, factor = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor(1 / 13)
    assert scale_gradient(stored, factor).item() == 0.23046875  # 3/13 = 0.230769, spacing 2^-10
    assert (stored * factor.bfloat16()).item() == 0.2314453125


needs_core = pytest.mark.skipif(_core.core is None, reason="no compiled core")
MB = 1 << 20


@pytest.fixture
def kept():
    """The core with nothing kept and a limit of 512 MB; the limit of this process comes back afterwards."""
    core, before = _core.core, _core.core.kept_limit()
    gc.collect()
    core.release_kept()
    core.set_kept_limit(512 * MB)
    yield core
    core.set_kept_limit(before)
    core.release_kept()


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_large_gradient_has_the_layout_of_its_input_and_its_memory_comes_back(kept, dtype):
    for like in (
        torch.empty(2 * KEPT_BYTES // 200, 100, dtype=dtype),
        torch.empty(64, 512, 1024, dtype=dtype).transpose(0, 2),
    ):
        made = gradient_like(like, True)
        assert (made.dtype, made.shape, made.stride()) == (like.dtype, like.shape, torch.empty_like(like).stride())
        made.fill_(2.0)
        address, part = made.data_ptr(), made[0]
        del made
        assert gradient_like(like, True).data_ptr() != address, "a view is still alive"
        assert bool((part == 2.0).all())
        del part
        assert kept.kept_idle() > 0
        kdfast.release_memory()
        assert kept.kept_idle() == 0
    first = gradient_like(like, True)
    address = first.data_ptr()
    del first
    assert gradient_like(like, True).data_ptr() == address


@needs_core
def test_kept_memory_stays_within_its_limit(kept):
    def buffer(mb):
        return gradient_like(
            torch.empty(mb * MB, dtype=torch.float32, device="meta").new_empty(mb * MB // 4, device="cpu"), True
        )

    kept.set_kept_limit(64 * MB)
    big = buffer(80)
    del big
    assert kept.kept_idle() == 0, "larger than the limit: freed at once"
    held = [buffer(24) for _ in range(4)]
    del held
    assert kept.kept_idle() == 48 * MB, "two of four stay"
    reused = buffer(20)
    assert kept.kept_idle() == 24 * MB, "a slightly larger buffer is taken"
    kept.set_kept_limit(0)
    del reused
    assert kept.kept_idle() == 0


@needs_core
def test_kept_memory_comes_back_from_any_thread(kept):
    box = [gradient_like(torch.empty(KEPT_BYTES), True)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert kept.kept_idle() == 4 * KEPT_BYTES


@needs_core
def test_gradients_of_two_losses_alive_together_do_not_share_memory(kept):
    student = torch.randn(KEPT_BYTES // 4000, 1000, requires_grad=True)
    teacher = torch.randn(student.shape)
    (first,) = torch.autograd.grad(kdfast.losses.kd_loss(student, teacher), student)
    copy = first.clone()
    (second,) = torch.autograd.grad(kdfast.losses.kd_loss(student, -teacher), student)
    assert torch.equal(first, copy) and not torch.equal(first, second)


def test_a_wrong_limit_says_what_was_expected():
    found = run("import kdfast", KDFAST_KEEP_MB="a lot")
    assert found.returncode != 0 and "KDFAST_KEEP_MB: expected a whole number of MB" in found.stderr
