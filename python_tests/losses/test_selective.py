"""selective_kd_loss and region_selective_loss: written-out sums, both gradients, parts, twins, bad input."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from modes import check_mode

from kdfast.losses import (
    RegionSelectiveLoss,
    SelectiveKDLoss,
    region_selection,
    region_selective_loss,
    selective_kd_loss,
)

F64 = torch.float64


def case(seed=0, shape=(2, 4, 6, 8), features=(2, 3, 6, 8), ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(shape, generator=generator, dtype=F64) for _ in range(2)]
    feats = [torch.randn(features, generator=generator, dtype=F64) for _ in range(2)]
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return *(z.requires_grad_() for z in (*feats, *logits)), labels


# ---------------------------------------------------------------- pixels
def written_out(a, b, labels, t):
    """Masks, two cross-entropy maps, two KL maps with the teaching side detached."""
    valid = labels != 255
    ce = [F.cross_entropy(z, labels, ignore_index=255, reduction="none") for z in (a, b)]
    losses = []
    for student, teacher, mine, other in ((a, b, *ce), (b, a, *reversed(ce))):
        kl = F.kl_div((student / t).log_softmax(1), (teacher.detach() / t).softmax(1), reduction="none").sum(1)
        losses.append((kl * ((other < mine) & valid)).sum() * t**2 / valid.sum())
    return losses


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pixel_loss_is_the_written_out_sum(temperature):
    _, _, a, b, labels = case()
    loss, parts = selective_kd_loss(a, b, labels, temperature=temperature)
    want = written_out(a, b, labels, temperature)
    assert min(w.item() for w in want) > 0.1
    torch.testing.assert_close(loss, sum(want))
    torch.testing.assert_close([parts["to_a"], parts["to_b"]], [w.detach() for w in want])
    got, expected = torch.autograd.grad(loss, (a, b)), torch.autograd.grad(sum(want), (a, b))
    assert all(g.any() for g in got)  # both models learn
    torch.testing.assert_close(got, expected)


def test_t2_is_an_option_and_reaches_the_gradient():
    _, _, a, b, labels = case()
    with_t2, without = (selective_kd_loss(a, b, labels, temperature=2.0, scale_t2=s) for s in (True, False))
    torch.testing.assert_close(with_t2.loss, 4 * without.loss)
    torch.testing.assert_close(with_t2.parts["to_a"], 4 * without.parts["to_a"])
    torch.testing.assert_close(torch.autograd.grad(with_t2.loss, a)[0], 4 * torch.autograd.grad(without.loss, a)[0])


def test_parts_are_detached_and_counted():
    _, _, a, b, labels = case()
    parts = selective_kd_loss(a, b, labels).parts
    assert not any(part.requires_grad for part in parts.values())
    assert parts["num_valid"].item() == int((labels != 255).sum())
    assert (parts["num_to_a"] + parts["num_to_b"]).item() == parts["num_valid"].item()  # random maps have no ties
    assert 0 < parts["num_to_a"].item() < parts["num_valid"].item()


def test_options_reach_the_op():
    _, _, a, b, labels = case()
    default = selective_kd_loss(a, b, labels).loss
    for options in ({"normalizer": "all"}, {"normalizer": "selected"}, {"reliability": "entropy"}, {"ignore_index": 3}):
        if "ignore_index" in options:
            other = selective_kd_loss(a, b, labels.where(labels != 255, 0), **options).loss
        else:
            other = selective_kd_loss(a, b, labels, **options).loss
        assert abs(other.item() - default.item()) > 1e-3, options


# ---------------------------------------------------------------- regions
def test_region_of_one_pixel_by_hand():
    # Four regions of one pixel, two classes, label 0. l is small where the first logit is large.
    logits_a = torch.tensor([[[[0.0, 3.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]], dtype=F64)
    logits_b = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]], dtype=F64)
    labels = torch.tensor([[[0, 0], [0, 255]]])  # b better, a better, tie, not valid
    feat_a = torch.tensor([[[[1.0, 2.0], [1.0, 5.0]], [[0.0, 0.0], [0.0, 1.0]]]], dtype=F64, requires_grad=True)
    feat_b = torch.tensor([[[[3.0, 1.0], [0.0, 1.0]], [[4.0, 1.0], [1.0, 0.0]]]], dtype=F64, requires_grad=True)
    loss, parts = region_selective_loss(feat_a, feat_b, logits_a, logits_b, labels, grid=(2, 2))
    # region 0: cos((1,0), (3,4)) = 3/5, a learns; region 1: cos((2,0), (1,1)) = 1/sqrt 2, b learns; three regions count
    torch.testing.assert_close(parts["to_a"], torch.tensor((1 - 0.6) / 3, dtype=F64))
    torch.testing.assert_close(parts["to_b"], torch.tensor((1 - 2**-0.5) / 3, dtype=F64))
    assert (parts["num_to_a"].item(), parts["num_to_b"].item()) == (1, 1)
    loss.backward()
    # d(1 - s.t/(|s||t|))/ds = -(t/|t| - cos s/|s|)/|s|
    torch.testing.assert_close(feat_a.grad[0, :, 0, 0], torch.tensor([0.0, -0.8 / 3], dtype=F64))
    torch.testing.assert_close(feat_b.grad[0, :, 0, 1], torch.tensor([-1.0, 1.0], dtype=F64) * 2**-0.5 / 2 / 3)
    assert not feat_a.grad[0, :, 0, 1].any() and not feat_a.grad[0, :, 1].any()
    assert not feat_b.grad[0, :, 0, 0].any() and not feat_b.grad[0, :, 1].any()
    mse = region_selective_loss(feat_a, feat_b, logits_a, logits_b, labels, grid=(2, 2), distance="mse").parts
    torch.testing.assert_close(mse["to_a"], torch.tensor((4 + 16) / 2 / 3, dtype=F64))


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_regions_are_rectangles_and_reliability_is_a_mean_over_valid_pixels(distance):
    feat_a, feat_b, a, b, labels = case(features=(2, 3, 3, 4))
    labels[1, :3, 4:] = 255  # one of the eight regions has no valid pixel
    ce = [F.cross_entropy(z, labels, ignore_index=255, reduction="none").detach() for z in (a, b)]
    valid = labels != 255
    out = region_selection(feat_a, feat_b, *ce, valid, grid=(1, 2), distance=distance)
    to_a, regions = 0.0, 0
    for image in range(2):
        for column in range(2):
            pixels = (image, slice(0, 6), slice(4 * column, 4 * column + 4))
            kept = valid[pixels]
            regions += int(kept.any())
            r = [c[pixels][kept].mean() for c in ce]
            torch.testing.assert_close(out.reliability_a[image, 0, column], r[0])
            s, t = (f[image, :, :, 2 * column : 2 * column + 2].reshape(-1) for f in (feat_a, feat_b))
            assert out.direction[image, 0, column].item() == (1 if r[1] < r[0] else -1)
            if r[1] < r[0]:
                to_a += 1 - F.cosine_similarity(s, t, dim=0) if distance == "cosine" else F.mse_loss(s, t)
    torch.testing.assert_close(out.loss_to_a, to_a / regions)
    finer = region_selective_loss(feat_a, feat_b, a, b, labels, grid=(3, 2), distance=distance)
    assert finer.parts["num_to_a"] + finer.parts["num_to_b"] <= 12


def test_a_region_without_valid_pixels_does_not_count():
    feat_a, feat_b, a, b, labels = case()
    labels[1] = 255
    both = region_selective_loss(feat_a, feat_b, a, b, labels, grid=(2, 2))
    first = region_selective_loss(feat_a[:1], feat_b[:1], a[:1], b[:1], labels[:1], grid=(2, 2))
    torch.testing.assert_close(both.loss, first.loss)
    nothing = region_selective_loss(feat_a, feat_b, a, b, torch.full_like(labels, 255), grid=(2, 2))
    nothing.loss.backward()
    assert nothing.loss.item() == 0 and not feat_a.grad.any() and not feat_b.grad.any()


def test_region_gradients_reach_features_only_each_by_its_own_term():
    feat_a, feat_b, a, b, labels = case()
    grads = torch.autograd.grad(
        region_selective_loss(feat_a, feat_b, a, b, labels, grid=(2, 2)).loss, (feat_a, feat_b, a, b), allow_unused=True
    )
    assert grads[0].any() and grads[1].any() and grads[2] is None and grads[3] is None
    learners = (grads[0] != 0).any(1) & (grads[1] != 0).any(1)
    assert not learners.any()


def test_a_zero_feature_vector_is_no_nan():
    feat_a, feat_b, a, b, labels = case()
    with torch.no_grad():
        feat_a.zero_()
    region_selective_loss(feat_a, feat_b, a, b, labels, grid=(2, 2)).loss.backward()
    assert feat_a.grad.isfinite().all() and feat_b.grad.isfinite().all()


def test_low_precision_features_are_compared_in_float32():
    feat_a, feat_b, a, b, labels = case()
    low = [f.detach().bfloat16() for f in (feat_a, feat_b)]
    got = region_selective_loss(*low, a, b, labels, grid=(2, 2)).loss
    want = region_selective_loss(*(f.double() for f in low), a, b, labels, grid=(2, 2)).loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- twins, modes, bad input
def test_twins_bind_options_and_pickle():
    feat_a, feat_b, a, b, labels = case()
    pixel = pickle.loads(pickle.dumps(SelectiveKDLoss(temperature=2.0, normalizer="all")))
    torch.testing.assert_close(
        pixel(a, b, labels).loss, selective_kd_loss(a, b, labels, temperature=2.0, normalizer="all").loss
    )
    region = RegionSelectiveLoss(grid=(2, 2))
    torch.testing.assert_close(
        region(feat_a, feat_b, a, b, labels).loss, region_selective_loss(feat_a, feat_b, a, b, labels, grid=(2, 2)).loss
    )
    with pytest.raises(TypeError, match="unknown option tempreature"):
        SelectiveKDLoss(tempreature=2.0)


@pytest.mark.parametrize("mode", ["fake", "export", "compile", "func.grad", "checkpoint"])
def test_modes(mode):
    *tensors, labels = case()

    def losses(feat_a, feat_b, a, b):
        region = region_selective_loss(feat_a, feat_b, a, b, labels, grid=(2, 2))
        return selective_kd_loss(a, b, labels).loss + region.loss

    check_mode(mode, losses, tensors)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grid": (4, 2)}, ValueError, "grid: 4 regions do not divide the height of feat_a, 6"),
        ({"grid": (3, 5)}, ValueError, "grid: 5 regions do not divide the width of feat_a, 8"),
        ({"grid": (2,)}, ValueError, r"grid: expected two ints >= 1, got \(2,\)"),
        ({"grid": (0, 2)}, ValueError, "grid: expected two ints >= 1"),
        ({"distance": "l1"}, ValueError, "distance: expected one of cosine, mse, got 'l1'"),
    ],
)
def test_region_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        region_selective_loss(*case(), **change)


def test_bad_tensors():
    feat_a, feat_b, a, b, labels = case()
    with pytest.raises(ValueError, match=r"feat_b: expected the shape \[B, C, h, w\] of feat_a"):
        region_selective_loss(feat_a, feat_b[:, :2], a, b, labels)
    with pytest.raises(ValueError, match="grid: 3 regions do not divide the width of labels, 8"):
        region_selective_loss(feat_a[..., :6], feat_b[..., :6], a, b, labels, grid=(3, 3))
    with pytest.raises(ValueError, match=r"labels: expected shape \[2, H, W\]"):
        region_selective_loss(feat_a, feat_b, a[:1], b[:1], labels[:1], grid=(2, 2))
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        selective_kd_loss(a, b, labels, temperature=-1.0)
    with pytest.raises(ValueError, match="logits_b: expected the shape of logits_a"):
        selective_kd_loss(a, b[..., :4], labels)
