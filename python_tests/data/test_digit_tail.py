"""Long-tailed digits: the counts, disjoint balanced splits, what the two views do."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task
from kdfast.data.digit_tail import shift_each, strong_view, tail_counts


def test_counts_and_splits():
    splits = load_task("digit_tail").splits(0)
    train, test = splits["student"], splits["test"]
    assert train.labels.bincount().tolist() == tail_counts() and sum(tail_counts()) == 420
    assert test.tensors["labels"].bincount().tolist() == [25] * 10
    pixels = [
        set(map(bytes, part.flatten(1).numpy()))
        for part in (train.images, test.tensors["images"], splits["val"].tensors["images"])
    ]
    assert not pixels[0] & pixels[1] and not pixels[0] & pixels[2] and not pixels[1] & pixels[2]
    other = load_task("digit_tail").splits(1)["student"].images
    assert torch.equal(load_task("digit_tail").splits(0)["student"].images, train.images)
    assert not torch.equal(other, train.images)


def test_a_batch_holds_the_weak_views_then_the_strong_ones():
    torch.manual_seed(0)
    data = load_task("digit_tail").splits(0)["student"]
    batch = data.__getitems__([3, 200, 7])
    assert batch["images"].shape == (6, 1, 8, 8) and torch.equal(batch["labels"], data.labels[[3, 200, 7]])
    weak, strong = batch["images"].chunk(2)
    assert weak.min() >= 0 > strong.min()  # only the strong view has noise
    assert not torch.equal(data.__getitems__([3])["images"], data.__getitems__([3])["images"])  # drawn anew


def test_shifted_moves_by_at_most_a_pixel():
    torch.manual_seed(0)
    images = torch.zeros(200, 2, 5, 6)
    images[:, :, 2, 3] = 1.0
    moved = shift_each(images)
    assert torch.equal(moved.sum((1, 2, 3)), torch.full((200,), 2.0)) and torch.equal(moved[:, 0], moved[:, 1])
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in (1, 2, 3) for j in (2, 3, 4)}


def test_strong_view_hides_a_patch():
    torch.manual_seed(0)
    view = strong_view(torch.ones(50, 1, 8, 8), noise=0.01)
    centre = view[:, 0, 1:-1, 1:-1]  # the edge may be moved out
    assert ((view == 0).sum((1, 2, 3)) >= 9).all() and (centre == 0).any() and (centre > 0.9).any()
