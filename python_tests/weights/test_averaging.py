"""Averages of weights: by hand, integer buffers, states that do not fit."""

import pytest
import torch
from torch import nn

from kdfast.weights import average, interpolate_


def model(value, steps):
    net = nn.BatchNorm1d(2)
    with torch.no_grad():
        net.weight.fill_(value)
        net.running_mean.fill_(10 * value)
        net.num_batches_tracked.fill_(steps)
    return net


def test_a_slow_copy_follows_parameters_and_buffers():
    slow, fast = model(1.0, 3), model(3.0, 8)
    interpolate_(slow, fast, 0.75)
    assert slow.weight.tolist() == [1.5, 1.5] and slow.running_mean.tolist() == [15.0, 15.0]
    assert slow.num_batches_tracked == 8 and fast.weight.tolist() == [3.0, 3.0] and slow.weight.requires_grad
    interpolate_(slow, fast, 0.0)
    assert torch.equal(slow.weight, fast.weight)


def test_average_and_weighted_sum():
    states = [model(1.0, 3).state_dict(), model(4.0, 8).state_dict()]
    found = average(states)
    assert found["weight"].tolist() == [2.5, 2.5] and found["num_batches_tracked"] == 3
    assert average(states, [2.0, -0.5])["weight"].tolist() == [0.0, 0.0]
    assert states[0]["weight"].tolist() == [1.0, 1.0]
    half = average([{"w": torch.tensor([1e-3], dtype=torch.float16)}] * 3)["w"]
    assert half.dtype == torch.float16 and half.item() == torch.tensor(1e-3).half().item()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="states: expected at least one"):
        average([])
    with pytest.raises(ValueError, match="weights: expected 2 numbers, one per state, got 1"):
        average([{}, {}], [1.0])
    with pytest.raises(ValueError, match=r"w: expected an entry of shape \(2,\) in every state, got none"):
        average([{"w": torch.zeros(2)}, {}])
    with pytest.raises(ValueError, match=r"weight: expected an entry of shape \(2,\) in every state, got \(3,\)"):
        interpolate_(nn.BatchNorm1d(2), nn.BatchNorm1d(3), 0.5)
    with pytest.raises(ValueError, match="tau: expected a finite number in"):
        interpolate_(nn.BatchNorm1d(2), nn.BatchNorm1d(2), 1.1)
