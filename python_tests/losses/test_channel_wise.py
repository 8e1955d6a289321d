"""Channel-wise KD: written out, its gradient, what it does not depend on, bad input."""

import pytest
import torch

from kdfast.losses import ChannelWiseKDLoss, channel_wise_kd_loss

F64 = torch.float64


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 7), (3, 2, 6)])
def test_the_equation_and_its_gradient(shape):
    s, t = maps(*shape).requires_grad_(), maps(*shape, seed=1).requires_grad_()
    temperature = 3.0
    q, p = ((x.flatten(2) / temperature).softmax(-1) for x in (s, t))
    b, c = shape[:2]
    loss = channel_wise_kd_loss(s, t, temperature=temperature)
    torch.testing.assert_close(loss, temperature**2 / (b * c) * (p * (p / q).log()).sum())
    grads = torch.autograd.grad(loss, (s, t), allow_unused=True)
    torch.testing.assert_close(grads[0], (temperature / (b * c) * (q - p)).reshape(shape))
    assert grads[1] is None
    torch.testing.assert_close(channel_wise_kd_loss(s, t, temperature=temperature, scale_t2=False), loss / 9)
    assert torch.autograd.grad(channel_wise_kd_loss(s, t, teacher_grad=True), t)[0].any()


def test_channels_are_shifted_freely_and_extreme_logits_stay_finite():
    s, t = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    shift = maps(2, 3, 1, 1, seed=2)
    torch.testing.assert_close(channel_wise_kd_loss(s + shift, t), channel_wise_kd_loss(s, t))
    assert channel_wise_kd_loss(s, s + shift) < 1e-12
    assert channel_wise_kd_loss(1e4 * s, -1e4 * t).isfinite()
    torch.testing.assert_close(ChannelWiseKDLoss(temperature=2.0)(s, t), channel_wise_kd_loss(s, t, temperature=2.0))


def test_memory_layouts_agree():
    s, t = maps(2, 3, 4, 6), maps(2, 3, 4, 6, seed=1)
    want = channel_wise_kd_loss(s, t)
    torch.testing.assert_close(channel_wise_kd_loss(s.to(memory_format=torch.channels_last), t), want)
    torch.testing.assert_close(channel_wise_kd_loss(s.mT, t.mT), want)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4, 4), (2, 3, 4, 5)), {}, r"teacher: expected maps of shape \(2, 3, 4, 4\) as the student's, got"),
        (((2, 3), (2, 3)), {}, r"student: expected maps \[B, C, ...\], got \(2, 3\)"),
        (((2, 3, 4), (2, 3, 4)), {"temperature": 0.0}, "temperature: expected a finite number"),
    ],
)
def test_wrong_arguments(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        channel_wise_kd_loss(*(maps(*shape) for shape in shapes), **options)
