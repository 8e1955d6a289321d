"""SinKD: the written-out total, annealing, regression, clouds, the sequence form against a loop, by name."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.losses import sinkhorn_kd_loss
from kdfast.methods.sinkd import annealed_temperature, multi_level_ot_loss, sinkd_total, sorted_answers


def logits(*shape):
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_total_is_the_written_out_formula():
    student, teacher = logits(6, 4)
    labels = torch.tensor([0, 3, 2, 1, 1, 0])
    loss, parts = sinkd_total(student, teacher, labels, alpha=0.7, beta=0.5, kd_temperature=3.0, scale=0.01)
    ce = F.cross_entropy(student, labels)
    kd = -(F.softmax(teacher / 3, -1) * F.log_softmax(student / 3, -1)).sum(-1).mean()
    w = torch.cdist(F.softmax(student / 2, -1), F.softmax(teacher / 2, -1), p=1)
    x = torch.exp(-w / 0.1)
    for _ in range(20):
        x = x / x.sum(1, keepdim=True)
        x = x / x.sum(0, keepdim=True)
    sink = 0.01 * (x * w).sum()
    want = 0.3 * ce + 0.7 * kd + 0.5 * sink
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))
    for name, value in (("ce", ce), ("kd", kd), ("sinkhorn", sink)):
        torch.testing.assert_close(parts[name], value.detach())


def test_annealing_follows_the_epochs():
    assert [annealed_temperature(4.0, e, 4) for e in range(4)] == [4.0, 3.0, 2.0, 1.0]
    assert annealed_temperature(4.0, 0, 1) == 4.0
    student, teacher = logits(5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    options = {"kd_temperature": 4.0, "total_steps": 40}
    for step, temperature in ((0, 4.0), (9, 4.0), (10, 3.0), (39, 1.0), (40, 1.0)):
        got = sinkd_total(student, teacher, labels, anneal_epochs=4, step=step, **options).loss
        want = sinkd_total(student, teacher, labels, kd_temperature=temperature).loss
        torch.testing.assert_close(got, want)
    fixed = sinkd_total(student, teacher, labels, step=39, **options).loss
    assert (fixed - want).abs() > 1e-3


def test_regression():
    student, teacher = logits(7, 1)
    labels = torch.linspace(0, 5, 7, dtype=torch.float64)
    loss, parts = sinkd_total(student, teacher, labels, task="regression", alpha=0.6, kd_temperature=2.0)
    want = 0.4 * F.mse_loss(student[:, 0], labels) + 0.6 * F.mse_loss(student / 2, teacher / 2)
    torch.testing.assert_close(loss, want)  # with one output the softmax is 1: no cost
    assert parts["sinkhorn"] == 0


@pytest.mark.parametrize("cloud", ["batch", "sequence"])
@pytest.mark.parametrize("dim", [-1, 1])
def test_clouds_and_ignored_tokens(cloud, dim):
    student, teacher = logits(3, 5, 4)
    labels = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 3:], labels[2, 1] = -100, -100
    moved = [x.movedim(-1, dim) for x in (student, teacher)]
    loss, parts = sinkd_total(*moved, labels, cloud=cloud, dim=dim)
    keep = labels != -100
    if cloud == "batch":
        want = sinkhorn_kd_loss(student[keep], teacher[keep])
    else:
        want = sum(sinkhorn_kd_loss(student[i][keep[i]], teacher[i][keep[i]]) for i in range(3))
    torch.testing.assert_close(parts["sinkhorn"], want.detach())
    kd = -(F.softmax(teacher[keep] / 2, -1) * F.log_softmax(student[keep] / 2, -1)).sum(-1).mean()
    torch.testing.assert_close(parts["kd"], kd.detach())
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad[~keep] == 0).all() and (grad[keep] != 0).any()


def test_sequence_form_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 8, 9, generator=generator, dtype=torch.float64)
    mask_s = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    mask_t = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    loss, parts = multi_level_ot_loss(student, teacher, mask_s, mask_t, top_k=8)

    def table(z, mask, length):
        rows = torch.zeros(3, length, z.shape[-1], dtype=torch.float64)
        for b in range(3):
            answer = z[b][mask[b]]
            rows[b, : len(answer)] = torch.softmax(answer / (answer.std(-1, keepdim=True) + 1e-4), -1)
        rows = rows[..., rows.detach().sum((0, 1)).argsort(descending=True)]
        return F.pad(rows, (0, 8))[..., :8]

    s, q = table(student, mask_s, 5), table(teacher, mask_t, 5)
    absolute = sum(
        (s[b] - q[b]).abs().sum(-1)[: min(int(mask_s[b].sum()), int(mask_t[b].sum()))].mean() for b in range(3)
    )
    logit = -(torch.softmax(s, -1) * torch.log_softmax(q, -1)).sum(-1).mean()
    sink = 0.0
    for b in range(3):
        w = torch.cdist(torch.softmax(q[b] / 2, -1), torch.softmax(s[b] / 2, -1), p=1)
        x = torch.exp(-w / 0.1)
        for _ in range(10):
            x = x / x.sum(1, keepdim=True)
            x = x / x.sum(0, keepdim=True)
        sink = sink + 1e-3 * (x * w).sum()
    want = 1.5 * (absolute / 3 + 0.1 * logit + 0.1 * sink)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))
    torch.testing.assert_close(parts["absolute"], (absolute / 3).detach())
    assert sorted_answers(student, mask_s, 5, 20).shape == (3, 5, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cloud": "tokens"}, "cloud: expected one of batch, sequence"),
        ({"task": "ranking"}, "task: expected one of"),
        ({"alpha": 1.5}, "alpha: expected a finite number"),
        ({"kd_temperature": 0.0}, "kd_temperature: expected a finite number"),
        ({"anneal_epochs": 0}, "anneal_epochs: expected an int >= 1"),
    ],
    ids=str,
)
def test_bad_options(change, message):
    student, teacher = logits(4, 3)
    with pytest.raises(ValueError, match=message):
        sinkd_total(student, teacher, torch.zeros(4, dtype=torch.long), **change)


def test_sequence_form_bad_input():
    student, teacher, mask = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3).bool()
    for arguments, message in (
        ((student[0], teacher, mask, mask), "student: expected logits"),
        ((student, teacher, mask.float(), mask), "student_mask: expected bool"),
        ((student, teacher[:1], mask, mask[:1]), "teacher: expected the batch of student"),
        ((student[:0], teacher[:0], mask[:0], mask[:0]), "student: expected logits .* of a sequence"),
        ((student, teacher[..., :1], mask, mask), "teacher: expected logits .* two classes"),
        ((student.to("meta"), teacher, mask, mask), "student, student_mask: expected them on meta, got meta and cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_level_ot_loss(*arguments)
    with pytest.raises(TypeError, match="teacher: expected float16"):
        multi_level_ot_loss(student, teacher.long(), mask, mask)
    for name, value in (
        ("top_k", 0), ("length", 0), ("student_temperature", 0.0), ("teacher_temperature", -1.0), ("temperature", 0.0),
        ("epsilon", 0.0), ("n_iters", 0), ("scale", math.inf), ("weight", math.nan), ("logit_weight", math.nan),
        ("sinkhorn_weight", math.inf),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            multi_level_ot_loss(student, teacher, mask, mask, **{name: value})


def test_sequence_form_cuts_answers_and_reads_no_other_row():
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    short = mask & (torch.arange(6) < 4)  # the answers' first three rows
    cut = multi_level_ot_loss(student, teacher, mask, mask, top_k=5, length=3)
    want = multi_level_ot_loss(student, teacher, short, short, top_k=5)
    for name, value in want.parts.items():
        torch.testing.assert_close(cut.parts[name], value)
    assert (
        cut.parts["absolute"] - multi_level_ot_loss(student, teacher, mask, mask, top_k=5).parts["absolute"]
    ).abs() > 1e-3
    broken = student.masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    loss = multi_level_ot_loss(broken, teacher.masked_fill(~mask.unsqueeze(-1), math.inf), mask, mask, top_k=5).loss
    torch.testing.assert_close(loss, multi_level_ot_loss(student, teacher, mask, mask, top_k=5).loss)
    (grad,) = torch.autograd.grad(loss, broken)
    assert (grad[~mask] == 0).all() and (grad[mask].abs().amax(-1) > 0).all()


def test_by_name():
    student, teacher = logits(5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    method = pickle.loads(pickle.dumps(methods.load("sinkd")(alpha=0.5, anneal_epochs=2)))
    loss, parts = method(methods.Context(student, teacher, labels, step=30, total_steps=40))
    want = sinkd_total(student, teacher, labels, alpha=0.5, kd_temperature=1.0)
    torch.testing.assert_close(loss, want.loss)
    assert set(parts) == {"ce", "kd", "sinkhorn"} and not any(p.requires_grad for p in parts.values())
