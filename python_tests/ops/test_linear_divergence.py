"""kdfast.ops.linear_divergence: the dense path, the float64 reference, chunks, teacher sources, modes, memory, bad input."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, check_mode
from tolerances import check_against_reference

import kdfast
from kdfast.ops import SampledTeacher, TopKTeacher, divergence, linear_divergence, sparse_divergence
from kdfast.ops.divergence import KINDS
from kdfast.ops.linear_chunks import Options
from kdfast.ops.linear_divergence import linear_divergence_total
from kdfast.ops.linear_passes import dense_sum
from kdfast.ops.sparse_divergence import SPARSE_KINDS

HAS_CORE = kdfast.backend_info()["compiled"]
needs_core = pytest.mark.skipif(not HAS_CORE, reason="no compiled core")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_core)]
N, D, DT, V, VT = 11, 8, 12, 37, 41
CASES = [(k, (1.0, 8.0) if k == "dkd" else 0.3) for k in KINDS]


@pytest.fixture(params=[*BACKENDS, "loop"])
def backend(request, monkeypatch):
    """The reference, the core, and "loop": what a GPU and an installation without a core run, here by hiding the core from it."""
    if request.param != "loop":
        return request.param
    module = sys.modules["kdfast.ops.linear_divergence"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "core_reason", lambda: "hidden by this test")
    monkeypatch.setattr(module, "_checkpointed", None)  # a fall back to the reference would fail
    return None


def tensors(dtype=torch.float64, rows=(N,), grad=True, seed=0, classes=V):
    """hidden, weight, bias of the student and of the teacher, with different widths."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_(grad)

    return (
        draw(*rows, D), draw(classes, D), draw(classes),
        draw(*rows, DT), draw(classes, DT, scale=0.7), draw(classes),
    )  # fmt: skip


def some_labels(rows=(N,), classes=V):
    return torch.randint(classes, rows, generator=torch.Generator().manual_seed(5))


def dense(
    h,
    w,
    b,
    ht,
    wt,
    bt,
    *,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    labels=None,
    kd=1.0,
    ce=0.0,
    cap=None,
    scale=1.0,
):
    """What one writes without the op: all logits, then `divergence` and F.cross_entropy."""
    x, z = ((F.linear(hidden, weight, bias) * scale) for hidden, weight, bias in ((h, w, b), (ht, wt, bt)))
    if cap is not None:
        x, z = cap * torch.tanh(x / cap), cap * torch.tanh(z / cap)
    rows = kd * divergence(
        x, z, kind=kind, beta=beta, temperature=temperature, labels=labels if kind == "dkd" else None, backend="reference"
    )  # fmt: skip
    return rows + ce * F.cross_entropy(x, labels, reduction="none") if ce else rows


# ---------------------------------------------------------------- equality with the dense path
@pytest.mark.parametrize("chunk_rows", [1, 4, N, 100])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_the_dense_path(kind, beta, chunk_rows, backend):
    """Value, and gradient of every input, for each kind with cross-entropy, whatever the chunks."""
    inputs = tensors()
    labels = some_labels()
    weight = torch.linspace(0.0, 2.0, N, dtype=torch.float64)  # the first row is dropped
    asked = inputs[:3] if kind == "dkd" else inputs
    h, w, b, ht, wt, bt = inputs if kind != "dkd" else (*inputs[:3], *(t.detach() for t in inputs[3:]))
    want = (
        weight * dense(h, w, b, ht, wt, bt, kind=kind, beta=beta, temperature=1.7, labels=labels, kd=0.6, ce=0.4)
    ).sum()
    got = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, kind=kind, beta=beta, temperature=1.7, labels=labels,
        kd_weight=0.6, ce_weight=0.4, row_weight=weight, chunk_rows=chunk_rows, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert want > 0.1
    for g, e in zip(torch.autograd.grad(got, asked), torch.autograd.grad(want, asked)):
        assert e.abs().max() > 1e-4
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_rows_with_any_upstream_factor(kind, backend):
    """reduction none: the chunks are computed again with the factor of each row."""
    inputs = tensors(rows=(2, 5))
    labels = some_labels((2, 5))
    h, w, b, ht, wt, bt = inputs
    upstream = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    upstream[0, 1] = 0.0
    got = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, kind=kind, labels=labels, ce_weight=0.5, chunk_rows=3,
        backend=backend,
    )  # fmt: skip
    want = dense(*(t.flatten(0, 1) if t.dim() == 3 else t for t in inputs), kind=kind, labels=labels.flatten(), ce=0.5)
    assert got.shape == (2, 5)
    torch.testing.assert_close(got.flatten(), want, rtol=1e-10, atol=0)
    for g, e in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream.flatten())):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("upstream", [1.0, 3.0, -0.7])
