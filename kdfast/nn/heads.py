"""Heads: the last linear layer of a model, found, or replaced by what a method trains instead."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def find_head(model: nn.Module, path: str | None = None) -> tuple[str, nn.Linear]:
    """(path, layer) of the nn.Linear at a dotted path; None takes the last one of the model. ValueError when there is none."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
    if not heads or (path is not None and path not in heads):
        raise ValueError(
            f"path: expected an nn.Linear of {type(model).__name__}, got {path!r}; there are {', '.join(heads) or 'none'}"
        )
    path = list(heads)[-1] if path is None else path
    return path, heads[path]


def replace_head(model: nn.Module, make: Callable[[nn.Linear], nn.Module], path: str | None = None) -> nn.Module:
    """Puts make(head) in the place of a model's head, in place; returns the model.

    Args:
        make: gets the old head, an nn.Linear(D, C). path: as in `find_head`.

    >>> student = replace_head(student, lambda head: nn.Linear(head.in_features, 2 * head.out_features))
    """
    path, head = find_head(model, path)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(head))
    return model
