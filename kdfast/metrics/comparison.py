"""Mean, standard error and what a paired comparison over seeds allows to say; sentences are made from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "standard_error" (None for one value), "n"}; standard error = sample deviation / sqrt(n)."""
    n = len(values)
    if n == 0:
        raise ValueError("values: expected at least one, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return {"mean": mean, "standard_error": None, "n": 1}
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return {"mean": mean, "standard_error": math.sqrt(variance / n), "n": n}


def compare(values: Sequence[float], baseline: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Student's t interval of the mean paired difference, and "gain", "loss", "no difference" or (one seed) "not decided".

    A gain is said when the whole interval lies above 0, a loss when it lies below. The seeds pair the values.

    >>> compare([0.93, 0.92, 0.94], [0.90, 0.89, 0.90])["verdict"]
    'gain'
    """
    if len(values) != len(baseline):
        raise ValueError(f"baseline: expected {len(values)} values, one per seed, got {len(baseline)}")
    difference = summary([a - b for a, b in zip(values, baseline)])
    if difference["n"] == 1:
        return {**difference, "low": None, "high": None, "level": level, "verdict": "not decided"}
    from scipy.stats import t  # comes with scikit-learn

    reach = float(t.ppf(0.5 + level / 2, difference["n"] - 1)) * difference["standard_error"]
    low, high = difference["mean"] - reach, difference["mean"] + reach
    verdict = "gain" if low > 0 else "loss" if high < 0 else "no difference"
    return {**difference, "low": low, "high": high, "level": level, "verdict": verdict}


def mean_and_error(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """ "92.5 ± 0.3", in percent by default."""
    found = summary(values)
    text = f"{scale * found['mean']:.{digits}f}"
    return text if found["standard_error"] is None else f"{text} ± {scale * found['standard_error']:.{digits}f}"


def sentence(
    name: str, values: Sequence[float], other: str, baseline: Sequence[float], *, score: str = "accuracy"
) -> str:
    """What the numbers say, in words."""
    found = compare(values, baseline)
    start = f"{name} {mean_and_error(values)} against {other} {mean_and_error(baseline)} (test {score} in %, n = {found['n']})"
    if found["low"] is None:
        return f"{start}: one seed decides nothing."
    interval = f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
    return (
        f"{start}: {found['verdict']}; the paired difference is {100 * found['mean']:+.2f}, "
        f"{100 * found['level']:.0f} % interval {interval}."
    )
