"""Splits are disjoint, balanced and decided by the seed; loaders give what they promise."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import TASKS, Rows, load_task, models
from kdfast.data.digits import digit_images, digit_splits


def keys(rows):
    return {tuple(image.flatten().tolist()) for image in rows.tensors[0]}


def test_splits_are_disjoint_balanced_and_complete():
    images, labels = digit_images()
    assert (
        images.shape == (1797, 1, 8, 8) and images.min() == 0 and images.max() == 1 and labels.bincount().min() >= 174
    )
    splits = digit_splits(3)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "teacher": 900,
        "student": 200,
        "val": 300,
        "test": 597,
    }
    parts = {name: keys(rows) for name, rows in splits.items()}
    assert parts["student"] < parts["teacher"]
    for a, b in (("teacher", "val"), ("teacher", "test"), ("val", "test")):
        assert not parts[a] & parts[b]
    assert len(parts["teacher"] | parts["val"] | parts["test"]) == len(keys(Rows(images)))
    assert splits["student"].tensors[1].bincount(minlength=10).min() >= 19


def test_the_seed_decides():
    a, b, c = digit_splits(1), digit_splits(1), digit_splits(2)
    assert torch.equal(a["test"].tensors[0], b["test"].tensors[0])
    assert keys(a["test"]) != keys(c["test"])
    task = load_task("digits")
    (first, _), (again, _), (other, _) = models(task, 1), models(task, 1), models(task, 2)
    assert torch.equal(first.head.weight, again.head.weight) and not torch.equal(first.head.weight, other.head.weight)


def test_train_loader_has_the_steps_asked_for_and_goes_through_all_the_data():
    task = load_task("digits")
    data = Rows(torch.arange(70), torch.arange(70))
    batches = list(task.train_loader(data, 5))
    assert [len(batch[0]) for batch in batches] == [64] * 5
    counts = torch.cat([batch[0] for batch in batches]).bincount(minlength=70)
    assert counts.min() >= 4 and counts.max() <= 5  # 320 reads of 70 rows
    assert torch.cat([batch[1] for batch in task.eval_loader(data)]).tolist() == list(range(70))


MAPPINGS = (
    "digit_nodes",
    "digit_nodes_unseen",
    "digit_tree",
)  # batches by name, and no layer is read: tests of their methods


# a task with `sizes` leaves the models to its method
@pytest.mark.parametrize("name", [name for name in TASKS if name not in MAPPINGS and not load_task(name).sizes])
def test_layers_of_a_task_exist_and_have_the_widths_it_says(name):
    from kdfast.train import capture_outputs

    task = load_task(name)
    data = task.splits(0)["val"]
    inputs, labels, *_ = next(iter(task.eval_loader(data)))
    for side, model in enumerate(models(task, 0)):
        model.eval()
        wanted = {key: paths[side] for key, paths in task.layers.items() if paths[side] is not None}
        with torch.no_grad(), capture_outputs(model, wanted) as found:
            logits = model(inputs[:3])
        assert logits.movedim(task.dim, -1).shape[:-1] == labels[:3].shape
        for key, widths in task.widths.items():
            if key not in wanted:
                continue
            if not isinstance(found[key], torch.Tensor):  # the maps of all stages first
                assert tuple(one.shape[1] for one in found[key][0]) == widths[side], key
            else:  # rows [N, C], maps [N, C, H, W] or tokens [N, L, C]
                assert found[key].shape[2 if found[key].dim() == 3 else 1] == widths[side], key


def test_unknown_task():
    with pytest.raises(ValueError, match=r"data: expected one of digits.*, got 'imagenet'"):
        load_task("imagenet")


def test_a_subset_is_collated_like_what_it_is_a_subset_of():
    from torch.utils.data import Subset, TensorDataset

    x, y = torch.randn(10, 4), torch.arange(10)
    task = load_task("digits")
    for data in (TensorDataset(x, y), Rows(x, y)):
        for part in (Subset(data, range(2, 8)), Subset(Subset(data, range(1, 9)), range(1, 7))):
            inputs, labels = next(iter(task.eval_loader(part)))
            assert torch.equal(inputs, x[2:8]) and labels.tolist() == [2, 3, 4, 5, 6, 7]
