"""KD^3: selection, weights, contrast and mixed statistics by hand; the module; one batch of the method; selection by epoch; experiment."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.data.confidence import adaptive_confidence, teacher_share
from kdfast.data.mixing import draw_mix_distribution, mix_distribution
from kdfast.methods.kd3 import feature_weights, nt_xent_loss, weighted_feature_loss
from kdfast.nn.transfer import ReusedClassifier, TransferModule, match_height

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- selection
def test_selection_against_a_loop():
    t, s = 3 * random(200, 4), 3 * random(200, 4, seed=1)
    t[:, 3] = s[:, 3] = -50.0  # a class never predicted
    found = adaptive_confidence(t, s, 0.7, cutoff=0.9)
    q = (0.7 * t + 0.3 * s).softmax(1)
    counts = [int((q.argmax(1) == c).sum()) for c in range(4)]
    threshold = [0.9 * (n / max(counts)) / (2 - n / max(counts)) for n in counts]
    kept = [i for i in range(200) if q[i].max() > threshold[int(q[i].argmax())]]
    assert found.rows.tolist() == kept and 0 < len(kept) < 200
    torch.testing.assert_close(found.threshold, torch.tensor(threshold, dtype=F64))
    assert found.threshold[3] == 0 and found.threshold.max() == 0.9 and torch.equal(found.pseudo_label, q.argmax(1))


def test_share_of_the_teacher_falls_then_jumps_to_zero():
    shares = [teacher_share(e) for e in range(1, 150)]
    assert all(a > b for a, b in itertools.pairwise(shares[:119])) and shares[118] == pytest.approx(0.268384371)
    assert shares[119:] == [0.0] * 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaptive_confidence(torch.zeros(0, 3), torch.zeros(0, 3), 0.5), "teacher: expected a pool"),
        (lambda: adaptive_confidence(torch.zeros(2, 3), torch.zeros(2, 4), 0.5), "student: expected logits"),
        (lambda: adaptive_confidence(torch.zeros(2, 3), torch.zeros(2, 3), 0.5, cutoff=0.0), "cutoff: expected a finite"),
        (lambda: adaptive_confidence(torch.zeros(2, 3), torch.zeros(2, 3), 1.5), "share: expected a finite"),
        (lambda: weighted_feature_loss(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1), random(2, 3), random(2, 3)), "teacher: expected maps"),
        (lambda: feature_weights(random(2, 3), random(2, 4)), "teacher_logits: expected"),
        (lambda: nt_xent_loss(random(2, 3), random(3, 3)), "other: expected"),
        (lambda: nt_xent_loss(random(2, 3), random(2, 3), temperature=0.0), "tau: expected a finite"),
        (lambda: mix_distribution(random(2, 1, 1, 1), torch.ones(2), torch.arange(2)), "more than one pixel"),
        (lambda: mix_distribution(random(2, 1, 2, 2), torch.tensor([0.0, 1.5]), torch.arange(2)), "lam: expected shares"),
        (lambda: mix_distribution(random(2, 1, 2, 2), torch.ones(2), torch.tensor([0, 0])), "perm: expected a permutation"),
        (lambda: TransferModule(4, 5, 2), "factor: expected a divisor of the teacher's 5 channels, got 2"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the terms
def test_weighted_features():
    s, t = random(3, 2, 4, 4).requires_grad_(), random(3, 2, 4, 4, seed=1)
    zs, zt = random(3, 5, seed=2).requires_grad_(), random(3, 5, seed=3)
    w = torch.sigmoid((zs - zt + 1e-6).norm(dim=1)).detach()
    want = (w.view(3, 1, 1, 1) * (s - t) ** 2).mean()
    loss = weighted_feature_loss(s, t, zs, zt)
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(loss, (s, zs), allow_unused=True)
    torch.testing.assert_close(grads[0], torch.autograd.grad(want, s)[0])
    assert grads[1] is None
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(
        weighted_feature_loss(s, t, zs, zt, mask=mask), (w.view(3, 1, 1, 1) * (s - t) ** 2)[mask].mean()
    )
    assert weighted_feature_loss(s, t, zs, zt, mask=mask & False) == 0


def test_contrast_against_a_loop_and_one_row():
    z, other = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    rows = F.normalize(torch.cat((z, other)), dim=1)
    similar = rows @ rows.T / 0.3
    terms = []
    for k in range(8):
        others = [j for j in range(8) if j != k]
        terms.append(similar[k, others].logsumexp(0) - similar[k, (k + 4) % 8])
    loss = nt_xent_loss(z, other)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss, (z, other), retain_graph=True),
        torch.autograd.grad(torch.stack(terms).mean(), (z, other)),
    )
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(nt_xent_loss(z, other, keep=keep), nt_xent_loss(z[keep], other[keep]))
    with pytest.warns(UserWarning, match="one row has nothing"):
        assert nt_xent_loss(z[:1], other[:1]).abs() < 1e-12
    assert nt_xent_loss(z, other, keep=keep[:0]) == 0
    assert nt_xent_loss(z, other, temperature=1e-3).isfinite()


def test_mixed_statistics_are_those_of_both():
    images, perm = random(3, 2, 4, 5), torch.tensor([1, 2, 0])
    torch.testing.assert_close(mix_distribution(images, torch.ones(3, dtype=F64), perm), images)
    got = mix_distribution(images, torch.zeros(3, dtype=F64), perm, eps=0.0)
    torch.testing.assert_close(got.mean((2, 3)), images[perm].mean((2, 3)))
    torch.testing.assert_close(got.var((2, 3)), images[perm].var((2, 3)))
    half = mix_distribution(images, torch.full((3,), 0.5, dtype=F64), perm, eps=0.0)
    torch.testing.assert_close(half.std((2, 3)), (images.std((2, 3)) + images[perm].std((2, 3))) / 2)
    lam, order = draw_mix_distribution(500)
    assert ((lam < 0.05) | (lam > 0.95)).float().mean() > 0.6 and torch.equal(order.sort().values, torch.arange(500))


def test_transfer_and_height():
    torch.manual_seed(0)
    module = TransferModule(3, 8, 4)
    assert module(torch.randn(2, 3, 5, 5)).shape == (2, 8, 5, 5)
    assert [m.kernel_size[0] for m in module.modules() if isinstance(m, nn.Conv2d)] == [1, 3, 1]
    assert all(m.bias is None for m in module.modules() if isinstance(m, nn.Conv2d))
    a, b = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)
    s, t = match_height(a, b)
    torch.testing.assert_close(s, F.avg_pool2d(a, 2))
    assert t is b and match_height(b, a)[1].shape[2:] == (4, 4)


# ---------------------------------------------------------------- the method
def example(cutoff=0.95, rows=6):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    teacher[3].weight.data.mul_(20)  # sure of something
    method = methods.load("kd3")({"tokens": (2, 4)}, epochs=10, max_epoch=5, scale=7, cutoff=cutoff)
    images = torch.randn(rows, 1, 4, 4)
    student = nn.Conv2d(1, 2, 3, padding=1)

    def sweep(split, plain):
        assert plain
        for index in torch.arange(rows).split(4):
            x = images[index]
            yield methods.Context(
                None, teacher(x), None, (x, torch.zeros(len(x)), index), student_features={"tokens": student(x)},
                teacher_features={"tokens": teacher[0](x)},
            )  # fmt: skip

    method.start(methods.Setup(student, teacher, sweep))
    return method, student, teacher, images


def context(method, student, teacher, images, step=0):
    torch.manual_seed(1)
    x, labels, index = method.prepare((images, torch.zeros(len(images)), torch.arange(len(images))))
    maps = student(x)
    return methods.Context(
        maps.mean((2, 3)), teacher(x).detach(), labels, (x, labels, index), step=step, total_steps=100,
        student_features={"tokens": maps}, teacher_features={"tokens": teacher[0](x).detach()},
    )  # fmt: skip


def test_one_batch_of_the_method():
    method, student, teacher, images = example(cutoff=None)
    method.eval()
    c = context(method, student, teacher, images)
    assert len(c.batch[0]) == 12 and torch.equal(c.batch[0][:6], images)
    s, t = c.student_features["tokens"], c.teacher_features["tokens"]
    after = method.transfer(s[:6])
    logits = teacher[3](after.mean((2, 3)))
    want = weighted_feature_loss(after, t[:6], logits, c.teacher[:6])
    for embed, maps in ((method.embed_student, s), (method.embed_teacher, t)):
        z = F.normalize(embed.linear(maps.mean((2, 3))), dim=1)
        want = want + 0.001 * nt_xent_loss(z[:6], z[6:])
    loss, parts = method(c)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in (student.weight, method.embed_teacher.linear.weight, method.embed_student.linear.weight)
    )
    assert teacher[0].weight.grad is None and teacher[3].weight.grad is None and parts["num_kept"] == 6


def test_selection_at_the_start_of_each_epoch_masks_rows_and_is_saved():
    method, student, teacher, images = example(cutoff=0.4)
    method.eval()
    with torch.no_grad():
        z_s = method.logits(method.transfer(student(images)))
        z_t = teacher(images)
    for step, epoch in ((0, 1), (9, 1), (10, 2), (99, 10)):
        method(context(method, student, teacher, images, step))
        assert int(method.epoch) == epoch
        found = adaptive_confidence(z_t, z_s, teacher_share(epoch, max_epoch=5, scale=7), cutoff=0.4)
        assert method.selected.nonzero().flatten().tolist() == found.rows.tolist()
    again, *_ = example(cutoff=0.4)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.selected, method.selected) and int(again.epoch) == 10
    kept = method(context(method, student, teacher, images, 99)).parts["num_kept"]
    assert kept == method.selected.sum()


def test_inference_reuses_the_teachers_classifier():
    method, student, teacher, images = example()
    method.eval()
    model = method.deploy(
        methods.Setup(nn.Sequential(student), teacher, lambda split: iter(()), capture={"tokens": "0"})
    )
    assert isinstance(model, ReusedClassifier)
    torch.testing.assert_close(model(images), teacher[3](method.transfer(student(images)).mean((2, 3))))


def test_inference_pools_a_higher_student_map_as_training_does():
    method, _, teacher, images = example(cutoff=None)
    teacher.insert(0, nn.AvgPool2d(2))
    student = nn.Conv2d(1, 2, 3, padding=1)
    method(
        methods.Context(
            None, teacher(images).detach(), None, (images, None, torch.arange(6)), total_steps=100,
            student_features={"tokens": student(images)}, teacher_features={"tokens": teacher[:2](images).detach()},
        )
    )  # fmt: skip
    again, *_ = example(cutoff=None)
    again.load_state_dict(method.state_dict())
    again.eval()
    setup = methods.Setup(nn.Sequential(student), teacher, lambda split: iter(()), capture={"tokens": "0"})
    again.start(setup)
    pooled, _ = match_height(student(images), teacher[:2](images))
    assert pooled.shape[2:] == (2, 2)
    torch.testing.assert_close(again.deploy(setup)(images), again.logits(again.transfer(pooled)))


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import kd3
    from kdfast.data import load_task
    from kdfast.data.web_digits import NO_DIGIT, web_splits

    kind = web_splits(0)["student"].tensors[3]
    assert (kind == NO_DIGIT).sum() == 175 and len(kind) == 700
    out = tmp_path / "kd3.json"
    task = dataclasses.replace(
        load_task("web_digits"), hints={"epochs": 1}
    )  # of eight steps: the student is sure of nothing
    results = kd3.run(out, seeds=1, steps=8, task=task, work=tmp_path / "work")
    assert len(results["sentences"]) == 5 and 0 < results["arms"]["kd3"]["measures"]["share kept"][0] <= 1
    assert "share kept" not in results["arms"]["kd"]["measures"]
    assert kd3.run(out, seeds=1, work=tmp_path / "none") == json.loads(out.read_text())