def test_the_sum_with_any_upstream_factor(upstream, backend):
    inputs = tensors()
    h, w, b, ht, wt, bt = inputs
    loss = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, row_weight=torch.ones(N), chunk_rows=4, backend=backend
    )  # fmt: skip
    want = dense(*inputs).sum()
    factor = torch.tensor(upstream, dtype=torch.float64)
    for g, e in zip(torch.autograd.grad(loss, inputs, factor), torch.autograd.grad(want, inputs, factor)):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("softcap", "logit_scale"), [(3.0, 1.0), (None, 0.4), (5.0, 1.7)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_softcap_and_logit_scale(softcap, logit_scale, by_rows, backend):
    inputs, labels = tensors(), some_labels()
    h, w, b, ht, wt, bt = inputs
    want = dense(*inputs, kind="js", labels=labels, ce=0.5, cap=softcap, scale=logit_scale)
    plain = dense(*inputs, kind="js", labels=labels, ce=0.5)
    assert (want - plain).abs().max() > 1e-2
    weight = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    got = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, kind="js", labels=labels, ce_weight=0.5, softcap=softcap,
        logit_scale=logit_scale, row_weight=None if by_rows else weight, chunk_rows=4, backend=backend,
    )  # fmt: skip
    if by_rows:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        got = (got * weight).sum()
    want = (want * weight).sum()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for g, e in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


def test_a_pair_of_caps_and_scales(backend):
    h, w, _, ht, wt, _ = tensors(grad=False)
    got = linear_divergence(h, w, ht, teacher_weight=wt, softcap=(2.0, None), logit_scale=(1.0, 0.5), backend=backend)
    want = divergence(2 * torch.tanh(h @ w.T / 2), 0.5 * ht @ wt.T, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- teacher sources
def sources(h, w, ht, wt, k=6, temperature=1.0):
    """(name, teacher, options, what `divergence` or `sparse_divergence` makes of it from the student's logits)."""
    z = (ht @ wt.T).detach()
    log_probs = (z / temperature).log_softmax(-1)
    top, ids = log_probs.topk(k, -1)
    listed = TopKTeacher(ids, top, 1 - top.exp().sum(-1), temperature)
    sampled = SampledTeacher(
        torch.multinomial(log_probs.exp(), 9, True, generator=torch.Generator().manual_seed(1)), None, temperature
    )
    return {
        "hidden": (ht.detach(), {"teacher_weight": wt.detach()}, lambda x, **o: divergence(x, z, **o)),
        "logits": (z, {}, lambda x, **o: divergence(x, z, **o)),
        "log_probs": (z.log_softmax(-1), {}, lambda x, **o: divergence(x, z, **o)),
        "top_k": (listed, {}, lambda x, **o: sparse_divergence(x, listed, **o)),
        "sampled": (sampled, {}, lambda x, **o: sparse_divergence(x, sampled, **o)),
    }


# binary has no softmax, so log-probabilities are other logits to it; dkd and it need every class; samples give the forward KL
COMPARED = [
    (source, kind, beta)
    for source, kinds in {
        "hidden": KINDS, "logits": KINDS, "log_probs": SPARSE_KINDS, "top_k": SPARSE_KINDS, "sampled": ("forward_kl",)
    }.items() for kind, beta in CASES if kind in kinds and kind != "dkd"
]  # fmt: skip


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (2.0, 4.0)])
@pytest.mark.parametrize(("source", "kind", "beta"), COMPARED)
def test_every_kind_and_teacher_source(source, kind, beta, temperature, softcap, reduced, backend):
    """Against the dense loss of the same source, with cross-entropy and dropped rows."""
    h, w, _, ht, wt, _ = tensors()
    teacher, options, dense_loss = sources(h, w, ht, wt, temperature=temperature)[source]
    labels = some_labels()
    x = h @ w.T
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    rows = dense_loss(x, kind=kind, beta=beta, temperature=temperature, backend="reference")
    rows = 0.7 * rows + 0.3 * F.cross_entropy(x, labels, reduction="none")
    weight = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    got = linear_divergence(
        h, w, teacher, **options, kind=kind, beta=beta, temperature=temperature, labels=labels, kd_weight=0.7, ce_weight=0.3,
        softcap=(softcap, None), row_weight=weight if reduced else None, chunk_rows=4, backend=backend,
    )  # fmt: skip
    if not reduced:
        torch.testing.assert_close(got, rows, rtol=1e-9, atol=1e-12)
        got = (got * weight).sum()
    want = (rows * weight).sum()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    for g, e in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w))):
        assert e.abs().max() > 1e-3
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-10)


