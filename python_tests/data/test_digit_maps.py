"""Digit CNNs: their maps and sizes, and the long tail."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data.digit_maps import digit_maps_tail_task, digit_maps_task, long_tailed


def test_long_tail_by_hand():
    labels = torch.arange(10).repeat(100)
    counts = labels[long_tailed(labels)].bincount()
    assert counts.tolist() == [round(100 * 0.05 ** (c / 9)) for c in range(10)]
    assert counts[0] == 100 and counts[9] == 5
    assert len(long_tailed(labels[:10])) == 10  # at least one of each


def test_only_the_student_sees_the_tail():
    full, tail = digit_maps_task().splits(2), digit_maps_tail_task().splits(2)
    for name in ("teacher", "val", "test"):
        assert torch.equal(full[name].tensors[0], tail[name].tensors[0])
    assert full["student"].tensors[1].bincount().min() > 80
    counts = tail["student"].tensors[1].bincount()
    assert bool((counts.diff() <= 0).all()) and counts[0] >= 15 * counts[9]


def test_maps_and_sizes():
    task = digit_maps_task()
    student, teacher = task.student(), task.teacher()
    images = task.splits(0)["val"].tensors[0][:5]
    assert student.body(images).shape == (5, 32, 4, 4) and teacher.body(images).shape == (5, 128, 4, 4)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    assert 4_000 < sizes[0] < 6_000 and 150_000 < sizes[1] < 250_000
