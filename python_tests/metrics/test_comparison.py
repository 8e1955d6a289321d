"""Numbers of a comparison against hand-made ones; the sentence follows from them."""

import math

import pytest
import torch

from kdfast.metrics import accuracy, compare, mean_and_error, sentence, summary


def test_summary_of_a_hand_made_sample():
    found = summary([1.0, 2.0, 3.0, 6.0])
    assert found["mean"] == 3.0 and found["n"] == 4
    assert found["standard_error"] == pytest.approx(math.sqrt(14 / 3 / 4))  # squares 4 + 1 + 0 + 9, over n - 1, over n
    assert summary([5.0]) == {"mean": 5.0, "standard_error": None, "n": 1}
    with pytest.raises(ValueError, match="values: expected at least one"):
        summary([])


def test_the_interval_is_students_t():
    found = compare([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])  # differences 1, 2, 3: mean 2, standard error 1/sqrt(3)
    reach = 4.302652729911275 / math.sqrt(3)  # t at 0.975 with 2 degrees of freedom
    assert (found["low"], found["high"]) == (pytest.approx(2 - reach), pytest.approx(2 + reach))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.93, 0.92, 0.94, 0.93], "gain"),
        ([0.87, 0.88, 0.86, 0.87], "loss"),
        ([0.95, 0.86, 0.93, 0.88], "no difference"),
        ([0.90, 0.90, 0.90, 0.90], "no difference"),
    ],
)
def test_verdict_and_sentence_come_from_the_numbers(values, verdict):
    baseline = [0.90, 0.90, 0.90, 0.90]
    assert compare(values, baseline)["verdict"] == verdict
    text = sentence("new", values, "old", baseline)
    assert f": {verdict}; the paired difference" in text and "n = 4" in text
    assert f"new {100 * sum(values) / 4:.1f} ±" in text and "against old 90.0 ± 0.0" in text
    assert sum(f": {word};" in text for word in ("gain", "loss", "no difference")) == 1


def test_pairing_by_seed_counts():
    # Every seed gains 1 point while seeds differ by 10: unpaired, nothing could be said.
    values, baseline = [0.71, 0.82, 0.90], [0.70, 0.81, 0.89]
    assert compare(values, baseline)["verdict"] == "gain"
    assert compare(values, baseline[::-1])["verdict"] == "no difference"


def test_one_seed_decides_nothing():
    assert compare([0.9], [0.1])["verdict"] == "not decided"
    assert sentence("a", [0.9], "b", [0.1]).endswith("one seed decides nothing.")
    assert mean_and_error([0.9]) == "90.0"


def test_unequal_seeds_are_refused():
    with pytest.raises(ValueError, match="baseline: expected 2 values, one per seed, got 3"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0])


def test_accuracy_ignores_and_counts():
    predictions, labels = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, -100])
    assert accuracy(predictions, labels) == 2 / 3
    assert accuracy(predictions, torch.full((4,), 255), ignore_index=255) == 0.0
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\), got \(2,\)"):
        accuracy(predictions, labels[:2])
