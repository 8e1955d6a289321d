"""Two tokenizers over one text: where both have read the same, and so predict what comes next from the same.

    "distillation"     student  dist|illation        teacher  distill|ation
    "is fun"           is| fun                       is| fun              ends agree after "distillation", "is", " fun"

A token's offsets say which characters it covers. Row i of a model predicts token i + 1 from the text up to the end of token i; so
rows of two models with equal ends are comparable, whatever happened before. Nothing is merged and no probability multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Batches of one list of texts for two models, and the rows of both that predict from the same text.

    student, teacher: {"input_ids", "attention_mask", "labels"} [B, L] each, padded on the right, labels not shifted.
    rows: [P, 3], (text, row of the student, row of the teacher).
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    rows: Tensor


def aligned_rows(student_offsets: Any, teacher_offsets: Any) -> Tensor:
    """[P, 2]: pairs (i, j) of tokens that end at the same place of the text and both have a token after them.

    Offsets [n, 2] and [m, 2]: (start, end) of each token in characters, as fast tokenizers give them; (0, 0) and others of no width
    are special tokens. A character cut into several tokens counts as read at the last of them.
    """
    ends = []
    for name, offsets in (("student_offsets", student_offsets), ("teacher_offsets", teacher_offsets)):
        table = torch.as_tensor(offsets)
        if table.dim() != 2 or table.shape[-1] != 2:
            raise ValueError(f"{name}: expected (start, end) of each token, got shape {tuple(table.shape)}")
        ends.append(_boundaries(table))
    (place_s, token_s), (place_t, token_t) = ends
    where = torch.searchsorted(place_t, place_s).clamp_max(max(len(place_t) - 1, 0))
    same = place_t[where] == place_s if len(place_t) else torch.zeros(len(place_s), dtype=torch.bool)
    return torch.stack((token_s[same], token_t[where[same]]), -1)


def _boundaries(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(ends, tokens) of the tokens after which a whole number of characters has been read; of the last token none is."""
    token = torch.arange(len(offsets))
    wide = offsets[:, 1] > offsets[:, 0]
    real, end = token[wide], offsets[wide, 1]
    start_after = torch.cat(
        (offsets[wide, 0][1:], end[-1:])
    )  # a piece of a character starts before the end of the one before
    whole = (start_after >= end) & (real < len(offsets) - 1)
    return end[whole], real[whole]


def align_texts(
    texts: Sequence[str],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    prompts: Sequence[str] | None = None,
    max_length: int | None = None,
    add_end: bool = True,
) -> Aligned:
    """Tokenizes texts for both models and pairs their rows.

    Args:
        texts: what is learned. prompts: what stands before each and is not; None: nothing.
        student_tokenizer, teacher_tokenizer: fast tokenizers of transformers.
        max_length: tokens kept of each text. add_end: an end-of-text token after each, which the last row then predicts.
    Raises:
        ValueError: a tokenizer without offsets (a slow one), or without an end-of-text token for add_end.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"prompts: expected one for each of {len(texts)} texts, got {len(prompts)}")
    sides, offsets = [], []
    for name, tokenizer in (("student_tokenizer", student_tokenizer), ("teacher_tokenizer", teacher_tokenizer)):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{name}: expected a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}")
        if add_end and tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: expected an end-of-text token for add_end=True, got none")
        read = [_row(tokenizer, prompt, text, max_length, add_end) for prompt, text in zip(prompts, texts)]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        sides.append(_padded([ids for ids, _, _ in read], [learned for _, _, learned in read], pad))
        offsets.append([spans for _, spans, _ in read])
    found = []
    for text, (ours, theirs) in enumerate(zip(*offsets)):
        pairs = aligned_rows(ours, theirs)
        found.append(torch.cat((torch.full((len(pairs), 1), text), pairs), -1))
    rows = torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.long)
    # Rows whose next token is learned, on both sides: the prompt is read, not predicted.
    b, i, j = rows.unbind(-1)
    learned = (sides[0]["labels"][b, i + 1] != -100) & (sides[1]["labels"][b, j + 1] != -100)
    return Aligned(sides[0], sides[1], rows[learned])


def _row(
    tokenizer: Any, prompt: str, text: str, max_length: int | None, add_end: bool
) -> tuple[list, Tensor, list[bool]]:
    """(ids, offsets, which are learned)."""
    # the prompt's end is a boundary in both tokenizers: the two are tokenized apart
    parts = [tokenizer(part, add_special_tokens=False, return_offsets_mapping=True) for part in (prompt, text)]
    first, second = (list(part["offset_mapping"]) for part in parts)
    spans = [*first, *((start + len(prompt), end + len(prompt)) for start, end in second)]
    ids = [*parts[0]["input_ids"], *parts[1]["input_ids"]]
    learned = [False] * len(first) + [True] * len(second)
    if add_end:
        whole = len(prompt) + len(text)
        ids, spans, learned = [*ids, tokenizer.eos_token_id], [*spans, (whole, whole)], [*learned, True]
    ids, spans, learned = ids[:max_length], spans[:max_length], learned[:max_length]
    return ids, torch.tensor(spans, dtype=torch.long).reshape(-1, 2), learned


def _padded(ids: list[list[int]], learned: list[list[bool]], pad: int) -> dict[str, Tensor]:
    length = max(map(len, ids), default=0)
    tokens, mask = torch.full((len(ids), length), pad), torch.zeros(len(ids), length, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for b, (row, keep) in enumerate(zip(ids, learned)):
        tokens[b, : len(row)], mask[b, : len(row)] = torch.tensor(row, dtype=torch.long), 1
        labels[b, : len(row)] = torch.tensor(row, dtype=torch.long).masked_fill(
            ~torch.tensor(keep, dtype=torch.bool), -100
        )
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
