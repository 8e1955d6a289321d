"""digit_stages: maps and sizes as stated."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task, models
from kdfast.nn import capture_outputs


def test_stages_and_sizes():
    task = load_task("digit_stages")
    student, teacher = models(task, 0)
    for side, model in enumerate((student, teacher)):
        with capture_outputs(model, {name: paths[side] for name, paths in task.layers.items()}) as found:
            assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert {name: maps.shape[1] for name, maps in found.items()} == {n: w[side] for n, w in task.widths.items()}
        assert [found[f"stage{i}"].shape[-1] for i in (1, 2, 3)] == [8, 4, 2]
    assert sum(p.numel() for p in student.parameters()) == 18482
