"""Outputs of submodules, by dotted path, while a model runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
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
