"""Outputs of submodules, by dotted path, while a model runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def find_module(model: nn.Module, path: str, name: str = "capture") -> nn.Module:
    """The submodule at a dotted path; ValueError, listing near names, when there is none."""
    modules = dict(model.named_modules())
    if path not in modules:
        last = path.rpartition(".")[2]
        near = difflib.get_close_matches(path, modules, n=5, cutoff=0.4)
        near += [known for known in modules if known.rpartition(".")[2] == last and known not in near]
        known = near or [child for child, _ in model.named_children()]
        raise ValueError(
            f"{name}: {type(model).__name__} has no submodule {path!r}; "
            + ("near names: " if near else "its children: ")
            + ", ".join(known[:8])
        )
    return modules[path]


@contextmanager
def capture_outputs(model: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Inside the block, what the submodules at `paths` ({name: dotted path}) return when `model` runs.

    The hooks are gone after the block. A submodule that runs twice keeps its last output.

    >>> with capture_outputs(resnet, {"feat": "layer4"}) as features:
    ...     logits = resnet(images)
    >>> features["feat"].shape
    """
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, path in paths.items():

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                found[name] = output

            stack.callback(find_module(model, path).register_forward_hook(keep).remove)
        yield found


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
