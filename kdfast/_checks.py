"""Argument checks. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_dtensor(tensor: Tensor) -> bool:
    # By name: importing torch.distributed.tensor costs half a second and nobody without one should pay it.
    return type(tensor).__name__ == "DTensor"


def check_float_tensor(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if type(tensor) is not Tensor and is_dtensor(tensor):
        raise TypeError(f"{name}: a DTensor is not supported; pass {name}.to_local() (or full_tensor() to gather it)")
    return tensor


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str] = ("student", "teacher")) -> None:
    """Same number of dimensions and the same device; widths are compared by the op, which may cut them."""
    check_float_tensor(names[0], student)
    check_float_tensor(names[1], teacher)
    if student.device != teacher.device:
        raise ValueError(f"{names[1]}: expected the device of {names[0]} ({student.device}), got {teacher.device}")


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """A finite number in [low, high], or (low, high] with open_low."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    inside = (value > low if open_low else value >= low) and value <= high
    if not inside or not -math.inf < value < math.inf:  # comparisons, so that torch.compile can trace a dynamic number
        left = f"{'(' if open_low or low == -math.inf else '['}{low:g}"
        right = f"{high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}: expected a finite number in {left}, {right}, got {value}")
    return float(value)


def check_dim(tensor: Tensor, dim: int) -> int:
    """The class axis, counted from the front."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim: expected an axis of a {tensor.dim()}-dimensional tensor, got {dim}")
    return dim % tensor.dim()


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_int(name: str, value: object, *, low: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value}")
    return value


def check_labels(labels: object, shape: torch.Size, device: torch.device, name: str = "labels") -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a Tensor of integers, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name}: expected the device of the logits ({device}), got {labels.device}")
    return labels


def check_row_tensor(name: str, tensor: object, shape: torch.Size, device: torch.device) -> Tensor:
    """One value per row (mask, weight, temperature): the shape of the logits without the class axis."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)} (one value per row), got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of the logits ({device}), got {tensor.device}")
    return tensor


def check_values(logits: dict[str, Tensor], labels: Tensor | None, classes: int, dim: int = -1) -> None:
    """What the CPU kernels find on their way, for the other backends under `kdfast.debug()`: reads the values."""
    for name, tensor in logits.items():
        bad = ~(tensor.narrow(dim, 0, classes) < math.inf)  # NaN and +inf; -inf is a masked class
        if bool(bad.any()):
            row = int(bad.any(dim).reshape(-1).int().argmax())
            raise ValueError(
                f"{name}: expected finite logits (or -inf for a masked class), got NaN or +inf at row {row}"
            )
    if labels is not None:
        bad = (labels < 0) | (labels >= classes)
        if bool(bad.any()):
            row = int(bad.reshape(-1).int().argmax())
            raise ValueError(
                f"labels: expected integers in [0, {classes}), got {int(labels.reshape(-1)[row])} at row {row}"
            )
