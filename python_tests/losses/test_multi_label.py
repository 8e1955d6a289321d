"""Sigmoid cross-entropy: dense against the formula, sparse against dense, extreme logits, refused input."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.losses import MultiLabelLoss, SparseMultiLabelLoss, multi_label_loss, sparse_multi_label_loss

F64 = torch.float64


def tensors():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=g, dtype=F64).requires_grad_()
    index = torch.tensor([[3, 0, -1], [6, 1, 2], [-1, -1, -1], [5, -1, 4]])
    value = torch.rand(4, 3, generator=g, dtype=F64)
    dense = torch.zeros(4, 7, dtype=F64)
    for i, k in (index >= 0).nonzero().tolist():
        dense[i, index[i, k]] = value[i, k]
    return logits, index, value, dense


def test_sum_over_classes_mean_over_rows():
    x, *_, z = tensors()
    p = torch.sigmoid(x)
    rows = -(z * p.log() + (1 - z) * (1 - p).log()).sum(1)
    torch.testing.assert_close(multi_label_loss(x, z), rows.mean())
    torch.testing.assert_close(multi_label_loss(x, z, reduction="none"), rows)
    keep = torch.tensor([True, False, True, True])
    torch.testing.assert_close(multi_label_loss(x, z, mask=keep), rows[keep].mean())
    grad = torch.autograd.grad(multi_label_loss(x, z), x)[0]
    torch.testing.assert_close(grad, (p - z).detach() / 4)
    assert MultiLabelLoss(reduction="sum")(x, z) == multi_label_loss(x, z, reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sparse_is_dense(reduction):
    x, index, value, z = tensors()
    got = sparse_multi_label_loss(x, index, value, reduction=reduction)
    want = multi_label_loss(x, z, reduction=reduction)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))
    assert torch.equal(SparseMultiLabelLoss(reduction=reduction)(x, index, value), got)


def test_extreme_logits_keep_their_digits():
    x = torch.tensor([[200.0, -200.0, 30.0, -30.0]], dtype=F64, requires_grad=True)
    loss = sparse_multi_label_loss(x, torch.tensor([[0, 3]]), torch.tensor([[1.0, 0.5]], dtype=F64))
    # softplus(200) - 200, softplus(-200), softplus(30), softplus(-30) + 15
    assert loss.item() == pytest.approx(30 + math.log1p(math.exp(-30)) * 2 + 15, rel=1e-12)
    grad = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 1.0, -0.5]], dtype=F64), atol=1e-12, rtol=0)
    half = sparse_multi_label_loss(torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0]]), torch.ones(1, 1))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, F.softplus(torch.ones(2)).sum() - 1)


def test_bad_input():
    x, index, value, z = tensors()
    with pytest.raises(ValueError, match=r"value: expected probabilities in \[0, 1\], got .* raw logits"):
        sparse_multi_label_loss(x, index, value + 5)
    with pytest.raises(ValueError, match="value: expected probabilities"):
        sparse_multi_label_loss(x, index, value * math.nan)
    with pytest.raises(ValueError, match=r"index: expected -1 or a class in \[0, 7\), got 1 to 7"):
        sparse_multi_label_loss(x, index.clamp_min(0) + torch.tensor([1, 2, 3]), value)
    with pytest.raises(ValueError, match="index: expected each class once"):
        sparse_multi_label_loss(x, torch.tensor([[2, 2, -1]] * 4), value)
    with pytest.raises(ValueError, match=r"index, value: expected \[4, K\]"):
        sparse_multi_label_loss(x, index[:2], value[:2])
    with pytest.raises(ValueError, match="logits: expected finite"):
        sparse_multi_label_loss(x * math.inf, index, value)
    with pytest.raises(ValueError, match="targets: expected shape"):
        multi_label_loss(x, z[:, :3])
    with pytest.raises(ValueError, match=r"targets: expected probabilities in \[0, 1\]"):
        multi_label_loss(x, z + 5)
    with pytest.raises(ValueError, match="logits: expected finite"):
        multi_label_loss(x * math.inf, z)


def test_dropped_rows_may_hold_anything():
    x, index, value, z = tensors()
    mask = torch.tensor([True, False, True, True])
    wild, target = x.detach().clone(), z.clone()
    wild[1], target[1] = math.nan, 9.0
    wild.requires_grad_()
    loss = multi_label_loss(wild, target, mask=mask)
    torch.testing.assert_close(loss, multi_label_loss(x[mask], z[mask]))
    assert torch.autograd.grad(loss, wild)[0].isfinite().all()
    loss = sparse_multi_label_loss(wild, index, value, mask=mask)
    torch.testing.assert_close(loss, sparse_multi_label_loss(x[mask], index[mask], value[mask]))
    assert torch.autograd.grad(loss, wild)[0].isfinite().all()
