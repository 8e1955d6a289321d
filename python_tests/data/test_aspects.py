"""Answers: probabilities of yes, tables by key and by number, files, a model behind a processor, small models."""

import json
from types import SimpleNamespace

import pytest
import torch

from kdfast.data.aspects import AspectTable, fit_attributes, vision_language_answers, yes_no_to_probability


def test_probability_of_yes():
    yes, no = torch.tensor([2.0, -800.0, 800.0]), torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(yes_no_to_probability(yes, no), torch.stack((yes, no)).softmax(0)[0])


def test_table_by_key_by_number_and_from_a_file(tmp_path):
    answers = {"a": [0.25, 1.0], "b": [0.5, 0.0], "c": [0.125, 0.75]}
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers))
    for table in (AspectTable.from_mapping(answers), AspectTable.from_file(path)):
        assert table.rows.dtype == torch.float16
        assert table.lookup(["c", "a"]).tolist() == [[0.125, 0.75], [0.25, 1.0]]
        assert table.lookup(torch.tensor([1, 1])).tolist() == [[0.5, 0.0]] * 2
    with pytest.raises(ValueError, match="images: no answers for d, e"):
        table.lookup(["a", "d", "e"])
    with pytest.raises(ValueError, match="images: no answers for a"):
        AspectTable(torch.zeros(2, 3)).lookup(["a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AspectTable(torch.tensor([[0.5, 1.5]])), r"rows: expected probabilities in \[0, 1\]; raw logits"),
        (lambda: AspectTable(torch.tensor([[float("nan")]])), "rows: expected probabilities"),
        (lambda: AspectTable(torch.zeros(2, 0)), r"rows: expected probabilities \[n, Q\]"),
        (lambda: AspectTable(torch.zeros(2, 1), ["a"]), "keys: expected 2, one per row, got 1"),
        (lambda: AspectTable.from_mapping({"a": [0.1], "b": [0.1, 0.2]}), r"answers: expected as many for every image, got \[1, 2\]"),
        (lambda: AspectTable.from_mapping({}), "answers: expected as many for every image, got none"),
    ],
)  # fmt: skip
def test_wrong_tables(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_answers_at_its_first_position():
    seen = []

    class Tokenizer:
        def encode(self, word, add_special_tokens):
            assert not add_special_tokens
            return {"Yes": [3, 9], "No": [1]}[word]

    class Processor:
        tokenizer = Tokenizer()

        def __call__(self, images, text, return_tensors):
            seen.append((images, text))
            return {"pixels": torch.tensor(float(images)), "length": torch.tensor(len(text))}

    def model(pixels, length):
        logits = torch.zeros(1, 5, 12)
        logits[0, -1, 3], logits[0, -1, 1] = pixels, 0.1 * length
        logits[0, 0, 3] = 99.0  # not the last position
        return SimpleNamespace(logits=logits)

    got = vision_language_answers(model, Processor(), [1, 2], ["Long?", "Has a tail?"], prompt="<image> {question}")
    lengths = torch.tensor([len("<image> Long?"), len("<image> Has a tail?")])
    torch.testing.assert_close(got, torch.sigmoid(torch.tensor([[1.0], [2.0]]) - 0.1 * lengths))
    assert seen[1] == (1, "<image> Has a tail?")


def test_small_models_learn_attributes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    truth = torch.stack((x[:, 0] > 0, x[:, 1] + x[:, 2] > 0.5), 1)
    answer = fit_attributes(x, truth, lr=3e-2)
    q = answer(x)
    assert q.shape == (400, 2) and ((q > 0.5) == truth).float().mean() > 0.9 and (q - q.round()).abs().max() > 0.3
    assert not q.requires_grad


def test_attributes_of_digits():
    pytest.importorskip("sklearn")
    from kdfast.data.aspect_digits import ASPECTS, aspect_splits, attributes

    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, :4] = 1.0  # the upper half
    images[1, 0, range(8), range(8)] = 1.0  # falling to the right
    found = attributes(images, torch.tensor([0, 7]))
    assert found.shape == (2, ASPECTS)
    assert found[0, :10].tolist() == [d in {0, 3, 6} for d in range(10)]  # 0689, 038, 06
    assert found[1, :10].tolist() == [d in {1, 4, 5} for d in range(10)]  # 147, 57, 27
    assert found[0, 10:].tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]  # upper; not left, slanted; ink; half the centre; pixels
    assert found[1, 10:].tolist() == [False, False, True, False, False, False]
    splits = aspect_splits(0)
    _, labels, answers, others = splits["student"].tensors
    assert (
        len(labels) == 100 and answers.shape == (100, 16) and torch.equal(answers.sort(0).values, others.sort(0).values)
    )
    assert ((answers > 0) & (answers < 1)).all() and not torch.equal(answers, others) and len(splits["test"]) == 1197
