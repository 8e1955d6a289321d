"""Answers to yes/no questions about images, as probabilities: from a file, from a vision-language model, or from small models of pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor
from kdfast._library import compute_dtype


def yes_no_to_probability(yes: Tensor, no: Tensor) -> Tensor:
    """exp(yes) / (exp(yes) + exp(no)) = sigmoid(yes - no) of the logits of the two answers, any shape.

    >>> yes_no_to_probability(torch.tensor(2.0), torch.tensor(2.0)).item()
    0.5
    """
    return torch.sigmoid(yes.to(compute_dtype(yes)) - no.to(compute_dtype(no)))


class AspectTable:
    """One row of Q probabilities per image, kept as float16; the row of an image serves every augmented view of it.

    >>> table = AspectTable.from_mapping({"a.png": [0.9, 0.1], "b.png": [0.2, 0.7]})
    >>> table.lookup(["b.png"]).shape
    torch.Size([1, 2])
    """

    def __init__(self, rows: Tensor, keys: Sequence[Hashable] | None = None) -> None:
        check_float_tensor("rows", rows)
        if rows.dim() != 2 or not rows.numel():
            raise ValueError(f"rows: expected probabilities [n, Q], got shape {tuple(rows.shape)}")
        if not bool(((rows >= 0) & (rows <= 1)).all()):
            raise ValueError(
                "rows: expected probabilities in [0, 1]; raw logits of an answer go through yes_no_to_probability first"
            )
        if keys is not None and len(keys) != len(rows):
            raise ValueError(f"keys: expected {len(rows)}, one per row, got {len(keys)}")
        self.rows = rows.to(torch.float16)
        self.places = None if keys is None else {key: i for i, key in enumerate(keys)}

    @classmethod
    def from_mapping(cls, answers: Mapping[Hashable, Sequence[float]]) -> AspectTable:
        """{image: [q_1, ..., q_Q]}, the same questions in the same order for all."""
        widths = {len(row) for row in answers.values()}
        if len(widths) != 1:
            raise ValueError(f"answers: expected as many for every image, got {sorted(widths) or 'none'}")
        return cls(torch.tensor([list(row) for row in answers.values()], dtype=torch.float32), list(answers))

    @classmethod
    def from_file(cls, path: str | Path) -> AspectTable:
        """A JSON file {image: [numbers]}."""
        return cls.from_mapping(json.loads(Path(path).read_text()))

    def lookup(self, images: Tensor | Sequence[Hashable]) -> Tensor:
        """[B, Q] float32 of row numbers (a tensor) or keys; ValueError naming a key that is not there."""
        if isinstance(images, Tensor):
            index = images.cpu()
        else:
            absent = [key for key in images if key not in (self.places or {})]
            if absent:
                raise ValueError(f"images: no answers for {', '.join(map(str, absent[:5]))}")
            index = torch.tensor([self.places[key] for key in images])  # type: ignore[index]
        return self.rows[index].float()


@torch.no_grad()
def vision_language_answers(
    model: Callable[..., Any], processor: Any, images: Sequence[Any], questions: Sequence[str], *, yes: str = "Yes", no: str = "No",
    prompt: str = "{question} Answer Yes or No.",
) -> Tensor:  # fmt: skip
    """[n, Q] probabilities of "yes" at the first generated position: a Transformers model and its processor answer each question.

    Args: model: gives `.logits` [1, L, V]. processor: (images=, text=, return_tensors=) -> inputs, with a `tokenizer`. prompt: with
        {question}, and whatever the model wants around it (an image token, a chat template).

    >>> model = AutoModelForImageTextToText.from_pretrained(name)
    >>> q = vision_language_answers(model, AutoProcessor.from_pretrained(name), images, ["Does it have a long tail?"])
    """
    ids = [processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in (yes, no)]
    rows = []
    for image in images:
        found = []
        for question in questions:
            inputs = processor(images=image, text=prompt.format(question=question), return_tensors="pt")
            device = getattr(model, "device", None)
            logits = model(
                **(inputs if device is None else {name: value.to(device) for name, value in inputs.items()})
            ).logits[0, -1]
            found.append(yes_no_to_probability(logits[ids[0]], logits[ids[1]]))
        rows.append(torch.stack(found))
    return torch.stack(rows).cpu()


def fit_attributes(inputs: Tensor, truth: Tensor, *, steps: int = 150, lr: float = 1e-2) -> Callable[[Tensor], Tensor]:
    """Q logistic models of attributes [n, Q] (0 or 1) on inputs [n, D]: a stand-in for a vision-language model that is soft and errs.

    Returns the function inputs [m, D] -> probabilities [m, Q]. Adam, full batch, from zero weights.
    """
    weight = torch.zeros(truth.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            logits = inputs @ weight.T + bias
            torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.float()).backward()
            optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    return lambda rows: torch.sigmoid(rows @ weight.T + bias)
