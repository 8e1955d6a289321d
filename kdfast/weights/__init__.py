"""Weights of models: averages and interpolation of state dicts, the best epoch kept."""

from kdfast.weights.averaging import average, interpolate_
from kdfast.weights.best import BestWeights

__all__ = ["BestWeights", "average", "interpolate_"]
