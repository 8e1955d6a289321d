"""Divergences between the softmax of two logit tensors, row by row.

With x = student / T, z = teacher / T, q = softmax(x), p = softmax(z) and d = log p - log q, all over the class axis:

    forward_kl        KL(p || q)         = sum p d
    reverse_kl        KL(q || p)         = sum -q d
    jeffreys          2 [(1-beta) KL(p || q) + beta KL(q || p)]             beta = 1/2: the Jeffreys divergence
    js                beta KL(p || m) + (1-beta) KL(q || m),  m = beta p + (1-beta) q
                      beta = 0 and beta = 1 mean forward and reverse KL, as in TRL and Liger: a jump, since the formula tends to 0 there
    js_rescaled       js / (beta (1-beta)): tends to forward KL at beta = 0 and to reverse KL at beta = 1, no jump
    skew_forward_kl   KL(p || beta p + (1-beta) q)
    skew_reverse_kl   KL(q || beta q + (1-beta) p)
    tvd               1/2 sum |p - q|
    alpha             (sum p^a q^(1-a) - 1) / (a (a-1)),  a = beta;  a = 1 and a = 0 are its limits, forward and reverse KL
    dkd               beta = (A, B):  A KL(b_p || b_q) + B KL(p^ || q^)      decoupled KD (Zhao et al. 2022, eq. 7)
                      b = (target, rest) as two classes, ^ = renormalised without the target class
    binary            sum over classes of KL(Bernoulli(sigmoid(z)) || Bernoulli(sigmoid(x))): no softmax

All but dkd and binary are f-divergences, sum q f(p/q), so their gradients have one form:

    dL/dx_i = v_i - q_i sum_j v_j,   v = q dL/dq          dL/dz_i = u_i - p_i sum_j u_j,   u = p dL/dp

and every kind is defined by its (term, v, u). `csrc/divergence_terms.h` has them, once for every compiled backend. The
kernels sum non-negative terms (p d + q - p instead of p d), so a KL of 5e-7 keeps four digits and none is negative.

-inf is a legal logit (a masked class): where both models have it the term is 0; forward KL is +inf, with a finite
gradient, where only the student has it. A row that is all -inf in either model counts as ignored: 0, zero gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _core
from kdfast._checks import (
    check_choice,
    check_dim,
    check_labels,
    check_number,
    check_pair,
    check_row_tensor,
    check_values,
)
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    address,
    compute_dtype,
    contiguous,
    direct,
    final_gradient_like,
    first_derivative_only,
    gradient_like,
    lib,
    operand,
    readable,
    scale_gradient,
    transforms_active,
)
from kdfast.cuda import limit as cuda_limit
from kdfast.cuda import reason as cuda_reason
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

KINDS = (
    "forward_kl", "reverse_kl", "jeffreys", "js", "js_rescaled", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha", "dkd", "binary",
)  # fmt: skip


# ---------------------------------------------------------------- reference: the definition, with every option
def divergence_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    row_weight: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """The equations of this module in plain torch: rows, or their sum weighted by `row_weight`. Any order of derivative."""
    classes = vocab_size or student.shape[dim]
    dtype = compute_dtype(student, teacher)
    inverse = 1.0 / temperature.to(dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else 1.0 / temperature
    x = student.movedim(dim, -1)[..., :classes].to(dtype) * inverse  # [..., C]
    z = teacher.movedim(dim, -1)[..., :classes].to(dtype) * inverse
    ignored = (x == -math.inf).all(-1) | (z == -math.inf).all(-1)  # [...]
    if row_weight is not None and not row_weight.requires_grad:
        ignored = ignored | (row_weight == 0)  # not read, as in the kernels
    x = torch.where(ignored.unsqueeze(-1), 0.0, x)
    z = torch.where(ignored.unsqueeze(-1), 0.0, z)
    if kind == "binary":
        rows = _bernoulli_kl(F.logsigmoid(z), F.logsigmoid(-z), F.logsigmoid(x), F.logsigmoid(-x)).sum(-1)
    else:
        log_q, log_p = F.log_softmax(x, -1), F.log_softmax(z, -1)
        if kind == "dkd":
            assert labels is not None
            rows = _dkd_rows(log_q, log_p, labels, beta)  # type: ignore[arg-type]  # a pair, as _check_kind saw
        else:
            rows = _f_divergence_rows(kind, log_q, log_p, beta)
    rows = torch.where(ignored, 0.0, rows)
    return rows if row_weight is None else (rows * row_weight.to(dtype)).sum()


def _kl(log_p: Tensor, log_m: Tensor) -> Tensor:
    """sum p log(p/m), 0 where p = 0 (also where both logs are -inf)."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_m, 0.0)).sum(-1)


