"""Every vector file through its method's adapter: outputs and gradients against numbers made with the authors' code or equations.

A file `NN-slug.json` (or `slug.json`) in $KDFAST_VECTORS, by default python_tests/vectors, is a list of
{case, inputs, params, outputs, grads}. `python_tests/adapters/<slug>.py` (with _ for -) holds

    run(inputs, params) -> dict

which names at least every key of `outputs`. The inputs arrive as float64, int64 or bool tensors (a number as a 0-d tensor);
what is no rectangular array (ragged lists, nulls, strings) arrives as it stands in the file. An input named under `grads` is a
float64 leaf. A key of `grads` is d<top>/d<input>, where <top> is a scalar output, (sum OUT) or (sum OUT*INPUT); the gradients
are taken here, by autograd, so an adapter must not detach what it returns.

    pytest python_tests/test_vectors.py -k sinkd                            one paper
    KDFAST_VECTORS=elsewhere pytest python_tests/test_vectors.py            other files of the same form
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("KDFAST_VECTORS") or HERE / "vectors")
ADAPTERS = HERE / "adapters"
# Allowed error: the files carry 9 digits, so nothing closer can be asked of a small entry beside a large one.
RELATIVE, ABSOLUTE = 1e-6, 1e-7


# ---------------------------------------------------------------- values: JSON to tensors
def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a nested list of numbers, None if it is ragged or holds anything else."""
    if not isinstance(value, list):
        return () if isinstance(value, (bool, int, float)) else None
    inner = {shape_of(entry) for entry in value}
    if len(inner) > 1 or None in inner:
        return None
    return (len(value), *(inner.pop() if inner else ()))


def leaves_of(value: Any) -> list[Any]:
    return [leaf for entry in value for leaf in leaves_of(entry)] if isinstance(value, list) else [value]


def to_tensor(value: Any) -> Any:
    """bool, int64 or float64 tensor; a ragged or non-numeric value comes back unchanged."""
    if shape_of(value) is None:
        return value
    kinds = {type(leaf) for leaf in leaves_of(value)}
    dtype = torch.float64 if float in kinds or not kinds else torch.int64 if int in kinds else torch.bool
    return torch.tensor(value, dtype=dtype)


