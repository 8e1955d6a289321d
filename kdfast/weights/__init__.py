"""Arithmetic of models' weights: averages and interpolation of state dicts."""

from kdfast.weights.averaging import average, interpolate_

__all__ = ["average", "interpolate_"]
