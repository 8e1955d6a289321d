"""A small hyper-relational graph over scikit-learn's digits: who is nearest to whom among the digits of a given class.

Entities: 300 samples and the 10 classes. Relations: nearest at 8x8 pixels, nearest at 4x4 means, and "class", which only
qualifies. Statement (i, r_s, j | class, d): of the samples of class d, j is nearest to i at scale s; 4 random d per (i, s).
Without its qualifier, (i, r_s, ?) has four answers; with it, one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.digits import digit_images
from kdfast.data.statements import MASK, NO_RELATION, PAD, SPECIALS
from kdfast.data.task import Task
from kdfast.metrics import filtered_rank, hits_at, mean_reciprocal_rank

SAMPLES, CLASSES, SCALES, PER_HEAD = 300, 10, 2, 4
ENTITIES, RELATIONS = SAMPLES + CLASSES, SCALES + 1
PAIRS = 2  # qualifier pairs a sequence has room for


@dataclass(frozen=True)
class Statements:
    """Columns of statements, as entity and relation numbers (not tokens): head, relation, tail, qualifier class."""

    head: Tensor
    relation: Tensor
    tail: Tensor
    qualifier: Tensor

    def __getitem__(self, index: Tensor) -> Statements:
        return Statements(self.head[index], self.relation[index], self.tail[index], self.qualifier[index])

    def __len__(self) -> int:
        return len(self.head)


def digit_statements(seed: int = 0) -> Statements:
    """All 2400 statements of a seed."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_images()
    chosen = torch.randperm(len(images), generator=generator)[:SAMPLES]
    images, labels = images[chosen], labels[chosen]
    rows = []
    for scale, features in enumerate((images.flatten(1), F.avg_pool2d(images, 2).flatten(1))):
        distance = torch.cdist(features, features).fill_diagonal_(torch.inf)
        for i in range(SAMPLES):
            for d in torch.randperm(CLASSES, generator=generator)[:PER_HEAD].tolist():
                candidates = torch.where(labels == d, distance[i], torch.inf)
                rows.append((i, scale, int(candidates.argmin()), SAMPLES + d))
    return Statements(*torch.tensor(rows).unbind(1))


class StatementExamples(Dataset):
    """Both directions of every statement as token sequences, a batch at a time.

    Batches for training: {"ids" [B, 7], "neighbours" [B, M, 7], "qualifiers" [B, 2, 3], "labels" [B] target token}. With `every`
    (all statements there are) batches for ranking: {"ids", "known" [B, entities] other true answers, "labels"}.
    """

    def __init__(
        self, statements: Statements, *, train: Statements, every: Statements | None = None, neighbours: int = 2
    ) -> None:
        self.neighbours = neighbours
        self.sequences, self.targets, self.query, self.relation = _sequences(statements)
        self.known = None if every is None else _known(self, every)
        self.pool, self.start, self.count = _neighbourhoods(train)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        batch = {"ids": self.sequences[index], "labels": self.targets[index]}
        if self.known is not None:
            batch["known"] = self.known[index]
        else:
            count = self.count[self.query[index]].unsqueeze(1)  # [B, 1], at least 1
            draw = (torch.rand(len(index), self.neighbours) * count).long()
            batch["neighbours"] = self.pool[self.start[self.query[index]].unsqueeze(1) + draw]
            pair = self.sequences[index, 3:5]
            mask = torch.full((len(index), 1), MASK)
            batch["qualifiers"] = torch.cat((pair, mask), 1).unsqueeze(1).expand(-1, PAIRS, -1)
        return batch


def _entity(number: Tensor) -> Tensor:
    return SPECIALS + number


def _relation(number: Tensor, reverse: bool) -> Tensor:
    return SPECIALS + ENTITIES + number + (RELATIONS if reverse else 0)


