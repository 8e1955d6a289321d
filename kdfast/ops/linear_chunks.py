"""The chunks of `kdfast.ops.linear_divergence`: what is alive of the logits, and what becomes of it.

Per chunk of rows, for each model one buffer that all chunks share:

    x = cap tanh(scale (hidden W^T + bias) / cap)           a product of torch.mm into the buffer
    x <- final gradient of the loss with respect to it      one pass of the compiled core, in place
    dhidden[rows] = scale x W     dW += scale x^T hidden    dbias += scale sum x

So no logits but one chunk of the student and one of the teacher exist. On other devices (`Eager`) the gradient of a chunk is a
buffer of its own, and without a fused divergence there torch's graph of one chunk lives beside it. The core reads an element before it writes its
gradient there, which makes the pass in place safe (`test_the_gradient_may_lie_over_the_logits`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._library import compute_dtype, new_empty
from kdfast.ops.sparse_divergence import BLOCK_BYTES

# One chunk of logits. On the CPU counted in float32: products of 100 rows take 1.3 times as long per row as those of 200.
CHUNK_BYTES = 128 << 20
DEVICE_CHUNK_BYTES = 512 << 20  # products fill a GPU with 2000 rows
# A float32 block of a weight's gradient. Above 32 MB glibc gives a block back to the system as soon as it is freed.
GRADIENT_BYTES = 40 << 20
ADDED_ROWS = 2048

Rows = slice | Tensor  # the rows of a chunk: neighbours, or the kept ones among ignored rows


class Options(NamedTuple):
    """What all passes share. Caps: 0 is none."""

    kind: str
    a: float
    b: float
    temperature: float
    classes: int
    kd_factor: float
    ce_factor: float
    student_scale: float
    teacher_scale: float
    student_cap: float
    teacher_cap: float
    chunk_rows: int


class Inputs(NamedTuple):
    """Tensors of the ops, rows flattened. teacher: hidden states (with teacher_weight), logits, or listed log-probabilities (with ids)."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    teacher: Tensor  # [N, D'], [N, V'] or [N, K]
    teacher_weight: Tensor | None  # [V', D']
    teacher_bias: Tensor | None  # [V']
    ids: Tensor | None  # [N, K]
    tail: Tensor | None  # [N]
    labels: Tensor | None  # [N]
    row_weight: Tensor | None  # [N]; a row of weight 0 is not read


def logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """bfloat16 for a bfloat16 model, as the model's own head gives them: float32 products would run several times slower on a
    CPU and hold twice the bytes. float32 for float16, whose gradients underflow before a loss scaler's factor comes.
    """
    if hidden.dtype == weight.dtype == torch.bfloat16:
        return torch.bfloat16
    return compute_dtype(hidden, weight)


@functools.cache
def bfloat16_products() -> bool:
    """Whether products in bfloat16 are fast on this CPU: without AVX-512 torch's run at a sixth of the speed of float32's."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the products of logits of `dtype`, and of their gradients, are computed in."""
    slow = dtype == torch.bfloat16 and device.type == "cpu" and not bfloat16_products()
    return torch.float32 if slow else dtype


