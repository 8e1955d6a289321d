"""ProC-KD: the objective of both stages, what is trained in which, inference with prototypes, tasks, the experiment."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.proc_kd import Augmented, proc_kd_loss, readout, reconstruction_loss

D, C = 4, 3


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D, eps=1e-6), nn.Linear(D, C)

    def forward(self, x):
        return self.head(self.norm(self.body(x))[:, 0])


def example(step=0, **options):
    torch.manual_seed(0)
    width = {name: (D, D) for name in ("tokens", "first", "second", "third")}
    method, student = methods.load("proc_kd")(width, num_prototypes=2, prototype_steps=10, **options), Student()
    assert method.adapt(student) is student
    x, layers = torch.randn(6, 5, D), [torch.randn(6, 5, D) for _ in range(3)]
    tokens = student.body(x)
    tokens.retain_grad()
    context = methods.Context(
        student.head(student.norm(tokens)[:, 0]), torch.zeros(6, 5), torch.arange(6) % C, step=step,
        student_features={"tokens": tokens}, teacher_features=dict(zip(("first", "second", "third"), layers)),
    )  # fmt: skip
    return method, student, context, layers, x


def moved(module):
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_stage_one_fits_the_modules_norm_and_head_on_the_teachers_path():
    method, student, context, layers, _ = example()
    loss, parts = method(context)
    out = method.learner(layers)[0]
    want = F.cross_entropy(
        student.head(student.norm(method.augment(out, method.learner.prototypes)[0])[:, 0]), context.labels
    )
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert moved(student) == {"norm", "head"} and set(parts) == {"prototypes"}
    assert {name for name, p in method.learner.named_parameters() if p.grad.any()} == {
        "prototypes", "cat.weight", "cat.bias", "fc.weight", "fc.bias", "assign.weight", "fuse1.weight", "fuse2.weight",
    }  # fmt: skip
    assert moved(method.augment) == {"encode", "aug1", "aug2"}


def test_stage_one_by_reconstruction_needs_no_labels_of_any_kind():
    method, student, context, layers, _ = example(stage1="reconstruction")
    context.labels = torch.full((6,), -100)
    t = torch.relu(method.learner.cat(torch.cat(layers, -1)))
    torch.testing.assert_close(method(context).loss, reconstruction_loss(method.learner(layers)[0], t, student.norm))


def test_stage_two_trains_the_student_with_the_prototypes_frozen():
    method, student, context, layers, _ = example(step=10, feature_weight=0.5, kd_weight=2.0, temperature=3.0)
    loss, parts = method(context)
    prototypes = method.learner.prototypes.detach()
    features, y2 = readout(
        method.augment(context.student_features["tokens"], prototypes)[0], student.norm, student.head
    )
    with torch.no_grad():
        wanted, y2_teacher = readout(
            method.augment(method.learner(layers)[0], prototypes)[0], student.norm, student.head
        )
    y1, y = context.student, context.labels
    kd = 9 * F.kl_div((y1 / 3).log_softmax(-1), (y2_teacher / 3).softmax(-1), reduction="batchmean")
    want = F.cross_entropy(y1, y) + F.cross_entropy(y2, y) + 0.5 * F.mse_loss(features, wanted) + 2 * kd
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(parts["kd"], kd.detach())
    loss.backward()
    assert moved(student) == {"body", "norm", "head"} and moved(method.augment) == {"encode", "aug1", "aug2"}
    assert not moved(method.learner)


def test_prototypes_at_a_low_rate():
    grads = {}
    for rate in (1.0, 0.25):
        method, _, context, *_ = example(step=10, prototype_rate=rate)
        method(context).loss.backward()
        grads[rate] = method.learner.prototypes.grad
    torch.testing.assert_close(grads[0.25], 0.25 * grads[1.0])
    assert grads[1.0].any()


def test_linear_baseline():
    method, _, context, layers, _ = example(form="linear", feature_weight=0.5)
    want = F.cross_entropy(context.student, context.labels) + 0.5 * F.mse_loss(
        method.linear(context.student_features["tokens"]), layers[2]
    )
    torch.testing.assert_close(method(context).loss, want)


def test_another_task_loss():
    y1, features, target = (
        torch.randn(4, 1),
        (torch.randn(4, 5, D), torch.randn(4, 1)),
        (torch.randn(4, 5, D), torch.randn(4, 1)),
    )
    labels = torch.randn(4, 1)
    loss, parts = proc_kd_loss(y1, features, target, labels, kd_weight=0.0, task_loss=F.mse_loss)
    want = F.mse_loss(y1, labels) + F.mse_loss(features[1], labels) + F.mse_loss(features[0], target[0])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(parts["task"], F.mse_loss(y1, labels))


def test_inference_of_y2_keeps_the_prototypes_and_drops_the_teacher():
    method, student, _context, _, x = example(predict="y2")
    setup = methods.Setup(student, None, lambda split: iter(()), capture={"tokens": "body"})
    model = method.deploy(setup)
    assert isinstance(model, Augmented)
    want = readout(method.augment(student.body(x), method.learner.prototypes)[0], student.norm, student.head)[1]
    torch.testing.assert_close(model(x), want)
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "augment", "prototypes"}
    assert example()[0].deploy(setup) is student


def test_wrong_use():
    method, _, context, *_ = example()
    context.teacher_features = {}
    with pytest.raises(ValueError, match="teacher: expected its features first, second, third in training, got none"):
        method(context)
    with pytest.raises(
        ValueError, match=r"widths\['second'\]: expected the width of the student's tokens \(4\), got 5"
    ):
        methods.load("proc_kd")({"tokens": (4, 4), "first": (4, 4), "second": (4, 5), "third": (4, 4)})
    pair = torch.zeros(2, 5, D), torch.zeros(2, C)
    with pytest.raises(ValueError, match="target: expected tokens"):
        proc_kd_loss(pair[1], pair, (torch.zeros(2, 6, D), pair[1]), torch.zeros(2, dtype=torch.long))
    for options in ({"temperature": 0.0}, {"kd_weight": -1.0}, {"stage1": "both"}, {"predict": "y3"}, {"form": "none"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            example(**options)


# ---------------------------------------------------------------- tasks and experiment
def test_tasks_hide_the_teachers_classes_and_pose_quadrants():
    pytest.importorskip("sklearn")
    from kdfast.data.digits import digit_splits
    from kdfast.data.other_digits import TokenViT, other_splits, quadrant_splits

    splits = other_splits(0)
    assert splits["student"].tensors[1].bincount().tolist() == [10] * 5
    assert len(splits["test"]) + len(splits["teacher_test"]) == len(digit_splits(0)["test"])
    canvases, answers = quadrant_splits(0)["student"].tensors
    ink = canvases.view(-1, 2, 8, 2, 8).sum((2, 4)).flatten(1)
    assert (
        ((ink > 0).sum(1) == 2).all() and (ink.gather(1, answers.unsqueeze(1)) > 0).all() and len(answers.unique()) == 4
    )
    torch.manual_seed(0)
    model = TokenViT(2, 5)
    assert model(canvases[:2]).shape == (2, 5)  # 64 patches: resized positions


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import proc_kd
    from kdfast.data.other_digits import other_digits_task

    out = tmp_path / "proc_kd.json"
    tasks = [other_digits_task()]
    results = proc_kd.run(out, seeds=1, steps=4, tasks=tasks, work=tmp_path / "work")
    assert len(results["sentences"]) == 4
    assert proc_kd.run(out, seeds=1, tasks=tasks, work=tmp_path / "none") == json.loads(out.read_text())
