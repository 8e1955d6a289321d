"""mean_iou by hand."""

import pytest
import torch

from kdfast.metrics import mean_iou


def test_mean_iou_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [255, 1, 0, 255]])
    predictions = torch.tensor([[0, 1, 1, 1], [2, 1, 0, 0]])  # at 255 anything may stand
    # class 0: 2 of 3; class 1: 3 of 4; class 2 and 3: nowhere
    assert mean_iou(predictions, labels, num_classes=4) == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert mean_iou(labels, labels, num_classes=256, ignore_index=-1) == 1.0
    # A class predicted where it is not counts as 0, and so does one that is never predicted.
    assert mean_iou(torch.full((4,), 3), torch.tensor([0, 0, 3, 3]), num_classes=4) == pytest.approx((0 + 2 / 4) / 2)
    assert mean_iou(torch.tensor([2, 1]), torch.tensor([1, 1]), num_classes=3) == pytest.approx((0 + 1 / 2) / 2)


def test_mean_iou_of_nothing_and_of_bad_input():
    assert mean_iou(torch.zeros(3, dtype=torch.long), torch.full((3,), 255), num_classes=2) == 0.0
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 2\), got 0 to 2"):
        mean_iou(torch.tensor([0, 1]), torch.tensor([0, 2]), num_classes=2)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(3,\)"):
        mean_iou(torch.tensor([0, 1]), torch.tensor([0, 1, 1]), num_classes=2)
