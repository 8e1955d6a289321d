"""`linear_divergence` with the classes of both heads split over the ranks of a process group (tensor parallelism).

Rank r holds the rows [offset_r, offset_r + V_r) of both heads; hidden states, labels and weights are the same on every rank. No
logits travel: per chunk of rows the ranks exchange a few numbers per row, from which each knows the whole softmax,

    L = log sum_r exp(L_r)        L_r: the log-sum-exp of a rank's logits, of student and teacher

so that q_i and p_i of its own classes are exact. With v = q dD/dq (`kdfast.ops.divergence`),

    dD/dx_i = v_i - q_i S        S = sum over all classes of v

S follows from the first exchange for forward_kl (S = -1), reverse_kl, jeffreys and alpha; the kinds with a mixture (js, skew, tvd)
need the softmax of both models before v, and exchange its sum in a second round. dh = sum_r W_r^T g_r is added up over the ranks
in the backward; the gradient of a head's rows belongs to their rank.

Terms are those of the plain-torch reference on a rank's classes, so the loss rounds as it does. Not for kind="dkd".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast._checks import check_choice
from kdfast._library import compute_dtype, first_derivative_only
from kdfast.ops.divergence import KINDS, _f_divergence_rows, divergence_reference
from kdfast.ops.linear_chunks import Inputs, Model, Options, pick, row_chunks
from kdfast.ops.linear_passes import capped
from kdfast.ops.sparse_divergence import bucket_logits, bucket_logits_backward, tail_floor, teacher_buckets

SPLIT_KINDS = tuple(kind for kind in KINDS if kind != "dkd")


class Shard(NamedTuple):
    """The classes of one rank: [offset, offset + classes) of `total`."""

    group: dist.ProcessGroup
    offset: int
    classes: int
    total: int


def shard_of(group: dist.ProcessGroup, kind: str, widths: dict[str, int], vocab_size: int | None) -> Shard:
    """This rank's classes, from the widths of all; every rank raises the same error."""
    check_choice("kind", kind, SPLIT_KINDS)
    mine = torch.tensor(list(widths.values()), device=_device(group))
    every = [t.tolist() for t in _gathered(mine, group)]
    if any(len(set(row)) > 1 for row in every):
        raise ValueError(
            f"process_group: expected heads split alike, got {' and '.join(widths)} of {every} classes per rank"
        )
    sizes = [row[0] for row in every]
    rank, total = dist.get_rank(group), sum(sizes)
    if vocab_size is not None and (
        isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= total
    ):
        raise ValueError(f"vocab_size: expected an int from 1 to {total}, the classes of all ranks, got {vocab_size!r}")
    total, offset = vocab_size or total, sum(sizes[:rank])
    return Shard(group, offset, min(max(total - offset, 0), sizes[rank]), total)


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: added up in the order of ranks afterwards, the same bits on each."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


# ---------------------------------------------------------------- one chunk of rows on one rank
class _Chunk(NamedTuple):
    kd: Tensor  # [n] this rank's part of each divergence (the whole one, on rank 0, for listed teachers)
    ce: Tensor  # [n] cross-entropies, whole
    grad_student: Tensor | None  # [n, C] of this rank's logits
    grad_teacher: Tensor | None


