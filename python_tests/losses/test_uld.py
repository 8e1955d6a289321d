"""uld_loss: hand-made numbers, the definition in float64, gradcheck, and what top_k leaves out."""

import pytest
import torch

from kdfast.losses import ULDLoss, uld_loss
from kdfast.losses import uld as module

uld_rows_reference = module.uld_rows_reference


def logits(n: int, v: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return (3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def test_by_hand():
    """p = (.7, .2, .1) in any order against q = (.5, .5): |.7 - .5| + |.2 - .5| + .1."""
    student = torch.tensor([[0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]).log()
    teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    torch.testing.assert_close(uld_loss(student, teacher, reduction="none"), torch.tensor([0.6, 0.6]))
    assert uld_loss(student, student.flip(-1)).item() == pytest.approx(0, abs=1e-7)
    # the first place and the rest as one: |.7 - .5| + |.3 - .5|
    torch.testing.assert_close(uld_loss(student, teacher, top_k=1), torch.tensor(0.4))


@pytest.mark.parametrize(("v", "v_teacher"), [(23, 40), (40, 23), (31, 31), (1, 5)])
def test_equals_the_definition(v, v_teacher, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8 * max(v, v_teacher))  # blocks of three rows
    student, teacher = logits(8, v, 0).requires_grad_(), logits(8, v_teacher, 1)
    factor = torch.linspace(-1, 2, 8, dtype=torch.float64)
    got = uld_loss(student, teacher, temperature=1.5, teacher_temperature=2.0, reduction="none")
    want = uld_rows_reference(student, teacher, 1.5, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad((rows * factor).sum(), student)[0] for rows in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)
    assert v == 1 or grads[1].abs().max() > 1e-2


def test_gradcheck_with_top_k():
    student, teacher = logits(3, 9, 2).requires_grad_(), logits(3, 12, 3)
    assert torch.autograd.gradcheck(lambda x: uld_loss(x, teacher, top_k=4, reduction="none"), student)


def test_top_k_is_a_bound_from_below():
    student, teacher = logits(6, 200, 4), logits(6, 300, 5)
    exact = uld_loss(student, teacher, reduction="none")
    previous = torch.zeros(6, dtype=torch.float64)
    for top_k in (1, 8, 64, 300):
        rows = uld_loss(student, teacher, top_k=top_k, reduction="none")
        rests = torch.stack(
            [x.softmax(-1).sort(-1, descending=True).values[:, top_k:].sum(-1) for x in (student, teacher)]
        )
        assert (
            (rows <= exact + 1e-12).all()
            and (rows >= exact - 2 * rests.amin(0) - 1e-12).all()
            and (rows >= previous - 1e-12).all()
        )
        previous = rows
    torch.testing.assert_close(previous, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_masks(dtype):
    student, teacher = logits(5, 50, 6, dtype).requires_grad_(), logits(5, 70, 7, dtype)
    mask = torch.tensor([True, False, True, True, False])
    loss = ULDLoss(temperature=2.0)(student, teacher, mask=mask)
    want = uld_rows_reference(student.detach().double(), teacher.double(), 2.0, 2.0)[mask].mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    loss.backward()
    assert student.grad.dtype == dtype and (student.grad[~mask] == 0).all() and student.grad[mask].abs().max() > 0
    assert uld_loss(student, teacher, mask=torch.zeros(5, dtype=torch.bool)).item() == 0


def test_float16_gradients_do_not_underflow_before_the_loss_scaler():
    """A probability of 1e-8 is no float16 number, but is one times the scaler's factor."""
    student = torch.cat((torch.zeros(3, 1), torch.full((3, 20), -18.0)), 1).half().requires_grad_()
    teacher = torch.zeros(3, 21).half()
    wide = student.detach().double().requires_grad_()
    for x in (student, wide):
        (65536 * uld_loss(x, teacher.to(x.dtype))).backward()
    assert student.grad.dtype == torch.float16 and wide.grad[:, 1:].abs().min() > 1e-4
    torch.testing.assert_close(student.grad[:, 1:].double(), wide.grad[:, 1:], rtol=2**-9, atol=0)


@pytest.mark.parametrize("top_k", [None, 4])
def test_rows_and_classes_of_minus_infinity(top_k):
    student, teacher = logits(4, 9, 10), logits(4, 12, 11)
    want = uld_loss(student[[0, 3]][:, :7], teacher[[0, 3]], top_k=top_k, reduction="none")
    student[:, 7:], student[1], teacher[2] = -torch.inf, -torch.inf, -torch.inf
    student.requires_grad_()
    rows = uld_loss(student, teacher, top_k=top_k, reduction="none")
    torch.testing.assert_close(rows[[0, 3]], want)
    assert rows[[1, 2]].tolist() == [0, 0] and want.min() > 0.1
    if top_k is None:
        torch.testing.assert_close(rows, uld_rows_reference(student, teacher, 1.0, 1.0))
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert (grad[[1, 2]] == 0).all() and (grad[:, 7:] == 0).all() and (grad[[0, 3], :7].abs().amax(-1) > 1e-3).all()
    broken = student.detach().index_fill(1, torch.tensor([0]), torch.nan)
    assert uld_loss(broken, teacher, top_k=top_k, reduction="none")[0].isnan()


def test_second_derivative_and_wrong_arguments():
    student, teacher = logits(2, 5, 8).requires_grad_(), logits(2, 6, 9)
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(uld_loss(student, teacher), student, create_graph=True)
    for wrong, match in (
        (dict(top_k=0), "top_k"), (dict(temperature=0.0), "temperature"), (dict(reduction="batch"), "reduction"),
        (dict(teacher_temperature=-1.0), "teacher_temperature"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            uld_loss(student, teacher, **wrong)
    with pytest.raises(ValueError, match=r"teacher: expected the rows of student, \(2,\)"):
        uld_loss(student, teacher[:1])
    with pytest.raises(ValueError, match=r"teacher: expected logits \[..., V\], got shape \(2, 0\)"):
        uld_loss(student, teacher[:, :0])
    with pytest.raises(TypeError, match="student: expected float16"):
        uld_loss(student.long(), teacher)