def test_a_teachers_logits_get_their_gradient(backend):
    h, w, *_ = tensors()
    z = torch.randn(N, V + 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    keep = torch.arange(N) % 3 != 0
    got = linear_divergence(
        h, w, z, kind="js", vocab_size=V - 2, row_weight=keep.double(), chunk_rows=3, backend=backend
    )
    want = divergence(h @ w.T, z, kind="js", vocab_size=V - 2, row_weight=keep.double(), backend="reference")
    before = z.detach().clone()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for g, e in zip(torch.autograd.grad(got, (h, w, z)), torch.autograd.grad(want, (h, w, z))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
    assert torch.equal(z.detach(), before), "the teacher's logits are read, not written"


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_two_vocabularies(wider, backend):
    """Qwen's 151936 and 152064: an error that names both, or the exact loss over the classes both have."""
    h, w, b, ht, wt, bt = tensors()
    if wider == "student":
        wt, bt = wt[: V - 5].detach().requires_grad_(), bt[: V - 5].detach().requires_grad_()
    else:
        w, b = w[: V - 5].detach().requires_grad_(), b[: V - 5].detach().requires_grad_()
    with pytest.raises(
        ValueError, match=rf"vocab_size: .*student_weight has {len(w)} and teacher_weight has {len(wt)}"
    ):
        linear_divergence(h, w, ht, teacher_weight=wt, backend=backend)
    got = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, vocab_size=V - 5, row_weight=torch.ones(N), chunk_rows=4,
        backend=backend,
    )  # fmt: skip
    want = dense(h, w[: V - 5], b[: V - 5], ht, wt[: V - 5], bt[: V - 5]).sum()
    asked = (h, w, b, ht, wt, bt)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for g, e in zip(torch.autograd.grad(got, asked), torch.autograd.grad(want, asked)):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- dtypes and accuracy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@needs_core
def test_error_budget(kind, dtype):
    """Against the reference, which has the same logits. A product's order of summation is torch's own and differs with the
    shape: in bfloat16 a logit lands on the neighbouring number now and then (1 of 2000 here), one rounding of it (2^-8) times its
    probability in a gradient; measured 0.4% of the largest gradient, and 2e-3 of a loss.
    """
    inputs, labels = tensors(dtype), some_labels()
    weight = torch.linspace(0.0, 2.0, N)

    def run(backend):
        def call(h, w, b, ht, wt, bt):
            return linear_divergence(
                h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, kind=kind, labels=labels, ce_weight=0.5,
                row_weight=weight, chunk_rows=4, backend=backend,
            )  # fmt: skip

        return call

    half = dtype == torch.bfloat16
    check_against_reference(
        run("cpu"), run("reference"), inputs, floor=(2e-3, 2e-3) if half else (1e-5, 1e-6),
        gradient_floor=(8e-3, 8e-3) if half else (1e-3 if dtype == torch.float16 else 1e-5, 2e-5),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_change_nothing(dtype, backend):
    """1 chunk, 64 chunks, and one row at a time. The weight's gradient is summed in float32: adding 64 parts in bfloat16 loses
    a digit of it (0.9% against 0.5% measured in a peer); here the parts of a chunk are rounded once, so 64 chunks stay within
    what a single rounding costs.
    """
    n = 64
    g = torch.Generator().manual_seed(0)
    h, w, ht, wt = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, D), (V, D), (n, DT), (V, DT))
    )
    results = []
    for chunk_rows in (n, 7, 1):
        leaves = [t.to(dtype).requires_grad_() for t in (h, w)]
        loss = linear_divergence(
            *leaves, ht.to(dtype), teacher_weight=wt.to(dtype), row_weight=torch.full((n,), 1 / n), chunk_rows=chunk_rows,
            backend=backend,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    exact = [t.to(dtype).double().requires_grad_() for t in (h, w)]
    ht, wt = ht.to(dtype).double(), wt.to(dtype).double()
    truth = dense(*exact, None, ht, wt, None).mean()
    truth = (truth.detach(), *torch.autograd.grad(truth, exact))
    eps = torch.finfo(dtype).eps if dtype != torch.float16 else 1e-3

    def error(got):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth)]

    whole = error(results[0])
    for got in results[1:]:
        for one, many in zip(whole, error(got)):
            assert many <= 1.3 * one + eps / 4


