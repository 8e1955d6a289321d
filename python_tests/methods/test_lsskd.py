"""lsskd: the terms written out, who teaches whom, earlier predictions from snapshot and table, branches that stay outside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.methods.lsskd import (
    Branch,
    class_logits,
    ensemble_probs,
    joint_labels,
    lsskd_alpha,
    lsskd_loss,
    rotation_expand,
    soft_label_cross_entropy,
    soft_targets,
)

F64 = torch.float64
C, M, L, B = 3, 4, 3, 2


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    z = random(B, C).requires_grad_()
    q = [random(B * M, C * M).requires_grad_() for _ in range(L)]
    f = [random(B * M, 5).requires_grad_() for _ in range(L)]
    before = F.softmax(random(B, C), -1), [F.softmax(random(B * M, C * M), -1) for _ in range(L)]
    return z, q, f, torch.tensor([2, 0]), before


def kl(p, q):
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("teacher", ["deepest", "next", "main"])
def test_the_total_written_out(teacher):
    z, q, f, y, (pz, pq) = tensors()
    options = {"alpha": 0.3, "temperature": 2.0, "kl_weight": 0.5, "feature_weight": 0.1, "teacher": teacher}
    loss, parts = lsskd_loss(z, q, f, y, pz, pq, **options)
    joint = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3])
    g = 0.7 * F.one_hot(y, C) + 0.3 * pz
    label = -(g * F.log_softmax(z, -1)).sum(-1).mean()
    branch = sum(
        -((0.7 * F.one_hot(joint, C * M) + 0.3 * p) * F.log_softmax(x, -1)).sum(-1).mean() for p, x in zip(pq, q)
    )
    soft = [F.softmax(x / 2, -1) for x in q]
    if teacher == "main":
        t = F.softmax(z / 2, -1).detach().repeat_interleave(M, 0)
        transfer = 4 * sum(kl(t, x.reshape(B * M, C, M).sum(-1)) for x in soft)
    else:
        transfer = 4 * sum(kl((soft[i + 1] if teacher == "next" else soft[-1]).detach(), soft[i]) for i in range(L - 1))
    distance = sum((f[i] - f[-1].detach()).square().sum(1).mean() for i in range(L - 1))
    want = label + branch + 0.5 * transfer + 0.1 * distance
    torch.testing.assert_close(loss, want)
    leaves = (z, *q, *f[:-1])
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(want, leaves))
    assert torch.autograd.grad(loss, f[-1], allow_unused=True) == (None,)  # the deepest feature only teaches
    for name, value in (("label_ce", label), ("branch_ce", branch), ("branch_kl", transfer), ("feature_l2", distance)):
        torch.testing.assert_close(parts[name], value.detach())


def test_ignored_images_leave_every_term_with_their_copies():
    z, q, f, _, (pz, pq) = tensors()
    got = lsskd_loss(z, q, f, torch.tensor([-100, 1]), pz, pq, alpha=0.3)
    want = lsskd_loss(
        z[1:], [x[M:] for x in q], [x[M:] for x in f], torch.tensor([1]), pz[1:], [p[M:] for p in pq], alpha=0.3
    )
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.parts, want.parts)


def test_soft_labels_are_never_built_but_are_the_same():
    z, _, _, y, (pz, _) = tensors()
    want = F.cross_entropy(z, soft_targets(y, pz, 0.4))
    torch.testing.assert_close(soft_label_cross_entropy(z, y, pz, 0.4), want)
    torch.testing.assert_close(soft_label_cross_entropy(z, y, None, 0.0), F.cross_entropy(z, y))


def test_joint_labels_turns_and_read_out():
    assert joint_labels(torch.tensor([1, -100], dtype=torch.int8), 2).tolist() == [2, 3, -100, -100]
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    turned, joint = rotation_expand(x, torch.tensor([2]))
    assert joint.tolist() == [8, 9, 10, 11] and torch.equal(turned[0], x[0])
    assert turned[1, 0].tolist() == [[2, 5, 8], [1, 4, 7], [0, 3, 6]]  # counter-clockwise
    with pytest.raises(ValueError, match="square images"):
        rotation_expand(x[..., :2], torch.tensor([2]))
    q = torch.arange(8.0).reshape(2, 4)
    assert class_logits(q, 2).tolist() == [[1, 5], [9, 13]]
    assert class_logits(q, 2, copies=2).tolist() == [[5, 9]]
    soft = class_logits(q, 2, softmax=True)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2))
    probs = ensemble_probs(torch.zeros(1, 2), [q[:2]], num_transforms=2)
    torch.testing.assert_close(probs, (torch.full((1, 2), 0.5) + soft.mean(0)) / 2)
    with pytest.raises(ValueError, match=r"joint: expected \[rows, 3 M\]"):
        class_logits(q, 3)


def test_bad_input():
    z, q, f, y, (pz, pq) = tensors()
    good = (z, q, f, y, pz, pq)
    for place, value, options, message in (
        (1, [x[:, :9] for x in q], {}, r"branch_logits: expected \[8, 12\] for 4 transformations"),
        (1, [x[:7] for x in q], {}, "branch_logits: expected"),
        (4, None, {"alpha": 0.3}, "previous: expected predictions of the previous epoch for alpha = 0.3"),
        (5, None, {"alpha": 0.3}, "previous_branches: expected 3 predictions"),
        (4, 2 * pz, {"alpha": 0.3}, "previous: expected rows that sum to 1"),
        (4, pz[:, :2], {"alpha": 0.3}, "previous: expected shape"),
        (0, z, {"alpha": 1.0}, r"alpha: expected a number in \[0, 1\)"),
        (0, z, {"temperature": 0.0}, "temperature: expected"),
        (0, z, {"teacher": "all"}, "teacher: expected one of"),
        (2, [f[0][:, :3], *f[1:]], {}, r"\(give maps\), got \(8, 3\) for branch 1"),
        (3, y + 3, {}, r"labels: expected integers in \[0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lsskd_loss(*[value if i == place else one for i, one in enumerate(good)], **{"alpha": 0.1} | options)
    with pytest.warns(UserWarning, match="one branch has nobody to learn from"):
        lone = lsskd_loss(z, q[:1], f[:1], y, alpha=0.0)
    assert lone.parts["branch_kl"] == 0
    first = lsskd_loss(z, q, f, y, alpha=0.0)  # the first epoch has no earlier predictions
    mapped = lsskd_loss(z, q, [f[0][:, :3], *f[1:]], y, alpha=0.0, maps=[lambda x: F.pad(x, (0, 2)), lambda x: x])
    assert first.loss.isfinite() and mapped.parts["feature_l2"] != first.parts["feature_l2"]


def test_growth_of_alpha():
    assert [round(lsskd_alpha(e, 5, 0.5), 3) for e in range(7)] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]


def test_branches_end_alike():
    x = [torch.randn(2, c, s, s) for c, s in ((8, 8), (16, 4), (32, 2))]
    for level, maps in enumerate(x):
        logits, pooled, last = Branch((8, 16, 32)[level:], 12)(maps)
        assert logits.shape == (2, 12) and pooled.shape == (2, 32) and last.shape == (2, 32, 2, 2)


# ---------------------------------------------------------------- by name
class Net(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.stage1 = nn.Conv2d(1, 2, 3, padding=1)
        self.stage2 = nn.Sequential(nn.Conv2d(2, 3, 3, 2, padding=1), nn.BatchNorm2d(3))
        self.stage3 = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C))


WIDTHS = {"stage1": (2, 0), "stage2": (3, 0), "stage3": (4, 0)}


def distiller(out=None, **options):
    from kdfast.train import Distiller

    torch.manual_seed(0)
    capture = {name: (name, None) for name in WIDTHS}
    return Distiller(
        Net(), None, "lsskd", options={"num_classes": C} | options, widths=WIDTHS, capture=capture, out=out, progress=False
    )  # fmt: skip


def data(rows=12):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % C, torch.arange(rows))


def test_by_name_the_snapshot_is_the_network_of_the_previous_epoch():
    pytest.importorskip("accelerate")
    run = distiller(epochs=3, alpha=0.6)
    plain = {name: value.shape for name, value in Net().state_dict().items()}
    seen = []
    original = run.method._predict
    run.method._predict = lambda batch: (
        seen.append((run.step, run.method.previous["student"].stage1.weight.clone())) or original(batch)
    )
    weights = []
    after = run.method.after_step
    run.method.after_step = lambda s, t, step: weights.append(s.stage1.weight.detach().clone()) or after(s, t, step)
    run.fit(DataLoader(data(), 4), 3)
    assert [step for step, _ in seen] == [3, 4, 5, 6, 7, 8]  # none in the first epoch
    for step, snapshot in seen:
        assert torch.equal(snapshot, weights[step // 3 * 3 - 1])
    assert {name: value.shape for name, value in run.deploy().state_dict().items()} == plain
    assert not any(p.requires_grad for p in run.method.previous.parameters())


def test_by_name_the_loss_is_that_of_the_turned_batch():
    pytest.importorskip("accelerate")
    run = distiller(steps_per_epoch=5, epochs=10, alpha=0.5, growth="linear")
    run.net.eval()
    x, y, _ = (one[:4] for one in data().tensors)
    run.step = 20  # epoch 4: alpha 0.2
    got = run.loss((x, y))
    turned, joint = rotation_expand(x, y)
    student = run.student
    maps = [student.stage1(turned)]
    maps += [student.stage2(maps[0])]
    maps += [student.stage3(maps[1])]
    out = [branch(m) for branch, m in zip(run.method.branches, maps)]
    z, q, f = student.head(maps[2])[::4], [one[0] for one in out], [one[1] for one in out]
    # before the first epoch ends the snapshot is the network itself
    before = F.softmax(z, -1).detach(), [F.softmax(x, -1).detach() for x in q]
    want = lsskd_loss(z, q, f, joint[::4] // 4, *before, alpha=0.2)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.parts, want.parts)
    mapping = run.loss({"input": x, "labels": y})
    torch.testing.assert_close(mapping.loss, want.loss)


def test_by_name_the_table_holds_what_was_predicted_last():
    pytest.importorskip("accelerate")
    run = distiller(memory="table", samples=12, steps_per_epoch=1, epochs=10, alpha=0.5, growth="constant")
    run.net.eval()
    x, y, index = (one[:4] for one in data().tensors)
    hard = run.loss((x, y, index))  # nothing seen: hard labels
    assert run.method.tables[0].seen.sum() == 4
    run.step = 1
    softened = run.loss((x, y, index))
    z = run.student(x)
    torch.testing.assert_close(run.method.tables[0].values[:4, 0], F.softmax(z, -1).detach())
    g = 0.5 * F.one_hot(y, C) + 0.5 * F.softmax(z, -1).detach()
    torch.testing.assert_close(softened.parts["label_ce"], F.cross_entropy(z, g).detach())
    assert (hard.parts["label_ce"] - softened.parts["label_ce"]).abs() > 1e-4
    unseen = run.loss((data().tensors[0][4:8], data().tensors[1][4:8], torch.arange(4, 8)))
    torch.testing.assert_close(
        unseen.parts["label_ce"], F.cross_entropy(run.student(data().tensors[0][4:8]), data().tensors[1][4:8]).detach()
    )
    for table in run.method.tables[1:]:
        torch.testing.assert_close(table.values[:8].sum(-1), torch.ones(8, 4))


def test_by_name_the_greatest_of_all_are_the_whole_table():
    pytest.importorskip("accelerate")
    found = {}
    for memory, kept in (("table", 20), ("topk", 20), ("topk", 1)):
        run = distiller(
            memory=memory, kept=kept, samples=12, steps_per_epoch=1, epochs=10, alpha=0.5, growth="constant"
        )
        run.net.eval()
        batch = [one[:4] for one in data().tensors]
        run.loss(batch)
        run.step = 1
        found[memory, kept] = run.loss(batch).loss
    torch.testing.assert_close(found["topk", 20], found["table", 20])  # 20 are more than there are classes
    assert (found["topk", 1] - found["table", 20]).abs() > 1e-4


def test_by_name_without_branches_nothing_is_turned():
    pytest.importorskip("accelerate")
    run = distiller(branches=False)
    x, y, _ = (one[:4] for one in data().tensors)
    assert run.method.prepare((x, y)) == (x, y) and not list(run.method.branches.parameters())
    got = run.loss((x, y))
    torch.testing.assert_close(got.loss, got.parts["label_ce"])


def test_bad_options_are_refused_when_bound():
    for options in (
        {"alpha": 1.0}, {"teacher": "all"}, {"memory": "disk"}, {"growth": "fast"}, {"feature": "x"}, {"epochs": 0},
        {"memory": "table", "samples": 0}, {"kl_weight": -1.0}, {"kept": 0, "memory": "topk", "samples": 4},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="samples" if options.get("samples") == 0 else next(iter(options))):
            methods.load("lsskd")(WIDTHS, num_classes=C, **options)
