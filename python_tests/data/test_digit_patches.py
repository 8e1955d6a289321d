"""digit_patches: grids and widths as stated, the teacher's last stage as a function of the one before."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task, models
from kdfast.data.digit_patches import MapNorm, PatchMerging
from kdfast.data.digits import digit_splits
from kdfast.nn import capture_outputs


def test_grids_and_widths():
    task = load_task("digit_patches")
    images = task.splits(0)["val"].tensors[0][:2]
    assert images.shape == (2, 1, 16, 16)
    for side, (model, grids) in enumerate(
        zip(models(task, 0), (task.hints["student_grids"], task.hints["teacher_grids"]))
    ):
        with capture_outputs(model, {name: paths[side] for name, paths in task.layers.items()}) as found:
            logits = model(images)
        assert logits.shape == (2, 10)
        for name, grid in zip(("stage3", "stage4"), grids):
            assert found[name].shape == (2, task.widths[name][side], *grid)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.stage4(found["stage3"]).mean((2, 3))), logits.detach())


def test_images_are_the_digits():
    small, large = digit_splits(1), load_task("digit_patches").splits(1)
    assert {name: len(rows) for name, rows in small.items()} == {name: len(rows) for name, rows in large.items()}
    image = large["test"].tensors[0]
    torch.testing.assert_close(image.mean((1, 2, 3)), small["test"].tensors[0].mean((1, 2, 3)), rtol=0.05, atol=0.01)
    assert torch.equal(small["test"].tensors[1], large["test"].tensors[1])


def test_merging_and_norm_by_hand():
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 4, 2)
    merge = PatchMerging(3, 5)
    corner = maps[0, :, 2:4, 0:2].flatten()  # channel slowest, then the rows of the window
    torch.testing.assert_close(merge(maps)[0, :, 1, 0], merge.linear(merge.norm(corner)))
    norm = MapNorm(3)
    torch.testing.assert_close(norm(maps).mean(1), torch.zeros(1, 4, 2), atol=1e-6, rtol=0)
