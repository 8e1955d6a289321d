"""bd_kd: weights by the entropy gap, identities, who gets which gradient, calibration error by hand. Vectors: test_vectors.py."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.losses import cross_entropy_loss, divergence_loss, entropy_rows, kd_loss
from kdfast.methods.bd_kd import balance, balance_weights, bd_kd_loss
from kdfast.metrics import expected_calibration_error

F64 = torch.float64


def logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(rows, classes, generator=generator, dtype=F64)
    t = 3 * torch.randn(rows, classes, generator=generator, dtype=F64)
    return s.requires_grad_(), t.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("teacher_loss", ["reverse_kl", "forward_kl", "none"])
@pytest.mark.parametrize("weighting", ["hard", "soft"])
def test_both_losses_written_out(weighting, teacher_loss):
    s, t, y = logits()
    s.data[0] *= 9  # one certain student row
    out = bd_kd_loss(s, t, y, temperature=2.0, delta=3.0, weighting=weighting, teacher_loss=teacher_loss)
    ps, pt = F.softmax(s / 2, -1), F.softmax(t / 2, -1)
    gap = (-(pt * pt.log()).sum(-1) + (ps * ps.log()).sum(-1)).detach()
    assert (gap > 0).any() and (gap < 0).any()
    if weighting == "hard":
        f, r = torch.where(gap > 0, 3.0, 1.0), torch.where(gap > 0, 1.0, 3.0)
    else:
        f = 2 / (1 + (-gap / 3).exp())
        r = 2 - f
    want_s = F.cross_entropy(s, y) + 4 * (f * kl(pt.detach(), ps) + r * kl(ps, pt.detach())).mean()
    second = {
        "reverse_kl": kl(ps.detach(), pt).mean(), "forward_kl": kl(pt, ps.detach()).mean(), "none": torch.zeros((), dtype=F64),
    }[teacher_loss]  # fmt: skip
    want_t = F.cross_entropy(t, y) + 4 * second
    torch.testing.assert_close(out.loss, want_s + want_t)
    torch.testing.assert_close([out.parts["student"], out.parts["teacher"]], [want_s.detach(), want_t.detach()])
    torch.testing.assert_close(torch.autograd.grad(out.loss, (s, t)), torch.autograd.grad(want_s + want_t, (s, t)))


def test_identities_jeffreys_and_plain_kd():
    s, t, y = logits()
    ce = cross_entropy_loss(s, y)
    one = bd_kd_loss(s, t, y, delta=1.0, online=False).loss
    torch.testing.assert_close(one, ce + divergence_loss(s, t, kind="jeffreys", temperature=4.0, scale_t2=True))
    plain = bd_kd_loss(s, t, y, weighting="fixed", weights=(1.0, 0.0), online=False).loss
    torch.testing.assert_close(plain, ce + kd_loss(s, t))
    assert abs(one - plain) > 1e-2


def test_equal_predictions_have_a_gap_of_exactly_zero_and_take_the_else_branch():
    for dtype in (torch.float32, torch.bfloat16):
        s = torch.randn(64, 33, dtype=torch.float32).to(dtype)
        rows = balance(s, s.clone(), temperature=4.0)
        assert torch.equal(rows.entropy_student, rows.entropy_teacher)
        assert (rows.weight_forward == 1).all() and (rows.weight_reverse == 2).all()


def test_emphasis_can_be_turned_round():
    low, high = torch.tensor([0.1]), torch.tensor([0.9])
    assert [w.item() for w in balance_weights(low, high, delta=5.0)] == [5, 1]
    assert [w.item() for w in balance_weights(low, high, delta=5.0, emphasise="reverse_when_overconfident")] == [1, 5]
    f, r = balance_weights(low, high, weighting="soft", delta=0.5)
    assert f.item() == pytest.approx(2 / (1 + math.exp(-1.6))) and (f + r).item() == pytest.approx(2)


def test_several_students_learn_from_the_teacher_alone():
    s, t, y = logits()
    other = logits(seed=3)[0]
    out = bd_kd_loss([s, other], t, y)
    singles = [bd_kd_loss(one, t, y) for one in (s, other)]
    want = torch.autograd.grad(singles[0].loss, (s, t), retain_graph=True)
    got = torch.autograd.grad(out.loss, (s, other, t), retain_graph=True)
    torch.testing.assert_close(got[0], want[0])
    second = torch.autograd.grad(singles[1].loss, t)[0]
    torch.testing.assert_close(got[2], (want[1] + second) / 2)  # cross-entropy once, the second term a mean
    torch.testing.assert_close(out.parts["teacher"], (singles[0].parts["teacher"] + singles[1].parts["teacher"]) / 2)


def test_ignored_rows_masked_classes_and_maps():
    s, t, y = logits()
    y[2] = -100
    kept = [0, 1, 3, 4, 5]
    out, want = bd_kd_loss(s, t, y), bd_kd_loss(s[kept], t[kept], y[kept])
    torch.testing.assert_close(out.loss, want.loss)
    out.loss.backward()
    assert not s.grad[2].any() and not t.grad[2].any()
    assert bd_kd_loss(s, t, torch.full_like(y, -100)).loss == 0
    with torch.no_grad():
        padded = [F.pad(z, (0, 2), value=-math.inf) for z in (s, t)]
        torch.testing.assert_close(bd_kd_loss(*padded, y).loss, out.loss)
        maps = [z.T.reshape(1, 5, 2, 3) for z in (s, t)]
        torch.testing.assert_close(bd_kd_loss(*maps, y.reshape(1, 2, 3), dim=1).loss, out.loss)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature: expected a finite number"),
        ({"delta": 0.5}, r"delta: expected a finite number in \[1"),
        ({"delta": 0.0, "weighting": "soft"}, r"delta: expected a finite number in \(0"),
        ({"weighting": "smooth"}, "weighting: expected one of"),
        ({"teacher_loss": "both"}, "teacher_loss: expected one of"),
        ({"emphasise": "x"}, "emphasise: expected one of"),
    ],
    ids=str,
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        bd_kd_loss(*logits(), **change)


def test_bad_input():
    s, t, y = logits()
    for arguments, message in (
        ((s, t[:, :4], y), "teacher: expected logits of the student's shape"),
        ((s[:0], t[:0], y[:0]), "not empty"),
        ((s, t, y + 5), r"labels: expected integers in \[0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bd_kd_loss(*arguments)


def test_by_name_trains_both_unless_the_teacher_is_frozen():
    s, t, y = logits()
    online = pickle.loads(pickle.dumps(methods.load("bd_kd")(delta=3.0)))
    assert online.trains_teacher and not methods.load("bd_kd")(online=False).trains_teacher
    online(methods.Context(s, t, y)).loss.backward()
    assert s.grad.any() and t.grad.any()
    (none,) = torch.autograd.grad(
        methods.load("bd_kd")(online=False)(methods.Context(s, t, y)).loss, t, allow_unused=True
    )
    assert none is None


# ---------------------------------------------------------------- shared parts
def test_cross_entropy_is_torchs_and_zero_without_a_kept_row():
    s, _, y = logits()
    torch.testing.assert_close(
        cross_entropy_loss(s, y, label_smoothing=0.1), F.cross_entropy(s, y, label_smoothing=0.1)
    )
    y[1] = -100
    for reduction in ("mean", "sum", "none"):
        got = cross_entropy_loss(s, y, reduction=reduction)
        torch.testing.assert_close(got, F.cross_entropy(s, y, reduction=reduction))
    mask = torch.tensor([True, True, False, False, False, False])
    torch.testing.assert_close(cross_entropy_loss(s, y, mask=mask), F.cross_entropy(s[:1], y[:1]))
    nothing = cross_entropy_loss(s, torch.full_like(y, -100))
    nothing.backward()
    assert nothing == 0 and not s.grad.any()
    maps = s.detach().T.reshape(1, 5, 2, 3)
    torch.testing.assert_close(cross_entropy_loss(maps, y.reshape(1, 2, 3), dim=1), F.cross_entropy(s.detach(), y))


def test_entropy_rows_have_a_gradient_beside_masked_classes():
    z = torch.tensor([[0.5, -1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    two = z.detach()[:, :2].requires_grad_()
    (got,), (want,) = (torch.autograd.grad(entropy_rows(x).sum(), x) for x in (z, two))
    assert got[0, 2] == 0
    torch.testing.assert_close(got[:, :2], want)


def test_entropy_rows_of_masked_classes():
    z = torch.tensor([[0.0, 0.0, -math.inf], [7.0, -math.inf, -math.inf]])
    torch.testing.assert_close(entropy_rows(z), torch.tensor([math.log(2), 0.0]))


def test_calibration_error_by_hand():
    # confidences 0.75 (right), 0.75 (wrong), 0.5 (a tie: the first class, wrong)
    z = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0]])
    y = torch.tensor([0, 0, 1, -100])
    assert expected_calibration_error(z, y) == pytest.approx((abs(0.5 - 0.75) * 2 + 0.5) / 3)
    # 0.5 belongs to the bin (0.25, 0.5], apart from 0.75 in (0.5, 0.75]; in one bin the errors meet
    assert expected_calibration_error(z, y, n_bins=4) == pytest.approx((0.5 + 0.5) / 3)
    assert expected_calibration_error(z, y, n_bins=1) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="n_bins: expected an int >= 1"):
        expected_calibration_error(z, y, n_bins=0)
    assert expected_calibration_error(z, torch.full_like(y, -100)) == 0


def test_reported_weight_is_of_the_rows_that_count():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4), 3 * torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -100, -100])
    student[4:] *= 100  # certain, and left out
    got = bd_kd_loss(student, teacher, labels).parts["weight_forward"]
    assert got == bd_kd_loss(student[:4], teacher[:4], labels[:4]).parts["weight_forward"]
    assert got != bd_kd_loss(student, teacher, labels.clamp_min(0)).parts["weight_forward"]