def _chunk(
    x: Tensor, z: Tensor, ids, tail, labels, weight: Tensor, o: Options, shard: Shard, need_student, need_teacher
) -> _Chunk:
    """x, z: this rank's logits in float32 or float64 (z: listed log-probabilities, with ids)."""
    n = len(x)
    sums, grad = {"x": (x / o.temperature).logsumexp(-1)}, None
    if o.ce_factor != 0:
        local = labels - shard.offset
        here = (local >= 0) & (local < x.shape[1])
        hit = torch.where(here, x.gather(1, torch.where(here, local, 0).unsqueeze(1)).squeeze(1), -math.inf) if x.shape[1] else x.new_full((n,), -math.inf)  # fmt: skip
        sums |= {"raw": x.logsumexp(-1), "hit": hit}
    if ids is None:
        kd, grad, grad_z = _dense(x, z, weight, o, shard, sums, need_student, need_teacher)
    else:
        kd, grad = _listed(x, z, ids, tail, weight, o, shard, sums, need_student)
        grad_z = None
    ce = torch.zeros_like(kd)
    if o.ce_factor != 0:
        ce = sums["raw"] - sums["hit"]
        if grad is not None:
            q = (x - sums["raw"].unsqueeze(1)).exp_()
            if x.shape[1]:
                q.scatter_add_(1, torch.where(here, local, 0).unsqueeze(1), -here.to(q.dtype).unsqueeze(1))
            grad = grad + q * (o.ce_factor * weight).unsqueeze(1)
    return _Chunk(kd, ce, grad, grad_z)


def _exchange(sums: dict[str, Tensor], shard: Shard) -> dict[str, Tensor]:
    """The first round: every number of every row of every rank, in one collective."""
    return dict(zip(sums, _gathered(torch.stack(list(sums.values())), shard.group).unbind(1)))  # name -> [ranks, n]


def _dense(x, z, weight, o: Options, shard: Shard, sums, need_student, need_teacher):
    x, z = x / o.temperature, z[:, : x.shape[1]] / o.temperature
    if o.kind == "binary":  # no softmax: every class by itself
        every = _exchange(sums, shard)
        for name in sums:
            sums[name] = every[name].logsumexp(0)
        with torch.enable_grad():
            leaves = x.requires_grad_(), z.requires_grad_()
            rows = divergence_reference(x, z, kind="binary") if x.shape[1] else (x + z).sum(-1)
            grads = torch.autograd.grad(rows.sum(), leaves)
        return rows.detach(), *(
            _scaled(g, weight, o) if need else None for g, need in zip(grads, (need_student, need_teacher))
        )
    sums["z"] = z.logsumexp(-1)
    if o.kind in ("reverse_kl", "jeffreys"):
        share = (x - sums["x"].unsqueeze(1)).exp()
        sums["gap"] = torch.where(share > 0, share * (x - z), 0.0).sum(-1)  # E_q[x - z] within the rank
    if o.kind == "alpha":
        sums["mix"] = (o.a * z + (1 - o.a) * x).logsumexp(-1)
    every = _exchange(sums, shard)
    for name in sums:
        if name != "gap":
            sums[name] = every[name].logsumexp(0)
    if "gap" in sums:
        sums["gap"] = torch.where(every["x"] > -math.inf, every["gap"] * (every["x"] - sums["x"]).exp(), 0.0).sum(0)
    with torch.enable_grad():
        log_q = (x - sums["x"].unsqueeze(1)).requires_grad_()
        log_p = (z - sums["z"].unsqueeze(1)).requires_grad_()
        rows = _f_divergence_rows(o.kind, log_q, log_p, o.a)
        v, u = (
            g if g is not None else torch.zeros_like(log_q)
            for g in torch.autograd.grad(rows.sum(), (log_q, log_p), allow_unused=True)
        )
    rows = rows.detach()
    if o.kind == "alpha" and o.a not in (0, 1) and dist.get_rank(shard.group) != 0:
        rows = rows + 1 / (o.a * (o.a - 1))  # (sum p^a q^(1-a) - 1) / (a (a - 1)): the 1 is taken away once
    if not need_student and not need_teacher:
        return rows, None, None
    sum_v = None if need_teacher else _sum_of_v(o, sums)
    if sum_v is None:  # the second round
        sum_v, sum_u = _gathered(torch.stack((v.sum(-1), u.sum(-1))), shard.group).sum(0)
    grad_x = _scaled(v - log_q.detach().exp() * sum_v.unsqueeze(1), weight, o) if need_student else None
    grad_z = _scaled(u - log_p.detach().exp() * sum_u.unsqueeze(1), weight, o) if need_teacher else None
    return rows, grad_x, grad_z


