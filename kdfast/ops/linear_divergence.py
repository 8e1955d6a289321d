"""Output layer, divergence and cross-entropy in one op: no logits in memory but a chunk of rows of each model.

    x_i = f(scale (W h_i + b))      f(a) = a, or cap tanh(a / cap)          logits of row i, [C]
    z_i                             likewise from the teacher's hidden states and head, or its logits as they are
    L_i = kd_weight D(z_i, x_i; T) + ce_weight CE(x_i, label_i)             D: `kdfast.ops.divergence`, its kinds

    dL/dh_i = scale W^T g_i      dL/dW = scale sum_i g_i h_i^T      dL/db = scale sum_i g_i       g_i = (dL/dx_i) f'

The weighted sum over rows makes its final gradients in the forward, chunk by chunk: the gradient of a chunk's logits is
written over them, multiplied out into dh and dW (summed in float32 over the chunks), and gone. Rows (no `row_weight`) keep
the inputs and compute the chunks again in the backward, with the upstream factor of each row.

Rows of weight 0 are left out before the products. `linear_chunks.py` has what a chunk goes through: on the CPU the compiled core
in place; on other devices `divergence` by its best backend, whose gradient is one more buffer of a chunk's size.
backend="reference" (and torch.compile without the core) takes the reference, its chunks computed again in the backward.

The logits of a bfloat16 model are bfloat16, as its own head would return them, all else is float32: on a CPU with bfloat16
instructions a product with float32 results takes several times as long. On one without, the products are of float32 copies of a
few classes, and rounded. Those of a float16 model are float32, since their gradients would underflow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kdfast._dispatch import choose, core_reason, forced_backend
from kdfast._library import (
    applied,
    compute_dtype,
    contiguous,
    first_derivative_only,
    lib,
    scale_gradient,
    transforms_active,
)
from kdfast.ops import linear_chunks as chunks
from kdfast.ops import linear_passes as passes
from kdfast.ops.linear_checks import PerModel, check_linear
from kdfast.ops.linear_chunks import Inputs, Model, Options, logits_dtype, pick, row_chunks
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher
from kdfast.ops.vocab_parallel import Shard, vocab_parallel_total


# ---------------------------------------------------------------- reference: the definition, with every option
def linear_divergence_reference(inputs: Inputs, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(L, D, CE) of every row, unweighted; 0 where row_weight is 0. All logits at once, in plain torch; any order of derivative."""
    x = head_logits(inputs.hidden, inputs.weight, inputs.bias, o.student_scale, o.student_cap, o.classes)
    z = inputs.teacher
    if inputs.teacher_weight is not None:
        z = head_logits(z, inputs.teacher_weight, inputs.teacher_bias, o.teacher_scale, o.teacher_cap, o.classes)
    return passes.logit_rows(x, z, inputs, o, backend="reference")


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float, classes: int) -> Tensor:
    dtype = logits_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight[:classes].to(dtype).T  # [N, C]
    if bias is not None:
        logits = logits + bias[:classes].to(dtype)
    return passes.soft_cap(logits * scale, cap)


# ---------------------------------------------------------------- registration
_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? ids, "
    "Tensor? tail, Tensor? labels, Tensor? row_weight"
)
_OPTIONS = (
    "str kind, float a, float b, float temperature, int classes, float kd_factor, float ce_factor, float student_scale, "
    "float teacher_scale, float student_cap, float teacher_cap, int chunk_rows"
)
N_TENSORS = len(Inputs._fields)