def default_chunk_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    on_cpu = device.type in ("cpu", "meta")
    rows = CHUNK_BYTES // (4 * classes) if on_cpu else DEVICE_CHUNK_BYTES // (classes * dtype.itemsize)
    return min(max(rows // 16 * 16, 16), 4096)


def row_chunks(rows: int, kept: Tensor | None, chunk_rows: int) -> Iterator[Rows]:
    """Chunks of all rows, or of those whose numbers are `kept`."""
    if kept is None or len(kept) == rows:
        for start in range(0, rows, chunk_rows):
            yield slice(start, min(start + chunk_rows, rows))
    else:
        yield from kept.split(chunk_rows) if len(kept) else ()


def pick(tensor: Tensor | None, rows: Rows) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def part_of(inputs: Inputs, rows: Rows) -> Inputs:
    """What belongs to the rows of a chunk besides hidden states and heads, which it does not name."""
    return inputs._replace(
        ids=pick(inputs.ids, rows), tail=pick(inputs.tail, rows), labels=pick(inputs.labels, rows), row_weight=pick(inputs.row_weight, rows)
    )  # fmt: skip


def total_of(kd: Tensor, ce: Tensor, o: Options) -> Tensor:
    """A term of factor 0 is left out: 0 times an infinite divergence is not 0."""
    return sum((f * t for f, t in ((o.kd_factor, kd), (o.ce_factor, ce)) if f != 0), start=torch.zeros_like(kd))


@contextlib.contextmanager
def row_context(rows: Rows) -> Iterator[None]:
    """The core counts rows from the start of its chunk; an error about a value says which chunk that was."""
    try:
        yield
    except ValueError as error:
        where = (
            f"rows {rows.start} to {rows.stop}"
            if isinstance(rows, slice)
            else f"the kept ones of rows {int(rows[0])} to {int(rows[-1])}"
        )
        raise ValueError(f"{error} (of a chunk: {where})") from error


def blocks(count: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Model:
    """One side of the loss: hidden states with a head, or (weight None) logits that exist. Makes chunks, takes gradients."""

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        classes: int,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.inputs, self.scale, self.classes = inputs, scale, classes
        self.full_weight, self.full_bias = weight, bias
        self.weight = None if weight is None else weight[:classes]
        self.bias = None if bias is None else bias[:classes]
        self.dtype = inputs.dtype if weight is None else logits_dtype(inputs, weight)
        self.products = products_dtype(self.dtype, inputs.device)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.buffer: Tensor | None = None
        self.scratch: dict[str, Tensor] = {}
        self.first = True
        self.needed = any(needs)
        self.grad_inputs = torch.zeros_like(inputs, dtype=stored(inputs), memory_format=torch.contiguous_format) if needs[0] else None  # fmt: skip
        self.weight_blocks: list[Tensor] | None = None
        self.grad_weight: Tensor | None = None
        if needs[1] and weight is not None:
            if weight.dtype == torch.bfloat16:
                self.weight_blocks = [
                    weight.new_empty((at.stop - at.start) * weight.shape[1], dtype=self.wide)
                    for at in self._class_blocks()
                ]
            else:
                self.grad_weight = new_empty(weight, tuple(weight.shape), self.wide)
        self.grad_bias = None if bias is None or not needs[2] else bias.new_zeros(classes, dtype=self.wide)

    def chunk(self, rows: Rows) -> Tensor:
        """Logits [n, C], to be overwritten by their gradient if one is needed; before the soft cap."""
        inputs = self.inputs[rows]
        if self.weight is None:
            return inputs.clone() if self.needed and isinstance(rows, slice) else inputs
        if self.buffer is None or len(self.buffer) < len(inputs):
            self.buffer = new_empty(inputs, (len(inputs), self.classes), self.dtype)
        out = self.buffer[: len(inputs)]
        inputs = inputs.to(self.products)
        for at in self._head_blocks(len(inputs)):
            weight = self._converted("weight", self.weight[at]).T
            bias = None if self.bias is None else self.bias[at]
            if self.products == self.dtype:
                product(inputs, weight, self.scale, out[:, at], bias)
            else:
                wide = self._scratch("logits", (len(inputs), weight.shape[1]))
                out[:, at] = product(inputs, weight, self.scale, wide, bias)
        return out

    def _head_blocks(self, rows: int) -> Iterator[slice]:
        """Classes of one product of `rows` rows. On the CPU a part of the head that stays in cache, which is faster and, where the
        head or the logits have another type, keeps their copies small; elsewhere, and for bfloat16 products, whose column slices
        are slow, all.
        """
        assert self.weight is not None
        whole = self.weight.dtype == self.products and (not self.weight.is_cpu or self.products == torch.bfloat16)
        copied = not self.weight.dtype == self.dtype == self.products
        longest = max(self.weight.shape[1], rows if copied else 0, 1)
        step = self.classes if whole else BLOCK_BYTES // (2 if copied else 1) // (4 * longest)
        for outer in (slice(0, self.classes),) if whole or self.weight_blocks is None else self._class_blocks():
            for at in blocks(outer.stop - outer.start, step):
                yield slice(outer.start + at.start, outer.start + at.stop)

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """In the type of the products: as it is, or as a copy."""
        return tensor if tensor.dtype == self.products else self._scratch(name, tuple(tensor.shape)).copy_(tensor)

    def _scratch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One buffer for all blocks: freed and made again in many sizes, they would stay with the allocator."""
        size = math.prod(shape)
        if name not in self.scratch or self.scratch[name].numel() < size:
            self.scratch[name] = self.inputs.new_empty(size, dtype=self.products)
        return self.scratch[name][:size].view(shape)

    def take(self, grad: Tensor, rows: Rows) -> None:
        """Adds what the gradient of a chunk's logits means for inputs, weight and bias."""
        if self.weight is None:
            if self.grad_inputs is not None:
                self.grad_inputs[rows, : grad.shape[1]] = grad.to(
                    self.grad_inputs.dtype
                )  # a rank compares its classes only
            return
        hidden = self.inputs[rows].to(self.products)
        empty = hidden.new_empty if self.classes else hidden.new_zeros  # a rank may have no class that is compared
        grad_hidden = None if self.grad_inputs is None else empty(hidden.shape)
        for at in self._head_blocks(len(grad)):
            part = self._converted("logits", grad[:, at])
            if grad_hidden is not None:
                product_into(
                    part, self._converted("weight", self.weight[at]), self.scale, grad_hidden, first=at.start == 0
                )
            if (to := self._gradient_of(at)) is not None:
                product_into(part.T, hidden, self.scale, to, first=self.first)
        if self.weight_blocks is not None and self.products == torch.bfloat16:
            self._add_by_blocks(grad, hidden)
        if self.grad_inputs is not None and grad_hidden is not None:
            self.grad_inputs[rows] = grad_hidden.to(self.grad_inputs.dtype)
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0, dtype=self.wide), alpha=self.scale)
        self.first = False

    def _gradient_of(self, at: slice) -> Tensor | None:
        """[n, D], where the weight's gradient of some classes is summed; None: nowhere, or by `_add_by_blocks`."""
        if self.grad_weight is not None:
            return self.grad_weight[at]
        if self.weight_blocks is None or self.products == torch.bfloat16:
            return None
        step = self._class_step()
        start = at.start % step
        block = self.weight_blocks[at.start // step].view(-1, self.inputs.shape[1])
        return block[start : start + at.stop - at.start]

    def _class_step(self) -> int:
        assert self.full_weight is not None
        return max(GRADIENT_BYTES // (4 * max(self.full_weight.shape[1], 1)), 1)

    def _class_blocks(self) -> Iterator[slice]:
        yield from blocks(self.classes, self._class_step())

    def _feature_blocks(self) -> Iterator[slice]:
        assert self.full_weight is not None
        width = self.full_weight.shape[1]
        some = max(GRADIENT_BYTES // (2 * max(self.classes, 1)) // 64 * 64, 64)
        yield from blocks(width, some if self.products == torch.bfloat16 else width)

    def _add_by_blocks(self, grad: Tensor, hidden: Tensor) -> None:
        """bfloat16 products of a chunk, summed over chunks in float32.

        The product is cut along the features: one with a column slice of the chunk is much slower. The sum is
        cut along the classes, so that a finished part of it can be freed. A block is kept tile by tile, each contiguous: adding
        to a strided one takes longer.
        """
        assert self.weight_blocks is not None
        for features in self._feature_blocks():
            part = torch.mm(grad.T, hidden[:, features])  # [C, few features]
            for classes, block in zip(self._class_blocks(), self.weight_blocks):
                rows, to = part[classes], _tile(block, classes, features)
                if not self.first:
                    for some in blocks(
                        len(rows), ADDED_ROWS
                    ):  # torch makes a float32 copy to add: a small one stays in cache
                        to[some].add_(rows[some], alpha=self.scale)
                elif self.scale == 1.0:
                    to.copy_(rows)
                else:
                    torch.mul(rows, self.scale, out=to)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of inputs, weight and bias; empty where not asked for."""
        self.buffer, self.scratch = None, {}
        grad_inputs, grad_weight, grad_bias = (
            self.inputs.new_empty(0) for _ in range(3)
        )  # an op's results may not be one
        if self.weight_blocks is not None:
            assert self.full_weight is not None
            if self.first:
                grad_weight = torch.zeros_like(self.full_weight, memory_format=torch.contiguous_format)
            else:
                grad_weight = new_empty(self.full_weight, tuple(self.full_weight.shape))
                grad_weight[self.classes :] = 0
                for classes in self._class_blocks():  # each freed once it is rounded: two whole copies never exist
                    block = self.weight_blocks.pop(0)
                    for features in self._feature_blocks():
                        grad_weight[classes, features] = _tile(block, classes, features)
                    del block
        elif self.grad_weight is not None:
            assert self.full_weight is not None
            grad_weight = self.grad_weight
            grad_weight[0 if self.first else self.classes :] = 0
            grad_weight = grad_weight.to(stored(self.full_weight))
        if self.grad_bias is not None:
            assert self.full_bias is not None
            grad_bias = self.full_bias.new_zeros(self.full_bias.shape, dtype=stored(self.full_bias))
            grad_bias[: self.classes] = self.grad_bias
        if self.grad_inputs is not None:
            grad_inputs = self.grad_inputs
        return grad_inputs, grad_weight, grad_bias


def _tile(block: Tensor, classes: slice, features: slice) -> Tensor:
    """Where a flat block of classes keeps some of their features."""
    n = classes.stop - classes.start
    return block[n * features.start : n * features.stop].view(n, features.stop - features.start)


def stored(tensor: Tensor) -> torch.dtype:
    """The dtype of a gradient kept until the upstream factor comes (`final_gradient_like`)."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def product(a: Tensor, b: Tensor, scale: float, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = scale (a b + bias), rounded once."""
    if bias is not None:
        return torch.addmm(bias.to(out.dtype), a, b, beta=scale, alpha=scale, out=out)
    if scale == 1.0:
        return torch.mm(a, b, out=out)
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def product_into(a: Tensor, b: Tensor, scale: float, to: Tensor, *, first: bool) -> None:
    """to += scale a b; the first time written, not zeroed and added to."""
    if first:
        product(a, b, scale, to)
    else:
        to.addmm_(a, b, alpha=scale)