def _scaled(gradient: Tensor, weight: Tensor, o: Options) -> Tensor:
    """A term of factor 0 is left out: 0 times the gradient of an infinite divergence is not 0."""
    if o.kd_factor == 0:
        return torch.zeros_like(gradient)
    return gradient * (o.kd_factor * weight / o.temperature).unsqueeze(1)


def _sum_of_v(o: Options, sums: dict[str, Tensor]) -> Tensor | None:
    """S of the module docstring where the first round gives it."""
    kind, beta = o.kind, o.a
    if kind in ("js", "js_rescaled", "alpha") and beta in (0, 1):  # their limits
        kind = "forward_kl" if beta == (1 if kind == "alpha" else 0) else "reverse_kl"
    if kind == "forward_kl":
        return -torch.ones_like(sums["x"])
    if kind in ("reverse_kl", "jeffreys") and "gap" in sums:
        reverse = sums["gap"] - sums["x"] + sums["z"] + 1  # v = q (log q - log p + 1)
        return reverse if kind == "reverse_kl" else 2 * (beta * reverse - (1 - beta))
    if kind == "alpha" and "mix" in sums:
        return -(sums["mix"] - beta * sums["z"] - (1 - beta) * sums["x"]).exp() / beta  # v = -p^a q^(1-a) / a
    return None


def _listed(x, log_probs, ids, tail, weight, o: Options, shard: Shard, sums, need_student):
    """A teacher known by K classes and a tail: the buckets of all ranks make those of the whole, [n, K + 1] numbers."""
    local = torch.where((ids >= shard.offset) & (ids < shard.offset + x.shape[1]), ids - shard.offset, -1)
    if x.shape[1]:
        buckets = bucket_logits(x, local, o.temperature)
    else:
        buckets = x.new_full((len(x), ids.shape[1] + 1), -math.inf)
    named = {**sums, **{str(i): column for i, column in enumerate(buckets.unbind(1))}}
    every = _exchange(named, shard)
    for name in sums:
        sums[name] = every[name].logsumexp(0)
    whole = torch.stack([every[str(i)].logsumexp(0) for i in range(buckets.shape[1])], 1)  # a listed class has one rank
    target = teacher_buckets(log_probs, ids, tail, whole, tail_floor(o.kind, o.a))
    with torch.enable_grad():
        leaf = whole.requires_grad_()
        rows = divergence_reference(leaf, target, kind=o.kind, beta=o.a)
        (grad,) = torch.autograd.grad((rows * (o.kd_factor * weight)).sum(), leaf)
        if o.kd_factor == 0:  # as in _scaled
            grad = torch.zeros_like(grad)
    rows = rows.detach() if dist.get_rank(shard.group) == 0 else torch.zeros_like(rows)
    if not need_student:
        return rows, None
    return rows, bucket_logits_backward(grad, x, local, whole.detach(), o.temperature) if x.shape[1] else x


