"""cnn_vit_bsd: totals from their parts, gradients that stay on their side, HFD, the method by name. Vectors: test_vectors.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.losses import LossOutput, region_selective_loss, selective_kd_loss
from kdfast.methods.cnn_vit_bsd import cnn_vit_bsd_loss, hfd_loss

F64 = torch.float64


def tensors(seed=0):
    """Logits [2, 4, 8, 8], low features of two sizes, high features of one, labels with a few ignored."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).requires_grad_()

    labels = torch.randint(4, (2, 8, 8), generator=generator)
    labels[:, 0] = 255
    low = random(2, 3, 8, 8), random(2, 5, 4, 4)
    high = random(2, 6, 4, 4), random(2, 6, 4, 4)
    return random(2, 4, 8, 8), random(2, 4, 8, 8), labels, low, high


def projections():
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 1).double(), nn.Conv2d(5, 3, 1).double()


# ---------------------------------------------------------------- HFD
def test_hfd_is_the_mean_squared_error_after_resizing_to_the_target():
    *_, low, _ = tensors()
    phi_a, phi_b = projections()
    to_a, to_b = hfd_loss(*low, phi_a, phi_b)
    want_a = F.interpolate(phi_a(low[0]), size=(4, 4), mode="bilinear", align_corners=False) - low[1]
    want_b = F.interpolate(phi_b(low[1]), size=(8, 8), mode="bilinear", align_corners=False) - low[0]
    torch.testing.assert_close([to_a, to_b], [want_a.square().mean(), want_b.square().mean()])
    grads = torch.autograd.grad(to_a, (*low, phi_a.weight, phi_b.weight), allow_unused=True)
    assert grads[0].any() and grads[1] is None and grads[2].any() and grads[3] is None


def test_hfd_pool_compares_at_the_smaller_size():
    *_, low, _ = tensors()
    phi_a, phi_b = projections()
    to_a, to_b = hfd_loss(*low, phi_a, phi_b, alignment="pool")
    torch.testing.assert_close(to_a, F.mse_loss(F.avg_pool2d(phi_a(low[0]), 2), low[1]))
    torch.testing.assert_close(to_b, F.mse_loss(phi_b(low[1]), F.avg_pool2d(low[0], 2)))
    with pytest.raises(ValueError, match="alignment: expected one of bilinear, pool, got 'nearest'"):
        hfd_loss(*low, phi_a, phi_b, alignment="nearest")
    with pytest.raises(ValueError, match="project: expected 5 channels as the other student has, got 3"):
        hfd_loss(*low, nn.Identity(), nn.Identity())


# ---------------------------------------------------------------- totals
def test_total_is_the_weighted_sum_of_its_terms():
    a, b, labels, low, high = tensors()
    phi = projections()
    weights = {"w_hfd": 0.5, "w_region": 2.0, "w_pixel": 3.0}
    loss, parts = cnn_vit_bsd_loss(
        a, b, labels, low=low, high=high, projections=phi, grid=(2, 2), temperature=2.0, **weights
    )
    pixel = selective_kd_loss(a, b, labels, temperature=2.0)
    region = region_selective_loss(*high, a, b, labels, grid=(2, 2))
    hfd = sum(hfd_loss(*low, *phi))
    ce = F.cross_entropy(a, labels, ignore_index=255) + F.cross_entropy(b, labels, ignore_index=255)
    want = ce + 0.5 * hfd + 2 * region.loss + 3 * pixel.loss
    torch.testing.assert_close(loss, want)
    leaves = (a, b, *low, *high, phi[0].weight, phi[1].weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(want, leaves))
    torch.testing.assert_close(parts["loss_a"] + parts["loss_b"], loss.detach())
    torch.testing.assert_close(parts["pixel_a"], pixel.parts["to_a"])
    torch.testing.assert_close(parts["region_b"], region.parts["to_b"])
    assert not any(part.requires_grad for part in parts.values())
    assert parts["pixel_a"] > 0 and parts["region_a"] + parts["region_b"] > 0


def test_one_backward_of_the_sum_gives_each_student_its_own_gradient():
    """L(a) + L(b) moves a exactly as L(a) alone, with b as a constant."""
    a, b, labels, low, high = tensors()
    phi = projections()
    options = {"projections": phi, "grid": (2, 2)}
    loss, _ = cnn_vit_bsd_loss(a, b, labels, low=low, high=high, **options)
    both = torch.autograd.grad(loss, (a, low[0], high[0]))
    frozen, _ = cnn_vit_bsd_loss(
        a, b.detach(), labels, low=(low[0], low[1].detach()), high=(high[0], high[1].detach()), **options
    )
    # HFD(b) resizes project_b(low_b) to a's features, which are under stop-gradient there: nothing of it reaches a
    torch.testing.assert_close(both, torch.autograd.grad(frozen, (a, low[0], high[0])))


