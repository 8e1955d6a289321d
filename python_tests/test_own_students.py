"""Methods that bring their own models run by name on the tasks made for them, and on no other."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from kdfast.data import NamedRows, load_task
from kdfast.experiment import arms_of, run

PAIRS = [
    ("digit_graph", "hyperformer", ["triples", "qualifiers", "dense", "whole"]),
    ("digit_diffusion", "switch_dit", ["dit", "no_prior", "whole"]),
]


@pytest.mark.parametrize("data, method, names", PAIRS)
def test_runs_by_name_and_resumes(data, method, names, tmp_path):
    results = run(data, method, seeds=1, steps=2, out=tmp_path)
    assert list(results["arms"]) == names
    assert all(0 < arm["test"][0] < 1 for arm in results["arms"].values()) or method == "switch_dit"
    for name in ("results.json", "report.md", "curves.png", "student.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    again = run(data, method, seeds=1, steps=2, out=tmp_path)
    assert again["arms"][names[0]]["test"] == results["arms"][names[0]]["test"]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["method"] == method


def test_arms_carry_their_options():
    arms = {arm.name: arm for arm in arms_of(load_task("digit_diffusion"), "switch_dit", {"eps": 1e-4})}
    assert arms["no_prior"].options["prior_weight"] == 0 and "prior_weight" not in arms["whole"].options
    assert all(arm.options["eps"] == 1e-4 for arm in arms.values())
    active = [sum(p.numel() for p in arms[name].student().parameters()) for name in ("dit", "whole")]
    assert active[0] < active[1]


def test_equal_active_width_of_the_dense_arm():
    arms = {arm.name: arm for arm in arms_of(load_task("digit_graph"), "hyperformer", {})}
    dense, whole = (arms[name].student().layers[0].feed_forward.moe for name in ("dense", "whole"))
    assert dense[0].out_features == whole.top_k * whole.d_hidden


@pytest.mark.parametrize(
    "data, method", [("digits", "hyperformer"), ("digit_graph", "kd"), ("digit_diffusion", "sinkd")]
)
def test_task_and_method_must_fit(data, method):
    with pytest.raises(ValueError, match=f"method: {method} .*; {data} is for one that"):
        arms_of(load_task(data), method, {})


def test_named_rows():
    rows = NamedRows(x=torch.arange(5), labels=torch.arange(5) * 2)
    assert len(rows) == 5
    assert {k: v.tolist() for k, v in rows.__getitems__([3, 1]).items()} == {"x": [3, 1], "labels": [6, 2]}
