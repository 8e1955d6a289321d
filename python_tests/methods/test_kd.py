"""kd and dkd by name: the written-out formulas, schedules, options."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.losses import LossOutput, dkd_loss
from kdfast.methods.dkd import dkd_total
from kdfast.methods.kd import kd_total


def logits(classes=7, rows=5):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.tensor([0, 3, 6, 1, 1])


def test_kd_is_the_written_out_formula():
    student, teacher, labels = logits()
    loss, parts = kd_total(student, teacher, labels, temperature=3.0, ce_weight=0.25, kd_weight=0.75)
    ce = F.cross_entropy(student, labels)
    kd = F.kl_div(F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean") * 9
    torch.testing.assert_close(loss, 0.25 * ce + 0.75 * kd)
    torch.testing.assert_close(parts["ce"], ce.detach())
    torch.testing.assert_close(parts["kd"], kd.detach())
    (got,) = torch.autograd.grad(loss, student)
    (want,) = torch.autograd.grad(0.25 * ce + 0.75 * kd, student)
    torch.testing.assert_close(got, want)


def test_dkd_is_cross_entropy_plus_dkd_loss():
    student, teacher, labels = logits()
    loss, _ = dkd_total(student, teacher, labels, alpha=2.0, beta=3.0, temperature=2.0, kd_weight=0.5)
    want = F.cross_entropy(student, labels) + 0.5 * dkd_loss(
        student, teacher, labels, alpha=2.0, beta=3.0, temperature=2.0
    )
    torch.testing.assert_close(loss, want)


def test_dkd_warms_up_with_the_steps_of_the_context():
    student, teacher, labels = logits()
    method = methods.load("dkd")(warmup_steps=10)
    at = [method(methods.Context(student, teacher, labels, step=step)).loss for step in (0, 5, 10, 99)]
    torch.testing.assert_close(at[0], F.cross_entropy(student, labels))
    torch.testing.assert_close(at[1] - at[0], 0.5 * (at[2] - at[0]))
    assert at[2] - at[0] > 1 and torch.equal(at[2], at[3])


@pytest.mark.parametrize("slug", ["kd", "dkd"])
def test_methods_by_name_return_a_loss_output_drop_ignored_labels_and_pickle(slug):
    student, teacher, labels = logits()
    method = pickle.loads(pickle.dumps(methods.load(slug)(ignore_index=1)))
    output = method(methods.Context(student, teacher, labels))
    assert isinstance(output, LossOutput) and output.loss.requires_grad
    assert all(not part.requires_grad for part in output.parts.values())
    keep = labels != 1
    torch.testing.assert_close(output.loss, method(methods.Context(student[keep], teacher[keep], labels[keep])).loss)


def test_unknown_names_and_options_are_refused_with_near_names():
    with pytest.raises(ValueError, match="method: there is no 'dkdd'; did you mean dkd"):
        methods.load("dkdd")
    with pytest.raises(TypeError, match="unknown option temprature"):
        methods.load("kd")(temprature=2.0)
    with pytest.raises(NotImplementedError, match=r"must define forward\(context\)"):
        methods.Method()(methods.Context(None))