@needs_core
def test_autocast_takes_inputs_as_they_are():
    h, w, _, ht, wt, _ = tensors(torch.float32)

    def run():
        loss = linear_divergence(h, w, ht, teacher_weight=wt, row_weight=torch.ones(N), chunk_rows=4)
        return loss, *torch.autograd.grad(loss, (h, w, wt))

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(g, e) and g.dtype == torch.float32 for g, e in zip(got, want))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)]
)
def test_two_dtypes(dtypes, backend):
    """bf16 hidden states and a float32 head, as under autocast: products in the wider one; gradients in their own."""
    h, w, _, ht, wt, _ = tensors(torch.float32)
    h, w = h.detach().to(dtypes[0]).requires_grad_(), w.detach().to(dtypes[1]).requires_grad_()
    loss = linear_divergence(h, w, ht, teacher_weight=wt, row_weight=torch.ones(N), chunk_rows=4, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in (h, w)]
    want = dense(*exact, None, ht.double(), wt.double(), None).sum()
    assert loss.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for g, e, dtype in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(want, exact), dtypes):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


@needs_core
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_may_lie_over_the_logits(kind):
    """The pass in place equals the pass into buffers of its own, bit for bit: what the chunk loop relies on."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        g = torch.Generator().manual_seed(0)
        student, teacher = ((torch.randn(5, 3001, generator=g) * 3).to(dtype) for _ in range(2))
        labels, weight = (
            some_labels((5,), 3001),
            torch.linspace(0.0, 1.0, 5).to(torch.float64 if dtype == torch.float64 else torch.float32),
        )
        for temperature, ce in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.0)):
            for need_teacher in (False, kind != "dkd"):
                a, b = (1.0, 8.0) if kind == "dkd" else (0.3, 0.0)
                options = Options(kind, a, b, temperature, 3001, 0.7, ce, 1.0, 1.0, 0.0, 0.0, 5)
                _, parts, *want = torch.ops.kdfast.divergence_sum(
                    student, teacher, labels, None, weight, kind, a, b, temperature, 3001, 1, 0.7, ce, 0.0, True, need_teacher
                )  # fmt: skip
                x, z = student.clone(), teacher.clone()
                got = dense_sum(x, z, labels, weight, options, True, need_teacher)
                assert torch.equal(got.to(parts.dtype), parts) and torch.equal(x, want[0])
                assert torch.equal(z, want[1] if need_teacher else teacher)


# ---------------------------------------------------------------- what is kept and what is computed
@needs_core
def test_no_more_than_two_chunks_and_only_the_gradients_asked_for():
    """The tensors that an op makes, largest first: two chunks of logits, dW of a trained head, nothing of size [N, V]."""
    h, w, _, ht, wt, _ = tensors(torch.float32, rows=(64,), classes=1000)
    made: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == "aten" and isinstance(out, torch.Tensor) and out._base is None:
                made.append(out.numel())
            return out

    for frozen in (False, True):
        made.clear()
        head = w.detach().requires_grad_(not frozen)
        teacher, teacher_weight, weight = ht.detach(), wt.detach(), torch.ones(64)
        with Recorder():
            loss = linear_divergence(h, head, teacher, teacher_weight=teacher_weight, row_weight=weight, chunk_rows=8)
        saved = [t.numel() for t in loss.grad_fn.saved_tensors if t is not None]
        assert max(made, default=0) <= 8 * 1000
        assert sorted(saved, reverse=True)[:2] == ([1000 * D, 64 * D] if not frozen else [64 * D, 0])


@needs_core
@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("fast", [True, False])
def test_a_bfloat16_weights_gradient_in_many_blocks(monkeypatch, logit_scale, fast):
    """37 classes of 130 features in tiles of 7 and 64, over chunks and with classes left out, equal one block's.

    fast: whether this CPU is taken as one with products in bfloat16.
    """
    chunks = sys.modules["kdfast.ops.linear_chunks"]
    monkeypatch.setattr(chunks, "bfloat16_products", lambda: fast)
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 3 * 4 * 130)  # three classes of a head at a time
    g = torch.Generator().manual_seed(0)
    h, w, ht, wt = (torch.randn(*s, generator=g).bfloat16() for s in ((N, 130), (V, 130), (N, DT), (V, DT)))
    w.requires_grad_()
    results = []
    for size in (40 << 20, 4000):
        monkeypatch.setattr(chunks, "GRADIENT_BYTES", size)
        loss = linear_divergence(
            h,
            w,
            ht,
            teacher_weight=wt,
            row_weight=torch.ones(N),
            chunk_rows=4,
            vocab_size=V - 2,
            logit_scale=logit_scale,
        )
        results.append(torch.autograd.grad(loss, w)[0])
    assert results[0].abs().max() > 0.1 and bool((results[0][-2:] == 0).all())
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-3)  # products of other shapes


@needs_core
def test_products_in_bfloat16_and_in_float32_round_alike(monkeypatch):
    """The logits are bfloat16 either way; the gradients of the slow CPUs' float32 products are at most nearer to the truth."""
    chunks = sys.modules["kdfast.ops.linear_chunks"]
    g = torch.Generator().manual_seed(0)
    h, w, ht, wt = (torch.randn(*s, generator=g).bfloat16() for s in ((N, 64), (V, 64), (N, DT), (V, DT)))
    results = {}
    for name, fast, convert in (("bf16", True, False), ("fp32", False, False), ("truth", True, True)):
        monkeypatch.setattr(chunks, "bfloat16_products", lambda fast=fast: fast)
        hidden, weight, th, tw = (t.double() if convert else t for t in (h, w, ht, wt))
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_divergence(hidden, weight, th, teacher_weight=tw, row_weight=torch.ones(N), chunk_rows=3)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for one, two, truth in zip(*(results[name] for name in ("bf16", "fp32", "truth"))):
        errors = [(value.double() - truth).norm() / truth.norm() for value in (one, two)]
        assert errors[1] < 1.2 * errors[0] + 1e-3 and errors[1] < 2e-2


