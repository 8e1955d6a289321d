"""Divergence from a teacher that is known by a few classes and the mass of the rest: a top-k list, or sampled tokens.

The classes listed are K buckets, all others together are one more, the tail. With q = softmax(student / T):

    teacher  p = (p_1, ..., p_K, t)                 t the tail mass; p is renormalised, so a rounded list still sums to 1
    student  q = (q_1, ..., q_K, q_tail)            q_tail = sum of q_i over the classes not listed

and the result is `kdfast.ops.divergence` of the two: any kind, exact in the buckets, never negative, and 0 only if the student
has the teacher's mass on each listed class AND outside them. (Renormalising p over the list alone is blind to a student whose
mass is elsewhere; leaving the tail out is no divergence and becomes negative.) It is at most the divergence of the full
distributions, with equality when the student splits its tail as the teacher does.

The student's logits enter through the K + 1 bucket logits x_k / T and R = log sum_{i not listed} exp(x_i / T). With g the gradient
for those,

    dL/dx_k = g_k / T                     listed
    dL/dx_i = g_tail exp(x_i / T - R) / T       not listed: q_i / q_tail of the tail's gradient

    forward KL: g = q - p,  so dL/dx_i = q_i (1 - t / q_tail) / T
    reverse KL: g_b = q_b (log(q_b / p_b) - KL),  so dL/dx_i = q_i (log(q_tail / t) - KL) / T

R is summed over the classes not listed, not taken as 1 - sum q_k, which has no digits left when the tail is small.

A tail mass of 0 is exact where that is finite (forward KL, JS, ...). Where it would be infinite (reverse KL, ...) it is taken
as 2^-25: less than a cache in half precision can hold. Where the student has no class left for the tail, the tail is dropped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor, check_labels, check_number
from kdfast._dispatch import forced_backend
from kdfast._library import (
    applied,
    compute_dtype,
    first_derivative_only,
    lib,
    readable,
)
from kdfast.ops.divergence import KINDS, _check_kind, _choose, divergence

SPARSE_KINDS = tuple(kind for kind in KINDS if kind not in ("dkd", "binary"))
TAIL_FLOOR = 2.0**-25
BLOCK_BYTES = 8 << 20  # a float32 copy of a few rows: the only buffer besides the result


class TopKTeacher(NamedTuple):
    """A teacher's most probable classes, as a cache of its outputs holds them.

    ids: [..., K] integers, each class at most once; -1 where there is no entry. log_probs: [..., K], log softmax(teacher / T)
    at those classes, over ALL classes. tail: [...], the mass of all others; None: 1 - sum exp(log_probs).
    temperature: the T they were taken at; a loss at another one raises, since a list cannot be softened again exactly.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor | None = None
    temperature: float = 1.0


class SampledTeacher(NamedTuple):
    """Tokens drawn from a teacher: p is their empirical distribution, so the forward KL's expected gradient is the full one's.

    ids: [..., S] integers drawn from softmax(teacher / T), repeats as they come; -1 where there is no entry.
    weights: [..., S], for tokens drawn from another distribution r: p/r, up to a factor. None: all equal.
    """

    ids: Tensor
    weights: Tensor | None = None
    temperature: float = 1.0