def test_terms_can_be_left_out_and_no_valid_pixel_is_zero():
    a, b, labels, _, _ = tensors()
    loss, parts = cnn_vit_bsd_loss(a, b, labels, w_pixel=0.0)
    ce = F.cross_entropy(a, labels, ignore_index=255) + F.cross_entropy(b, labels, ignore_index=255)
    torch.testing.assert_close(loss, ce)
    assert "hfd_a" not in parts and "region_a" not in parts
    nothing, parts = cnn_vit_bsd_loss(a, b, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0 and parts["num_valid"] == 0 and not a.grad.any() and not b.grad.any()


def test_every_open_choice_of_the_reconstruction_is_an_argument_that_acts():
    a, b, labels, low, high = tensors()
    fixed = {"low": low, "high": high, "projections": projections(), "grid": (2, 2)}
    default = cnn_vit_bsd_loss(a, b, labels, **fixed).loss
    for choice in (
        {"reliability": "entropy"}, {"distance": "mse"}, {"temperature": 3.0}, {"normalizer": "all"}, {"w_hfd": 2.0},
        {"w_region": 2.0}, {"w_pixel": 2.0}, {"alignment": "pool"}, {"grid": (4, 4)},
    ):  # fmt: skip
        assert abs((cnn_vit_bsd_loss(a, b, labels, **fixed | choice).loss - default).item()) > 1e-6, choice


def test_bad_input():
    a, b, labels, low, high = tensors()
    with pytest.raises(ValueError, match="projections: expected"):
        cnn_vit_bsd_loss(a, b, labels, low=low)
    with pytest.raises(ValueError, match="grid: 3 regions do not divide the height of feat_a, 4"):
        cnn_vit_bsd_loss(a, b, labels, high=high, grid=(3, 3))
    with pytest.raises(ValueError, match="w_pixel: expected a finite number"):
        cnn_vit_bsd_loss(a, b, labels, w_pixel=float("nan"))


# ---------------------------------------------------------------- by name
def context(step=0, **change):
    a, b, labels, low, high = tensors()
    fields = {
        "student": a, "teacher": b, "labels": labels, "step": step,
        "student_features": {"low": low[0], "high": high[0]}, "teacher_features": {"low": low[1], "high": high[1]},
    }  # fmt: skip
    return methods.Context(**fields | change)


def test_by_name_both_learn_and_the_projections_too():
    Method = methods.load("cnn_vit_bsd")
    assert Method.trains_teacher and Method.captures == ("low", "high")
    torch.manual_seed(0)
    method = Method({"low": (3, 5), "high": (6, 6)}, grid=(2, 2)).double()
    assert sorted(dict(method.named_parameters())) == [
        f"low_projections.{i}.{name}" for i in (0, 1) for name in ("bias", "weight")
    ]
    c = context()
    output = method(c)
    assert isinstance(output, LossOutput)
    output.loss.backward()
    learners = [c.student, c.teacher, *c.student_features.values(), *c.teacher_features.values(), *method.parameters()]
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in learners)


def test_by_name_widths_and_sizes_that_differ_are_brought_together():
    torch.manual_seed(0)
    method = methods.load("cnn_vit_bsd")({"low": (3, 5), "high": (6, 9)}, grid=(2, 2)).double()
    assert [p.out_channels for p in method.high_projections] == [6, 6]
    small = torch.randn(2, 9, 2, 2, dtype=F64)
    logits = torch.randn(2, 4, 4, 4, dtype=F64, requires_grad=True)
    c = context()
    out = method(context(student=logits, teacher_features={"low": c.teacher_features["low"], "high": small}))
    out.loss.backward()
    assert logits.grad.any() and method.high_projections[1].weight.grad.any()


def test_warm_up_scales_the_three_weights():
    torch.manual_seed(0)
    method = methods.load("cnn_vit_bsd")({"low": (3, 5), "high": (6, 6)}, grid=(2, 2), warmup_steps=10).double()
    at = [method(context(step=step)).loss.item() for step in (0, 5, 10, 50)]
    ce = [method(context()).parts[f"ce_{side}"].item() for side in "ab"]
    assert at[0] == pytest.approx(sum(ce))
    assert at[1] - at[0] == pytest.approx((at[2] - at[0]) / 2) and at[2] == at[3] != at[0]