lib.define(f"linear_divergence_rows({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
lib.define(
    f"linear_divergence_sum({_TENSORS}, {_OPTIONS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _dtype(inputs: Inputs) -> torch.dtype:
    tensors = (inputs.hidden, inputs.weight, inputs.teacher, inputs.teacher_weight)
    return compute_dtype(*(t for t in tensors if t is not None))


@torch.library.register_fake("kdfast::linear_divergence_rows")
def _(*args):
    inputs = Inputs(*args[:N_TENSORS])
    return tuple(inputs.hidden.new_empty(inputs.hidden.shape[0], dtype=_dtype(inputs)) for _ in range(3))


@torch.library.register_fake("kdfast::linear_divergence_sum")
def _(*args):
    inputs, needs = Inputs(*args[:N_TENSORS]), args[-1]
    new = inputs.hidden.new_empty
    grads = (
        new(t.shape, dtype=chunks.stored(t)) if need and t is not None else new(0) for t, need in zip(inputs[:6], needs)
    )
    return new((), dtype=_dtype(inputs)), new(2, dtype=_dtype(inputs)), *grads


def _prepared(inputs: Inputs) -> tuple[Inputs, Tensor | None]:
    """Small tensors in the core's types, and the numbers of the rows that are kept (None: no row has a weight)."""
    kept = None if inputs.row_weight is None else inputs.row_weight.nonzero().squeeze(-1)
    inputs = inputs._replace(
        labels=contiguous(inputs.labels, torch.int64), ids=contiguous(inputs.ids, torch.int64),
        row_weight=contiguous(inputs.row_weight, _dtype(inputs)),
    )  # fmt: skip
    return inputs, kept


def _sides(inputs: Inputs, o: Options, needs=(False,) * 6) -> tuple[Model, Model]:
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = inputs[:6]
    return (
        Model(hidden, weight, bias, o.student_scale, o.classes, tuple(needs[:3])),
        Model(teacher, teacher_weight, teacher_bias, o.teacher_scale, o.classes, tuple(needs[3:])),
    )


def _loop_rows(inputs: Inputs, o: Options, engine: type[passes.Engine]) -> tuple[Tensor, Tensor, Tensor]:
    inputs, kept = _prepared(inputs)
    new = inputs.hidden.new_zeros
    total, kd, ce = (new(len(inputs.hidden), dtype=_dtype(inputs)) for _ in range(3))
    with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):  # inputs are taken as they are
        student, teacher = _sides(inputs, o)
        for rows in row_chunks(len(inputs.hidden), kept, o.chunk_rows):
            x, z = student.chunk(rows), teacher.chunk(rows)
            with chunks.row_context(rows):
                one, two = engine.rows(x, z, chunks.part_of(inputs, rows), o)
            kd[rows], ce[rows] = one.to(kd.dtype), two.to(ce.dtype)
        total += chunks.total_of(kd, ce, o)
    return total, kd, ce


def _loop_sum(inputs: Inputs, o: Options, needs, engine: type[passes.Engine]) -> tuple[Tensor, ...]:
    inputs, kept = _prepared(inputs)
    need_student, need_teacher = any(needs[:3]), any(needs[3:])
    parts = inputs.hidden.new_zeros(2, dtype=torch.float32 if inputs.hidden.device.type == "mps" else torch.float64)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        student, teacher = _sides(inputs, o, needs)
        for rows in row_chunks(len(inputs.hidden), kept, o.chunk_rows):
            x, z = student.chunk(rows), teacher.chunk(rows)
            with chunks.row_context(rows):
                sums, x, z = engine.sum(x, z, chunks.part_of(inputs, rows), o, need_student, need_teacher)
            parts += sums
            if need_student:
                student.take(x, rows)
            if need_teacher:
                teacher.take(z, rows)
            del x, z
        grads = *student.gradients(), *teacher.gradients()
    return chunks.total_of(parts[0], parts[1], o).to(_dtype(inputs)), parts.to(_dtype(inputs)), *grads


@torch.library.impl(lib, "linear_divergence_rows", "CPU")
def _rows_cpu(*args):
    return _loop_rows(Inputs(*args[:N_TENSORS]), Options(*args[N_TENSORS:]), passes.Core)


@torch.library.impl(lib, "linear_divergence_sum", "CPU")
def _sum_cpu(*args):
    return _loop_sum(Inputs(*args[:N_TENSORS]), Options(*args[N_TENSORS:-1]), args[-1], passes.Core)


def _rows_by(inputs: Inputs, o: Options, fused: bool) -> tuple[Tensor, ...]:
    """The op, or its loop outside the dispatcher, where `divergence` may record a graph of one chunk."""
    return _rows_op(*inputs, *o) if fused else _loop_rows(inputs, o, passes.Eager)


def _sum_by(inputs: Inputs, o: Options, needs: list[bool], fused: bool) -> tuple[Tensor, ...]:
    return _sum_op(*inputs, *o, needs) if fused else _loop_sum(inputs, o, needs, passes.Eager)


# ---------------------------------------------------------------- autograd
_rows_op = torch.ops.kdfast.linear_divergence_rows.default
_sum_op = torch.ops.kdfast.linear_divergence_sum.default


class _Rows(torch.autograd.Function):
    """(L, D, CE) rows; the backward runs the sum with the upstream factors as weights. Only L has a gradient."""

    @staticmethod
    def forward(*args):
        return _rows_by(Inputs(*args[:N_TENSORS]), *args[N_TENSORS:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:N_TENSORS])
        ctx.options, ctx.fused = inputs[N_TENSORS:]
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows, *_):
        inputs = Inputs(*ctx.saved_tensors)
        if inputs.row_weight is not None:
            grad_rows = torch.where(inputs.row_weight != 0, grad_rows, 0.0)
        needs = list(ctx.needs_input_grad[:6])
        _, _, *grads = _sum_by(inputs._replace(row_weight=grad_rows), ctx.options, needs, ctx.fused)
        grads = [g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needs)]
        return *grads, *(None,) * (N_TENSORS - 4)


