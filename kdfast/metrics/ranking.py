"""Ranking metrics: filtered rank, mean reciprocal rank and Hits@k of link prediction; average precision of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor, check_int, check_labels


def filtered_rank(scores: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """rank = 1 + #(others with a greater score) + #(others with the same score) / 2, other known answers left out; [B].

    Args:
        scores: [B, N]. target: [B] integers, the answer asked for. known: [B, N] bool, True = another right answer, which
            must not push the target down; it may not mark the target itself.
    Ties count half: a constant scorer gets the mean rank, not the first.
    Raises:
        ValueError: a NaN score of a candidate, a target outside [0, N), `known` marking the target.

    >>> filtered_rank(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]), torch.tensor([[True, False, False]])).item()
    1.0
    """
    check_float_tensor("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [B, N], got {tuple(scores.shape)}")
    check_labels(target, scores.shape[:1], scores.device, "target")
    index = target.long().unsqueeze(1)
    if scores.shape[0] and not 0 <= int(index.min()) <= int(index.max()) < scores.shape[1]:
        raise ValueError(
            f"target: expected values in [0, {scores.shape[1]}), got {int(index.min())} to {int(index.max())}"
        )
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, index, False)
    if known is not None:
        if known.shape != scores.shape or known.dtype != torch.bool:
            raise ValueError(f"known: expected bool {tuple(scores.shape)}, got {known.dtype} {tuple(known.shape)}")
        if bool(known.gather(1, index).any()):
            raise ValueError("known: expected other answers only, but it marks a target")
        others = others & ~known
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected no NaN")
    own = scores.gather(1, index)
    return 1 + ((scores > own) & others).sum(1) + ((scores == own) & others).sum(1) / 2


def mean_reciprocal_rank(ranks: Tensor) -> float:
    """Mean of 1 / rank; NaN without a rank.

    >>> mean_reciprocal_rank(torch.tensor([1.0, 2.0]))
    0.75
    """
    return float((1 / ranks.double()).mean())


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Of each class: the mean over its positive rows of the share of positives among the rows scored as high or higher; [C].

    Args: scores: [B, C]. targets: [B, C], positive where not 0. Equal scores count together; a class without positives is NaN.

    >>> average_precision(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1], [0], [1]])).tolist()
    [0.8333333333333334]
    """
    check_float_tensor("scores", scores)
    if scores.dim() != 2 or targets.shape != scores.shape:
        raise ValueError(f"targets: expected shape {tuple(scores.shape)}, [B, C], got {tuple(targets.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected no NaN")
    found = []
    for column, positive in zip(scores.T, targets.T != 0):
        ascending, own = column.sort().values, column[positive].sort().values
        above = len(ascending) - torch.searchsorted(ascending, own)  # rows scored at least as high as each positive
        right = len(own) - torch.searchsorted(own, own)
        found.append((right / above.double()).mean())
    return torch.stack(found)


def hits_at(ranks: Tensor, k: int) -> float:
    """Share of ranks that are at most k; NaN without a rank.

    >>> hits_at(torch.tensor([1.0, 2.0, 11.0]), 10)
    0.6666666666666666
    """
    check_int("k", k, low=1)
    return float((ranks <= k).double().mean())