@needs_core
def test_ignored_rows_are_left_out_before_the_products(monkeypatch):
    from kdfast.ops import linear_chunks

    h, w, _, ht, wt, _ = tensors(torch.float32)
    seen = []
    monkeypatch.setattr(linear_chunks, "product", _spy(linear_chunks.product, seen))
    keep = torch.arange(N) % 4 == 1
    h.data[~keep] = math.nan
    loss = linear_divergence(h, w, ht, teacher_weight=wt, row_weight=keep.float(), chunk_rows=2)
    rows = [a.shape[0] for a, _ in seen if a.shape[1] in (D, DT)]
    assert sum(rows) == 2 * int(keep.sum())  # student and teacher
    grads = torch.autograd.grad(loss, (h, w, wt))
    assert all(g.isfinite().all() for g in grads) and bool((grads[0][~keep] == 0).all())
    assert bool((grads[0][keep] != 0).any())


def _spy(function, seen):
    def spy(a, b, *rest, **options):
        seen.append((a, b))
        return function(a, b, *rest, **options)

    return spy


@pytest.mark.parametrize("rows", [(0,), (3, 0)])
def test_no_row(rows, backend):
    h, w, _, ht, wt, _ = tensors(rows=rows)
    out = linear_divergence(h, w, ht, teacher_weight=wt, backend=backend)
    assert out.shape == rows
    loss = linear_divergence(h, w, ht, teacher_weight=wt, row_weight=torch.ones(rows), backend=backend)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (h, w, wt)):
        assert bool((grad == 0).all())