# ---------------------------------------------------------------- all chunks
def _sweep(inputs: Inputs, o: Options, shard: Shard, needs: tuple[bool, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(D, CE) of every row, 0 where row_weight is 0, and this rank's gradients of the sum weighted by row_weight."""
    dtype = compute_dtype(
        *(t for t in (inputs.hidden, inputs.weight, inputs.teacher, inputs.teacher_weight) if t is not None)
    )
    student = Model(inputs.hidden, inputs.weight, inputs.bias, o.student_scale, o.classes, needs[:3])  # type: ignore[arg-type]
    teacher = Model(inputs.teacher, inputs.teacher_weight, inputs.teacher_bias, o.teacher_scale, o.classes, needs[3:])  # type: ignore[arg-type]
    kept = None if inputs.row_weight is None else inputs.row_weight.nonzero().squeeze(-1)
    n = len(inputs.hidden)
    kd, ce = (inputs.hidden.new_zeros(n, dtype=dtype) for _ in range(2))
    need_student, need_teacher = any(needs[:3]), any(needs[3:])
    for rows in row_chunks(n, kept, o.chunk_rows):
        x, x_slope = capped(student.chunk(rows), o.student_cap, dtype)
        z, z_slope = capped(teacher.chunk(rows), o.teacher_cap, dtype)
        weight = x.new_ones(len(x)) if inputs.row_weight is None else inputs.row_weight[rows].to(dtype)
        part = _chunk(
            x, z, pick(inputs.ids, rows), pick(inputs.tail, rows), pick(inputs.labels, rows), weight, o, shard, need_student, need_teacher
        )  # fmt: skip
        kd[rows], ce[rows] = part.kd, part.ce
        for side, grad, slope in ((student, part.grad_student, x_slope), (teacher, part.grad_teacher, z_slope)):
            if grad is not None:
                side.take((grad if slope is None else grad * slope[:, : grad.shape[1]]).to(side.dtype), rows)
    return _gathered(kd, shard.group).sum(0), ce, [*student.gradients(), *teacher.gradients()]


class _VocabParallel(torch.autograd.Function):
    """(L, D, CE): rows, or weighted sums whose gradients the forward stores. Hidden gradients meet in the backward."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, o, shard, rows, total = args
        inputs = Inputs(*tensors)
        wanted = tuple(ctx.needs_input_grad[:6])
        kd, ce, grads = _sweep(inputs, o, shard, (False,) * 6 if rows else wanted)
        loss = total(kd, ce, o)
        ctx.o, ctx.shard, ctx.rows = o, shard, rows
        ctx.dtypes = [None if t is None else t.dtype for t in tensors[:6]]
        ctx.hidden = (True, False, False, inputs.teacher_weight is not None, False, False)
        if rows:
            ctx.save_for_backward(*tensors)
        else:
            ctx.save_for_backward(*grads)
            weight = torch.ones_like(loss) if inputs.row_weight is None else inputs.row_weight.to(loss.dtype)
            loss, kd, ce = (torch.where(weight != 0, t * weight, 0.0).sum() for t in (loss, kd, ce))
        ctx.mark_non_differentiable(kd, ce)
        return loss, kd, ce

    @staticmethod
    @first_derivative_only
    def backward(ctx, upstream, *_):
        wanted = tuple(ctx.needs_input_grad[:6])
        if ctx.rows:
            inputs = Inputs(*ctx.saved_tensors)
            if inputs.row_weight is not None:
                upstream = torch.where(inputs.row_weight != 0, upstream, 0.0)
            grads, upstream = _sweep(inputs._replace(row_weight=upstream), ctx.o, ctx.shard, wanted)[2], None
        else:
            grads = list(ctx.saved_tensors)
        results: list[Tensor | None] = []
        for grad, dtype, hidden, need in zip(grads, ctx.dtypes, ctx.hidden, wanted):
            if not need:
                results.append(None)
                continue
            grad = (
                grad
                if upstream is None
                else grad * upstream.to(grad.dtype if grad.dtype == torch.float64 else torch.float32)
            )
            if hidden:  # each rank has the share of its own classes
                grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
                dist.all_reduce(grad, group=ctx.shard.group)
            results.append(grad.to(dtype))
        return *results, *(None,) * (len(Inputs._fields) - 6 + 4)


def vocab_parallel_total(
    inputs: Inputs, o: Options, shard: Shard, total, *, rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_divergence_total`, on every rank of shard.group at once, forward and backward."""
    if torch.is_grad_enabled() and inputs.row_weight is not None and inputs.row_weight.requires_grad:
        raise ValueError("weight: expected one without a gradient with a process_group, got one that requires grad")
    # A rank's default is that of its own classes; the chunks that the ranks exchange are the same ones.
    own = torch.tensor([o.chunk_rows], device=_device(shard.group))
    o = o._replace(chunk_rows=int(_gathered(own, shard.group).min()))
    if not torch.is_grad_enabled():  # inside a Function the need would still be reported
        inputs = Inputs(*(t if t is None else t.detach() for t in inputs))  # type: ignore[arg-type]
    return _VocabParallel.apply(*inputs, o, shard, rows, total)