def _f_divergence_rows(kind: str, log_q: Tensor, log_p: Tensor, beta) -> Tensor:
    if kind in ("js", "js_rescaled", "alpha") and beta in (0, 1):  # the limits, see the module docstring
        forward = beta == (1 if kind == "alpha" else 0)
        kind = "forward_kl" if forward else "reverse_kl"
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "jeffreys":
        return 2 * ((1 - beta) * _kl(log_p, log_q) + beta * _kl(log_q, log_p))
    if kind in ("js", "js_rescaled"):
        log_m = _log_mixture(log_p, log_q, beta)
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
        return rows / (beta * (1 - beta)) if kind == "js_rescaled" else rows
    if kind == "skew_forward_kl":
        return _kl(log_p, _log_mixture(log_p, log_q, beta))
    if kind == "skew_reverse_kl":
        return _kl(log_q, _log_mixture(log_q, log_p, beta))
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    assert kind == "alpha"
    both = (log_p > -math.inf) & (log_q > -math.inf)
    power = beta * torch.where(both, log_p, 0.0) + (1 - beta) * torch.where(both, log_q, 0.0)
    total = torch.where(both, power.exp(), 0.0).sum(-1)
    if beta > 1:  # q = 0 < p: infinite, as p^a q^(1-a) says
        total = total + torch.where((log_q == -math.inf) & (log_p > -math.inf), math.inf, 0.0).sum(-1)
    if beta < 0:
        total = total + torch.where((log_p == -math.inf) & (log_q > -math.inf), math.inf, 0.0).sum(-1)
    return (total - 1) / (beta * (beta - 1))


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1-weight) b) in log space: exp(log_a) may underflow where the mixture does not."""
    if weight in (0, 1):
        return log_a if weight == 1 else log_b
    either = (log_a > -math.inf) | (log_b > -math.inf)  # logaddexp(-inf, -inf) has a NaN gradient
    a = torch.where(either, log_a + math.log(weight), 0.0)
    b = torch.where(either, log_b + math.log1p(-weight), 0.0)
    return torch.where(either, torch.logaddexp(a, b), -math.inf)


def _bernoulli_kl(log_p: Tensor, log_not_p: Tensor, log_q: Tensor, log_not_q: Tensor) -> Tensor:
    """KL of two coins from the logs of both sides, 0 where a side has no mass."""
    p, not_p = log_p.exp(), log_not_p.exp()
    return p * torch.where(p > 0, log_p - log_q, 0.0) + not_p * torch.where(not_p > 0, log_not_p - log_not_q, 0.0)


def _dkd_rows(log_q: Tensor, log_p: Tensor, labels: Tensor, beta: tuple[float, float]) -> Tensor:
    index = labels.long().unsqueeze(-1)
    rest_q = log_q.scatter(-1, index, -math.inf)  # log-probabilities without the target class
    rest_p = log_p.scatter(-1, index, -math.inf)
    if log_q.shape[-1] == 1:  # no other class: nothing to compare
        return (log_q - log_p).sum(-1) * 0.0
    log_rest_q, log_rest_p = rest_q.logsumexp(-1), rest_p.logsumexp(-1)  # log of the mass outside the target
    target = _bernoulli_kl(
        log_p.gather(-1, index).squeeze(-1), log_rest_p, log_q.gather(-1, index).squeeze(-1), log_rest_q
    )
    others = _kl(rest_p - log_rest_p.unsqueeze(-1), rest_q - log_rest_q.unsqueeze(-1))
    return beta[0] * target + beta[1] * others


# ---------------------------------------------------------------- registration
# Shared tail of every schema: kind, its two parameters, the temperature, the number of classes compared, the class axis.
_TAIL = "str kind, float a, float b, float temperature, int classes, int dim"

# Last, whether a GPU runs the CUDA kernels instead of Triton's; torch leaves a default out when it calls a kernel.
lib.define(
    f"divergence_rows(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_temperature, {_TAIL}, bool cuda=False) "
    "-> (Tensor, Tensor)"
)
lib.define(
    "divergence_rows_backward(Tensor grad_rows, Tensor student, Tensor teacher, Tensor stats, Tensor? labels, "
    f"Tensor? row_temperature, {_TAIL}, bool need_student, bool need_teacher, bool cuda=False) -> (Tensor, Tensor)"
)
lib.define(
    "divergence_sum(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_temperature, Tensor? row_weight, "
    f"{_TAIL}, float kd_factor, float ce_factor, float label_smoothing, bool need_student, bool need_teacher, bool cuda=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

# Per-row scalars kept for the backward: largest logit and log-sum-exp above it, of student and teacher; the difference of the
# whole log-sum-exps; sum of v, sum of u (module docstring). The core has the same number (csrc/cpu/divergence.h).
N_STATS = 7


def _row_shape(student: Tensor, dim: int) -> list[int]:
    return [*student.shape[:dim], *student.shape[dim + 1 :]]


@torch.library.register_fake("kdfast::divergence_rows")
def _(student, teacher, labels, row_temperature, kind, a, b, temperature, classes, dim, cuda=False):
    shape = _row_shape(student, dim)
    dtype = compute_dtype(student, teacher)
    return student.new_empty(shape, dtype=dtype), student.new_empty([N_STATS, *shape], dtype=dtype)


@torch.library.register_fake("kdfast::divergence_rows_backward")
def _(
    grad_rows,
    student,
    teacher,
    stats,
    labels,
    row_temperature,
    kind,
    a,
    b,
    temperature,
    classes,
    dim,
    need_student,
    need_teacher,
    cuda=False,
):
    return gradient_like(student, need_student), gradient_like(teacher, need_teacher)


@torch.library.register_fake("kdfast::divergence_sum")
def _(student, teacher, labels, row_temperature, row_weight, kind, a, b, temperature, classes, dim,
      kd_factor, ce_factor, label_smoothing, need_student, need_teacher, cuda=False):  # fmt: skip
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(2, dtype=dtype),
        final_gradient_like(student, need_student),
        final_gradient_like(teacher, need_teacher),
    )


@torch.library.impl(lib, "divergence_rows", "CPU")
def _divergence_rows_cpu(student, teacher, labels, row_temperature, kind, a, b, temperature, classes, dim):
    shape, dtype = _row_shape(student, dim), compute_dtype(student, teacher)
    rows = torch.empty(shape, dtype=dtype)
    stats = torch.empty([N_STATS, *shape], dtype=dtype)
    labels, row_temperature = contiguous(labels, torch.int64), contiguous(row_temperature, dtype)
    _core.core.divergence_rows(
        *operand(student), *operand(teacher), student.shape, teacher.shape[dim], dim, classes, kind, a, b, temperature,
        address(labels), address(row_temperature), address(rows), address(stats),
    )  # fmt: skip
    return rows, stats


@torch.library.impl(lib, "divergence_rows_backward", "CPU")
def _divergence_rows_backward_cpu(grad_rows, student, teacher, stats, labels, row_temperature, kind, a, b, temperature, classes, dim,
                                  need_student, need_teacher):  # fmt: skip
    dtype = compute_dtype(student, teacher)
    grad_student, grad_teacher = gradient_like(student, need_student), gradient_like(teacher, need_teacher)
    labels, row_temperature, grad_rows = (
        contiguous(labels, torch.int64),
        contiguous(row_temperature, dtype),
        contiguous(grad_rows, dtype),
    )
    _core.core.divergence_rows_backward(
        *operand(student), *operand(teacher), student.shape, teacher.shape[dim], dim, classes, kind, a, b, temperature,
        address(labels), address(row_temperature), address(grad_rows), address(stats),
        *operand(grad_student), *operand(grad_teacher),
    )  # fmt: skip
    return grad_student, grad_teacher


@torch.library.impl(lib, "divergence_sum", "CPU")
def _divergence_sum_cpu(student, teacher, labels, row_temperature, row_weight, kind, a, b, temperature, classes, dim,
                        kd_factor, ce_factor, label_smoothing, need_student, need_teacher):  # fmt: skip
    dtype = compute_dtype(student, teacher)
    loss, parts = torch.empty((), dtype=dtype), torch.empty(2, dtype=dtype)
    grad_student, grad_teacher = final_gradient_like(student, need_student), final_gradient_like(teacher, need_teacher)
    labels, row_temperature, row_weight = (
        contiguous(labels, torch.int64),
        contiguous(row_temperature, dtype),
        contiguous(row_weight, dtype),
    )
    _core.core.divergence_sum(
        *operand(student), *operand(teacher), student.shape, teacher.shape[dim], dim, classes, kind, a, b, temperature,
        address(labels), address(row_temperature), address(row_weight), kd_factor, ce_factor, label_smoothing,
        *operand(grad_student), *operand(grad_teacher), address(loss), address(parts),
    )  # fmt: skip
    return loss, parts, grad_student, grad_teacher


register("divergence_rows", "divergence", "rows")
register("divergence_rows_backward", "divergence", "rows_backward")
register("divergence_sum", "divergence", "weighted_sum")

# ---------------------------------------------------------------- autograd
_rows_op = direct(torch.ops.kdfast.divergence_rows.default, _divergence_rows_cpu)
_rows_backward_op = direct(torch.ops.kdfast.divergence_rows_backward.default, _divergence_rows_backward_cpu)
_sum_op = direct(torch.ops.kdfast.divergence_sum.default, _divergence_sum_cpu)


class _Rows(torch.autograd.Function):
    """Rows: saves its inputs and O(rows) scalars, recomputes in the backward, so any upstream factor per row is exact."""

    @staticmethod
    def forward(ctx, student, teacher, labels, row_temperature, options, cuda):
        rows, stats = _rows_op(student, teacher, labels, row_temperature, *options, *cuda)
        _Rows._save(ctx, student, teacher, labels, row_temperature, options, cuda, stats)
        return rows

    @staticmethod
    def _save(ctx, student, teacher, labels, row_temperature, options, cuda, stats):
        ctx.save_for_backward(student, teacher, labels, row_temperature, stats)
        ctx.options, ctx.cuda = options, cuda

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows):
        student, teacher, labels, row_temperature, stats = ctx.saved_tensors
        need_student, need_teacher = ctx.needs_input_grad[:2]
        grad_student, grad_teacher = _rows_backward_op(
            grad_rows, student, teacher, stats, labels, row_temperature, *ctx.options, need_student, need_teacher, *ctx.cuda
        )  # fmt: skip
        return grad_student if need_student else None, grad_teacher if need_teacher else None, None, None, None, None


class _Sum(torch.autograd.Function):
    """The weighted sum: the forward already stores the final gradient, so the logits are read in one go and not kept."""

    @staticmethod
    def forward(ctx, student, teacher, labels, row_temperature, row_weight, options, cuda):
        need_student, need_teacher = ctx.needs_input_grad[:2]
        loss, parts, grad_student, grad_teacher = _sum_op(
            student, teacher, labels, row_temperature, row_weight, *options, need_student, need_teacher, *cuda
        )
        ctx.save_for_backward(grad_student, grad_teacher)
        ctx.dtypes = student.dtype, teacher.dtype
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss, _):
        need_student, need_teacher = ctx.needs_input_grad[:2]
        grad_student, grad_teacher = ctx.saved_tensors
        return (
            scale_gradient(grad_student, grad_loss, ctx.dtypes[0]) if need_student else None,
            scale_gradient(grad_teacher, grad_loss, ctx.dtypes[1]) if need_teacher else None,
            None, None, None, None, None,
        )  # fmt: skip


class _RowsTransform(torch.autograd.Function):
    """`_Rows` in the form torch.func transforms ask for; it costs 12 us more, so eager does not use it."""

    @staticmethod
    def forward(student, teacher, labels, row_temperature, options, cuda):
        return _rows_op(student, teacher, labels, row_temperature, *options, *cuda)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Rows._save(ctx, *inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_rows, _):
        return _Rows.backward(ctx, grad_rows)


# What the ops get as their last argument, `cuda`, from the backend chosen: nothing for the others.
_CUDA = {"cuda": (True,)}


def _apply_rows(student, teacher, labels, row_temperature, options, cuda) -> Tensor:
    if not torch.is_grad_enabled():
        return _rows_op(student, teacher, labels, row_temperature, *options, *cuda)[0]
    if transforms_active():
        return _RowsTransform.apply(student, teacher, labels, row_temperature, options, cuda)[0]
    return _Rows.apply(student, teacher, labels, row_temperature, options, cuda)


def _apply_sum(student, teacher, labels, row_temperature, row_weight, options, cuda) -> tuple[Tensor, Tensor]:
    if (
        not torch.is_grad_enabled()
    ):  # inside a Function the need would still be reported, and a gradient made for nobody
        return _sum_op(student, teacher, labels, row_temperature, row_weight, *options, False, False, *cuda)[:2]
    return _Sum.apply(student, teacher, labels, row_temperature, row_weight, options, cuda)


# ---------------------------------------------------------------- public
def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    row_weight: Tensor | None = None,
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Divergence of every row, or their weighted sum; the equations stand at the top of this module.

    Args:
        student, teacher: logits, the same shape but for the class axis `dim`; float16, bfloat16, float32 or float64, also
            two different ones. Any strides: a slice or an NCHW map (`dim=1`) is read in place.
        kind: one of KINDS. beta: its parameter, the order for "alpha", a pair (A, B) for "dkd".
        temperature: T > 0, a number or one value per row (a gradient for it comes from the reference).
        labels: [...] integers, the target class; for kind="dkd" only.
        vocab_size: compare only the first so many classes of both (the rest gets zero gradient). Without it, unequal
            widths raise.
        row_weight: [...] weights; the result is then the scalar sum of weight * row, and its gradient is made in the
            forward pass. A row of weight 0 is not read.
        backend: "cpu", "cuda", "triton", "reference" or None for the best that can run.
    Returns:
        float32 rows [...] (float64 for float64 input), the shape of the logits without `dim`; or their weighted sum.
    Differentiable in student and teacher, once; `backend="reference"` gives every derivative, also for temperature and row_weight.
    Raises:
        ValueError: labels out of range, +inf or NaN logits on the CPU (elsewhere under `kdfast.debug()`), bad options.

    >>> rows = divergence(torch.randn(4, 10), torch.randn(4, 10), kind="js", temperature=2.0)
    """
    dim, classes, a, b = _check(student, teacher, kind, beta, temperature, labels, vocab_size, row_weight, dim)
    chosen = _choose(student, teacher, temperature, row_weight, kind, classes, dim, backend)
    if chosen != "cpu" and debugging():
        check_values({"student": student, "teacher": teacher}, labels, classes, dim)
    if chosen == "reference":
        return divergence_reference(
            student, teacher, kind=kind, beta=beta, temperature=temperature, labels=labels, vocab_size=classes,
            row_weight=row_weight, dim=dim,
        )  # fmt: skip
    number, rows_t = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    options, cuda = (kind, a, b, number, classes, dim), _CUDA.get(chosen, ())
    if row_weight is None:
        return _apply_rows(student, teacher, labels, rows_t, options, cuda)
    if transforms_active():
        return (_apply_rows(student, teacher, labels, rows_t, options, cuda) * row_weight).sum()
    return _apply_sum(student, teacher, labels, rows_t, row_weight, (*options, 1.0, 0.0, 0.0), cuda)[0]


