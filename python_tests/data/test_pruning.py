"""Data pruning: scores by hand and against autograd, the tracker's state, selection with ties and classes, wrong arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.data.pruning import (
    ForgettingTracker,
    el2n,
    grand,
    grand_last_layer,
    memorisation,
    prototype_distance,
    select,
)

F64 = torch.float64


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_el2n_is_the_mean_distance_from_the_label():
    z, y = 3 * logits(3, 6, 4), torch.arange(6) % 4
    want = torch.stack([(z[r].softmax(-1) - F.one_hot(y, 4)).norm(dim=-1) for r in range(3)]).mean(0)
    torch.testing.assert_close(el2n(z, y), want)
    torch.testing.assert_close(el2n(z[0], y), (z[0].softmax(-1) - F.one_hot(y, 4)).norm(dim=-1))
    assert el2n(torch.tensor([[900.0, -900.0]]), torch.tensor([1])).item() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("bias", [True, False])
def test_grand_of_the_last_layer_and_of_the_whole_model_against_autograd(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=bias)).double()
    model(logits(20, 5, seed=1))  # moves the batch statistics
    model.train()
    x, y = logits(4, 5), torch.tensor([0, 1, 2, 1])
    whole = grand(model, x, y)
    assert model.training
    model.eval()
    last = grand_last_layer(model[:3](x), model(x), y, bias=bias)
    for i in range(4):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert whole[i].item() == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item())
        of_last = grads[-2:] if bias else grads[-1:]
        assert last[i].item() == pytest.approx(torch.cat([g.flatten() for g in of_last]).norm().item())


def test_forgetting_events_and_their_state():
    history = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]])
    tracker = ForgettingTracker(4)
    for epoch in history[:2]:
        tracker.update(torch.arange(4), epoch)
    again = ForgettingTracker(4)
    again.load_state_dict(tracker.state_dict())
    for epoch in history[2:]:
        for part in (torch.tensor([2, 0]), torch.tensor([1, 3])):  # in batches, in any order
            again.update(part, epoch[part])
    assert again.events.tolist() == [1, 2, 0, 0] and again.never_learned.tolist() == [False, False, False, True]
    assert again.scores().tolist() == [1.0, 2.0, 0.0, math.inf]


def test_memorisation_by_hand():
    included = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])
    correct = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1]])
    assert memorisation(included, correct).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"included: expected runs with and without every sample, not so for \[1\]"):
        memorisation(torch.tensor([[1, 1], [0, 1]]), torch.ones(2, 2))


def test_prototype_distance_of_clear_clusters():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], dtype=F64)
    offsets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]], dtype=F64)
    points = (centres.unsqueeze(1) + offsets).flatten(0, 1)
    got = prototype_distance(points, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, offsets.norm(dim=1).repeat(3))
    assert prototype_distance(points, 12).max() == 0 and prototype_distance(torch.zeros(4, 2), 3).max() == 0


# ---------------------------------------------------------------- selection
def test_of_equal_scores_the_lower_index_is_kept_first():
    scores = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, math.inf])
    assert select(scores, keep=0.5, mode="hard").tolist() == [0, 2, 5]
    assert select(scores, keep=0.5, mode="easy").tolist() == [0, 1, 3]
    assert select(torch.zeros(1000), keep=0.1, mode="hard").tolist() == list(range(100))
    assert select(torch.zeros(5), keep=0.5, mode="hard").tolist() == [0, 1]  # 2.5 rounds to even


def test_random_parts_follow_the_generator():
    first, again, other = (select(n=100, keep=0.2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first.unique()) == 20
    assert torch.equal(first, first.sort().values)
    assert select(n=7, keep=1.0).tolist() == list(range(7))


@pytest.mark.parametrize("mode", ["random", "hard"])
def test_stratified_parts_keep_the_shares_of_the_classes(mode):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    scores = torch.arange(100).double()
    kept = select(scores, keep=0.2, mode=mode, stratify=labels)
    assert labels[kept].bincount().tolist() == [10, 6, 4]
    if mode == "hard":
        assert kept[:10].tolist() == list(range(40, 50))
    with pytest.raises(ValueError, match=r"keep: 0.02 of 20 samples rounds to none \(class 2\)"):
        select(scores, keep=0.02, mode=mode, stratify=labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select(n=10, keep=0.0), "keep: expected a finite number in"),
        (lambda: select(n=10, keep=1.1), "keep: expected a finite number in"),
        (lambda: select(n=10, keep=0.01), r"keep: 0.01 of 10 samples rounds to none \(all samples\)"),
        (lambda: select(n=10, mode="hard"), "scores: needed with mode='hard'"),
        (lambda: select(), "n: needed without scores"),
        (lambda: select(torch.tensor([1.0, math.nan])), "scores: expected no NaN, got one at 1"),
        (lambda: select(torch.zeros(3), 4), r"scores: expected shape \(4,\), got \(3,\)"),
        (lambda: select(torch.zeros(3), mode="best"), "mode: expected one of random, hard, easy"),
        (lambda: select(torch.zeros(3), stratify=torch.zeros(2).long()), "stratify: expected shape"),
        (lambda: el2n(torch.zeros(4), torch.zeros(4).long()), r"logits: expected \[R, n, C\]"),
        (lambda: el2n(torch.zeros(2, 3), torch.tensor([0, 3])), r"labels: expected integers in \[0, 3\)"),
        (lambda: grand_last_layer(torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(3).long()), "features: expected"),
        (lambda: ForgettingTracker(3).scores(), "update: expected at least 2 epochs"),
        (lambda: ForgettingTracker(3).update(torch.tensor([0, 3]), torch.ones(2)), r"indices: expected values in \[0, 3\)"),
        (lambda: ForgettingTracker(3).update(torch.tensor([1, 1]), torch.ones(2)), "indices: expected each sample at most once"),
        (lambda: ForgettingTracker(3).update(torch.tensor([1]), torch.ones(2)), "correct: expected shape"),
        (lambda: memorisation(torch.ones(2, 3), torch.ones(2, 2)), r"correct: expected \[R, n\]"),
        (lambda: prototype_distance(torch.zeros(3, 2), 4), "k: expected 1 to 3 centres, got 4"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