# ---------------------------------------------------------------- reference: the definition, with every option
def sparse_divergence_reference(
    student: Tensor,
    teacher: TopKTeacher | SampledTeacher,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The equations of this module in plain torch: rows. Any order of derivative."""
    ids, log_probs, tail = listed(teacher, compute_dtype(student))
    buckets = bucket_logits_reference(student[..., : vocab_size or student.shape[-1]], ids, temperature)
    target = teacher_buckets(log_probs, ids, tail, buckets.detach(), tail_floor(kind, beta))
    return divergence(buckets, target, kind=kind, beta=beta, backend="reference")


def bucket_logits_reference(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """[..., K + 1]: the listed logits / T (-inf where there is no entry) and the log-sum-exp of all others."""
    x = student.to(compute_dtype(student)) / temperature
    index, valid, any_valid = _places(ids)
    picked = x.gather(-1, index)
    rest = x.scatter(-1, index, torch.where(any_valid, -math.inf, picked))
    empty = (rest == -math.inf).all(-1, keepdim=True)
    rest = torch.where(empty, -math.inf, torch.where(empty, 0.0, rest).logsumexp(-1, keepdim=True))
    return torch.cat((torch.where(valid, picked, -math.inf), rest), -1)


def _places(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(classes to gather, which entries count, which rows have any). An entry that does not count points at one that does."""
    valid = ids >= 0
    return torch.where(valid, ids, ids.amax(-1, keepdim=True).clamp_min(0)), valid, valid.any(-1, keepdim=True)


# ---------------------------------------------------------------- the teacher's side
def listed(teacher: TopKTeacher | SampledTeacher, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [..., K], log-probabilities [..., K], tail mass [...])."""
    ids = teacher.ids.long()
    if isinstance(teacher, TopKTeacher):
        log_probs = torch.where(ids >= 0, teacher.log_probs.to(dtype), -math.inf)
        if teacher.tail is None:
            return ids, log_probs, (1 - log_probs.exp().sum(-1)).clamp_min(0)
        return ids, log_probs, teacher.tail.to(dtype)
    weights = torch.ones_like(ids, dtype=dtype) if teacher.weights is None else teacher.weights.to(dtype)
    weights = torch.where(ids >= 0, weights, 0.0)
    # the first of several equal tokens takes the weight of all, the others count no more
    ids, order = ids.sort(dim=-1, stable=True)
    weights = weights.gather(-1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    group = first.long().cumsum(-1) - 1
    sums = torch.zeros_like(weights).scatter_add(-1, group, weights)
    share = torch.where(first, sums.gather(-1, group), 0.0)
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # no entry: all -inf, an ignored row
    return torch.where(first, ids, -1), share.log(), torch.zeros_like(share[..., 0])


def tail_floor(kind: str, beta: float) -> float:
    """The least tail mass: 0, or TAIL_FLOOR in the kinds that are infinite where the teacher has no mass and the student has."""
    infinite = {"reverse_kl": True, "jeffreys": True, "js": beta == 1, "js_rescaled": beta == 1, "alpha": beta <= 0,
                "skew_reverse_kl": beta == 0}  # fmt: skip
    return TAIL_FLOOR if infinite.get(kind, False) else 0.0


def teacher_buckets(log_probs: Tensor, ids: Tensor, tail: Tensor, buckets: Tensor, floor: float) -> Tensor:
    """Logits [..., K + 1] of the teacher beside the student's `buckets`."""
    listed_logs = torch.where(ids >= 0, log_probs.to(buckets.dtype), -math.inf)
    log_tail = tail.to(buckets.dtype).clamp_min(floor).log()
    log_tail = torch.where(buckets[..., -1] == -math.inf, -math.inf, log_tail)
    return torch.cat((listed_logs, log_tail.unsqueeze(-1)), -1)


# ---------------------------------------------------------------- the student's buckets: registration
lib.define("bucket_logits(Tensor student, Tensor ids, float temperature) -> Tensor")
lib.define(
    "bucket_logits_backward(Tensor grad, Tensor student, Tensor ids, Tensor buckets, float temperature) -> Tensor"
)


@torch.library.register_fake("kdfast::bucket_logits")
def _(student, ids, temperature):
    return student.new_empty((len(student), ids.shape[1] + 1), dtype=compute_dtype(student))


@torch.library.register_fake("kdfast::bucket_logits_backward")
def _(grad, student, ids, buckets, temperature):
    return student.new_empty(student.shape)


def row_blocks(logits: Tensor) -> list[slice]:
    """A few rows at a time, so that a float32 copy of them is small beside a chunk."""
    step = max(BLOCK_BYTES // (4 * max(logits.shape[1], 1)), 1)
    return [slice(start, start + step) for start in range(0, len(logits), step)]


@torch.library.impl(lib, "bucket_logits", "CompositeExplicitAutograd")
def bucket_logits(student: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """[N, K + 1] of logits [N, C]; see `bucket_logits_reference`."""
    out = student.new_empty((len(student), ids.shape[1] + 1), dtype=compute_dtype(student))
    for at in row_blocks(student):
        out[at] = bucket_logits_reference(student[at], ids[at], temperature)
    return out


@torch.library.impl(lib, "bucket_logits_backward", "CompositeExplicitAutograd")
def bucket_logits_backward(grad: Tensor, student: Tensor, ids: Tensor, buckets: Tensor, temperature: float) -> Tensor:
    out = student.new_empty(student.shape)
    index, valid, any_valid = _places(ids)
    # an entry that does not count writes what the one it points at writes, so their order does not matter
    listed_grad = torch.where(valid, grad[:, :-1], grad[:, :-1].gather(1, ids.argmax(1, keepdim=True).expand_as(ids)))
    tail_grad, rest = grad[:, -1:] / temperature, buckets[:, -1:]
    rest = torch.where(rest == -math.inf, math.inf, rest)  # no class in the tail: exp(x - inf) = 0
    dead = (grad == 0).all(1, keepdim=True)  # a masked row, whose logits may be anything
    for at in row_blocks(student):
        part = (student[at].to(buckets.dtype) / temperature).sub_(rest[at]).exp_().mul_(tail_grad[at])
        there = torch.where(any_valid[at], listed_grad[at] / temperature, part.gather(1, index[at]))
        out[at] = part.scatter_(1, index[at], there).masked_fill_(dead[at], 0.0)
    return out


class _Buckets(torch.autograd.Function):
    """Keeps the logits, which the caller holds anyway, and K + 1 numbers a row."""

    @staticmethod
    def forward(student, ids, temperature):
        return torch.ops.kdfast.bucket_logits.default(student, ids, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], output)
        ctx.temperature = inputs[2]

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        student, ids, buckets = ctx.saved_tensors
        backward = torch.ops.kdfast.bucket_logits_backward.default
        return backward(grad, student, ids, buckets, ctx.temperature), None, None


_apply_buckets = applied(_Buckets)


# ---------------------------------------------------------------- public
def sparse_divergence(
    student: Tensor,
    teacher: TopKTeacher | SampledTeacher,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    row_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of every row from a top-k list with its tail or from sampled tokens; equations at the top of this module.

    Args:
        student: logits [..., C]; float16, bfloat16, float32 or float64.
        teacher: TopKTeacher with ids, log_probs [..., K] and tail [...], or SampledTeacher with ids [..., S] (forward KL only).
        kind, beta: as in `kdfast.ops.divergence`, but not "dkd" and "binary", which need every class.
        temperature: T > 0, the teacher's own.
        vocab_size: the student's classes from here on do not exist; no id may be one of them.
        row_weight: [...] weights; the result is then the scalar sum of weight * row.
        backend: "cpu", "reference" or None, for the divergence of the buckets.
    Returns:
        float32 rows [...] (float64 for float64 logits), or their weighted sum.
    Differentiable in student, once; `backend="reference"` gives every derivative. No gradient for the teacher.
    Raises:
        ValueError: another temperature than the teacher's, ids out of range (on the CPU), shapes that do not fit.

    >>> log_probs, ids = torch.log_softmax(teacher, -1).topk(3)
    >>> rows = sparse_divergence(student, TopKTeacher(ids, log_probs), kind="reverse_kl")
    """
    check_float_tensor("student", student)
    if student.dim() == 0:
        raise ValueError("student: expected logits [..., C], got a tensor without dimensions")
    classes = check_vocab_size(vocab_size, {"student": student.shape[-1]})
    check_sparse(teacher, student.shape[:-1], classes, student.device, kind, beta, temperature)
    ids, log_probs, tail = listed(teacher, compute_dtype(student))
    logits = student[..., :classes]
    chosen = _choose(logits, logits, temperature, row_weight, kind, ids.shape[-1] + 1, -1, backend)
    if (backend or forced_backend()) == "reference":
        if row_weight is not None and not row_weight.requires_grad:  # not read, as in the kernels
            logits = logits.masked_fill((row_weight == 0).unsqueeze(-1), 0.0)
        buckets = bucket_logits_reference(logits, ids, temperature)
    else:
        flat = logits.reshape(-1, classes)
        buckets = _apply_buckets(flat, ids.reshape(-1, ids.shape[-1]), float(temperature))
        buckets = buckets.reshape(ids.shape[:-1] + buckets.shape[-1:])
    target = teacher_buckets(log_probs, ids, tail, buckets.detach(), tail_floor(kind, beta))
    return divergence(buckets, target, kind=kind, beta=beta, row_weight=row_weight, backend=chosen)


def check_vocab_size(vocab_size: int | None, widths: dict[str, int]) -> int:
    """The number of classes compared: the common width, or vocab_size. Two widths without it raise, naming both."""
    smallest = min(widths.values())
    if vocab_size is None:
        if len(set(widths.values())) > 1:
            sizes = " and ".join(f"{name} has {width}" for name, width in widths.items())
            raise ValueError(f"vocab_size: expected a number when the vocabularies differ, got None; {sizes} classes")
        return smallest
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= smallest:
        raise ValueError(
            f"vocab_size: expected an int from 1 to {smallest} (the smaller of the widths {tuple(widths.values())}), got {vocab_size!r}"
        )
    return vocab_size


def check_sparse(teacher, rows: torch.Size, classes: int, device: torch.device, kind, beta, temperature) -> None:
    if not isinstance(teacher, (TopKTeacher, SampledTeacher)):
        raise TypeError(f"teacher: expected a TopKTeacher or a SampledTeacher, got {type(teacher).__name__}")
    sampled = isinstance(teacher, SampledTeacher)
    if kind in ("dkd", "binary"):
        raise ValueError(
            f"kind: expected one of {', '.join(SPARSE_KINDS)} for a {type(teacher).__name__}, got {kind!r}"
        )
    _check_kind(kind, beta)
    if sampled and kind != "forward_kl":
        raise ValueError(f"kind: sampled tokens give the forward KL only (others need densities), got {kind!r}")
    check_number("temperature", temperature, low=0.0, open_low=True)
    if temperature != teacher.temperature:
        raise ValueError(
            f"temperature: expected {teacher.temperature}, at which the teacher's {'tokens' if sampled else 'list'} was taken, "
            f"got {temperature}; a part of a distribution cannot be softened again"
        )
    ids = teacher.ids
    if not isinstance(ids, Tensor) or ids.dim() != len(rows) + 1 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"teacher.ids: expected shape {(*rows, 'K')} with K >= 1, got {got}")
    check_labels(ids, ids.shape, device, "teacher.ids")
    per_entry = (
        ("weights", teacher.weights) if isinstance(teacher, SampledTeacher) else ("log_probs", teacher.log_probs)
    )
    per_row = None if isinstance(teacher, SampledTeacher) else teacher.tail
    for name, value, shape in ((*per_entry, ids.shape), ("tail", per_row, rows)):
        if value is None and name != "log_probs":
            continue
        value = check_float_tensor(f"teacher.{name}", value)
        if value.shape != shape or value.device != device:
            raise ValueError(
                f"teacher.{name}: expected shape {tuple(shape)} on {device}, got {tuple(value.shape)} on {value.device}"
            )
        if value.requires_grad:
            raise ValueError(f"teacher.{name}: a list of classes is a constant, got a tensor that requires grad")
    if readable(ids) and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < classes:
        raise ValueError(
            f"teacher.ids: expected classes in [0, {classes}), or -1 for no entry, got {int(ids.min())} to {int(ids.max())}"
        )
