"""Two tokenizers over one text: where both have read the same, and so predict what comes next from the same.

    "distillation"     student  dist|illation        teacher  distill|ation
    "is fun"           is| fun                       is| fun              ends agree after "distillation", "is", " fun"

A token's offsets say which characters it covers. Row i of a model predicts token i + 1 from the text up to the end of token i; so
rows of two models with equal ends are comparable, whatever happened before. Nothing is merged and no probability multiplied.
A begin-of-text token has read nothing: if both models have one, both predict the first token of the text from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Aligned(NamedTuple):
    """Batches of one list of texts for two models, and the rows of both that predict from the same text.

    student, teacher: {"input_ids", "attention_mask", "labels"} [B, L] each, padded on the right, labels not shifted.
    rows: [P, 3], (text, row of the student, row of the teacher).
    masks: bool [B, L] of the student and of the teacher: rows that predict a learned token, as `multi_level_ot_loss` takes them. The
        t-th of one model answers the t-th of the other: a row that has read nothing is in them if both models have one.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    rows: Tensor
    masks: tuple[Tensor, Tensor]


def aligned_rows(student_offsets: Any, teacher_offsets: Any) -> Tensor:
    """[P, 2]: pairs (i, j) of tokens that end at the same place of the text and both have a token after them.

    Offsets [n, 2] and [m, 2]: (start, end) of each token in characters, as fast tokenizers give them; (0, 0) and others of no width
    are special tokens. Of those in front the last counts as at place 0, and is paired if both have one. A character cut into
    several tokens counts as read at the last of them.
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
    token, front = torch.arange(len(offsets)), _front(offsets)
    wide = offsets[:, 1] > offsets[:, 0]
    real, end = token[wide], offsets[wide, 1]
    start_after = torch.cat(
        (offsets[wide, 0][1:], end[-1:])
    )  # a piece of a character starts before the end of the one before
    whole = (start_after >= end) & (real < len(offsets) - 1)
    return torch.cat((end.new_zeros(min(front, 1)), end[whole])), torch.cat((token[:front][-1:], real[whole]))


def _front(offsets: Tensor) -> int:
    """Tokens in front that cover nothing; where none covers anything the last is the end of an empty text."""
    return min(int((offsets[:, 1] <= offsets[:, 0]).long().cumprod(0).sum()), max(len(offsets) - 1, 0))


def align_texts(
    texts: Sequence[str],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    prompts: Sequence[str] | None = None,
    max_length: int | None = None,
    add_start: bool = True,
    add_end: bool = True,
) -> Aligned:
    """Tokenizes texts for both models and pairs their rows.

    Args:
        texts: what is learned. prompts: what stands before each and is not; None: nothing.
        student_tokenizer, teacher_tokenizer: fast tokenizers of transformers.
        max_length: tokens kept of each prompt with its text, special tokens among them.
        add_start: put in front what each tokenizer puts there itself (a begin-of-text token; some have none), so that a model reads
            the text as in normal use. Never learned; not put twice where a chat template has written it into the prompt.
        add_end: an end-of-text token after each, which the last row then predicts.
    Raises:
        ValueError: a tokenizer without offsets (a slow one), or without an end-of-text token for add_end.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    if len(prompts) != len(texts):
        raise ValueError(f"prompts: expected one for each of {len(texts)} texts, got {len(prompts)}")
    sides: list[dict[str, Tensor]] = []
    offsets = []
    for name, tokenizer in (("student_tokenizer", student_tokenizer), ("teacher_tokenizer", teacher_tokenizer)):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{name}: expected a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}")
        if add_end and tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: expected an end-of-text token for add_end=True, got none")
        start = _start(tokenizer) if add_start else []
        read = [_row(tokenizer, start, prompt, text, max_length, add_end) for prompt, text in zip(prompts, texts)]
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
    masks = [F.pad(side["labels"][:, 1:] != -100, (0, 1)) for side in sides]
    for text, fronts in enumerate(zip(*([_front(spans) for spans in side] for side in offsets))):
        if min(fronts) == 0:
            for mask, front in zip(masks, fronts):
                mask[text, :front] = False
    return Aligned(sides[0], sides[1], rows[learned], (masks[0], masks[1]))


def _start(tokenizer: Any) -> list[int]:
    """What a tokenizer puts in front of a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    special = found["special_tokens_mask"]
    return list(found["input_ids"][: special.index(0) if 0 in special else 0])


def _row(
    tokenizer: Any, start: list[int], prompt: str, text: str, max_length: int | None, add_end: bool
) -> tuple[list, Tensor, list[bool]]:
    """(ids, offsets, which are learned)."""
    # the prompt's end is a boundary in both tokenizers: the two are tokenized apart
    parts = [tokenizer(part, add_special_tokens=False, return_offsets_mapping=True) for part in (prompt, text)]
    first, second = (list(part["offset_mapping"]) for part in parts)
    spans = [*first, *((begin + len(prompt), end + len(prompt)) for begin, end in second)]
    ids = [*parts[0]["input_ids"], *parts[1]["input_ids"]]
    learned = [False] * len(first) + [True] * len(second)
    if ids[: len(start)] != start:
        ids, spans, learned = [*start, *ids], [(0, 0)] * len(start) + spans, [False] * len(start) + learned
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
