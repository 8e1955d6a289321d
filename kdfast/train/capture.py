"""Which submodules a method reads: paths of both models, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from kdfast.nn.capture import capture_outputs, find_module

__all__ = ["capture_outputs", "find_module", "split_captures"]


def split_captures(
    capture: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None, wanted: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """({name: student path}, {name: teacher path}), every path checked."""
    missing = [name for name in wanted if name not in capture]
    if missing:
        raise ValueError(f"capture: the method reads {', '.join(missing)}; give {{name: (student path, teacher path)}}")
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, paths in capture.items():
        pair = (paths, paths if teacher is not None else None) if isinstance(paths, str) else tuple(paths)
        if len(pair) != 2:
            raise ValueError(f"capture[{name!r}]: expected (student path, teacher path), got {paths!r}")
        for side, model, path in zip(sides, (student, teacher), pair):
            if path is not None:
                if model is None:
                    raise ValueError(f"capture[{name!r}]: there is no teacher, so no {path!r} in it")
                find_module(model, path, f"capture[{name!r}]")
                side[name] = path
    return sides
