"""Canvases of digits: what is on them, no image in two splits, both students, and which of them teaches where."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task, models
from kdfast.data.canvases import BACKGROUND, CLASSES, IGNORE, canvas_splits, canvases, canvases_task
from kdfast.losses import region_selective_loss
from kdfast.ops import selective_kl


def test_digits_stand_whole_and_apart_with_their_classes():
    # Full squares: each digit is 64 pixels of its class, so a covered one would be short of some.
    images = torch.ones(10, 1, 8, 8)
    images[:, :, 0] = 0.2  # one faint row of 8
    inputs, targets = canvases(images, torch.arange(10), 60, np.random.default_rng(3))
    assert inputs.shape == (60, 1, 32, 32) and targets.shape == (60, 32, 32) and targets.dtype == torch.int64
    numbers = (targets == IGNORE).sum((1, 2)) / 8
    assert sorted(set(numbers.tolist())) == [4, 5, 6]
    assert torch.equal(inputs.squeeze(1) == 1, targets < BACKGROUND)
    assert torch.equal((inputs == 1).sum((1, 2, 3)), (numbers * 56).long())
    assert torch.equal(inputs.squeeze(1) == 0, targets == BACKGROUND)
    assert set(targets.unique().tolist()) == {*range(CLASSES), IGNORE}
    covered = (targets != BACKGROUND).any(0)
    assert bool(covered.any(0).all()) and bool(covered.any(1).all())  # every row and column is reached


def test_splits_of_a_seed():
    first, again, other = canvas_splits(0), canvas_splits(0), canvas_splits(1)
    assert {name: len(rows) for name, rows in first.items()} == {"student": 400, "val": 100, "test": 200}
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name].tensors, again[name].tensors))
        assert not torch.equal(first[name].tensors[0], other[name].tensors[0])
        ignored = (first[name].tensors[1] == IGNORE).float().mean()
        assert 0.005 < ignored < 0.1


def test_students_and_their_sizes():
    task = canvases_task()
    cnn, vit = models(task, 0)
    inputs, _ = task.splits(0)["val"][:3]
    assert cnn(inputs).shape == vit(inputs).shape == (3, CLASSES, 32, 32)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (cnn, vit)]
    assert 55_000 < sizes[0] < 70_000 and 160_000 < sizes[1] < 190_000
    assert len([m for m in vit.modules() if isinstance(m, torch.nn.TransformerEncoderLayer)]) == 4


def test_directions_and_ties_are_the_labelled_pixels():
    task = canvases_task()
    inputs, labels = task.splits(0)["val"][:8]
    cnn, vit = (model(inputs).detach() for model in models(task, 0))
    cnn[0] = vit[0]  # a whole canvas of ties
    out = selective_kl(cnn, vit, labels)
    valid = labels != IGNORE
    ties = int(((out.direction == 0) & valid).sum())
    assert ties >= int(valid[0].sum()) and out.num_to_a > 0 and out.num_to_b > 0
    assert int(out.num_valid) == int(valid.sum()) == int(out.num_to_a) + int(out.num_to_b) + ties
    assert not bool(out.direction[~valid].any())
    features = torch.randn(8, 4, 8, 8)
    regions = region_selective_loss(features, features.flip(0), cnn, vit, labels).parts
    assert int(regions["num_to_a"]) + int(regions["num_to_b"]) <= 7 * 16  # the tied canvas teaches nothing


def test_the_cnns_of_two_widths():
    task = load_task("canvas_cnns")
    splits = task.splits(0)
    assert splits["teacher"] is splits["student"]
    student, teacher = models(task, 0)
    images = splits["val"].tensors[0][:2]
    assert student(images).shape == teacher(images).shape == (2, CLASSES, 32, 32)
    for model, side in ((student, 0), (teacher, 1)):
        low = model.low(model.stem(images))
        assert (low.shape[1], model.high(low).shape[1]) == (task.widths["low"][side], task.widths["high"][side])