def test_no_kept_row(backend):
    inputs = tensors()
    h, w, b, ht, wt, bt = inputs
    labels = torch.full((N,), -100)
    loss = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, labels=labels, ce_weight=1.0, row_weight=torch.zeros(N),
        chunk_rows=3, backend=backend,
    )  # fmt: skip
    assert loss.item() == 0.0
    for grad, tensor in zip(torch.autograd.grad(loss, inputs), inputs):
        assert grad.shape == tensor.shape and bool((grad == 0).all())


@needs_core
@pytest.mark.parametrize("frozen", ["student head", "student", "teacher"])
def test_each_gradient_alone(frozen):
    """Which inputs require grad decides what is computed; the others get None."""
    inputs = [t.detach() for t in tensors()]
    asked = {"student head": (0,), "student": (3, 4), "teacher": (0, 1)}[frozen]
    for i in asked:
        inputs[i].requires_grad_()
    h, w, b, ht, wt, bt = inputs
    loss = linear_divergence(
        h, w, ht, teacher_weight=wt, student_bias=b, teacher_bias=bt, row_weight=torch.ones(N), chunk_rows=4
    )
    want = dense(*inputs).sum()
    loss.backward()
    for i, e in zip(asked, torch.autograd.grad(want, [inputs[i] for i in asked])):
        torch.testing.assert_close(inputs[i].grad, e, rtol=1e-9, atol=1e-12)
    assert all(t.grad is None for i, t in enumerate(inputs) if i not in asked)


# ---------------------------------------------------------------- modes
@needs_core
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("source", ["hidden", "top_k"])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, source, reduced):
    h, w, _, ht, wt, _ = tensors(torch.float32)
    labels, weight = some_labels(), torch.linspace(0.0, 2.0, N)
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:5] for i in range(N)])

    def options(labels, weight):
        return {"labels": labels, "ce_weight": 0.5, "chunk_rows": 4, "row_weight": weight if reduced else None}

    def live(h, w, ht, wt, labels, weight):
        return linear_divergence(h, w, ht, teacher_weight=wt, kind="js", **options(labels, weight))

    def cached(h, w, ids, log_probs, labels, weight):
        return linear_divergence(h, w, TopKTeacher(ids, log_probs), kind="reverse_kl", **options(labels, weight))

    if source == "hidden":
        check_mode(mode, live, (h, w, ht, wt, labels, weight))
    else:
        check_mode(mode, cached, (h, w, ids, torch.full((N, 5), -2.0), labels, weight))


@needs_core
def test_second_derivative_of_the_reference():
    h, w, _, ht, wt, _ = tensors(rows=(3,), classes=5)
    call = lambda *x: linear_divergence(x[0], x[1], x[2], teacher_weight=x[3], kind="js", backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (h, w, ht, wt))
    assert torch.autograd.gradgradcheck(call, (h, w, ht, wt))


# ---------------------------------------------------------------- hypothesis
@needs_core
@given(
    rows=st.integers(0, 9), classes=st.integers(1, 40), width=st.integers(1, 9), chunk=st.integers(1, 10),
    kind=st.sampled_from([k for k in KINDS if k != "dkd"]), temperature=st.sampled_from([0.5, 1.0, 3.0]),
    scale=st.sampled_from([0.0, 1.0, 20.0]), masked=st.booleans(), strided=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_any_shape_against_the_dense_path(rows, classes, width, chunk, kind, temperature, scale, masked, strided, seed):
    g = torch.Generator().manual_seed(seed)
    h, w, ht, wt = (
        torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        for shape in ((rows, width), (classes, width), (rows, 3), (classes, 3))
    )
    if strided:  # every second row and column of something larger
        h, w = (t.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for t in (h, w))
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    weight = torch.rand(rows, generator=g, dtype=torch.float64)
    if masked:
        weight = torch.where(torch.rand(rows, generator=g) < 0.5, weight, 0.0)
    got = linear_divergence(
        h, w, ht, teacher_weight=wt, kind=kind, temperature=temperature, row_weight=weight, chunk_rows=chunk
    )
    want = divergence(h @ w.T, ht @ wt.T, kind=kind, temperature=temperature, row_weight=weight, backend="cpu")
    # two products of the same numbers differ by roundings of logits up to 4000 / T
    size = 1 + scale**2 * 30 / temperature
    torch.testing.assert_close(got, want, rtol=1e-12 * size, atol=1e-13 * size)
    assert got >= 0
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-11 * size, atol=1e-12 * size * max(scale, 1))


