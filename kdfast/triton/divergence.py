"""`kdfast.ops.divergence` on a GPU: the three ops as functions on tensors. Passes and bytes: divergence_sweeps.py.

Rows are split over programs when there are too few to fill the GPU; then each pass is a launch of its own. Nothing here waits
for the GPU, and nothing that changes from batch to batch (rows, strides, temperatures, factors) is compiled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype, contiguous, final_gradient_like, gradient_like
from kdfast.ops.divergence import N_STATS, _row_shape
from kdfast.triton import divergence_sweeps as kernels
from kdfast.triton.launch import DTYPES, MAX_32, Layout, launch, lay_out, power_of_two, splits, tile_shape

# Kinds whose sums the first pass can take: (sum v, sum u, the sum of p^a q^(1-a)). The others with a sum need a pass for it.
ONLINE = {
    "forward_kl": (False, True, False), "reverse_kl": (True, False, False), "jeffreys": (True, True, False),
    "alpha": (False, False, True), "dkd": (False, False, False), "binary": (False, False, False),
}  # fmt: skip


def _limits(kind: str, a: float) -> tuple[str, float]:
    """(kind, scale): at the ends of beta a kind is another one; scale 0 where it is identically 0."""
    if kind in ("js", "js_rescaled"):
        if a in (0, 1):
            return ("forward_kl" if a == 0 else "reverse_kl"), 1.0
        return "js", 1 / (a * (1 - a)) if kind == "js_rescaled" else 1.0
    if kind in ("skew_forward_kl", "skew_reverse_kl") and a in (0, 1):
        return kind.removeprefix("skew_"), 1.0 - a
    if kind == "alpha" and a in (0, 1):
        return ("forward_kl" if a == 1 else "reverse_kl"), 1.0
    return kind, 1.0


@dataclass
class _Call:
    """One call of an op: what its launches have in common."""

    student: Tensor
    teacher: Tensor
    grad_student: Tensor | None
    grad_teacher: Tensor | None
    labels: Tensor | None
    row_temperature: Tensor | None
    row_weight: Tensor | None
    kind: str
    a: float
    b: float
    temperature: float
    classes: int
    dim: int
    kd_factor: float = 1.0
    ce_factor: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.student, self.teacher)
        self.device = self.student.device
        self.kind, self.scale = _limits(self.kind, self.a)
        self.labels = contiguous(self.labels, torch.int64)
        self.row_temperature = contiguous(self.row_temperature, self.dtype)
        self.row_weight = contiguous(self.row_weight, self.dtype)
        empty = self.student.new_empty(0)
        operands = [self.student, self.teacher, self.grad_student, self.grad_teacher]
        self.layout: Layout = lay_out([empty if t is None else t for t in operands], self.dim)
        self.rows, self.width, self.num_warps = tile_shape(self.layout, self.classes, self.dtype)
        self.single = self.width >= self.classes
        self.blocks = self.layout.outer * -(-self.layout.inner // self.rows)
        tiles = -(-self.classes // self.width)
        wanted = 1 if self.single else splits(self.blocks, tiles, self.device)
        self.per_split = -(-tiles // wanted) * self.width
        self.splits = -(-self.classes // self.per_split)

    @property
    def need(self) -> tuple[bool, bool]:
        return self.grad_student is not None, self.grad_teacher is not None

    @property
    def online(self) -> tuple[bool, bool, bool]:
        """What the first pass sums for the gradients: nothing where the row is in registers or a pass of its own sums."""
        if self.single or self.sums_pass:
            return False, False, False
        student, teacher = self.need
        v, u, r = ONLINE[self.kind]
        return v and student, u and teacher, r and (student or teacher)

    @property
    def sums_pass(self) -> bool:
        """Whether the gradients' sums, or the loss alone, need a pass of their own."""
        student, teacher = self.need
        if not (student or teacher) or self.kind not in ONLINE:
            return True
        # 1 - sum r is divided by the order (or by it minus 1), and so is its rounding
        return self.kind == "alpha" and ((student and abs(self.a) < 0.25) or (teacher and abs(self.a - 1) < 0.25))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _shared(self) -> dict[str, Any]:
        sizes, strides = self.layout.sizes, self.layout.strides
        cross = self.ce_factor != 0
        raw = cross and (self.temperature != 1 or self.row_temperature is not None or self.kind == "dkd")
        v, u, r = self.online
        return {
            "student": self.student, "teacher": self.teacher, "labels": self.labels, "row_temperature": self.row_temperature,
            "row_weight": self.row_weight, "count": self.layout.rows, "tiles": -(-self.layout.inner // self.rows),
            "n_splits": self.splits, "per_split": self.per_split, "n1": sizes[1], "n2": sizes[2], "inner": self.layout.inner,
            "classes": self.classes, **{f"x{i}": s for i, s in enumerate(strides[0])},
            **{f"z{i}": s for i, s in enumerate(strides[1])}, "temperature": float(self.temperature), "beta": float(self.a),
            "KIND": self.kind, "DTYPE": DTYPES[self.dtype], "RAW": raw, "SMOOTH": cross and self.label_smoothing != 0,
            "ONLINE_V": v, "ONLINE_U": u, "ONLINE_R": r, "R": self.rows, "B": self.width, "WIDE": self._wide(),
        }  # fmt: skip

    def _wide(self) -> bool:
        widths = (self.student.shape[self.dim], self.teacher.shape[self.dim])
        return any(abs(strides[4]) * (max(widths) + self.width) > MAX_32 for strides in self.layout.strides)

    def log_sums(self) -> Tensor:
        """First pass of split rows."""
        partials = self.new(11, self.splits, self.layout.rows)
        self._launch(kernels.log_sums_kernel, {**self._shared(), "partials": partials})
        return partials

    def run(self, *, source: str = "logits", sums: bool = False, given: bool = False, loss: Tensor | None = None,
            ce_loss: Tensor | None = None, stats: Tensor | None = None, partials: Tensor | None = None,
            row_sums: tuple[Tensor, Tensor] | None = None, per_row: bool = False, gradients: bool = True) -> None:  # fmt: skip
        """divergence_kernel, with the gradients unless told otherwise."""
        student, teacher = self.need if gradients else (False, False)
        strides = self.layout.strides
        sums_v, sums_u = row_sums or (None, None)
        arguments = self._shared() | {
            "grad_student": self.grad_student if student else None, "grad_teacher": self.grad_teacher if teacher else None,
            "partials": partials, "stats": stats, "sums_v": sums_v, "sums_u": sums_u, "loss": loss, "ce_loss": ce_loss,
            "student_width": self.student.shape[self.dim], "teacher_width": self.teacher.shape[self.dim],
            **{f"gx{i}": s for i, s in enumerate(strides[2])}, **{f"gz{i}": s for i, s in enumerate(strides[3])},
            "beta_2": float(self.b), "scale": self.scale, "kd_factor": float(self.kd_factor), "ce_factor": float(self.ce_factor),
            "smoothing": float(self.label_smoothing), "SOURCE": source, "ROWS": per_row, "SUMS": sums, "GIVEN": given,
            "LOSS": loss is not None, "GRAD_S": student, "GRAD_T": teacher, "CE": self.ce_factor != 0,
            "SPLITS": power_of_two(self.splits), "SINGLE": self.single and source == "logits",
            "ZERO": self.kd_factor * self.scale == 0,
        }  # fmt: skip
        self._launch(kernels.divergence_kernel, arguments)

    def _launch(self, kernel: Any, arguments: dict[str, Any]) -> None:
        launch(kernel, self.blocks * self.splits, self.num_warps, self.device, **arguments)


def rows(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_temperature: Tensor | None, kind: str, a: float, b: float,
    temperature: float, classes: int, dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_rows: two passes over the logits (one where a row fits a tile), rows and their 7 stats out."""
    call = _Call(student, teacher, None, None, labels, row_temperature, None, kind, a, b, temperature, classes, dim)
    shape = _row_shape(student, dim)
    out, stats = call.new(*shape), call.new(N_STATS, *shape)
    if call.splits == 1:
        call.run(sums=True, loss=out, stats=stats, row_sums=(stats[5], stats[6]), per_row=True)
        return out, stats
    parts = call.new(3, call.splits, call.layout.rows)
    call.run(source="partials", partials=call.log_sums(), sums=True, loss=parts[0], stats=stats, row_sums=(parts[1], parts[2]),
             per_row=True)  # fmt: skip
    _add_rows(call, parts, stats, out)
    return out, stats


def _add_rows(call: _Call, parts: Tensor, stats: Tensor, out: Tensor) -> None:
    arguments = {"parts": parts, "stats": stats, "rows": out, "count": call.layout.rows, "n_splits": call.splits,
                 "R": 32, "SPLITS": power_of_two(call.splits)}  # fmt: skip
    launch(kernels.rows_kernel, -(-call.layout.rows // 32), 1, call.device, **arguments)


def rows_backward(
    grad_rows: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, labels: Tensor | None, row_temperature: Tensor | None,
    kind: str, a: float, b: float, temperature: float, classes: int, dim: int, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_rows_backward: one pass, both logits in, the gradients out; any upstream factor per row."""
    grads = gradient_like(student, need_student), gradient_like(teacher, need_teacher)
    if need_student or need_teacher:
        call = _Call(
            student, teacher, grads[0] if need_student else None, grads[1] if need_teacher else None, labels, row_temperature,
            grad_rows, kind, a, b, temperature, classes, dim,
        )  # fmt: skip
        call.run(source="stats", stats=stats)
    return grads


def weighted_sum(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_temperature: Tensor | None, row_weight: Tensor | None,
    kind: str, a: float, b: float, temperature: float, classes: int, dim: int, kd_factor: float, ce_factor: float,
    label_smoothing: float, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_sum: loss, (KD, CE) and the final gradients in the same call: two passes, three for mixtures."""
    grads = final_gradient_like(student, need_student), final_gradient_like(teacher, need_teacher)
    call = _Call(
        student, teacher, grads[0] if need_student else None, grads[1] if need_teacher else None, labels, row_temperature,
        row_weight, kind, a, b, temperature, classes, dim, kd_factor, ce_factor, label_smoothing,
    )  # fmt: skip
    kd = call.new(call.blocks * call.splits)
    ce = call.new(call.blocks * call.splits) if ce_factor != 0 else None
    sums = call.sums_pass
    if call.splits == 1:
        call.run(sums=sums, loss=kd, ce_loss=ce)
    else:
        partials = call.log_sums()
        if not sums:
            call.run(source="partials", partials=partials, loss=kd, ce_loss=ce)
        else:
            row_sums = (call.new(call.splits, call.layout.rows), call.new(call.splits, call.layout.rows))
            call.run(
                source="partials", partials=partials, sums=True, loss=kd, ce_loss=ce, row_sums=row_sums, gradients=False
            )
            if any(call.need):
                call.run(source="partials", partials=partials, given=True, row_sums=row_sums)
    loss, parts = call.new(), call.new(2)
    arguments = {"kd_parts": kd, "ce_parts": ce, "loss": loss, "parts": parts, "n": kd.numel(), "kd_factor": float(kd_factor),
                 "ce_factor": float(ce_factor), "CE": ce is not None, "B": 1024}  # fmt: skip
    launch(kernels.total_kernel, 1, 4, call.device, **arguments)
    return loss, parts, *grads
