"""linear_distillation_loss: the dense loss it replaces, shift, denominators, teacher sources, and what others got wrong."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.losses import (
    LinearDistillationLoss,
    SampledTeacher,
    TopKTeacher,
    distillation_loss,
    linear_distillation_loss,
    sparse_kd_loss,
)
from kdfast.ops.divergence import KINDS

HAS_CORE = kdfast.backend_info()["compiled"]
needs_core = pytest.mark.skipif(not HAS_CORE, reason="no compiled core")
B, L, D, DT, V = 3, 6, 8, 12, 31


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_core)])
def backend(request):
    return request.param


def batch(dtype=torch.float64, classes=V, seed=0):
    """hidden, weight of student and teacher, and labels as a batch has them: a prompt and padding at -100."""
    g = torch.Generator().manual_seed(seed)
    h, w, ht, wt = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, L, D), (classes, D), (B, L, DT), (classes, DT))
    )
    labels = torch.randint(classes, (B, L), generator=g)
    labels[0, :2] = labels[1, 4:] = -100
    return h, w, ht, wt, labels


def dense(h, w, ht, wt, labels, shift=0, **options):
    x, z = h @ w.T, ht @ wt.T
    if shift:
        x, z, labels = x[:, :-1], z[:, :-1], labels[:, 1:]
    return distillation_loss(x, z, labels, backend="reference", **options)


def check_equal(got, want, leaves, rtol=1e-9):
    torch.testing.assert_close(got.loss, want.loss, rtol=rtol, atol=1e-12)
    for name in ("ce", "kd"):
        torch.testing.assert_close(got.parts[name], want.parts[name], rtol=rtol, atol=1e-12)
        assert not got.parts[name].requires_grad
    for a, b in zip(torch.autograd.grad(got.loss.sum(), leaves), torch.autograd.grad(want.loss.sum(), leaves)):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


# ---------------------------------------------------------------- the dense loss
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_loss(kind, reduction, shift, backend):
    h, w, ht, wt, labels = batch()
    options = {
        "kind": kind, "beta": (1.0, 8.0) if kind == "dkd" else 0.3, "temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7,
        "reduction": reduction,
    }  # fmt: skip
    got = linear_distillation_loss(
        h, w, ht, labels, teacher_weight=wt, shift=shift, chunk_rows=4, backend=backend, **options
    )
    check_equal(got, dense(h, w, ht, wt, labels, shift, **options), (h, w))
    assert got.loss.shape == ((B, L - shift) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_mask_weight_and_shift_belong_to_tokens(reduction, backend):
    """With shift=1 row t is kept by the mask and weight of token t + 1, which it predicts."""
    h, w, ht, wt, labels = batch()
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) < 0.7
    weight = torch.rand(B, L, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = linear_distillation_loss(
        h, w, ht, labels, teacher_weight=wt, shift=1, mask=mask, weight=weight, reduction=reduction, chunk_rows=4, backend=backend
    )  # fmt: skip
    want = dense(h, w, ht, wt, labels, 1, mask=mask[:, 1:], weight=weight[:, 1:], reduction=reduction)
    check_equal(got, want, (h, w))
    wrong = dense(h, w, ht, wt, labels, 1, mask=mask[:, :-1], weight=weight[:, :-1], reduction=reduction)
    assert (wrong.loss - want.loss).abs().max() > 1e-3


def test_without_labels_the_last_row_of_a_shift_is_dropped(backend):
    h, w, ht, wt, _ = batch()
    got = linear_distillation_loss(h, w, ht, teacher_weight=wt, ce_weight=0.0, kd_weight=1.0, shift=1, backend=backend)
    keep = torch.ones(B, L, dtype=torch.bool)
    keep[:, -1] = False
    want = linear_distillation_loss(
        h, w, ht, teacher_weight=wt, ce_weight=0.0, kd_weight=1.0, mask=keep, backend=backend
    )
    torch.testing.assert_close(got.loss, want.loss)
    assert got.parts["ce"] == 0
    (grad,) = torch.autograd.grad(got.loss, h)
    assert bool((grad[:, -1] == 0).all()) and bool((grad[:, :-1] != 0).any(-1).all())


def test_teacher_gradient_only_on_demand(backend):
    h, w, ht, wt, labels = batch()
    loss = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, backend=backend).loss
    assert torch.autograd.grad(loss, (ht, wt), allow_unused=True) == (None, None)
    got = linear_distillation_loss(
        h, w, ht, labels, teacher_weight=wt, teacher_grad=True, chunk_rows=4, backend=backend
    )
    check_equal(got, dense(h, w, ht, wt, labels, teacher_grad=True), (h, w, ht, wt))


def sources(ht, wt, temperature):
    z = (ht @ wt.T).detach()
    log_probs = (z / temperature).log_softmax(-1)
    top, ids = log_probs.topk(5, -1)
    tokens = torch.multinomial(log_probs.exp().flatten(0, 1), 7, True, generator=torch.Generator().manual_seed(0))
    return {
        "logits": z,
        "log_probs": z.log_softmax(-1),
        "top_k": TopKTeacher(ids, top.float(), (1 - top.exp().sum(-1)).float(), temperature),
        "sampled": SampledTeacher(tokens.reshape(B, L, 7), None, temperature),
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("source", ["logits", "log_probs", "top_k", "sampled"])
def test_teacher_sources_with_shift(source, reduction, backend):
    """The teacher's row t stands beside the student's row t, both predict token t + 1."""
    h, w, ht, wt, labels = batch()
    teacher = sources(ht, wt, 2.0)[source]
    options = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "reduction": reduction}
    got = linear_distillation_loss(h, w, teacher, labels, shift=1, chunk_rows=4, backend=backend, **options)
    if source in ("logits", "log_probs"):
        want = dense(h, w, ht, wt, labels, 1, **options)
        check_equal(got, want, (h, w))
        return
    x, targets = (h @ w.T)[:, :-1], labels[:, 1:]
    cut = type(teacher)(*(t[:, :-1] if isinstance(t, torch.Tensor) else t for t in teacher))
    keep = targets != -100
    kd = sparse_kd_loss(x, cut, temperature=2.0, scale_t2=True, mask=keep, reduction=reduction, backend="reference")
    ce = F.cross_entropy(x.transpose(1, 2), targets, reduction="mean" if reduction == "mean" else "none")
    want = 0.3 * ce + 0.7 * kd
    torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-9)
    for a, b in zip(torch.autograd.grad(got.loss.sum(), (h, w)), torch.autograd.grad(want.sum(), (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_one_token_without_batch(backend):
    """Hidden states [D] of one row, and [L, D] of one sequence."""
    h, w, ht, wt, labels = batch()
    one = linear_distillation_loss(h[0, 2], w, ht[0, 2], labels[0, 2], teacher_weight=wt, backend=backend)
    row = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, reduction="none", backend=backend).loss[0, 2]
    torch.testing.assert_close(one.loss, row)
    alone = linear_distillation_loss(
        h[0, 2], w, ht[0, 2], labels[0, 2], teacher_weight=wt, reduction="none", backend=backend
    )  # fmt: skip
    assert alone.loss.shape == ()
    torch.testing.assert_close(alone.loss, row)
    sequence = linear_distillation_loss(h[2], w, ht[2], labels[2], teacher_weight=wt, shift=1, backend=backend)
    torch.testing.assert_close(sequence.loss, dense(h[2:], w, ht[2:], wt, labels[2:], 1).loss)


@pytest.mark.parametrize("teacher_grad", [False, True])
def test_a_divergence_of_weight_0_gives_no_gradient_even_where_it_is_infinite(backend, teacher_grad):
    h, w, _, _, labels = batch()
    z = torch.randn(B, L, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[..., 3] = -math.inf
    labels = torch.where(labels == 3, 4, labels)
    z.requires_grad_(teacher_grad)
    options = dict(kind="reverse_kl", kd_weight=0.0, ce_weight=1.0, teacher_grad=teacher_grad, backend=backend)
    got = torch.autograd.grad(linear_distillation_loss(h, w, z, labels, **options).loss, (h, w))
    want = torch.autograd.grad(F.cross_entropy((h @ w.T).flatten(0, 1), labels.flatten()), (h, w))
    torch.testing.assert_close(got, want)


def test_the_module_twin():
    h, w, ht, wt, labels = batch()
    module = LinearDistillationLoss(kind="js", shift=1, ce_weight=0.2)
    got = module(h, w, ht, labels, teacher_weight=wt)
    want = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, kind="js", shift=1, ce_weight=0.2)
    assert torch.equal(got.loss, want.loss)
    assert "shift" in repr(module)
    with pytest.raises(TypeError, match="unknown option shfit"):
        LinearDistillationLoss(shfit=1)


def test_the_signature_is_stable():
    names = list(inspect.signature(linear_distillation_loss).parameters)
    assert names[:22] == [
        "student_hidden", "student_weight", "teacher", "labels", "teacher_weight", "student_bias", "teacher_bias", "kind", "beta",
        "temperature", "ce_weight", "kd_weight", "ignore_index", "shift", "softcap", "logit_scale", "vocab_size", "mask", "weight",
        "chunk_rows", "reduction", "scale_t2",
    ]  # fmt: skip


# ---------------------------------------------------------------- what others got wrong
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tvd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_never_negative(kind, dtype, backend):
    """A JSD of bf16 softmaxes came out as -0.0009 near agreement; here the bf16 logits are exact numbers to float32 terms."""
    h, w, _, _, labels = batch(dtype)
    near = (h.detach() * 1.01).to(dtype)
    out = linear_distillation_loss(
        h, w, near, labels, teacher_weight=w.detach(), kind=kind, ce_weight=0.0, reduction="none", backend=backend
    )
    assert bool((out.loss >= (0 if backend == "cpu" else -1e-6)).all()) and out.loss.max() > 0
    same = linear_distillation_loss(
        h, w, h.detach(), labels, teacher_weight=w.detach(), kind=kind, ce_weight=0.0, backend=backend
    )
    assert abs(same.loss.item()) <= (0.0 if backend == "cpu" else 1e-6)


def test_chunks_run_over_tokens_whatever_the_shape(backend):
    """[B, L, D] once made B chunks of L rows; rows are rows here, and labels are cut with them."""
    h, w, ht, wt, labels = batch()
    for chunk_rows in (1, 5, 7, B * L, 1000):
        want = dense(h, w, ht, wt, labels, kind="reverse_kl")
        got = linear_distillation_loss(
            h, w, ht, labels, teacher_weight=wt, kind="reverse_kl", chunk_rows=chunk_rows, backend=backend
        )
        check_equal(got, want, (h, w))


def test_a_chunk_of_ignored_rows_and_a_batch_of_them(backend):
    """NaN, or a constant without a graph, in others."""
    h, w, ht, wt, labels = batch()
    labels[0] = -100  # with chunk_rows = L the whole first chunk
    check_equal(
        linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, chunk_rows=L, backend=backend),
        dense(h, w, ht, wt, labels), (h, w),
    )  # fmt: skip
    labels[:] = -100
    for options in ({"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none"}):
        out = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, shift=1, backend=backend, **options)
        assert bool((out.loss == 0).all())
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.loss.sum(), (h, w)))


def test_sums_over_micro_batches_have_one_denominator(backend):
    """num_items_in_batch: the sum of micro-batches over all kept tokens is the loss of the whole batch."""
    h, w, ht, wt, labels = batch()
    whole = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, shift=1, backend=backend).loss
    items = (labels[:, 1:] != -100).sum()
    parts = [
        linear_distillation_loss(
            h[i : i + 1], w, ht[i : i + 1], labels[i : i + 1], teacher_weight=wt, shift=1, reduction="sum", backend=backend
        ).loss
        for i in range(B)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts) / items, whole)
    means = torch.stack([p / (labels[i, 1:] != -100).sum() for i, p in enumerate(parts)])
    assert abs(means.mean() - whole) > 1e-3  # a mean of means is another number


def test_packed_sequences_keep_their_own_rows(backend):
    """Two sequences in one row: -100 at the first token of the second, so that no row predicts across the seam."""
    h, w, ht, wt, labels = batch()
    flat, teacher = h[:2].reshape(1, 2 * L, D), ht[:2].reshape(1, 2 * L, DT)
    packed = labels[:2].reshape(1, 2 * L).clone()
    packed[0, L] = -100
    got = linear_distillation_loss(flat, w, teacher, packed, teacher_weight=wt, shift=1, backend=backend)
    want = linear_distillation_loss(h[:2], w, ht[:2], labels[:2], teacher_weight=wt, shift=1, backend=backend)
    torch.testing.assert_close(got.loss, want.loss)


def test_padding_on_the_left_equals_padding_on_the_right(backend):
    h, w, ht, wt, labels = batch()
    labels[:] = torch.where(labels == -100, 0, labels)
    pad_h, pad_t, pad_y = torch.randn(B, 2, D).double(), torch.randn(B, 2, DT).double(), torch.full((B, 2), -100)
    sides = []
    for order in (lambda pad, x: (pad, x), lambda pad, x: (x, pad)):
        args = [torch.cat(order(pad, x), 1) for pad, x in ((pad_h, h), (pad_t, ht), (pad_y, labels))]
        if order(0, 1) == (0, 1):
            args[2][:, 2] = -100  # nothing predicts the first real token from padding
        sides.append(
            linear_distillation_loss(args[0], w, args[1], args[2], teacher_weight=wt, shift=1, backend=backend).loss
        )
    torch.testing.assert_close(*sides)


def test_padded_vocabularies_are_exact(backend):
    """Padding with zeros gave 3.3653 for 3.3497 elsewhere. Ours cuts, or asks, naming both sizes."""
    h, w, ht, _, labels = batch()
    wide = torch.randn(V + 9, DT, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"vocab_size: .*student_weight has {V} and teacher_weight has {V + 9}"):
        linear_distillation_loss(h, w, ht, labels, teacher_weight=wide, backend=backend)
    got = linear_distillation_loss(h, w, ht, labels, teacher_weight=wide, vocab_size=V, backend=backend)
    check_equal(got, dense(h, w, ht, wide[:V], labels), (h, w))
    # rows of a head that are no tokens, in both models: neither softmax nor cross-entropy may see them
    got = linear_distillation_loss(
        h, w, ht, labels.clamp_max(V - 5), teacher_weight=wide, vocab_size=V - 4, backend=backend
    )
    check_equal(got, dense(h, w[: V - 4], ht, wide[: V - 4], labels.clamp_max(V - 5)), (h, w))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tvd"])
def test_classes_masked_by_a_bias_of_minus_infinity(kind, backend):
    h, w, ht, wt, labels = batch()
    labels = labels.clamp_max(V - 6)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[V - 5 :] = -math.inf
    got = linear_distillation_loss(
        h,
        w,
        ht,
        labels,
        teacher_weight=wt,
        student_bias=bias,
        teacher_bias=bias,
        kind=kind,
        chunk_rows=4,
        backend=backend,
    )
    want = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, vocab_size=V - 5, kind=kind, backend=backend)
    check_equal(got, want, (h, w))


def test_t2_and_the_weights(backend):
    h, w, ht, wt, labels = batch()
    options = {"teacher_weight": wt, "temperature": 3.0, "backend": backend}
    plain = linear_distillation_loss(h, w, ht, labels, scale_t2=False, **options)
    scaled = linear_distillation_loss(h, w, ht, labels, **options)
    torch.testing.assert_close(scaled.parts["kd"], 9 * plain.parts["kd"])
    torch.testing.assert_close(scaled.parts["ce"], plain.parts["ce"])
    for ce_weight in (0.0, 1e-12):  # T^2 does not depend on the other weight
        out = linear_distillation_loss(h, w, ht, labels, ce_weight=ce_weight, kd_weight=1.0, **options)
        torch.testing.assert_close(out.loss, scaled.parts["kd"])
    alone = linear_distillation_loss(h, w, ht, labels, ce_weight=1.0, kd_weight=0.0, **options)
    torch.testing.assert_close(alone.loss, F.cross_entropy((h @ w.T).flatten(0, 1), labels.flatten()))


def test_a_divergence_of_weight_zero_may_be_infinite(backend):
    h, w, ht, wt, labels = batch()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[0] = -math.inf
    labels = labels.clamp_min(1).where(labels != -100, -100)
    for reduction in ("mean", "none"):
        out = linear_distillation_loss(
            h, w, ht, labels, teacher_weight=wt, student_bias=bias, ce_weight=1.0, kd_weight=0.0, reduction=reduction, backend=backend
        )  # fmt: skip
        assert bool(out.loss.isfinite().all()) and out.loss.max() > 0 and out.parts["kd"].max() == math.inf


def test_narrow_labels_and_other_ignore_indices():
    h, w, ht, wt, labels = batch()
    want = linear_distillation_loss(h, w, ht, labels, teacher_weight=wt, shift=1).loss
    torch.testing.assert_close(
        linear_distillation_loss(h, w, ht, labels.to(torch.int8), teacher_weight=wt, shift=1).loss, want
    )
    other = labels.where(labels != -100, 255).to(torch.uint8)
    torch.testing.assert_close(
        linear_distillation_loss(h, w, ht, other, teacher_weight=wt, ignore_index=255, shift=1).loss, want
    )


@needs_core
def test_no_work_for_nobody():
    """no_grad makes no gradient; a frozen head makes none of its size."""
    h, w, ht, wt, labels = batch(torch.float32)
    with torch.no_grad():
        assert linear_distillation_loss(h, w, ht, labels, teacher_weight=wt).loss.grad_fn is None
    frozen = linear_distillation_loss(h, w.detach(), ht, labels, teacher_weight=wt).loss
    assert [t.numel() for t in frozen.grad_fn.saved_tensors] == [h.numel(), 0, 0, 0, 0, 0]


H, W, HT, WT, Y = (
    torch.randn(2, 4, 3),
    torch.randn(6, 3),
    torch.randn(2, 4, 5),
    torch.randn(6, 5),
    torch.zeros(2, 4).long(),
)
BAD = {
    "labels": (lambda: linear_distillation_loss(H, W, HT, teacher_weight=WT), ValueError, r"labels: expected a Tensor.*ce_weight=0"),
    "shift": (lambda: linear_distillation_loss(H, W, HT, Y, teacher_weight=WT, shift=2), ValueError, r"shift: expected 0 or 1, got 2"),
    "one row": (lambda: linear_distillation_loss(H[0, 0], W, HT[0, 0], Y[0, 0], teacher_weight=WT, shift=1), ValueError, r"shift: expected hidden states"),
    "mask": (lambda: linear_distillation_loss(H, W, HT, Y, teacher_weight=WT, mask=torch.ones(2, 4)), TypeError, r"mask: expected bool"),
    "weight": (lambda: linear_distillation_loss(H, W, HT, Y, teacher_weight=WT, weight=torch.ones(2)), ValueError, r"weight: expected shape \(2, 4\)"),
    "reduction": (lambda: linear_distillation_loss(H, W, HT, Y, teacher_weight=WT, reduction="avg"), ValueError, r"reduction: expected one of"),
    "temperature": (lambda: linear_distillation_loss(H, W, HT, Y, teacher_weight=WT, temperature="2"), TypeError, r"temperature: expected a number"),
    "cache at another temperature": (
        lambda: linear_distillation_loss(H, W, TopKTeacher(torch.zeros(2, 4, 1).long(), torch.zeros(2, 4, 1), None, 2.0), Y), ValueError,
        r"temperature: expected 2.0, at which the teacher's list was taken, got 1.0",
    ),
    "label": (lambda: linear_distillation_loss(H, W, HT, Y + 6, teacher_weight=WT), ValueError, r"labels: expected integers in \[0, 6\), got 6 at row 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