# ---------------------------------------------------------------- bad input
H, W, HT, WT = (torch.randn(4, 3), torch.randn(6, 3), torch.randn(4, 5), torch.randn(6, 5))
TOP = TopKTeacher(torch.zeros(4, 1, dtype=torch.long), torch.full((4, 1), -1.0))
BAD = {
    "head": (lambda: linear_divergence(H, torch.randn(6, 4), HT, teacher_weight=WT), r"student_weight: expected \[V, 3\].*got \(6, 4\)"),
    "teacher head": (lambda: linear_divergence(H, W, HT, teacher_weight=W), r"teacher_weight: expected \[V, 5\].*got \(6, 3\)"),
    "rows": (lambda: linear_divergence(H, W, HT[:3], teacher_weight=WT), r"teacher: expected the rows of student_hidden"),
    "vocabulary of logits": (lambda: linear_divergence(H, W, torch.randn(4, 7)), r"student_weight has 6 and teacher has 7"),
    "vocab_size": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, vocab_size=7), r"vocab_size: expected an int from 1 to 6"),
    "bias": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, student_bias=torch.zeros(5)), r"student_bias: expected shape \(6,\)"),
    "bias without head": (lambda: linear_divergence(H, W, torch.randn(4, 6), teacher_bias=torch.zeros(6)), r"teacher_bias: expected None"),
    "labels": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, ce_weight=1.0), r"labels: expected a Tensor.*ce_weight=0"),
    "label value": (
        lambda: linear_divergence(H, W, HT, teacher_weight=WT, ce_weight=1.0, labels=torch.tensor([0, 1, 6, 2])),
        r"labels: expected integers in \[0, 6\), got 6 at row 2",
    ),
    "kind": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, kind="kl"), r"kind: expected one of"),
    "kind of a list": (lambda: linear_divergence(H, W, TOP, kind="binary"), r"kind: expected one of .*got 'binary'"),
    "head of a list": (lambda: linear_divergence(H, W, TOP, teacher_weight=WT), r"teacher_weight: a TopKTeacher has no head"),
    "temperature": (lambda: linear_divergence(H, W, TOP, temperature=2.0), r"temperature: expected 1.0, at which .* got 2.0"),
    "chunk_rows": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, chunk_rows=0), r"chunk_rows: expected an int >= 1"),
    "softcap": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, softcap=-1.0), r"softcap: expected a finite number"),
    "row_weight": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, row_weight=torch.ones(3)), r"row_weight: expected shape \(4,\)"),
    "backend": (lambda: linear_divergence(H, W, HT, teacher_weight=WT, backend="cuda"), r"linear_divergence has no cuda backend"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@needs_core
def test_a_bad_value_names_its_chunk():
    h = H.clone()
    h[3] = math.inf
    with pytest.raises(ValueError, match=r"student: .*at row 1 \(of a chunk: rows 2 to 4\)"):
        linear_divergence(h, W, HT, teacher_weight=WT, chunk_rows=2)


def test_totals_carry_their_parts(backend):
    from kdfast.ops.linear_checks import check_linear

    h, w, _, ht, wt, _ = tensors()
    labels = some_labels()
    inputs, o, _ = check_linear(
        h, w, ht, teacher_weight=wt, student_bias=None, teacher_bias=None, kind="js", beta=0.5, temperature=1.0, labels=labels,
        kd_weight=0.6, ce_weight=0.4, vocab_size=None, softcap=None, logit_scale=1.0, row_weight=torch.ones(N), chunk_rows=4,
    )  # fmt: skip
    total, kd, ce = linear_divergence_total(inputs, o, backend, rows=False)
    torch.testing.assert_close(total, 0.6 * kd + 0.4 * ce)
    torch.testing.assert_close(ce, F.cross_entropy(h @ w.T, labels, reduction="sum"))
    assert not kd.requires_grad and not ce.requires_grad and kd > 0
