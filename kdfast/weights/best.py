"""The weights of the epoch that scored best on validation data."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class BestWeights(nn.Module):
    """A copy of a model as it was when it scored highest. Both are part of the state, so that a resumed run still has them.

    `model` is the copy, `score` [] its score, -inf before the first `offer`.

    >>> best = BestWeights(student)
    >>> best.offer(student, mean_iou(...))      # after each epoch
    >>> best.model(images)
    """

    score: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("score", torch.tensor(-torch.inf))

    @torch.no_grad()
    def offer(self, model: nn.Module, score: float) -> bool:
        """Takes the model's weights if its score is above the best one; whether it did. The first of equal ones stays."""
        better = score > float(self.score)
        if better:
            self.score.fill_(score)
            self.model.load_state_dict(model.state_dict())
        return better
