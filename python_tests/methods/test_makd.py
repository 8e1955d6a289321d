"""MaKD: the written-out loss, what it refuses, classes alone at inference, the widened classifier, by name, the experiment."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.makd import AspectHead, multi_aspect_loss, predict_classes, widen_classifier

F64 = torch.float64


def example(rows=5, classes=3, aspects=4):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(rows, classes + aspects, generator=generator, dtype=F64)
    q = torch.rand(rows, aspects, generator=generator, dtype=F64)
    return x.requires_grad_(), torch.randint(classes, (rows,), generator=generator), q


def test_loss_and_gradient_are_the_written_out_ones():
    x, y, q = example()
    loss, parts = multi_aspect_loss(x, y, q, num_classes=3, alpha=4.0, ce_weight=0.5)
    aspect = (F.softplus(x[:, 3:]) - q * x[:, 3:]).mean()
    ce = F.cross_entropy(x[:, :3], y)
    torch.testing.assert_close(
        [loss, parts["ce"], parts["aspect"]], [0.5 * ce + 4 * aspect, ce.detach(), aspect.detach()]
    )
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad[:, :3], 0.5 * (x[:, :3].softmax(1) - F.one_hot(y, 3)).detach() / 5)
    torch.testing.assert_close(grad[:, 3:], 4 * (x[:, 3:].sigmoid() - q).detach() / 20)


def test_the_part_above_the_entropy_is_zero_for_perfect_answers():
    _, y, q = example()
    x = torch.cat((torch.zeros(5, 3, dtype=F64), torch.logit(q)), 1)
    parts = multi_aspect_loss(x, y, q, num_classes=3).parts
    assert parts["aspect_kl"].abs() < 1e-12 < parts["aspect"]
    hard = multi_aspect_loss(x, y, q.round().long(), num_classes=3)  # integers are converted
    torch.testing.assert_close(hard.parts["aspect"], hard.parts["aspect_kl"])


def test_extreme_logits_stay_finite():
    x = torch.tensor([[900.0, -900.0, 900.0, -900.0]], requires_grad=True)
    loss, _ = multi_aspect_loss(x, torch.tensor([1]), torch.tensor([[0.0, 1.0]]), num_classes=2)
    loss.backward()
    assert loss.item() == pytest.approx(1800 + 4 * 900) and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "logits: expected 2 classes \\+ 4 aspects = 6 outputs, got 7"),
        ({"num_classes": 4}, "logits: expected 4 classes \\+ 4 aspects = 8 outputs, got 7"),
        ({"q": torch.full((5, 4), 1.5)}, r"aspects: expected probabilities in \[0, 1\]; raw logits"),
        ({"q": torch.full((5, 4), float("nan"))}, "aspects: expected probabilities"),
        ({"q": torch.zeros(5, 0), "num_classes": 7}, "aspects: expected at least one question"),
        ({"q": torch.zeros(4, 4)}, r"aspects: expected \[B, Q\]"),
        ({"y": torch.full((5,), 3)}, r"labels: expected integers in \[0, 3\), got 3 at row 0"),
        ({"y": torch.full((5,), -100)}, r"labels: expected integers in \[0, 3\)"),
        ({"alpha": -1.0}, "alpha: expected a finite number in"),
        ({"ce_weight": -1.0}, "ce_weight: expected a finite number in"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    x, y, q = example()
    given = {"y": y, "q": q, "num_classes": 3} | change
    with pytest.raises(ValueError, match=message):
        multi_aspect_loss(x, given.pop("y"), given.pop("q"), **given)


def test_an_aspect_never_wins():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 2.0, 9.0]])
    assert predict_classes(x, 2).tolist() == [1, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_widened_classifier_keeps_its_classes(bias):
    torch.manual_seed(0)
    old = nn.Linear(4, 3, bias=bias).double()
    wide, x = widen_classifier(old, 5), torch.randn(2, 4, dtype=F64)
    assert wide.out_features == 8 and (wide.bias is not None) == bias
    torch.testing.assert_close(wide(x)[:, :3], old(x))
    head = AspectHead(old, 5)
    assert head(x).shape == (2, 8)
    torch.testing.assert_close(head.eval()(x), old(x))


def test_by_name():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    method = methods.load("makd")(aspects=4, alpha=2.0)
    assert method.adapt(student) is student and not method.uses_teacher
    x, y, q = torch.randn(7, 6), torch.arange(7) % 3, torch.rand(7, 4)
    got = method(methods.Context(student(x), labels=y, batch=(x, y, q)))
    torch.testing.assert_close(got.loss, multi_aspect_loss(student(x), y, q, num_classes=3, alpha=2.0).loss)
    assert student.eval()(x).shape == (7, 3)
    with pytest.raises(ValueError, match="batch: expected the answers at place 2, got 2 entries"):
        method(methods.Context(student.train()(x), labels=y, batch=(x, y)))


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import makd

    out = tmp_path / "makd.json"
    results = makd.run(out, seeds=1, steps=30, work=tmp_path / "work")
    assert list(results["arms"]) == ["labels", "shuffled", "answers 1", "answers"] and len(results["sentences"]) == 4
    assert len({arm["test"][0] for arm in results["arms"].values()}) > 2
    assert makd.run(out, seeds=1, work=tmp_path / "none") == json.loads(out.read_text())
