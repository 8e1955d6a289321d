"""Heads: the last linear layer of a student replaced by what a method trains instead."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_head(model: nn.Module, make: Callable[[nn.Linear], nn.Module], path: str | None = None) -> nn.Module:
    """Puts make(head) in the place of a model's head, in place; returns the model.

    Args:
        make: gets the old head, an nn.Linear(D, C). path: of the head, dotted; None takes the last nn.Linear of the model.
    Raises:
        ValueError: no nn.Linear there.

    >>> student = replace_head(student, lambda head: nn.Linear(head.in_features, 2 * head.out_features))
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
    if not heads or (path is not None and path not in heads):
        raise ValueError(
            f"path: expected an nn.Linear of {type(model).__name__}, got {path!r}; there are {', '.join(heads) or 'none'}"
        )
    path = list(heads)[-1] if path is None else path
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(heads[path]))
    return model
