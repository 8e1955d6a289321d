"""Argument checks of `kdfast.ops.linear_divergence`: from what a user passes to flat rows and options."""

from __future__ import annotations

from torch import Tensor

from kdfast._checks import check_float_tensor, check_labels, check_number, check_row_tensor
from kdfast._library import compute_dtype, readable
from kdfast.ops.divergence import _check_kind
from kdfast.ops.linear_chunks import Inputs, Options, default_chunk_rows, logits_dtype
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher, check_sparse, check_vocab_size, listed
from kdfast.ops.vocab_parallel import Shard, shard_of

PerModel = float | tuple[float | None, float | None] | None  # for both models, or (student, teacher)


def check_linear(
    student_hidden, student_weight, teacher, *, teacher_weight, student_bias, teacher_bias, kind, beta, temperature, labels,
    kd_weight, ce_weight, vocab_size, softcap, logit_scale, row_weight, chunk_rows, process_group=None,
) -> tuple[Inputs, Options, Shard | None]:  # fmt: skip
    """The arguments of `linear_divergence` as flat rows and options, and this rank's classes if there is a process group."""
    widths = {"student_weight": _check_head("student", student_hidden, student_weight, student_bias)}
    device, shape = student_hidden.device, student_hidden.shape[:-1]
    sparse = isinstance(teacher, (TopKTeacher, SampledTeacher))
    if not sparse:
        check_float_tensor("teacher", teacher)
        if teacher.device != device or teacher.shape[:-1] != shape or teacher.dim() == 0:
            raise ValueError(
                f"teacher: expected the rows of student_hidden, {tuple(shape)} on {device}, got shape {tuple(teacher.shape)} on {teacher.device}"
            )
    if teacher_weight is not None:
        if sparse:
            raise ValueError(f"teacher_weight: a {type(teacher).__name__} has no head, got a Tensor")
        widths["teacher_weight"] = _check_head("teacher", teacher, teacher_weight, teacher_bias)
    elif teacher_bias is not None:
        raise ValueError("teacher_bias: expected None without teacher_weight, got a Tensor")
    elif not sparse:
        widths["teacher"] = teacher.shape[-1]
    shard = None if process_group is None else shard_of(process_group, kind, widths, vocab_size)
    classes = check_vocab_size(vocab_size, widths) if shard is None else shard.classes
    total = classes if shard is None else shard.total
    check_number("temperature", temperature, low=0.0, open_low=True)
    if sparse:
        check_sparse(teacher, shape, total, device, kind, beta, temperature)
    a, b = _check_kind(kind, beta)
    check_number("kd_weight", kd_weight)
    check_number("ce_weight", ce_weight)
    if kind == "dkd" or ce_weight != 0:
        if labels is None:
            raise ValueError(
                f"labels: expected a Tensor for {'kind=' + repr(kind) if kind == 'dkd' else 'cross-entropy'}, got None"
                + ("; ce_weight=0 leaves cross-entropy out" if kind != "dkd" else "")
            )
        check_labels(labels, shape, device)
    elif labels is not None:
        check_labels(labels, shape, device)
        labels = None  # nothing reads them
    if row_weight is not None:
        check_row_tensor("row_weight", row_weight, shape, device)
    scales = [float(check_number("logit_scale", v)) for v in _pair(logit_scale, 1.0)]
    caps = [0.0 if v is None else check_number("softcap", v, low=0.0, open_low=True) for v in _pair(softcap, None)]
    if teacher_weight is None:
        scales[1], caps[1] = 1.0, 0.0
    flat_labels = None if labels is None else labels.reshape(-1).long()
    flat_weight = None if row_weight is None else row_weight.reshape(-1)
    if flat_labels is not None and readable(flat_labels) and (flat_weight is None or readable(flat_weight)):
        _check_label_values(flat_labels, flat_weight, total)
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    ids, tail = None, None
    if sparse:
        ids, log_probs, tail = listed(teacher, compute_dtype(student_hidden, student_weight))
        ids, tail, teacher = ids.reshape(-1, ids.shape[-1]), tail.reshape(-1), log_probs
    teacher = teacher.reshape(-1, teacher.shape[-1])
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(max(classes, 1), logits_dtype(student_hidden, student_weight), device)
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected an int >= 1 or None, got {chunk_rows!r}")
    inputs = Inputs(
        hidden, student_weight, student_bias, teacher, teacher_weight, teacher_bias, ids, tail, flat_labels, flat_weight
    )
    options = Options(
        kind, a, b, float(temperature), classes, float(kd_weight), float(ce_weight), scales[0], scales[1], caps[0], caps[1], chunk_rows
    )  # fmt: skip
    return inputs, options, shard


def _pair(value: PerModel, otherwise: float | None) -> tuple:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"softcap, logit_scale: expected one value or a pair (student, teacher), got {value!r}")
        return tuple(otherwise if v is None else v for v in value)
    return (otherwise, otherwise) if value is None else (value, value)


def _check_label_values(labels: Tensor, row_weight: Tensor | None, classes: int) -> None:
    bad = (labels < 0) | (labels >= classes)
    if row_weight is not None:
        bad &= row_weight != 0
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(f"labels: expected integers in [0, {classes}), got {int(labels[row])} at row {row}")


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The number of classes of a head that fits these hidden states."""
    name = "student_hidden" if side == "student" else "teacher"
    check_float_tensor(name, hidden)
    check_float_tensor(f"{side}_weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"{side}_weight: expected [V, {hidden.shape[-1] if hidden.dim() else 'D'}] for hidden states {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    for what, tensor in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None:
            continue
        check_float_tensor(what, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{what}: expected the device of {name} ({hidden.device}), got {tensor.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return weight.shape[0]
