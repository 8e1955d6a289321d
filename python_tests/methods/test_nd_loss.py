"""nd_loss: the two gradients by hand, ties and zeros, warm-up, means that are saved. Vectors: test_vectors.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.data.class_means import ClassMeans
from kdfast.losses import dkd_loss
from kdfast.methods.nd_loss import FeatureAdapter, nd_loss_total, norm_direction_loss

F64 = torch.float64


def features(rows=5, width=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t, means = (torch.randn(n, width, generator=generator, dtype=F64) for n in (rows, rows, classes))
    labels = torch.randint(classes, (rows,), generator=generator)
    return s.requires_grad_(), t, means, labels


def test_gradient_is_direction_alone_above_the_teachers_norm_and_both_below():
    s, t, means, labels = features()
    scale = torch.tensor([0.1, 9.0, 0.1, 9.0, 1.0], dtype=F64).unsqueeze(1)
    s = (s.detach() * scale).requires_grad_()
    (grad,) = torch.autograd.grad(norm_direction_loss(s, t, means, labels), s)
    e = F.normalize(means, dim=1)[labels]
    u, ns, nt = (s * e).sum(1, keepdim=True), s.norm(dim=1, keepdim=True), t.norm(dim=1, keepdim=True)
    above = ns >= nt
    want = torch.where(above, -(e / ns - u * s / ns**3), -e / nt) / 5
    torch.testing.assert_close(grad, want.detach())
    assert above.any() and not above.all()


def test_tie_takes_the_students_norm_and_two_zero_norms_give_one_without_gradient():
    s, _, means, labels = features()
    t = s.detach().clone()
    (grad,) = torch.autograd.grad(norm_direction_loss(s, t, means, labels), s)
    assert (grad * s).sum(1).abs().max() < 1e-12  # no pull on the norm
    zero = torch.zeros(5, 6, dtype=F64, requires_grad=True)
    loss = norm_direction_loss(zero, torch.zeros_like(zero), means, labels)
    loss.backward()
    assert loss == 1 and not zero.grad.any()
    (grad,) = torch.autograd.grad(norm_direction_loss(zero, t, means, labels), zero)
    torch.testing.assert_close(grad, -F.normalize(means, dim=1)[labels] / t.norm(dim=1, keepdim=True) / 5)


def test_cosine_mode_rows_and_means_per_row():
    s, t, means, labels = features()
    rows = norm_direction_loss(s, t, means, labels, mode="cosine", reduction="none")
    torch.testing.assert_close(rows, 1 - F.cosine_similarity(s, means[labels]))
    torch.testing.assert_close(
        norm_direction_loss(s, t, means[labels], reduction="sum"), 5 * norm_direction_loss(s, t, means, labels)
    )
    labels[1] = -100
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(
        norm_direction_loss(s, t, means, labels), norm_direction_loss(s[kept], t[kept], means, labels[kept])
    )


def test_half_precision_norms_are_taken_in_float32():
    s, t, means, labels = features()
    half = [(300 * x).detach().half() for x in (s, t)]  # squares beyond 65504
    want = norm_direction_loss(*[x.double() for x in half], means.half().double(), labels)
    torch.testing.assert_close(norm_direction_loss(*half, means.half(), labels).double(), want, rtol=1e-5, atol=1e-6)


def test_total_warm_up_and_dkd():
    s, t, means, labels = features()
    zs, zt = torch.randn(5, 3, dtype=F64, requires_grad=True), torch.randn(5, 3, dtype=F64)
    ce, nd = F.cross_entropy(zs, labels), norm_direction_loss(s, t, means, labels)
    kd = F.kl_div(F.log_softmax(zs / 4, -1), F.softmax(zt / 4, -1), reduction="batchmean") * 16
    weights = {"ce_weight": 0.5, "kd_weight": 3.0, "nd_weight": 2.0}
    for epoch, r in ((0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)):
        got = nd_loss_total(zs, zt, labels, s, t, means, epoch=epoch, warmup_epochs=20, **weights).loss
        torch.testing.assert_close(got, 0.5 * ce + r * 3 * kd + 2 * nd)
    got = nd_loss_total(zs, zt, labels, s, t, means, kind="dkd", beta=(1.0, 8.0), **weights)
    torch.testing.assert_close(got.loss, 0.5 * ce + 3 * dkd_loss(zs, zt, labels) + 2 * nd)
    assert set(got.parts) == {"ce", "kd", "nd"} and not any(p.requires_grad for p in got.parts.values())


def test_bad_input():
    s, t, means, labels = features()
    zero = means.clone()
    zero[1] = 0
    for arguments, message in (
        ((s, t[:, :4], means, labels), "use an adapter"),
        ((s[:0], t[:0], means, labels[:0]), "B > 0"),
        ((s, t, means[:, :4], labels), r"class_means: expected \[C, 6\]"),
        ((s, t, means), "one row per sample"),
        ((s, t, zero, labels), "norm above 0, got 0 for class 1"),
        ((s, t, means * torch.tensor([1.0, 1.0, float("nan")]).unsqueeze(1), labels), "for class 2"),
        ((s, t, means, labels + 2), r"labels: expected integers in \[0, 3\)"),
        ((s, t, means, labels.unsqueeze(1)), "labels: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_direction_loss(*arguments)
    with pytest.raises(ValueError, match="mode: expected one of nd, cosine"):
        norm_direction_loss(s, t, means, labels, mode="norm")
    logits = torch.zeros(5, 3)
    for change in ({"nd_weight": -1.0}, {"kd_weight": -1.0}, {"temperature": 0.0}, {"warmup_epochs": -1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            nd_loss_total(logits, logits, labels, s, t, means, **change)


def test_class_means_by_hand():
    means = ClassMeans(3)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    means.update(rows[:2], torch.tensor([2, 2]))
    means.update(rows[2:], torch.tensor([0, -100]))
    got = means.compute(missing="nan")
    assert got[0].tolist() == [5, 6] and got[2].tolist() == [2, 3] and got[1].isnan().all()
    with pytest.raises(ValueError, match="no row of class 1, so it has no mean"):
        means.compute()
    with pytest.raises(ValueError, match=r"labels: expected integers in \[0, 3\), got 3 to 3"):
        means.update(rows[:1], torch.tensor([3]))
    with pytest.raises(ValueError, match="at least one batch"):
        ClassMeans(2).compute()


# ---------------------------------------------------------------- by name
class Net(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(4, width), nn.ReLU())
        self.head = nn.Linear(width, 3)


def distiller(tmp_path, **options):
    from kdfast.train import Distiller

    torch.manual_seed(0)
    student, teacher = Net(5), Net(8)
    return Distiller(
        student, teacher, "nd_loss", options=options, widths={"embedding": (5, 8)}, capture={"embedding": "embedding"},
        out=tmp_path, progress=False,
    )  # fmt: skip


def test_by_name_takes_the_means_from_the_teacher_and_resumes_them(tmp_path):
    pytest.importorskip("accelerate")
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    loader = DataLoader(TensorDataset(x, y), 10, shuffle=True)
    run = distiller(tmp_path, epochs=10, warmup_epochs=4)
    with pytest.raises(ValueError, match="class_means: not there yet"):
        run.loss((x, y))
    run.fit(loader, 1)
    embedding = run.teacher.embedding(x)
    want = torch.stack([embedding[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(run.method.class_means, want.detach())
    assert isinstance(run.method.adapter, FeatureAdapter)
    again = distiller(tmp_path, epochs=10, warmup_epochs=4)
    again.teacher.embedding[0].weight.data.zero_()  # the saved means count, not new ones
    again.fit(loader, 2, resume=True)
    assert torch.equal(again.method.class_means, run.method.class_means)


def test_by_name_counts_epochs_and_pools_maps():
    method = methods.load("nd_loss")({"embedding": (6, 6)}, epochs=10, warmup_epochs=4, nd_weight=1.0)
    s, t, means, labels = features()
    method.class_means = means
    zs, zt = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    maps = [x.detach()[:, :, None, None] + torch.tensor([[-1.0, 1.0]], dtype=F64) for x in (s, t)]
    for step, epoch in ((0, 0), (29, 2), (30, 3), (99, 9)):
        context = methods.Context(
            zs, zt, labels, student_features={"embedding": maps[0]}, teacher_features={"embedding": maps[1]}, step=step,
            total_steps=100,
        )  # fmt: skip
        want = nd_loss_total(zs, zt, labels, s, t, means, nd_weight=1.0, epoch=epoch, warmup_epochs=4).loss
        torch.testing.assert_close(method(context).loss, want)