def divergence_total(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    beta: float | tuple[float, float],
    temperature: float | Tensor,
    labels: Tensor | None,
    vocab_size: int | None,
    row_weight: Tensor | None,
    kd_factor: float,
    ce_factor: float = 0.0,
    label_smoothing: float = 0.0,
    dim: int = -1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What the reduced losses call: kd_factor * KD + ce_factor * CE in one pass over the logits, and (KD, CE) detached.

    KD = sum row_weight * divergence, CE = sum row_weight * cross_entropy(student at T = 1, labels); no row_weight means 1
    for every row (a factor is cheaper than a tensor of equal weights). Labels of rows of weight 0 are not read.
    """
    dim, classes, a, b = _check(
        student, teacher, kind, beta, temperature, labels, vocab_size, row_weight, dim, ce=ce_factor != 0
    )
    chosen = _choose(student, teacher, temperature, row_weight, kind, classes, dim, backend)
    if chosen == "reference" or transforms_active():
        backend = chosen
        target = labels if kind == "dkd" else None
        if target is not None and row_weight is not None:
            target = torch.where(row_weight != 0, target, 0)
        weight = (
            student.new_ones(_row_shape(student, dim), dtype=compute_dtype(student, teacher))
            if row_weight is None
            else row_weight.to(compute_dtype(student, teacher))
        )
        kd = divergence(
            student, teacher, kind=kind, beta=beta, temperature=temperature, labels=target, vocab_size=classes,
            row_weight=weight, dim=dim, backend=backend,
        )  # fmt: skip
        ce = torch.zeros_like(kd)
        if ce_factor != 0:
            assert labels is not None
            ce = (cross_entropy_rows(student, labels, weight != 0, classes, dim, label_smoothing) * weight).sum()
        # a term of factor 0 is left out: 0 times an infinite divergence is not 0
        loss = sum((f * term for f, term in ((kd_factor, kd), (ce_factor, ce)) if f != 0), start=torch.zeros_like(kd))
        return loss, torch.stack((kd, ce)).detach()
    if chosen != "cpu" and debugging():
        kept = labels if labels is None or row_weight is None else torch.where(row_weight != 0, labels, 0)
        check_values({"student": student, "teacher": teacher}, kept, classes, dim)
    number, rows_t = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    options = (kind, a, b, number, classes, dim, kd_factor, ce_factor, label_smoothing)
    return _apply_sum(student, teacher, labels, rows_t, row_weight, options, _CUDA.get(chosen, ()))


def cross_entropy_rows(
    student: Tensor, labels: Tensor, keep: Tensor, classes: int, dim: int, label_smoothing: float
) -> Tensor:
    """Cross-entropy at temperature 1 of each kept row, 0 for the others, whose labels may be anything."""
    logits = student.movedim(dim, -1)[..., :classes].to(compute_dtype(student))
    keep = keep & ~(logits == -math.inf).all(-1)  # a row of only -inf is ignored, as in the fused pass
    logits = torch.where(keep.unsqueeze(-1), logits, 0.0)
    safe = torch.where(keep, labels.long(), 0)
    rows = F.cross_entropy(
        logits.reshape(-1, classes), safe.reshape(-1), reduction="none", label_smoothing=label_smoothing
    ).reshape(safe.shape)
    return torch.where(keep, rows, 0.0)


# ---------------------------------------------------------------- checks and choice
def _check(student, teacher, kind, beta, temperature, labels, vocab_size, row_weight, dim, ce=False):
    """Returns (dim >= 0, number of classes compared, the kind's two parameters). A few us on the tiny path."""
    check_pair(student, teacher)
    if student.dim() == 0 or student.dim() != teacher.dim():
        raise ValueError(
            f"teacher: expected as many dimensions as student (at least 1), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    dim = check_dim(student, dim)
    widths = student.shape[dim], teacher.shape[dim]
    if vocab_size is None:
        classes = widths[0]
        if student.shape != teacher.shape:
            if widths[0] != widths[1]:
                raise ValueError(
                    f"teacher: expected {widths[0]} classes along dim {dim} as the student has, got {widths[1]}; "
                    "pass vocab_size to compare only the first classes of both"
                )
            raise ValueError(f"teacher: expected shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    else:
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= min(widths):
            raise ValueError(
                f"vocab_size: expected an int from 1 to {min(widths)} (the smaller of the widths {widths}), got {vocab_size!r}"
            )
        classes = vocab_size
        if _row_shape(student, dim) != _row_shape(teacher, dim):
            raise ValueError(
                f"teacher: expected the rows of student {tuple(student.shape)}, got {tuple(teacher.shape)}"
            )
    if classes == 0:
        raise ValueError(f"student: expected at least one class along dim {dim}, got shape {tuple(student.shape)}")
    a, b = _check_kind(kind, beta)
    if isinstance(temperature, Tensor):
        check_row_tensor("temperature", temperature, torch.Size(_row_shape(student, dim)), student.device)
        if (debugging() or readable(temperature)) and not bool(((temperature > 0) & (temperature < math.inf)).all()):
            raise ValueError("temperature: expected positive finite values, got one that is not")
    else:
        check_number("temperature", temperature, low=0.0, open_low=True)
    if kind == "dkd" or ce:
        if labels is None:
            raise ValueError(
                f"labels: expected a Tensor for {'kind=' + repr(kind) if kind == 'dkd' else 'cross-entropy'}, got None"
            )
        check_labels(labels, torch.Size(_row_shape(student, dim)), student.device)
    elif labels is not None:
        raise ValueError(f"labels: only kind='dkd' reads them, got a Tensor with kind={kind!r}")
    if row_weight is not None:
        check_row_tensor("row_weight", row_weight, torch.Size(_row_shape(student, dim)), student.device)
    return dim, classes, a, b


def _check_kind(kind: str, beta) -> tuple[float, float]:
    check_choice("kind", kind, KINDS)
    if kind == "dkd":
        if not isinstance(beta, Sequence) or len(beta) != 2:
            raise ValueError(f"beta: expected a pair (target weight, non-target weight) for kind='dkd', got {beta!r}")
        return check_number("beta[0]", beta[0]), check_number("beta[1]", beta[1])
    if kind in ("forward_kl", "reverse_kl", "tvd", "binary"):
        return 0.0, 0.0
    if kind == "alpha":
        return check_number("beta", beta), 0.0
    return check_number("beta", beta, low=0.0, high=1.0), 0.0


# Up to here Triton's kernels read a row once as well (kdfast/triton/launch.py), several to a program; beyond, CUDA's read less.
_READ_ONCE = 8192


def _choose(student, teacher, temperature, row_weight, kind, classes, dim, backend) -> str:
    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        if student.device.type not in ("cpu", "meta"):
            return f"the tensors are on {student.device}"
        if student.dim() > 9:
            return f"the core takes at most 9 dimensions, got {student.dim()}"
        return _reference_only(teacher, temperature, row_weight, kind)

    def triton() -> str | None:
        return triton_reason("divergence", student, teacher) or _reference_only(teacher, temperature, row_weight, kind)

    def cuda() -> str | None:
        return (
            cuda_reason("divergence", student, teacher)
            or _not_by_cuda(student, teacher, kind, classes, dim)
            or _reference_only(teacher, temperature, row_weight, kind)
        )

    if classes > _READ_ONCE:
        return choose("divergence", backend, {"cpu": cpu, "cuda": cuda, "triton": triton}, (student, teacher))
    return choose("divergence", backend, {"cpu": cpu, "triton": triton, "cuda": cuda}, (student, teacher))


def _not_by_cuda(student, teacher, kind, classes, dim) -> str | None:
    if kind in ("dkd", "binary"):
        return f"kind={kind!r} is Triton's"
    if student.dtype != teacher.dtype or student.dtype == torch.float64:
        return f"it takes two tensors of one dtype, not float64; got {student.dtype} and {teacher.dtype}"
    if student.stride(dim) != 1 or teacher.stride(dim) != 1:
        return "the classes do not lie side by side"
    if student.dim() > 9:
        return f"the core takes at most 9 dimensions, got {student.dim()}"
    most = cuda_limit("divergence_most", student.device.index, student.itemsize)
    if classes > most:
        return f"a row of {classes} classes does not fit the shared memory of a cluster ({most} do)"
    return None


def _reference_only(teacher, temperature, row_weight, kind) -> str | None:
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        return "a gradient for temperature comes from the reference only"
    if row_weight is not None and row_weight.requires_grad:
        return "a gradient for row_weight comes from the reference only"
    if kind == "dkd" and teacher.requires_grad:
        return "kind='dkd' has no fused teacher gradient"
    return None
