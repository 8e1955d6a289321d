"""digit_few: five labels per class, none elsewhere, and no image in two splits."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task


def test_splits_are_disjoint_and_labels_are_few():
    splits = load_task("digit_few").splits(0)
    student = splits["student"]
    assert len(student) == 500 and student.labels.bincount().tolist() == [5] * 10
    images, labels = student.__getitems__([0, 499])
    assert images.shape == (52, 1, 8, 8) and (labels[50:] == -100).all() and (labels[:50] >= 0).all()
    assert torch.equal(images[50:], student.pool[[0, 499]])
    pool = {image.numpy().tobytes() for image in student.pool}
    assert {image.numpy().tobytes() for image in student.images} <= pool  # labelled ones are in the pool too
    # a few digits are in the data twice, so a handful may meet
    assert all(len(pool & {i.numpy().tobytes() for i in splits[name].tensors[0]}) < 5 for name in ("val", "test"))
    assert len(splits["teacher"]) == 200 and splits["teacher"].tensors[0].min() < -1  # noise