_apply_rows = applied(_Rows)


class _Sum(torch.autograd.Function):
    """The weighted sum, which stores its final gradients."""

    @staticmethod
    def forward(ctx, *args):
        inputs, (options, fused) = Inputs(*args[:N_TENSORS]), args[N_TENSORS:]
        loss, parts, *grads = _sum_by(inputs, options, list(ctx.needs_input_grad[:6]), fused)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:6]]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss, _):
        needed = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:6])
        grads = [scale_gradient(grad, grad_loss, dtype) if need else None for grad, dtype, need in needed]
        return *grads, *(None,) * (N_TENSORS - 4)


def linear_divergence_total(
    inputs: Inputs, o: Options, backend: str | None, *, rows: bool, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, D, CE), for arguments that are checked: rows [N], or their sums weighted by row_weight (D and CE detached)."""
    if shard is not None:
        if backend is not None:
            raise ValueError(
                f"backend: expected None with a process_group, which has one implementation, got {backend!r}"
            )
        return vocab_parallel_total(inputs, o, shard, chunks.total_of, rows=rows)
    fused = _choose(inputs, o, backend) != "reference"
    if not fused and not _by_chunks(inputs, backend):
        total, kd, ce = _checkpointed(inputs, o)
        if rows:
            return total, kd.detach(), ce.detach()
        weight = torch.ones_like(total) if inputs.row_weight is None else inputs.row_weight.to(total.dtype)
        kept = weight != 0
        return tuple(torch.where(kept, t * weight, 0.0).sum() for t in (total, kd.detach(), ce.detach()))  # type: ignore[return-value]
    if rows or transforms_active():
        total, kd, ce = _apply_rows(*inputs, o, fused) if torch.is_grad_enabled() else _rows_by(inputs, o, fused)
        if rows:
            return total, kd, ce
        weight = torch.ones_like(total) if inputs.row_weight is None else inputs.row_weight.to(total.dtype)
        return tuple(torch.where(weight != 0, t * weight, 0.0).sum() for t in (total, kd, ce))  # type: ignore[return-value]
    if torch.is_grad_enabled():
        loss, parts = _Sum.apply(*inputs, o, fused)
    else:
        loss, parts = _sum_by(inputs, o, [False] * 6, fused)[:2]
    return loss, parts[0], parts[1]


def _checkpointed(inputs: Inputs, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The reference by chunks of rows that the backward computes again; every derivative."""
    n = len(inputs.hidden)
    if n <= o.chunk_rows or transforms_active() or torch.compiler.is_compiling():
        return linear_divergence_reference(inputs, o)
    # A half-precision head takes part as a float32 copy, so that autograd adds the chunks' gradients in float32.
    heads = {name: getattr(inputs, name) for name in ("weight", "bias", "teacher_weight", "teacher_bias")}
    wide = {
        k: t.float() if t is not None and t.requires_grad and t.dtype.itemsize == 2 else t for k, t in heads.items()
    }
    hidden = {"weight": inputs.hidden, "teacher_weight": inputs.teacher}
    narrow = [k for k, t in hidden.items() if heads[k] is not None and logits_dtype(t, heads[k]) == torch.bfloat16]

    def one(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        part = Inputs(*tensors)  # type: ignore[arg-type]
        return linear_divergence_reference(part._replace(**{k: getattr(part, k).bfloat16() for k in narrow}), o)

    results = []
    for rows in row_chunks(n, None, o.chunk_rows):
        part = Inputs(*(t if k in heads else pick(t, rows) for k, t in zip(Inputs._fields, inputs)))  # type: ignore[arg-type]
        results.append(checkpoint(one, *part._replace(**wide), use_reentrant=False, preserve_rng_state=False))
    total, kd, ce = (torch.cat(column) for column in zip(*results))
    return total, kd, ce


# ---------------------------------------------------------------- public
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopKTeacher | SampledTeacher,
    *,
    teacher_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    vocab_size: int | None = None,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    row_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """kd_weight D + ce_weight CE of every row, from hidden states and output layers; equations at the top of this module.

    Args:
        student_hidden: [..., D]. student_weight: [V, D], as in nn.Linear. student_bias: [V].
        teacher: one of: hidden states [..., D'] with teacher_weight [V', D'] (and teacher_bias [V']); logits or log-probabilities
            [..., V'] (log-probabilities are logits, but for kind="binary"); a TopKTeacher; a SampledTeacher.
        kind, beta, temperature: as in `kdfast.ops.divergence`; temperature a number.
        labels: [...] integers in [0, C), for cross-entropy and kind="dkd"; those of rows of weight 0 may be anything.
        kd_weight, ce_weight: factors of the two terms; a term of weight 0 is not computed into the sum.
        vocab_size: C, the first so many classes of both models; needed when V and V' differ. The rest gets zero gradient.
        softcap: c gives c tanh(logits / c); logit_scale multiplies the logits before it. One value for both models, or a pair
            (student, teacher); a teacher given as logits is taken as it is.
        row_weight: [...] weights; the result is then the scalar sum of weight * row, its gradients made in the forward.
            Rows of weight 0 are left out before the products.
        chunk_rows: rows of logits held at a time; None: 128 MiB of them in float32 on the CPU (as many in
            bfloat16), 512 MiB on other devices.
        backend: "cpu", "reference" or None for the best that can run.
        process_group: the heads (or the teacher's logits) are this rank's slice of the classes, in the order of ranks; everything
            else is equal on all ranks, labels, ids and vocab_size count the classes of all, and every rank calls forward and
            backward (`kdfast.ops.vocab_parallel`). Each gets the whole loss, hidden gradients, and its own head's.
    Returns:
        float32 rows [...] (float64 if an input is), or their weighted sum.
    Differentiable once in hidden states, weights and biases of both models and in a teacher's logits, each only where it
    requires grad: a frozen head costs nothing. `backend="reference"` gives every derivative.
    Raises:
        ValueError: two vocabulary sizes without vocab_size, labels or ids out of range, another temperature than a cache's.

    >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    >>> rows = linear_divergence(hidden, weight, torch.randn(6, 16), teacher_weight=torch.randn(50, 16), kind="js")
    >>> rows.sum().backward()
    """
    inputs, o, shard = check_linear(
        student_hidden, student_weight, teacher, teacher_weight=teacher_weight, student_bias=student_bias,
        teacher_bias=teacher_bias, kind=kind, beta=beta, temperature=temperature, labels=labels, kd_weight=kd_weight,
        ce_weight=ce_weight, vocab_size=vocab_size, softcap=softcap, logit_scale=logit_scale, row_weight=row_weight,
        chunk_rows=chunk_rows, process_group=process_group,
    )  # fmt: skip
    total = linear_divergence_total(inputs, o, backend, rows=row_weight is None, shard=shard)[0]
    return total.reshape(student_hidden.shape[:-1]) if row_weight is None else total


# ---------------------------------------------------------------- choice
def _by_chunks(inputs: Inputs, backend: str | None) -> bool:
    """Whether what the core cannot take may run as its loop in plain calls: eager, and nothing only the reference can give."""
    return (
        (backend or forced_backend()) is None
        and inputs.hidden.device.type != "meta"
        and not (inputs.row_weight is not None and inputs.row_weight.requires_grad)
        and not (torch.compiler.is_compiling() or transforms_active() or torch._C._len_torch_dispatch_stack())
    )


def _choose(inputs: Inputs, o: Options, backend: str | None) -> str:
    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        if inputs.hidden.device.type not in ("cpu", "meta"):
            return f"the tensors are on {inputs.hidden.device}"
        if inputs.row_weight is not None and inputs.row_weight.requires_grad:
            return "a gradient for row_weight comes from the reference only"
        teachers = (inputs.teacher, inputs.teacher_weight, inputs.teacher_bias)
        if o.kind == "dkd" and any(t is not None and t.requires_grad for t in teachers):
            return "kind='dkd' has no fused teacher gradient"
        return None

    return choose("linear_divergence", backend, {"cpu": cpu}, inputs[:5])
