"""digit_nodes: the graph of nearest neighbours, the parts of a seed, nodes that training does not see."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data import load_task, models
from kdfast.data.digit_nodes import induced, nearest_edges, node_parts
from kdfast.data.digits import digit_images


def item(dataset):
    return dataset.__getitems__([0])


def test_nearest_neighbours_by_definition():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    edges = nearest_edges(features, 3)
    near = torch.cdist(features, features).fill_diagonal_(torch.inf).argsort(1)[:, :3]
    want = torch.zeros(20, 20, dtype=torch.bool)
    want[torch.arange(20).unsqueeze(1), near] = True
    want |= want.T.clone()
    assert torch.equal(edges, want.nonzero().T)


def test_an_induced_graph_by_hand():
    edges = torch.tensor([[0, 1, 1, 3, 2], [1, 0, 3, 1, 3]])
    kept = torch.tensor([True, True, False, True])
    assert induced(edges, kept).tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]


def test_parts_of_a_seed():
    labels = digit_images()[1]
    parts = node_parts(labels, 3)
    assert torch.equal(sum(part.long() for part in parts.values()), torch.ones_like(labels))
    for name, number in (("labelled", 20), ("val", 30)):
        assert labels[parts[name]].bincount().tolist() == [number] * 10
    assert not torch.equal(parts["labelled"], node_parts(labels, 4)["labelled"])


def test_the_whole_graph_and_the_seen_one():
    whole, seen = (load_task(name).splits(0) for name in ("digit_nodes", "digit_nodes_unseen"))
    graph, part = item(whole["student"]), item(seen["student"])
    assert graph["features"].shape == (1797, 64) and len(whole["student"]) == 1
    counts = {name: int((item(rows)["labels"] != -100).sum()) for name, rows in whole.items()}
    assert counts == {"teacher": 200, "student": 200, "val": 300, "test": 1297}
    hidden = item(seen["test"])["labels"] != -100
    assert int(hidden.sum()) == round(0.2 * 1297) and len(part["features"]) == 1797 - int(hidden.sum())
    assert torch.equal(part["features"], graph["features"][~hidden])  # what is tested is not there
    assert int((item(seen["val"])["labels"] != -100).sum()) == 300
    assert part["edges"].max() < len(part["features"]) and part["edges"].shape[1] < graph["edges"].shape[1]
    for batch in (graph, part):  # symmetric, no loops, none twice
        i, j = batch["edges"]
        key, back = i * 1797 + j, j * 1797 + i
        assert (i != j).all() and len(key.unique()) == len(key) and torch.equal(key.sort()[0], back.sort()[0])


def test_models():
    task = load_task("digit_nodes")
    student, teacher = models(task, 0)
    batch = item(task.splits(0)["test"])
    assert student(batch["features"]).shape == teacher(batch["features"], batch["edges"]).shape == (1797, 10)
    assert sum(p.numel() for p in student.parameters()) == 64 * 128 + 128 + 1280 + 10
