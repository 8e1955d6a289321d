"""PredictionMemory against rows written out: whole, the greatest alone, and what was not seen yet."""

import pytest
import torch

from kdfast.data.predictions import PredictionMemory

ROWS = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]])


@pytest.mark.parametrize(
    ("kept", "want"),
    [
        (None, ROWS.tolist()),
        (3, ROWS.tolist()),
        (1, [[0.2, 0.6, 0.2], [0.5, 0.25, 0.25]]),
        (2, [[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]]),
    ],
)
def test_what_was_stored_comes_back_once(kept, want):
    memory = PredictionMemory(5, 3, kept=kept)
    index, labels = torch.tensor([4, 1]), torch.tensor([2, 0])
    first = memory.exchange(index, ROWS, labels)
    assert first.tolist() == [[0, 0, 1], [1, 0, 0]] and memory.seen.tolist() == [False, True, False, False, True]
    torch.testing.assert_close(memory.exchange(index, ROWS.flip(0), labels), torch.tensor(want))
    again = PredictionMemory(5, 3, kept=kept)
    again.load_state_dict(memory.state_dict())
    latest = again.exchange(torch.tensor([1]), ROWS[:1], labels[:1])
    torch.testing.assert_close(latest, torch.tensor(want[:1]))


def test_copies_of_a_sample_stay_apart():
    memory = PredictionMemory(3, 3, copies=2, kept=1)
    labels = torch.tensor([0, 1])
    assert memory.exchange(torch.tensor([2]), ROWS, labels).tolist() == [[1, 0, 0], [0, 1, 0]]
    got = memory.exchange(torch.tensor([2]), ROWS, labels)
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.6, 0.2], [0.5, 0.25, 0.25]]))


def test_many_classes_have_wide_places():
    memory = PredictionMemory(1, 40_000, kept=1)
    probs = torch.zeros(1, 40_000)
    probs[0, 39_999] = 1
    memory.exchange(torch.tensor([0]), probs, torch.tensor([0]))
    assert memory.exchange(torch.tensor([0]), probs, torch.tensor([0])).argmax() == 39_999


def test_bad_input():
    with pytest.raises(ValueError, match=r"probs: expected shape \(2, 3\)"):
        PredictionMemory(5, 3).exchange(torch.tensor([4, 1]), ROWS[:1], torch.tensor([2, 0]))
    for options in ({"samples": 0}, {"classes": 0}, {"copies": 0}, {"kept": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PredictionMemory(**{"samples": 1, "classes": 2} | options)
