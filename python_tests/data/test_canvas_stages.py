"""Canvases for hierarchical transformers: what the encoder gives, sizes, and that the teacher sees the student's canvases."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task, models
from kdfast.data.canvas_stages import TEACHER_WIDTHS, WIDTHS
from kdfast.data.canvases import CLASSES


def test_pyramids_logits_and_sizes():
    task = load_task("canvas_stages")
    images, _ = task.splits(0)["val"][:3]
    for model, widths, size in zip(models(task, 0), (WIDTHS, TEACHER_WIDTHS), (40_000, 250_000)):
        assert model(images).shape == (3, CLASSES, 32, 32)
        found = model.encoder(images)
        assert [tuple(one.shape) for one in found.maps] == [(3, c, s, s) for c, s in zip(widths, (16, 8, 4))]
        assert [tuple(one.shape) for one in found.embeddings] == [(3, s * s, c) for c, s in zip(widths, (16, 8, 4))]
        assert 0.5 * size < sum(p.numel() for p in model.parameters()) < size


def test_wide_images_keep_their_positions():
    student, _ = models(load_task("canvas_stages"), 0)
    student.eval()
    image = torch.zeros(1, 1, 32, 64)
    marked = image.clone()
    marked[0, 0, 5, 50] = 1
    with torch.no_grad():
        near = (student.encoder(marked).embeddings[0] - student.encoder(image).embeddings[0]).abs().sum(-1)[0]
    assert {divmod(int(i), 32) for i in near.nonzero()} == {(2, 25), (3, 25)}  # row-major, stride 2, kernel 3


def test_the_teacher_learns_from_the_same_canvases():
    splits = load_task("canvas_stages").splits(0)
    assert set(splits) == {"student", "teacher", "val", "test"} and splits["teacher"] is splits["student"]
