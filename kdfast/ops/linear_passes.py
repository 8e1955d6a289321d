"""One chunk of `kdfast.ops.linear_divergence`: from the logits of both models to values and the logits' gradients.

`Core` is the compiled core, in place. `Eager` is `divergence` by its best backend on any device, differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import _core
from kdfast._library import address, compute_dtype, operand
from kdfast.ops.divergence import N_STATS, cross_entropy_rows, divergence
from kdfast.ops.linear_chunks import Inputs, Options, pick, total_of
from kdfast.ops.sparse_divergence import (
    bucket_logits,
    bucket_logits_backward,
    bucket_logits_reference,
    row_blocks,
    tail_floor,
    teacher_buckets,
)


# ---------------------------------------------------------------- one chunk by torch: every option, any device
def soft_cap(logits: Tensor, cap: float) -> Tensor:
    return logits if cap == 0 else torch.tanh(logits.to(compute_dtype(logits)) / cap) * cap


def logit_rows(x: Tensor, z: Tensor, part: Inputs, o: Options, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """(L, D, CE) of rows of logits (z: log-probabilities of a list, with ids), 0 where row_weight is 0."""
    keep = x.new_ones(len(x), dtype=torch.bool) if part.row_weight is None else part.row_weight != 0
    labels = None if part.labels is None else torch.where(keep, part.labels, 0)
    x_kd, temperature = x, o.temperature
    if part.ids is not None:
        assert part.tail is not None
        x_kd, temperature = bucket_logits_reference(x, part.ids, o.temperature), 1.0
        z = teacher_buckets(z, part.ids, part.tail, x_kd.detach(), tail_floor(o.kind, o.a))
    elif z.shape[1] != o.classes:
        z = z[:, : o.classes]
    if part.row_weight is not None:
        dead = keep.logical_not().unsqueeze(-1)  # rows that may hold anything
        x_kd, z = x_kd.masked_fill(dead, 0.0), z.masked_fill(dead, 0.0)
    kd = divergence(
        x_kd, z, kind=o.kind, beta=(o.a, o.b) if o.kind == "dkd" else o.a, temperature=temperature,
        labels=labels if o.kind == "dkd" else None, backend=backend,
    ).masked_fill(~keep, 0.0)  # fmt: skip
    ce = torch.zeros_like(kd)
    if o.ce_factor != 0:
        assert labels is not None
        ce = cross_entropy_rows(x, labels, keep, o.classes, -1, 0.0)
    return total_of(kd, ce, o), kd, ce


class Engine:
    """How one chunk becomes values and gradients. rows: (D, CE) [n]. sum: both summed with row_weight, the gradients of x and z."""

    @staticmethod
    def rows(x: Tensor, z: Tensor, part: Inputs, o: Options) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @staticmethod
    def sum(
        x: Tensor, z: Tensor, part: Inputs, o: Options, need_student: bool, need_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Eager(Engine):
    """`divergence` by the best backend of the device, differentiated chunk by chunk."""

    @staticmethod
    def rows(x, z, part, o):
        return Eager._rows(x, z, part._replace(row_weight=None), o)[1:]

    @staticmethod
    def _rows(x, z, part, o):
        return logit_rows(soft_cap(x, o.student_cap), soft_cap(z, o.teacher_cap), part, o, backend=None)

    @staticmethod
    def sum(x, z, part, o, need_student, need_teacher):
        leaves = [t.detach().requires_grad_(need) for t, need in ((x, need_student), (z, need_teacher))]
        asked = [t for t in leaves if t.requires_grad]
        with torch.set_grad_enabled(bool(asked)):
            total, kd, ce = Eager._rows(
                *leaves, part._replace(row_weight=None), o
            )  # compacted: no row of weight 0 is here
            weight = torch.ones_like(total) if part.row_weight is None else part.row_weight.to(total.dtype)
            loss = (total * weight).sum()
            asked_of = {"allow_unused": True, "materialize_grads": True}  # a term of factor 0 is not in the graph
            grads = iter(
                torch.autograd.grad(loss, asked, **asked_of) if loss.requires_grad else map(torch.zeros_like, asked)
            )
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        sums = torch.stack([(t.detach() * weight).sum(dtype=wide) for t in (kd, ce)])
        return sums, *(next(grads) if need else t for t, need in ((x, need_student), (z, need_teacher)))


class Core(Engine):
    """The compiled core; gradients lie over the logits."""

    @staticmethod
    def rows(x, z, part, o):
        if part.ids is None:
            return dense_rows(x, z, part.labels, o)
        return sparse_rows(x, z, part.ids, part.tail, part.labels, o)

    @staticmethod
    def sum(x, z, part, o, need_student, need_teacher):
        if part.ids is None:
            return dense_sum(x, z, part.labels, part.row_weight, o, need_student, need_teacher), x, z
        return sparse_sum(x, z, part.ids, part.tail, part.labels, part.row_weight, o, need_student), x, z


# ---------------------------------------------------------------- one chunk by the core: values, and gradients in place
def _core_sum(student, teacher, labels, row_weight, o: Options, need_student, need_teacher) -> Tensor:
    """(sum of weighted divergences, of weighted cross-entropies); gradients over the logits they belong to."""
    dtype = compute_dtype(student, teacher)
    loss, parts = torch.empty((), dtype=dtype), torch.empty(2, dtype=dtype)
    none = student.new_empty(0)
    _core.core.divergence_sum(
        *operand(student), *operand(teacher), student.shape, teacher.shape[1], 1, o.classes, o.kind, o.a, o.b, o.temperature,
        address(labels), 0, address(row_weight), o.kd_factor, o.ce_factor, 0.0,
        *operand(student if need_student else none), *operand(teacher if need_teacher else none), address(loss), address(parts),
    )  # fmt: skip
    return parts.double()


def capped(logits: Tensor, cap: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """(logits after the soft cap in float32 or `dtype`, its slope)."""
    wide = logits.to(dtype or compute_dtype(logits), copy=True)
    if cap == 0:
        return wide, None
    wide.div_(cap).tanh_()
    slope = 1 - wide * wide
    return wide.mul_(cap), slope


def dense_sum(student, teacher, labels, row_weight, o: Options, need_student, need_teacher) -> Tensor:
    if o.student_cap == 0 and o.teacher_cap == 0:
        return _core_sum(student, teacher, labels, row_weight, o, need_student, need_teacher)
    total = torch.zeros(2, dtype=torch.float64)
    for at in row_blocks(student):
        (x, x_slope), (z, z_slope) = capped(student[at], o.student_cap), capped(teacher[at], o.teacher_cap)
        total += _core_sum(x, z, pick(labels, at), pick(row_weight, at), o, need_student, need_teacher)
        for need, to, grad, slope in ((need_student, student, x, x_slope), (need_teacher, teacher, z, z_slope)):
            if need:
                to[at] = grad if slope is None else grad.mul_(slope)
    return total


def dense_rows(student, teacher, labels, o: Options) -> tuple[Tensor, Tensor]:
    """(divergences, cross-entropies) of the rows of a chunk."""
    dtype = compute_dtype(student, teacher)
    kd, ce = torch.zeros(len(student), dtype=dtype), torch.zeros(len(student), dtype=dtype)
    has_cap = o.student_cap != 0 or o.teacher_cap != 0
    for at in row_blocks(student) if has_cap or o.ce_factor != 0 else (slice(0, len(student)),):
        x, z = student[at], teacher[at]
        if has_cap:
            x, z = capped(x, o.student_cap)[0], capped(z, o.teacher_cap)[0]
        stats = torch.empty([N_STATS, len(x)], dtype=dtype)
        _core.core.divergence_rows(
            *operand(x), *operand(z), x.shape, z.shape[1], 1, o.classes, o.kind, o.a, o.b, o.temperature,
            address(pick(labels, at) if o.kind == "dkd" else None), 0, address(kd[at]), address(stats),
        )  # fmt: skip
        if o.ce_factor != 0:
            ce[at] = _cross_entropy(x, labels[at], o.classes)
    return kd, ce


def _cross_entropy(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    return cross_entropy_rows(logits, labels, torch.ones_like(labels, dtype=torch.bool), classes, -1, 0.0)


def sparse_rows(student, log_probs, ids, tail, labels, o: Options) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student)
    kd, ce = torch.zeros(len(student), dtype=dtype), torch.zeros(len(student), dtype=dtype)
    for at in row_blocks(student):
        x = capped(student[at], o.student_cap)[0] if o.student_cap != 0 else student[at]
        buckets = bucket_logits(x, ids[at], o.temperature)
        target = teacher_buckets(log_probs[at], ids[at], tail[at], buckets, tail_floor(o.kind, o.a))
        kd[at] = torch.ops.kdfast.divergence_rows(
            buckets, target, None, None, o.kind, o.a, o.b, 1.0, buckets.shape[1], 1
        )[0]
        if o.ce_factor != 0:
            ce[at] = _cross_entropy(x, labels[at], o.classes)
    return kd, ce


def sparse_sum(student, log_probs, ids, tail, labels, row_weight, o: Options, need_student) -> Tensor:
    """As dense_sum, for a teacher known by a few classes and the mass of the rest (`kdfast.ops.sparse_divergence`)."""
    total = torch.zeros(2, dtype=torch.float64)
    for at in row_blocks(student):
        x, slope = capped(student[at], o.student_cap)
        weight = x.new_ones(len(x)) if row_weight is None else row_weight[at]
        buckets = bucket_logits(x, ids[at], o.temperature)
        target = teacher_buckets(log_probs[at], ids[at], tail[at], buckets, tail_floor(o.kind, o.a))
        _, parts, grad_buckets, _ = torch.ops.kdfast.divergence_sum(
            buckets, target, None, None, weight, o.kind, o.a, o.b, 1.0, buckets.shape[1], 1, o.kd_factor, 0.0, 0.0, need_student, False
        )  # fmt: skip
        total[0] += parts[0].double()
        q = None
        if o.ce_factor != 0:
            log_sum = x.logsumexp(-1)
            hit = x.gather(-1, labels[at].unsqueeze(-1)).squeeze(-1)
            total[1] += ((log_sum - hit) * weight).sum(dtype=torch.float64)
            if need_student:
                q = (x - log_sum.unsqueeze(-1)).exp_()
                q.scatter_add_(1, labels[at].unsqueeze(-1), q.new_full((len(x), 1), -1.0))
                q.mul_((weight * o.ce_factor).unsqueeze(-1))
        if need_student:
            grad = bucket_logits_backward(grad_buckets, x, ids[at], buckets, o.temperature)
            if q is not None:
                grad.add_(q)
            student[at] = grad if slope is None else grad.mul_(slope)
    return total
