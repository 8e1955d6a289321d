"""LELP: the fit by hand and by invariants, targets, the loss and its limits, rows without labels, state, by name, the experiment."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.lelp import (
    SubclassHead,
    fit_subclasses,
    lelp_loss,
    merge_subclass_logits,
    project_embeddings,
    subclass_targets,
)

F64 = torch.float64


def embeddings(rows=60, width=8, classes=2, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    spread = torch.linspace(3, 0.5, width, dtype=F64)
    h = torch.randn(rows, width, generator=generator, dtype=F64) * spread + labels.unsqueeze(1) + offset
    w = torch.randn(classes, width, generator=generator, dtype=F64)
    return h, labels, w


# ---------------------------------------------------------------- fit
def test_directions_are_orthonormal_principal_and_in_the_null_space_of_the_classifier():
    h, labels, w = embeddings()
    fit = fit_subclasses(h, labels, w, n_subclasses=3)
    assert fit.mean.shape == (2, 8) and fit.directions.shape == (2, 3, 8) and fit.scale.shape == (2, 3)
    torch.testing.assert_close(fit.projector @ w.T, torch.zeros(8, 2, dtype=F64), atol=1e-12, rtol=0)
    for c in range(2):
        v, rows = fit.directions[c], h[labels == c]
        torch.testing.assert_close(v @ v.T, torch.eye(3, dtype=F64))
        torch.testing.assert_close(v @ w.T, torch.zeros(3, 2, dtype=F64), atol=1e-12, rtol=0)
        centred = (rows - rows.mean(0)) @ fit.projector
        values = torch.linalg.svdvals(centred)
        torch.testing.assert_close(fit.scale[c], values[:3] / len(rows) ** 0.5)
        assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


def test_without_projection_it_is_pca_of_each_class():
    h, labels, w = embeddings(classes=3)
    for fit in (
        fit_subclasses(h, labels, w, n_subclasses=2, project_null_space=False),
        fit_subclasses(h, labels, n_subclasses=2),
    ):
        assert torch.equal(fit.projector, torch.eye(8, dtype=F64))
        covariance = torch.cov(h[labels == 1].T, correction=0)
        values, vectors = torch.linalg.eigh(covariance)
        torch.testing.assert_close(fit.scale[1] ** 2, values.flip(0)[:2])
        torch.testing.assert_close((fit.directions[1] * vectors.T.flip(0)[:2]).sum(1).abs(), torch.ones(2, dtype=F64))


def test_rotation_shares_the_variance_and_keeps_the_span():
    h, labels, w = embeddings()
    plain = fit_subclasses(h, labels, w, n_subclasses=3)
    turned = fit_subclasses(h, labels, w, n_subclasses=3, rotate=True, generator=torch.Generator().manual_seed(1))
    for c in range(2):
        torch.testing.assert_close(
            turned.directions[c].T @ turned.directions[c], plain.directions[c].T @ plain.directions[c]
        )
    torch.testing.assert_close(turned.scale.square().sum(1), plain.scale.square().sum(1))
    assert not torch.allclose(turned.scale, plain.scale)


def test_random_directions_lie_in_the_range_of_the_projector():
    h, labels, w = embeddings()
    fits = [
        fit_subclasses(h, labels, w, n_subclasses=3, random_directions=True, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(fits[0].directions, fits[1].directions) and not torch.allclose(
        fits[0].directions, fits[2].directions
    )
    v = fits[0].directions
    torch.testing.assert_close(v @ fits[0].projector, v)
    torch.testing.assert_close(v @ v.mT, torch.eye(3, dtype=F64).expand(2, 3, 3))
    a = project_embeddings(fits[0], h)[labels == 0, 0]
    torch.testing.assert_close(a.square().mean(0), torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_subclasses": 30}, "n_subclasses: the null space of classifier_weight has 6 dimensions, expected 30"),
        ({"n_subclasses": 0}, "n_subclasses: expected an int >= 1"),
        ({"n_subclasses": 30, "w": None}, "labels: class 0 has 30 rows, 30 subclasses need one more"),
        ({"labels": torch.arange(60) % 2 * 3}, r"labels: expected integers in \[0, 2\), got 0 to 3"),
        ({"labels": torch.arange(60) % 2 - 1}, r"labels: expected integers in \[0, 2\), got -1 to 0"),
        ({"labels": torch.zeros(60, dtype=torch.long)}, "labels: class 1 has 0 rows"),
        ({"w": torch.zeros(2, 7, dtype=F64)}, r"classifier_weight: expected \[C, 8\], got \(2, 7\)"),
        ({"h": torch.full((60, 8), float("nan"))}, "embeddings: expected finite values"),
        ({"h": torch.zeros(60)}, r"embeddings: expected \[N, D\]"),
        ({"h": torch.randn(60, 1) * torch.ones(1, 8)}, "embeddings: class 0 has rank 1 after the projection, expected >= 3"),
        ({"h": torch.zeros(60, 8), "random_directions": True}, "direction 0 of class 0 has no variance"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_fit(change, message):
    h, labels, w = embeddings()
    given = {"h": h, "labels": labels, "w": w, "n_subclasses": 3} | change
    with pytest.raises(ValueError, match=message):
        fit_subclasses(given.pop("h"), given.pop("labels"), given.pop("w"), **given)


# ---------------------------------------------------------------- targets and loss
def test_targets_split_the_class_probability():
    h, labels, w = embeddings()
    fit = fit_subclasses(h, labels, w, n_subclasses=3)
    z = torch.randn(60, 2, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    q = subclass_targets(fit, h, z, temperature=2.0, subclass_temperature=0.5)
    assert q.shape == (60, 6) and not q.requires_grad
    torch.testing.assert_close(q.unflatten(1, (2, 3)).sum(-1), (z.detach() / 2).softmax(-1))
    a = torch.stack([(h - fit.mean[c]) @ fit.directions[c].T / fit.scale[c] for c in range(2)], 1)
    torch.testing.assert_close(project_embeddings(fit, h), a)
    torch.testing.assert_close(q[:, 3:], (z.detach() / 2).softmax(-1)[:, 1:] * (a[:, 1] / 0.5).softmax(-1))


def test_projection_far_from_zero_keeps_its_digits_in_float32():
    h, labels, _ = embeddings(offset=1000.0)
    fit = fit_subclasses(h, labels, n_subclasses=3)
    small = project_embeddings(type(fit)(*(tensor.float() for tensor in fit)), h.float())
    torch.testing.assert_close(small.double(), project_embeddings(fit, h), atol=2e-4, rtol=0)


def loss_example(classes=3, subclasses=2, rows=7):
    generator = torch.Generator().manual_seed(3)
    u = 2 * torch.randn(rows, classes * subclasses, generator=generator, dtype=F64)
    q = torch.rand(rows, classes * subclasses, generator=generator, dtype=F64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return u.requires_grad_(), q / q.sum(1, keepdim=True), labels


def test_loss_is_the_written_out_formula():
    u, q, labels = loss_example()
    loss, parts = lelp_loss(u, q, labels, n_subclasses=2, temperature=3.0, alpha=0.7)
    kd = -9 * (q * (u / 3).log_softmax(-1)).sum(-1).mean()
    probs = u.softmax(-1).unflatten(1, (3, 2)).sum(-1)
    ce = F.nll_loss(probs.log(), labels)
    want = 0.7 * kd + 0.3 * ce
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, u), torch.autograd.grad(want, u))
    torch.testing.assert_close([parts["kd"], parts["ce"]], [kd.detach(), ce.detach()])
    torch.testing.assert_close(merge_subclass_logits(u, 2).softmax(-1), probs)


def test_one_subclass_is_plain_kd():
    u, q, labels = loss_example(subclasses=1)
    loss, _ = lelp_loss(u, q, labels, n_subclasses=1, alpha=0.4)
    want = -0.4 * (q * u.log_softmax(-1)).sum(-1).mean() + 0.6 * F.cross_entropy(u, labels)
    torch.testing.assert_close(loss, want)


def test_rows_without_labels_have_the_distillation_alone():
    u, q, labels = loss_example()
    options = {"n_subclasses": 2, "alpha": 0.7}
    none = lelp_loss(u, q, None, **options)
    torch.testing.assert_close(none.loss, lelp_loss(u, q, torch.full_like(labels, -100), **options).loss)
    torch.testing.assert_close(none.loss, none.parts["kd"])
    assert none.parts["ce"] == 0
    some = labels.clone()
    some[4:] = -100
    each = [
        lelp_loss(u[i : i + 1], q[i : i + 1], labels[i : i + 1] if i < 4 else None, **options).loss for i in range(7)
    ]
    got = lelp_loss(u, q, some, **options)
    torch.testing.assert_close(got.loss, torch.stack(each).mean())
    torch.testing.assert_close(got.parts["ce"], F.cross_entropy(merge_subclass_logits(u, 2)[:4], labels[:4]).detach())


def test_a_target_of_zero_and_extreme_logits_stay_finite():
    u = torch.tensor([[800.0, -800.0, 0.0, 1.0]], requires_grad=True)
    loss, _ = lelp_loss(u, torch.tensor([[0.0, 0.25, 0.75, 0.0]]), torch.tensor([1]), n_subclasses=2)
    loss.backward()
    assert loss.isfinite() and u.grad.isfinite().all() and loss > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(7, 4)}, r"student: expected \[B, C S\] as targets \(7, 4\)"),
        ({"n_subclasses": 4}, "logits: expected a multiple of 4 outputs, got 6"),
        ({"alpha": 1.1}, "alpha: expected a finite number in"),
        ({"temperature": 0.0}, "temperature: expected a finite number in"),
        ({"labels": torch.full((7,), 3)}, r"labels: expected integers in \[0, 3\), got 3 at row 0"),
        ({"labels": torch.zeros(6, dtype=torch.long)}, "labels: expected shape"),
    ],
    ids=str,
)
def test_bad_loss(change, message):
    u, q, labels = loss_example()
    given = {"q": q, "labels": labels, "n_subclasses": 2} | change
    with pytest.raises(ValueError, match=message):
        lelp_loss(u, given.pop("q"), given.pop("labels"), **given)


def test_bad_targets():
    h, labels, w = embeddings()
    fit = fit_subclasses(h, labels, w, n_subclasses=3)
    z = torch.zeros(60, 2)
    for arguments, options, message in (
        ((h[:, :7], z), {}, r"embeddings: expected \[B, 8\]"),
        ((h, z[:, :1]), {}, r"teacher_logits: expected \[B, 2\]"),
        ((h, z), {"subclass_temperature": 0.0}, "subclass_temperature: expected a finite number"),
        ((h, z), {"temperature": -1.0}, "temperature: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            subclass_targets(fit, *arguments, **options)


# ---------------------------------------------------------------- by name
def setup(teacher, h, labels, step=0):
    def sweep(split):
        assert split == "train"
        for rows, y in zip(h.split(16), labels.split(16)):
            yield methods.Context(None, teacher(rows), y, teacher_features={"embedding": rows})

    return methods.Setup(nn.Identity(), teacher, sweep, step=step)


def test_by_name_fits_once_changes_the_head_and_resumes():
    h, labels, w = embeddings()
    labels[50:] = -100
    teacher = nn.Sequential(nn.Linear(8, 2, bias=False))
    teacher[0].weight.data = w
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    method = methods.load("lelp")({"embedding": (5, 8)}, n_subclasses=3, alpha=0.5, temperature=2.0).double()
    assert method.adapt(student) is student and isinstance(student[2], SubclassHead)
    method.start(setup(teacher.double(), h, labels))
    want = fit_subclasses(h[:50], labels[:50], w, n_subclasses=3)
    torch.testing.assert_close(method.directions, want.directions)
    u = student(torch.randn(60, 4))
    assert u.shape == (60, 6)
    context = methods.Context(u.double(), teacher(h).detach(), labels, teacher_features={"embedding": h})
    q = subclass_targets(want, h, context.teacher, temperature=2.0)
    torch.testing.assert_close(
        method(context).loss, lelp_loss(u.double(), q, labels, n_subclasses=3, alpha=0.5, temperature=2.0).loss
    )
    again = methods.load("lelp")({"embedding": (5, 8)}, n_subclasses=3).double()
    again.load_state_dict(method.state_dict())
    again.start(setup(teacher, h[:1], labels[:1], step=1))
    assert all(torch.equal(a, b) for a, b in zip(again.projection, method.projection))
    assert student.eval()(torch.randn(3, 4)).shape == (3, 2)


def test_membership_by_the_teacher_and_maps_as_embeddings():
    h, labels, w = embeddings()
    teacher = nn.Sequential(nn.Linear(8, 2, bias=False)).double()
    teacher[0].weight.data = w
    method = methods.load("lelp")({"embedding": (5, 8)}, n_subclasses=3, membership="teacher").double()
    method.start(setup(teacher, h, torch.full_like(labels, -100)))
    torch.testing.assert_close(method.directions, fit_subclasses(h, (h @ w.T).argmax(-1), w, n_subclasses=3).directions)
    maps = methods.Context(None, teacher_features={"embedding": h.view(60, 8, 1, 1).expand(60, 8, 2, 3)})
    torch.testing.assert_close(method.embedding(maps), h)


def test_the_splits_hide_digits_and_labels():
    pytest.importorskip("sklearn")
    from kdfast.data.digit_residues import residue_splits

    splits = residue_splits(0, classes=3)
    images, labels, digits = splits["student"].tensors
    assert (
        len(images) == 900
        and (labels != -100).sum() == 300
        and len(images.flatten(1).unique(dim=0)) == len(splits["teacher"].tensors[0].flatten(1).unique(dim=0))
    )
    assert torch.equal(labels[:300], digits[:300] % 3) and (labels[300:] == -100).all()


def test_experiment_runs_and_measures_information(tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.experiments import lelp
    from kdfast.data.digit_residues import residue_task

    out = tmp_path / "lelp.json"
    tasks = [residue_task(2)]
    results = lelp.run(out, seeds=1, steps=10, tasks=tasks, work=tmp_path / "work")
    (found,) = results["data"].values()
    assert list(found["arms"]) == ["teacher", "ce", "kd", "random", "lelp"] and len(results["sentences"]) == 5
    bits = {name: arm["measures"].get("subclass and digit, bits", [0])[0] for name, arm in found["arms"].items()}
    assert bits["kd"] > 0.5 and bits["lelp"] > bits["kd"] and bits["ce"] == 0
    assert lelp.run(out, seeds=1, tasks=tasks, work=tmp_path / "none") == json.loads(out.read_text())


def test_mutual_information_by_hand():
    pytest.importorskip("sklearn")
    from benchmarks.experiments.lelp import mutual_information

    a = torch.tensor([0, 0, 1, 1])
    assert mutual_information(a, a) == pytest.approx(1.0)
    assert mutual_information(a, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.0)
