"""Filtered ranks by hand, ties, and what must raise."""

import math

import pytest
import torch

from kdfast.metrics import average_precision, filtered_rank, hits_at, mean_reciprocal_rank


def test_ranks_by_hand():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 2.0, 1.0]])
    target = torch.tensor([2, 1, 3])
    assert filtered_rank(scores, target).tolist() == [3.0, 2.0, 3.0]
    known = torch.tensor([[True, False, False, False], [True, False, True, False], [False, True, True, True]])
    with pytest.raises(ValueError, match="known: expected other answers only"):
        filtered_rank(scores, target, known)
    known[2, 3] = False
    assert filtered_rank(scores, target, known).tolist() == [2.0, 1.0, 1.0]


def test_a_constant_scorer_gets_the_mean_rank():
    assert filtered_rank(torch.zeros(1, 9), torch.tensor([4])).item() == 5.0
    assert filtered_rank(torch.full((1, 3), -math.inf), torch.tensor([0])).item() == 2.0


def test_equals_a_sort_without_ties():
    scores = torch.randn(20, 30)
    target = torch.randint(30, (20,))
    position = (scores.argsort(descending=True) == target.unsqueeze(1)).nonzero()[:, 1] + 1
    assert torch.equal(filtered_rank(scores, target), position.float())


def test_means():
    ranks = torch.tensor([1.0, 2.0, 4.0, 11.0])
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 0.5 + 0.25 + 1 / 11) / 4)
    assert hits_at(ranks, 1) == 0.25 and hits_at(ranks, 10) == 0.75


def test_bad_input():
    scores, target = torch.randn(2, 3), torch.tensor([0, 1])
    for call, message in [
        (lambda: filtered_rank(scores[0], target), r"scores: expected \[B, N\]"),
        (lambda: filtered_rank(scores, target + 2), r"target: expected values in \[0, 3\)"),
        (lambda: filtered_rank(scores * math.nan, target), "no NaN"),
        (lambda: filtered_rank(scores, target, torch.zeros(2, 3)), "known: expected bool"),
        (lambda: hits_at(torch.ones(2), 0), "k: expected an int >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_average_precision_by_hand_and_with_ties():
    scores = torch.tensor([[4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    targets = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]])
    each = average_precision(scores, targets)
    assert each.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 4])  # a constant scorer gets the share of its positives
    assert math.isnan(average_precision(scores, torch.zeros(4, 2))[0])
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = torch.randn(200, 3).mul(2).round(), torch.randint(2, (200, 3))
    want = sklearn.average_precision_score(targets.numpy(), scores.numpy(), average=None)
    assert average_precision(scores, targets).tolist() == pytest.approx(want.tolist())
    with pytest.raises(ValueError, match="targets: expected shape"):
        average_precision(scores, targets[:, :2])
    with pytest.raises(ValueError, match="scores: expected no NaN"):
        average_precision(scores * math.nan, targets)
