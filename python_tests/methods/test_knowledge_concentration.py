"""knowledge_concentration: targets, pace and layouts against their formulas, the method by name, its task. Vectors: test_vectors.py."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.knowledge_concentration import (
    KnowledgeConcentrationLoss,
    SelfPace,
    StructurallyConnectedHead,
    grouped_linear,
    knowledge_concentration_loss,
    self_pace,
    specialist_targets,
    vertical_order,
)

F64 = torch.float64
SIZES = (3, 1, 4)
OFFSETS = (0, 3, 4)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch():
    x = random(5, 8).requires_grad_()
    probs = torch.rand(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x, probs, torch.tensor([2, 0, 1, 2, 0])


def dense_targets(probs, vertical, top_k):
    z = torch.zeros(len(probs), sum(SIZES), dtype=F64)
    for i, v in enumerate(vertical.tolist()):
        own = probs[i, : SIZES[v]].tolist()
        for j in sorted(range(len(own)), key=lambda j: (-own[j], j))[:top_k]:
            z[i, OFFSETS[v] + j] = own[j]
    return z


def scattered(index, value):
    z = torch.zeros(len(index), sum(SIZES), dtype=value.dtype)
    for i, k in (index >= 0).nonzero().tolist():
        z[i, index[i, k]] = value[i, k]
    return z


# ---------------------------------------------------------------- targets
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 100])
def test_targets_are_the_greatest_of_the_own_vertical(top_k):
    _, probs, vertical = batch()
    index, value = specialist_targets(probs, vertical, SIZES, top_k)
    assert index.shape == value.shape == (5, min(top_k, 4))
    assert torch.equal(scattered(index, value), dense_targets(probs, vertical, top_k))
    assert bool((value.diff() <= 0).all()) and torch.equal(index < 0, (index < 0) & (value == 0))
    assert (index[2] >= 0).sum() == 1  # a vertical of one class


def test_ties_go_to_the_lower_class_and_zeros_are_kept():
    probs = torch.tensor([[0.5, 0.7, 0.5, 0.5], [0.0, 0.0, 0.0, 0.9]])
    index, value = specialist_targets(probs, torch.tensor([2, 0]), SIZES, 3)
    assert index.tolist() == [[5, 4, 6], [0, 1, 2]]
    assert value.tolist() == [pytest.approx([0.7, 0.5, 0.5]), [0.0, 0.0, 0.0]]
    probs[1, 3] = math.nan  # a column that is not the row's: ignored
    assert torch.equal(specialist_targets(probs, torch.tensor([2, 0]), SIZES, 3)[0], index)


# ---------------------------------------------------------------- pace and loss
def test_pace_is_a_unit_vector_of_each_vertical_times_gamma():
    x, gamma = random(3, 8), torch.tensor([2.0, 0.5, 3.0], dtype=F64)
    y = self_pace(x, SIZES, gamma)
    for v, part in enumerate(y.split(SIZES, 1)):
        torch.testing.assert_close(part.norm(dim=1), gamma[v].expand(3))
        torch.testing.assert_close(part, gamma[v] * F.normalize(x.split(SIZES, 1)[v], dim=1))
    of_class = random(8, seed=3)
    torch.testing.assert_close(self_pace(x, SIZES, of_class), of_class * self_pace(x, SIZES, torch.ones(3, dtype=F64)))
    torch.testing.assert_close(self_pace(7 * x, SIZES, gamma), y)


def test_below_the_floor_the_norm_is_a_constant():
    x = torch.full((1, 8), 1e-14, dtype=F64, requires_grad=True)
    y = self_pace(x, SIZES, torch.ones(3, dtype=F64))
    torch.testing.assert_close(y, x.detach() / 1e-12)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((1, 8), 1e12, dtype=F64))
    zero = torch.zeros(1, 8, requires_grad=True)
    self_pace(zero, SIZES, torch.ones(3)).sum().backward()
    assert bool(zero.grad.isfinite().all())


@pytest.mark.parametrize("level", [None, 3, 8])
def test_loss_and_gradients_are_the_formulas(level):
    x, probs, vertical = batch()
    gamma = None if level is None else random(level, seed=2).abs().requires_grad_()
    loss, parts = knowledge_concentration_loss(x, probs, vertical, vertical_sizes=SIZES, gamma=gamma, top_k=2)
    z = dense_targets(probs, vertical, 2)
    y = x if gamma is None else self_pace(x, SIZES, gamma)
    p = torch.sigmoid(y)
    torch.testing.assert_close(loss, -(z * p.log() + (1 - z) * (1 - p).log()).sum(1).mean())
    torch.testing.assert_close(parts["kd"], loss.detach())
    g = ((p - z) / 5).detach()
    if gamma is None:
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], g)
        return
    grad_x, grad_gamma = torch.autograd.grad(loss, (x, gamma))
    wide = gamma.detach() if level == 8 else gamma.detach().repeat_interleave(torch.tensor(SIZES))
    want_gamma, start = [], 0
    for size in SIZES:
        cut = slice(start, start + size)
        n = x[:, cut].detach().norm(dim=1, keepdim=True)
        unit, gg = x[:, cut].detach() / n, wide[cut] * g[:, cut]
        torch.testing.assert_close(grad_x[:, cut], (gg - (gg * unit).sum(1, keepdim=True) * unit) / n)
        each = (g[:, cut] * unit).sum(0)
        want_gamma.append(each if level == 8 else each.sum(0, keepdim=True))
        start += size
    torch.testing.assert_close(grad_gamma, torch.cat(want_gamma))


def test_cached_targets_and_the_true_label():
    x, probs, vertical = batch()
    kept = specialist_targets(probs, vertical, SIZES, 2)
    options = {"vertical_sizes": SIZES, "top_k": 2}
    plain = knowledge_concentration_loss(x, probs, vertical, **options).loss
    assert torch.equal(plain, knowledge_concentration_loss(x, kept, vertical, **options).loss)
    labels = (random(5, 8, seed=4) > 0).to(F64)
    hard = F.binary_cross_entropy_with_logits(x, labels, reduction="none").sum(1).mean()
    mixed = knowledge_concentration_loss(x, kept, vertical, labels=labels, label_weight=0.25, **options)
    torch.testing.assert_close(mixed.loss, 0.75 * plain + 0.25 * hard)
    torch.testing.assert_close(mixed.parts["label"], hard.detach())
    alone = knowledge_concentration_loss(x, None, vertical, labels=labels, label_weight=1.0, **options)
    torch.testing.assert_close(alone.loss, hard)


def test_the_module_owns_its_gamma():
    torch.manual_seed(0)
    x, probs, vertical = batch()
    module = KnowledgeConcentrationLoss(SIZES, top_k=2).double()
    roots = torch.tensor(SIZES, dtype=F64).sqrt()
    drift = module.pace.gamma.detach() - roots
    assert drift.abs().max() < 6e-3 and drift.abs().min() > 0
    module(x, probs, vertical).loss.backward()
    assert module.pace.gamma.grad.abs().max() > 0
    want = knowledge_concentration_loss(x, probs, vertical, vertical_sizes=SIZES, gamma=module.pace.gamma, top_k=2)
    torch.testing.assert_close(module(x, probs, vertical).loss, want.loss)
    assert list(KnowledgeConcentrationLoss(SIZES, pace=None).parameters()) == []
    of_class = SelfPace(SIZES, level="class", start=10.0)
    assert of_class.gamma.shape == (8,) and (of_class.gamma - 10).abs().max() < 6e-3
    fixed = SelfPace(SIZES, fixed=True)
    assert torch.equal(fixed.gamma.double(), roots.float().double()) and not fixed.gamma.requires_grad


# ---------------------------------------------------------------- layers
@pytest.mark.parametrize(
    "layout, shared, count",
    [
        ("fc-fc", 0, lambda b, s1, s2, n, m, g: b * s1 + s1 * s2 + s2 * n),
        ("fc-sc", 0, lambda b, s1, s2, n, m, g: b * s1 + m * s1 * s2 + s2 * n),
        ("sc-sc", 0, lambda b, s1, s2, n, m, g: m * b * s1 + m * s1 * s2 + s2 * n),
        ("fc-sc", 2, lambda b, s1, s2, n, m, g: b * s1 + s1 * g + m * s1 * (s2 - g) + s2 * n),
        ("fc-sc", 5, lambda b, s1, s2, n, m, g: b * s1 + s1 * g + m * s1 * (s2 - g) + s2 * n),
    ],
)
def test_layouts_have_their_weights_and_compute_their_layers(layout, shared, count):
    torch.manual_seed(0)
    head = StructurallyConnectedHead(6, SIZES, first=4, hidden=5, shared_dim=shared, layout=layout).double()
    assert sum(w.numel() for w in head.weights.values()) == count(6, 4, 5, 8, 3, shared)
    h = random(2, 6)
    w, b, got, start = head.weights, head.biases, head(h), 0
    for v, size in enumerate(SIZES):
        first = (w["first"][v], b["first"][v]) if layout == "sc-sc" else (w["first"], b["first"])
        x = torch.relu(h @ first[0].T + first[1])
        parts = []
        if "common" in w:
            parts.append(torch.relu(x @ w["common"].T + b["common"]))
        if "private" in w:
            parts.append(torch.relu(x @ w["private"][v].T + b["private"][v]))
        cut = slice(start, start + size)
        want = torch.cat(parts, 1) @ w["out"][cut].T + b["out"][cut]
        torch.testing.assert_close(got[:, cut], want)
        start += size
    assert got.shape == (2, 8)


def test_grouped_linear_of_one_input_for_all():
    x, w, b = random(2, 3), [random(2, 3, seed=1), random(4, 3, seed=2)], [random(2, seed=3), random(4, seed=4)]
    torch.testing.assert_close(grouped_linear(x, w, b), F.linear(x, torch.cat(w), torch.cat(b)))


# ---------------------------------------------------------------- bad input
def test_bad_input():
    x, probs, vertical = batch()
    kept = specialist_targets(probs, vertical, SIZES, 2)

    def loss(x=x, teacher=probs, vertical=vertical, **options):
        return knowledge_concentration_loss(x, teacher, vertical, **{"vertical_sizes": SIZES, "top_k": 2} | options)

    outside, twice = kept[0].clone(), kept[0].clone()
    outside[0, 0], twice[0, 1] = 0, kept[0][0, 0]
    for call, message in (
        (lambda: loss(vertical_sizes=(3, 0, 5)), "vertical_sizes: expected .* none empty"),
        (lambda: loss(vertical_sizes=()), "vertical_sizes: expected at least one"),
        (lambda: loss(vertical_sizes=(3, 1)), r"logits: expected \[B, 4\]"),
        (lambda: loss(vertical=vertical + 1), r"vertical_index: expected verticals in \[0, 3\), got 1 to 3"),
        (lambda: loss(teacher=probs[:, :3]), "teacher_probs: expected the 4 classes of the row's vertical, got 3"),
        (lambda: loss(teacher=probs[:3]), r"teacher_probs: expected \[5, N_v\]"),
        (lambda: loss(teacher=probs * 9 - 4), "are these raw logits"),
        (lambda: loss(top_k=0), "top_k: expected"),
        (lambda: loss(vertical=vertical[:1], label_weight=1.0, labels=torch.zeros_like(x)), r"vertical_index: expected \[5\]"),
        (lambda: loss(teacher=(outside, kept[1])), "index outside it"),
        (lambda: loss(teacher=(twice, kept[1])), "each class once"),
        (lambda: loss(gamma=torch.ones(4)), "gamma: expected 3 numbers, of verticals, or 8, of classes"),
        (lambda: loss(x=x * math.nan), "logits: expected finite"),
        (lambda: loss(x=x[:0], teacher=probs[:0], vertical=vertical[:0]), "got an empty batch"),
        (lambda: loss(label_weight=0.5), "labels: expected multi-hot labels"),
        (lambda: vertical_order([[0, 1], [1, 2]]), "verticals: expected every class"),
        (lambda: vertical_order([[0, 1], [3]]), "verticals: expected every class"),
        (lambda: vertical_order([[0], []]), "none empty"),
        (lambda: StructurallyConnectedHead(4, SIZES, hidden=5, shared_dim=6), "shared_dim: expected 0 to 5"),
        (lambda: StructurallyConnectedHead(4, SIZES, hidden=5, shared_dim=2, layout="sc-sc"), "shared_dim: expected"),
        (lambda: StructurallyConnectedHead(4, SIZES, layout="dense"), "layout: expected one of"),
        (lambda: SelfPace(SIZES, level="image"), "level: expected one of"),
        (lambda: methods.load("knowledge_concentration")(vertical_sizes=SIZES, pace="all"), "level: expected one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- by name, its task, its experiment
def test_by_name_the_head_is_replaced_and_the_loss_is_that_of_the_own_specialist():
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from kdfast.data.digit_tree import SIZES as SIXTEEN
    from kdfast.data.digit_tree import Base, Specialists, tree_splits
    from kdfast.train import Distiller

    torch.manual_seed(0)
    teacher = Specialists()
    options = {"vertical_sizes": SIXTEEN, "first": 8, "hidden": 6}
    run = Distiller(Base(), teacher, "knowledge_concentration", options=options, progress=False)
    head, pace = run.student.head
    assert isinstance(head, StructurallyConnectedHead) and isinstance(pace, SelfPace)
    rows = tree_splits(0)["student"].__getitems__(list(range(12)))
    seen = []
    for v, one in enumerate(teacher.each):
        one.register_forward_hook(lambda _, inputs, __, v=v: seen.append((v, len(inputs[0]))))
    out = run.loss(rows)
    assert [count for _, count in seen] == rows["vertical"].bincount(minlength=3).tolist()  # each image once
    width = max(SIXTEEN)
    probs = torch.zeros(12, width)
    for i, v in enumerate(rows["vertical"].tolist()):
        probs[i, : SIXTEEN[v]] = torch.sigmoid(teacher.each[v](rows["images"][i]))
    raw = head(rows["images"])
    want = knowledge_concentration_loss(raw, probs, rows["vertical"], vertical_sizes=SIXTEEN, gamma=pace.gamma)
    torch.testing.assert_close(out.loss, want.loss)
    out.loss.backward()
    assert pace.gamma.grad.abs().max() > 0 and all(p.grad is None for p in teacher.parameters())
    hard = Distiller(
        Base(), teacher, "knowledge_concentration", options=options | {"label_weight": 1.0, "pace": None}, progress=False
    )  # fmt: skip
    got = hard.loss(rows).loss
    want = F.binary_cross_entropy_with_logits(hard.student(rows["images"]), rows["labels"], reduction="none").sum(1)
    torch.testing.assert_close(got, want.mean())


def test_the_task_is_the_tree_that_it_says():
    pytest.importorskip("sklearn")
    from kdfast.data.digit_tree import TREE, tree_labels, tree_precision, tree_splits

    vertical, labels = tree_labels(torch.arange(10))
    assert vertical.tolist() == [0, 1, 2, 2, 2, 2, 0, 1, 0, 0] and labels.shape == (10, 16)
    assert labels[6].nonzero().flatten().tolist() == [1, 4, 5]  # itself, loop, even
    assert labels[9].nonzero().flatten().tolist() == [3, 4]
    assert labels[7].nonzero().flatten().tolist() == [7, 8]
    assert labels[4].nonzero().flatten().tolist() == [11, 13, 14]
    splits = tree_splits(3)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "teacher": 1000,
        "student": 300,
        "val": 97,
        "test": 700,
    }
    noisy, clean = splits["teacher"].tensors, tree_splits(3, noise=0.0)["teacher"].tensors
    assert torch.equal(noisy["vertical"], clean["vertical"]) and torch.equal(noisy["images"], clean["images"])
    assert (noisy["labels"] != clean["labels"]).any(1).sum() == 300
    rows = splits["student"].tensors
    for i in (0, 7, 299):  # the student's labels are those of the specialists
        where = (noisy["images"] == rows["images"][i]).all(1).nonzero().flatten()
        assert any(torch.equal(noisy["labels"][j], rows["labels"][i]) for j in where.tolist())
    test = splits["test"].tensors["labels"]
    assert tree_precision(test, test) == 1.0 and tree_precision(-test, test) < 0.5
    assert [len(digits) for digits, _ in TREE] == [4, 2, 4]


def test_a_task_with_a_loss_of_its_own_learns_labels_by_it_and_has_no_plain_kd():
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from kdfast.data import load_task
    from kdfast.experiment import Labels, arms_of
    from kdfast.methods import Context

    task = load_task("digit_tree")
    assert [arm.name for arm in arms_of(task, "knowledge_concentration", {})] == ["ce", "knowledge_concentration"]
    x, z = random(3, 16), (random(3, 16, seed=1) > 0).to(F64)
    want = F.binary_cross_entropy_with_logits(x, z, reduction="none").sum(1).mean()
    torch.testing.assert_close(Labels(loss=task.loss)(Context(x, labels=z)).loss, want)


def test_experiment_runs_all_arms_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from benchmarks.experiments.knowledge_concentration import ARMS, CLAIMS, run
    from kdfast.data import load_task

    task = dataclasses.replace(load_task("digit_tree"), teacher_steps=4, eval_every=4)
    out, work = tmp_path / "kc.json", tmp_path / "work"
    results = run(out, seeds=1, steps=4, task=task, work=work)
    assert results["arms"].keys() == {"teacher", *(arm.name for arm in ARMS)}
    assert len(results["sentences"]) == len(CLAIMS) and results["score"] == "mean average precision"
    assert run(out, seeds=1, work=tmp_path / "nothing") == json.loads(out.read_text())


def test_specialists_are_independent():
    pytest.importorskip("sklearn")
    from kdfast.data.digit_tree import Specialists
    from kdfast.losses import multi_label_loss

    torch.manual_seed(0)
    model, images = Specialists(), torch.randn(5, 64)
    logits = model(images, torch.tensor([0, 1, 1, 0, 0]))
    assert bool((torch.sigmoid(logits[0, 6:]) == 0).all()) and bool((logits[1, :6] < -9e3).all())
    multi_label_loss(logits, torch.zeros(5, 16)).backward()
    grads = [sum(p.grad.abs().sum() for p in one.parameters() if p.grad is not None) for one in model.each]
    assert grads[0] > 0 and grads[1] > 0 and grads[2] == 0
    assert isinstance(model.each[2], nn.Sequential)
