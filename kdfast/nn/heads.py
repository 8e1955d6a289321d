"""Heads: the last linear layer of a model, found, or replaced by what a method trains instead; two heads on one feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from kdfast._checks import check_choice


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


class DualOutput(NamedTuple):
    """What a model with two heads returns while training: logits of its own head, and of the second one, both [..., C]."""

    main: Tensor
    aux: Tensor


class DualHead(nn.Module):
    """A second head beside a model's own on the same feature [..., D]: `DualOutput` while training, then the own logits [..., C].

    Args:
        main: the model's head, an nn.Linear(D, C), kept as it is. aux: "linear", an nn.Linear(D, C), or "nonlinear", Linear(D,
            hidden), Dropout, BatchNorm1d, ReLU, Linear(hidden, C), for features [N, D]. hidden, dropout: of that.
    `both`: return the pair in evaluation too. `remove_dual_heads` leaves the model as it was, without the second head.

    >>> student = replace_head(student, DualHead)
    """

    def __init__(self, main: nn.Linear, *, aux: str = "linear", hidden: int = 200, dropout: float = 0.1) -> None:
        super().__init__()
        check_choice("aux", aux, ("linear", "nonlinear"))
        width, classes = main.in_features, main.out_features
        self.main, self.both = main, False
        self.aux: nn.Module = nn.Linear(width, classes)
        if aux == "nonlinear":
            self.aux = nn.Sequential(
                nn.Linear(width, hidden), nn.Dropout(dropout), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
            )  # fmt: skip

    def pair(self, feature: Tensor) -> DualOutput:
        return DualOutput(self.main(feature), self.aux(feature))

    def inference(self, feature: Tensor) -> Tensor:
        """What counts after training; the own head alone, unless a subclass combines the two."""
        return self.main(feature)

    def forward(self, feature: Tensor) -> DualOutput | Tensor:
        return self.pair(feature) if self.training or self.both else self.inference(feature)


def dual_heads(model: nn.Module) -> list[DualHead]:
    return [module for module in model.modules() if isinstance(module, DualHead)]


def remove_dual_heads(model: nn.Module) -> nn.Module:
    """Puts every DualHead's own head back in its place, in place; returns the model."""
    if isinstance(model, DualHead):
        return model.main
    for name, child in model.named_children():
        setattr(model, name, remove_dual_heads(child))
    return model