def plain(value: Any) -> Any:
    """Tensors to lists, at any depth, so that a ragged output may hold tensors."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- comparison
def compare(name: str, got: Any, want: Any) -> str | None:
    """None if equal within the tolerance, else what is wrong."""
    if shape_of(want) is None:
        return compare_lists(name, plain(got), want)
    want = to_tensor(want)
    got = torch.as_tensor(got).detach()
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.is_floating_point() and not got.is_floating_point():
        wrong = got.to(torch.int64) != want.to(torch.int64)
    else:
        got, want = got.to(torch.float64), want.to(torch.float64)
        finite = torch.isfinite(want)
        largest = float(want[finite].abs().max()) if bool(finite.any()) else 0.0
        allowed = RELATIVE * want.abs() + ABSOLUTE * max(1.0, largest)
        # Comparisons with NaN are false, so a NaN in got is wrong unless want has one there.
        wrong = torch.where(finite, ~((got - want).abs() <= allowed), (got != want) & ~(got.isnan() & want.isnan()))
    if not bool(wrong.any()):
        return None
    at = wrong.nonzero()[0].tolist()
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: got {got[tuple(at)].item()!r}, expected {want[tuple(at)].item()!r}"


def compare_lists(name: str, got: Any, want: Any) -> str | None:
    numbers = [abs(leaf) for leaf in leaves_of(want) if isinstance(leaf, float) and math.isfinite(leaf)]
    slack = ABSOLUTE * max([1.0, *numbers])

    def differs(got: Any, want: Any, path: str) -> str | None:
        if isinstance(want, list):
            if not isinstance(got, list) or len(got) != len(want):
                return f"{path}: got {got!r}, expected {want!r}"
            found = (differs(g, w, f"{path}[{i}]") for i, (g, w) in enumerate(zip(got, want)))
            return next((text for text in found if text), None)
        if isinstance(want, float) and isinstance(got, (int, float)):
            if not math.isfinite(want):
                return None if got == want or (got != got and want != want) else f"{path}: got {got}, expected {want}"
            return None if abs(got - want) <= RELATIVE * abs(want) + slack else f"{path}: got {got}, expected {want}"
        return None if got == want else f"{path}: got {got!r}, expected {want!r}"

    return differs(got, want, name)


# ---------------------------------------------------------------- gradients
def split_key(key: str) -> tuple[str, str]:
    """'d(sum y*upstream)/dfc0.weight' -> ('(sum y*upstream)', 'fc0.weight')."""
    top, slash, name = key.partition("/d")
    if not slash or not top.startswith("d"):
        raise ValueError(f"grads: expected a key d<top>/d<input>, got {key!r}")
    return top[1:], name


def top_value(top: str, outputs: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
    match = re.fullmatch(r"\(sum ([^*]+?)(?:\*(.+))?\)", top)
    if match is None:
        return outputs[top].reshape(())
    out, factor = match.groups()
    value = outputs[out].to(torch.float64)
    if factor is not None:
        if value.shape != inputs[factor].shape:
            raise ValueError(f"grads: {top} multiplies shapes {tuple(value.shape)} and {tuple(inputs[factor].shape)}")
        value = value * inputs[factor]
    return value.sum()


def gradient(top: Tensor, leaf: Tensor) -> Tensor:
    """Zero where the output does not depend on the leaf."""
    found = torch.autograd.grad(top, leaf, retain_graph=True, allow_unused=True)[0] if top.requires_grad else None
    return torch.zeros_like(leaf) if found is None else found


def run_case(case: dict[str, Any], run: Any) -> list[str]:
    """All differences of one case."""
    grads = case.get("grads") or {}
    leaves = {split_key(key)[1] for key in grads}
    inputs = {}
    for name, value in case["inputs"].items():
        inputs[name] = to_tensor(value)
        if name in leaves:
            inputs[name] = inputs[name].to(torch.float64).requires_grad_()
    outputs = run(inputs, dict(case.get("params") or {}))
    missing = sorted(set(case["outputs"]) - set(outputs))
    wrong = [f"the adapter returned no {', '.join(missing)}"] if missing else []
    wrong += [compare(name, outputs[name], want) for name, want in case["outputs"].items() if name in outputs]
    for key, want in grads.items():
        top, name = split_key(key)
        wrong.append(compare(key, gradient(top_value(top, outputs, inputs), inputs[name]), want))
    return [text for text in wrong if text]


# ---------------------------------------------------------------- the files
def slug_of(path: Path) -> str:
    return re.sub(r"^\d+-", "", path.stem).replace("-", "_")


@cache
def adapter(slug: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"kdfast_adapter_{slug}", ADAPTERS / f"{slug}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def collect() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        slug = slug_of(path)
        if not (ADAPTERS / f"{slug}.py").exists():
            reason = f"{path.name}: no adapter python_tests/adapters/{slug}.py"
            found.append(pytest.param(slug, None, id=slug, marks=pytest.mark.skip(reason=reason)))
            continue
        for number, case in enumerate(json.loads(path.read_text())):
            found.append(pytest.param(slug, case, id=f"{slug}-{number}-{case.get('case', '')}".replace(" ", "_")))
    return found


CASES = collect()


def test_folder_holds_vector_files():
    assert CASES, f"no *.json in {FOLDER} (KDFAST_VECTORS)"


@pytest.mark.parametrize("slug, case", CASES)
def test_vectors(slug, case):
    wrong = run_case(case, adapter(slug))
    assert not wrong, f"{case.get('case')}:\n  " + "\n  ".join(wrong)


# ---------------------------------------------------------------- the runner itself: it must be able to fail
X = [[1.0, 2.0], [3.0, -4.0]]
CASE = {
    "inputs": {"x": X, "fc.w": X, "unused": [1, 2], "up": [[1.0, 1.0], [2.0, 0.5]], "ragged": [[1], [2, 3]]},
    "outputs": {"y": [[1.0, 4.0], [9.0, 16.0]], "total": 30.0, "count": 2, "mask": [[1, 1], [1, 0]], "lists": [[1.5], None]},
    "grads": {
        "dtotal/dx": [[2.0, 4.0], [6.0, -8.0]],
        "d(sum y)/dfc.w": [[0.0, 0.0], [0.0, 0.0]],
        "d(sum y*up)/dx": [[2.0, 4.0], [12.0, -4.0]],
        "dtotal/dunused": [0.0, 0.0],
    },
}  # fmt: skip


def squares(inputs, params):
    assert inputs["ragged"] == [[1], [2, 3]] and inputs["unused"].dtype == torch.float64
    y = inputs["x"] ** 2
    return {"y": y, "total": y.sum(), "count": 2, "mask": inputs["x"] > 0, "lists": [torch.tensor([1.5]), None]}


def test_runner_passes_what_is_right():
    assert run_case(CASE, squares) == []


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("outputs", "y", [[1.0, 4.0], [9.0, 16.00002]]),
        ("outputs", "y", [1.0, 4.0]),
        ("outputs", "y", [[1.0, 4.0], [9.0, math.nan]]),
        ("outputs", "count", 3),
        ("outputs", "mask", [[1, 1], [1, 1]]),
        ("outputs", "lists", [[1.5001], None]),
        ("outputs", "lists", [[1.5], 0]),
        ("outputs", "absent", 1.0),
        ("grads", "dtotal/dx", [[2.0, 4.0], [6.0, 8.0]]),
        ("grads", "d(sum y)/dfc.w", [[0.0, 0.0], [1e-6, 0.0]]),
        ("grads", "d(sum y*up)/dx", [[2.0, 4.0], [6.0, -8.0]]),
    ],
)
def test_runner_sees_what_is_wrong(section, key, value):
    case = CASE | {section: CASE[section] | {key: value}}
    wrong = run_case(case, squares)
    assert len(wrong) == 1 and key in wrong[0]


def test_runner_compares_nan_and_inf_by_kind():
    want = [math.nan, math.inf, -math.inf, 1.0]
    assert compare("x", torch.tensor(want), want) is None
    for got in (
        [0.0, *want[1:]],
        [math.nan, -math.inf, *want[2:]],
        [math.nan, math.nan, *want[2:]],
        [*want[:3], math.inf],
    ):
        assert compare("x", torch.tensor(got), want)
