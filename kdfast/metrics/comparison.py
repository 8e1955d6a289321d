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


def compare(
    values: Sequence[float], baseline: Sequence[float], *, level: float = 0.95, lower_is_better: bool = False
) -> dict[str, Any]:
    """Student's t interval of the mean paired difference, and "gain", "loss", "no difference" or (one seed) "not decided".

    A gain is said when the whole interval lies above 0 (below it, when lower is better), a loss when it lies on the other side.
    The seeds pair the values.

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
    above, below = ("loss", "gain") if lower_is_better else ("gain", "loss")
    verdict = above if low > 0 else below if high < 0 else "no difference"
    return {**difference, "low": low, "high": high, "level": level, "verdict": verdict}


def mean_and_error(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """ "92.5 ± 0.3", in percent by default."""
    found = summary(values)
    text = f"{scale * found['mean']:.{digits}f}"
    return text if found["standard_error"] is None else f"{text} ± {scale * found['standard_error']:.{digits}f}"


def sentence(
    name: str,
    values: Sequence[float],
    other: str,
    baseline: Sequence[float],
    *,
    score: str = "accuracy",
    unit: str | None = None,
    scale: float = 100.0,
    digits: int = 1,
    lower_is_better: bool = False,
) -> str:
    """What the numbers say, in words. unit: what is measured, where it is not the test `score` in percent."""
    found = compare(values, baseline, lower_is_better=lower_is_better)
    first, second = (mean_and_error(each, scale=scale, digits=digits) for each in (values, baseline))
    unit = f"test {score} in %" if unit is None else unit
    start = f"{name} {first} against {other} {second} ({unit}, n = {found['n']})"
    if found["low"] is None:
        return f"{start}: one seed decides nothing."
    mean, low, high = (f"{scale * found[key]:+.{digits + 1}f}" for key in ("mean", "low", "high"))
    return (
        f"{start}: {found['verdict']}; the paired difference is {mean}, "
        f"{100 * found['level']:.0f} % interval {low} to {high}."
    )
