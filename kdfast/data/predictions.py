"""What a network predicted for each training sample when it last saw it: every probability, or the k greatest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_int


class PredictionMemory(nn.Module):
    """The latest probabilities [copies, C] of each of N samples, as buffers: part of the state, so a resumed run has them.

    Args:
        samples: N. classes: C. copies: views of a sample that are predicted apart. kept: None stores all C numbers; k the k greatest
            with their classes (C = 4000, k = 20: 120 bytes a row, not 16,000), and what they leave is spread evenly over the others.

    >>> memory = PredictionMemory(100, 10, kept=3)
    >>> earlier = memory.exchange(index, logits.softmax(-1), labels)
    """

    values: Tensor
    places: Tensor
    seen: Tensor

    def __init__(self, samples: int, classes: int, *, copies: int = 1, kept: int | None = None) -> None:
        super().__init__()
        check_int("samples", samples, low=1)
        self.classes, self.copies = check_int("classes", classes, low=1), check_int("copies", copies, low=1)
        self.kept = None if kept is None else min(check_int("kept", kept, low=1), classes)
        columns = classes if self.kept is None else self.kept
        self.register_buffer("values", torch.zeros(samples, copies, columns))
        if self.kept is not None:
            narrow = torch.int16 if classes <= torch.iinfo(torch.int16).max else torch.int32
            self.register_buffer("places", torch.zeros(samples, copies, columns, dtype=narrow))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.bool))

    @torch.no_grad()
    def exchange(self, index: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
        """What was stored of the samples `index` [B], [B copies, C]; then `probs`, of the same shape, takes its place.

        A sample that was not stored yet gives the one-hot rows of `labels` [B copies].
        """
        rows = len(index) * self.copies
        if probs.shape != (rows, self.classes):
            raise ValueError(f"probs: expected shape {(rows, self.classes)}, got {tuple(probs.shape)}")
        stored = self.values[index].flatten(0, 1).to(probs)
        if self.kept is not None:
            rest = (1 - stored.sum(-1, keepdim=True)).clamp_min(0) / max(1, self.classes - self.kept)
            places = self.places[index].flatten(0, 1).long()
            stored = rest.expand(-1, self.classes).scatter(1, places, stored)
        known = self.seen[index].repeat_interleave(self.copies).unsqueeze(1)
        earlier = torch.where(known, stored, F.one_hot(labels.long(), self.classes).to(probs))
        if self.kept is not None:
            probs, places = probs.topk(self.kept, -1)
            self.places[index] = places.to(self.places.dtype).unflatten(0, (-1, self.copies))
        self.values[index] = probs.to(self.values.dtype).unflatten(0, (-1, self.copies))
        self.seen[index] = True
        return earlier
