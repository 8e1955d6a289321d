"""Digits as the nodes of a graph: each joined to its 8 nearest at 8x8 pixels; few have a label, and the student must do without edges."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.digits import CLASSES, digit_images
from kdfast.data.task import Task
from kdfast.nn.graph import GCN, NodeMLP
from kdfast.ops import knn_graph

UNLABELLED = -100
LABELLED, VAL = 20, 30  # per class
HELD_OUT = 0.2  # of the test nodes, where they are not seen in training


class WholeGraph(Dataset):
    """One item, the graph: {"features" [N, D], "edges" [2, M], "labels" [N]}, labels of the nodes that count here, else -100."""

    def __init__(self, features: Tensor, edges: Tensor, labels: Tensor, counted: Tensor) -> None:
        self.features, self.edges = features, edges
        self.labels = torch.where(counted, labels, UNLABELLED)

    def __len__(self) -> int:
        return 1

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"features": self.features, "edges": self.edges, "labels": self.labels}


def nearest_edges(features: Tensor, k: int = 8) -> Tensor:
    """[2, M]: i and j are joined when one is among the k nearest of the other; both directions, none twice, in order."""
    neighbours, _ = knn_graph(features, k)
    n = len(features)
    i = torch.arange(n).repeat_interleave(k)
    j = neighbours.long().reshape(-1)
    key = torch.unique(torch.cat((i * n + j, j * n + i)))
    return torch.stack((key // n, key % n))


def induced(edges: Tensor, kept: Tensor) -> Tensor:
    """The edges between kept nodes ([N] bool), which are numbered anew."""
    number = kept.cumsum(0) - 1
    return number[edges[:, kept[edges].all(0)]]


def node_parts(labels: Tensor, seed: int) -> dict[str, Tensor]:
    """{"labelled", "val", "test": [N] bool}: 20 and 30 random nodes per class, and the rest."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = {name: torch.zeros(len(labels), dtype=torch.bool) for name in ("labelled", "val", "test")}
    for c in range(CLASSES):
        of_class = order[labels[order] == c]
        for name, index in zip(parts, of_class.tensor_split((LABELLED, LABELLED + VAL))):
            parts[name][index] = True
    return parts


def node_splits(seed: int, *, unseen: bool = False) -> dict[str, Dataset]:
    """Of the whole graph; unseen: a fifth of the test nodes and their edges are there for the test alone, which counts those."""
    images, labels = digit_images()
    features = images.flatten(1)
    edges, parts = nearest_edges(features), node_parts(labels, seed)
    graph, seen = (features, edges, labels), torch.ones_like(parts["test"])
    if unseen:
        test = parts["test"].nonzero().flatten()
        test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed + 1))]
        hidden = torch.zeros_like(seen)
        hidden[test[: round(HELD_OUT * len(test))]] = True
        seen, parts["test"] = ~hidden, hidden
        graph = (features[seen], induced(edges, seen), labels[seen])
    train = WholeGraph(*graph, parts["labelled"][seen])
    return {
        "teacher": train, "student": train, "val": WholeGraph(*graph, parts["val"][seen]),
        "test": WholeGraph(features, edges, labels, parts["test"]),
    }  # fmt: skip


def _adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-4)


def digit_nodes_task(unseen: bool = False) -> Task:
    """Ten classes, 200 labelled nodes of 1797; student MLP 64-128-10, its teacher a GCN of two layers; full batches."""
    return Task(
        name="digit_nodes_unseen" if unseen else "digit_nodes",
        title="handwritten digits (scikit-learn) as nodes of a graph of nearest neighbours, 20 labels per class"
        + (", tested on nodes that were not there in training" if unseen else ""),
        splits=partial(node_splits, unseen=unseen),
        student=lambda: NodeMLP(64, CLASSES, hidden=128),
        teacher=lambda: GCN(64, CLASSES, hidden=128),
        columns=("edges",),
        classes=CLASSES,
        steps=500,
        eval_every=5,
        teacher_steps=500,
        batch_size=1,
        lr=0.01,
        optimizer=_adam,
        teacher_optimizer=_adam,
        patience=10,
        threads=1,
    )


def digit_nodes_unseen_task() -> Task:
    return digit_nodes_task(unseen=True)
