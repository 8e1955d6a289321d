"""The best epoch's weights: the first of equal scores stays, everything is in the state."""

import torch
from torch import nn

from kdfast.weights import BestWeights


def test_a_higher_score_is_taken_and_an_equal_one_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    best = BestWeights(model)
    assert best.score == -torch.inf and not any(p.requires_grad for p in best.parameters())
    seen = []
    for score in (0.25, 0.5, 0.5, 0.125):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].running_mean.add_(1.0)
        seen.append(best.offer(model, score))
        if score == 0.5 and seen[-1]:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert seen == [True, True, False, False] and best.score == 0.5
    assert all(torch.equal(value, kept[name]) for name, value in best.model.state_dict().items())
    again = BestWeights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    again.load_state_dict(best.state_dict())
    assert again.score == 0.5 and not again.offer(model, 0.4)
    assert torch.equal(again.model[1].running_mean, kept["1.running_mean"])
