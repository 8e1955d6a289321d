"""The digit graph: statements by brute force, both directions, filtered answers, neighbours, splits."""

import pytest
import torch

pytest.importorskip("sklearn")

from kdfast.data.digit_graph import (
    CLASSES,
    ENTITIES,
    PER_HEAD,
    RELATIONS,
    SAMPLES,
    SCALES,
    StatementExamples,
    digit_graph_task,
    digit_statements,
    graph_splits,
)  # fmt: skip
from kdfast.data.digits import digit_images
from kdfast.data.statements import MASK, NO_RELATION, PAD, SPECIALS


def test_each_statement_names_the_nearest_of_its_class():
    statements = digit_statements(3)
    assert len(statements) == SAMPLES * SCALES * PER_HEAD
    chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(3))[:SAMPLES]
    images, labels = (t[chosen] for t in digit_images())
    for n in range(0, len(statements), 97):
        i, s, j = int(statements.head[n]), int(statements.relation[n]), int(statements.tail[n])
        d = int(statements.qualifier[n]) - SAMPLES
        features = images.flatten(1) if s == 0 else torch.nn.functional.avg_pool2d(images, 2).flatten(1)
        distance = ((features - features[i]) ** 2).sum(1)
        distance[i] = torch.inf
        rivals = distance[labels == d]
        assert i != j and labels[j] == d and 0 <= d < CLASSES
        assert distance[j] <= rivals.min() + 1e-5


def test_the_qualifier_decides_the_answer():
    statements = digit_statements()
    keys = torch.stack((statements.head, statements.relation), 1)
    with_qualifier = torch.cat((keys, statements.qualifier.unsqueeze(1)), 1)
    assert len(with_qualifier.unique(dim=0)) == len(statements)  # one answer
    assert len(keys.unique(dim=0)) == len(statements) // PER_HEAD  # several


def test_sequences_in_both_directions():
    splits = graph_splits(0)
    train = splits["student"]
    n = len(train) // 2
    batch = train.__getitems__([0, n])
    tail, head = batch["ids"]
    assert tail[2] == head[2] == MASK and tail[5:].tolist() == [PAD, PAD]
    assert (
        head[0] == batch["labels"][0] and tail[0] == batch["labels"][1]
    )  # the answer of one is the query of the other
    assert head[1] - tail[1] == RELATIONS and head[3] - tail[3] == RELATIONS and head[4] == tail[4]
    assert batch["neighbours"].shape == (2, 2, 7) and batch["qualifiers"].shape == (2, 2, 3)
    assert torch.equal(batch["qualifiers"][:, 0, :2], batch["ids"][:, 3:5])
    assert (batch["neighbours"][..., 2] == MASK).all()


def test_neighbours_answer_with_the_query():
    """Each neighbour is a training sequence whose answer is the query entity."""
    train = graph_splits(0)["student"]
    examples = {(tuple(s.tolist()), int(t)) for s, t in zip(train.sequences, train.targets)}
    batch = train.__getitems__(list(range(0, len(train), 50)))
    for query, neighbours in zip(batch["ids"][:, 0], batch["neighbours"]):
        for sequence in neighbours:
            assert sequence[1] == NO_RELATION or (tuple(sequence.tolist()), int(query)) in examples
    assert train.count.sum() >= len(train) and (train.count >= 1).all()


def test_known_answers_are_the_others():
    splits = graph_splits(1)
    examples = splits["test"]
    batch = examples.__getitems__(list(range(40)))
    assert not batch["known"].gather(1, (batch["labels"] - SPECIALS).unsqueeze(1)).any()
    assert batch["known"].sum() > 0 and "neighbours" not in batch
    total = batch["known"][:, SAMPLES:].sum()
    assert total == 0  # a class is no answer


def test_splits_share_no_statement():
    splits = graph_splits(0)
    rows = {n: {(*s.tolist(), int(t)) for s, t in zip(d.sequences, d.targets)} for n, d in splits.items()}
    assert not rows["student"] & rows["val"] and not rows["student"] & rows["test"] and not rows["val"] & rows["test"]
    assert [len(splits[n]) for n in ("student", "val", "test")] == [3840, 480, 480]
    assert isinstance(splits["val"], StatementExamples)


def test_metrics_of_a_perfect_and_of_a_constant_scorer():
    task = digit_graph_task()
    labels = SPECIALS + torch.arange(20)
    perfect = torch.eye(ENTITIES)[:20]
    assert [f(perfect, labels) for f in task.metrics.values()] == [1.0, 1.0, 1.0]
    constant = torch.zeros(20, ENTITIES)
    assert task.metrics["MRR"](constant, labels) == pytest.approx(2 / (ENTITIES + 1), rel=0.01)
