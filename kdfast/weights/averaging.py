"""Averages of weights: of several models, or a slow copy that follows a fast one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdfast._checks import check_number


@torch.no_grad()
def interpolate_(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """slow <- tau slow + (1 - tau) fast, in place, for every floating entry of the state; integer buffers are copied.

    >>> interpolate_(slow, model, 0.9999)
    """
    check_number("tau", tau, low=0.0, high=1.0)
    source = fast.state_dict()
    for name, value in slow.state_dict().items():
        _same_shape(name, value, source)
        if value.is_floating_point():
            value.mul_(tau).add_(source[name].to(value), alpha=1 - tau)
        else:
            value.copy_(source[name])


@torch.no_grad()
def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """sum_i w_i state_i of state dicts with the same entries; None: equal weights. Sums in float64; integer entries are the first's.

    >>> model.load_state_dict(average([a.state_dict(), b.state_dict()]))
    """
    if not states:
        raise ValueError("states: expected at least one state dict, got none")
    shares = [1 / len(states)] * len(states) if weights is None else list(weights)
    if len(shares) != len(states):
        raise ValueError(f"weights: expected {len(states)} numbers, one per state, got {len(shares)}")
    found = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for share, state in zip(shares, states):
            _same_shape(name, first, state)
            total.add_(state[name].to(total), alpha=check_number("weights", share))
        found[name] = total.to(first.dtype)
    return found


def _same_shape(name: str, value: Tensor, state: Mapping[str, Tensor]) -> None:
    if name not in state or state[name].shape != value.shape:
        got = tuple(state[name].shape) if name in state else "none"
        raise ValueError(f"{name}: expected an entry of shape {tuple(value.shape)} in every state, got {got}")