def _sequences(s: Statements) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens [2 n, 3 + 2 PAIRS], target tokens, query entity numbers, relation tokens), tails first, then heads."""
    parts = []
    for reverse in (False, True):
        query, answer = (s.tail, s.head) if reverse else (s.head, s.tail)
        relation = _relation(s.relation, reverse)
        tokens = torch.full((len(s), 3 + 2 * PAIRS), PAD)
        tokens[:, 0], tokens[:, 1], tokens[:, 2] = _entity(query), relation, MASK
        tokens[:, 3], tokens[:, 4] = _relation(torch.full_like(s.relation, SCALES), reverse), _entity(s.qualifier)
        parts.append((tokens, _entity(answer), query, relation))
    tokens, targets, query, relation = (torch.cat(column) for column in zip(*parts))
    return tokens, targets, query, relation


def _known(examples: StatementExamples, every: Statements) -> Tensor:
    """[n, entities]: the other answers to the same (query, relation), whatever their qualifier."""
    _, targets, query, relation = _sequences(every)
    table = torch.zeros(ENTITIES, SPECIALS + ENTITIES + 2 * RELATIONS, ENTITIES, dtype=torch.bool)
    table[query, relation, targets - SPECIALS] = True
    known = table[examples.query, examples.relation]
    known[torch.arange(len(examples.targets)), examples.targets - SPECIALS] = False
    return known


def _neighbourhoods(train: Statements) -> tuple[Tensor, Tensor, Tensor]:
    """Training sequences sorted by the entity at their MASK, with first place and number per entity; at least one each."""
    tokens, targets, _, _ = _sequences(train)
    alone = torch.full((ENTITIES, 3 + 2 * PAIRS), PAD)  # for an entity without neighbours: itself
    alone[:, 0], alone[:, 1], alone[:, 2] = _entity(torch.arange(ENTITIES)), NO_RELATION, MASK
    lonely = torch.bincount(targets - SPECIALS, minlength=ENTITIES) == 0
    entity = torch.cat((targets - SPECIALS, torch.arange(ENTITIES)[lonely]))
    order = entity.argsort(stable=True)
    count = torch.bincount(entity, minlength=ENTITIES)
    return torch.cat((tokens, alone[lonely]))[order], count.cumsum(0) - count, count


def graph_splits(seed: int) -> dict[str, Dataset]:
    """80 % of the statements to train, 10 % "val", 10 % "test"; ranking is filtered by the answers of all of them."""
    statements = digit_statements(seed)
    order = torch.randperm(len(statements), generator=torch.Generator().manual_seed(seed + 1))
    tenth = len(statements) // 10
    train = statements[order[2 * tenth :]]
    splits: dict[str, Dataset] = {"student": StatementExamples(train, train=train)}
    for name, index in {"val": order[:tenth], "test": order[tenth : 2 * tenth]}.items():
        splits[name] = StatementExamples(statements[index], train=train, every=statements)
    return splits


def _ranks(predictions: Tensor, labels: Tensor) -> Tensor:
    return filtered_rank(predictions, labels - SPECIALS)


def digit_graph_task() -> Task:
    """Filtered mean reciprocal rank of the missing entity, tails and heads."""
    return Task(
        name="digit_graph",
        title="statements over 300 handwritten digits and their classes: which digit is nearest?",
        splits=graph_splits,
        sizes={"num_entities": ENTITIES, "num_relations": RELATIONS},
        # the filtered answers are -inf in the logits, so the rank needs nothing else
        predict=lambda output: output["pass1"][:, SPECIALS : SPECIALS + ENTITIES],
        metrics={
            "MRR": lambda predictions, labels: mean_reciprocal_rank(_ranks(predictions, labels)),
            "Hits@1": lambda predictions, labels: hits_at(_ranks(predictions, labels), 1),
            "Hits@10": lambda predictions, labels: hits_at(_ranks(predictions, labels), 10),
        },
        steps=600,
        eval_every=60,
        batch_size=128,
        threads=1,
    )
