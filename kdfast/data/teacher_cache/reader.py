"""`TeacherCache`: rows of a teacher's cache, by id, as items of a data set and as batches for a loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.teacher_cache.lists import has_list, unpack_lists
from kdfast.data.teacher_cache.store import CacheError, Shards
from kdfast.data.text import (
    IGNORE,
    collate_rows,
    differing_tokens,
    name_tokens,
    padded,
    tokenizer_fingerprint,
)
from kdfast.ops.sparse_divergence import TopKTeacher

KIND, VOCABULARY = "top-k lists", "vocabulary.json"
logger = logging.getLogger(__name__)
LISTS = ("ids", "codes", "ids_high", "log_probs", "tail", "top", "span")


class TeacherCache(Dataset):
    """A cache that `cache_teacher` wrote, by row id: a map-style data set whose rows carry the teacher's lists.

        cache = TeacherCache("runs/teacher", tokenizer=tokenizer)
        for batch in DataLoader(cache, 8, shuffle=True, collate_fn=cache.collate):
            teacher = cache.pop_teacher(batch)                     # TopKTeacher at the cache's temperature
            hidden = student.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            loss, parts = linear_distillation_loss(
                hidden, student.lm_head.weight, teacher, batch["labels"], temperature=cache.temperature, shift=1
            )

    Or beside a data set of one's own, whose batches carry the row ids: `cache.rows(batch["row_id"], batch["input_ids"])`.

    path: the folder. tokenizer: the student's (or its vocabulary {token: id}), for `check_tokenizer`.
    temperature, top_k, vocab_size: what the caller expects; another one in the manifest is an error.
    verify: compare a shard with its sha256 when a process first reads it (`cache.verify()` reads all at once); sizes always are.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: Any = None,
        temperature: float | None = None,
        top_k: int | None = None,
        vocab_size: int | None = None,
        verify: bool = True,
    ) -> None:
        self.shards = Shards(Path(path), KIND, verify)
        self.manifest = self.shards.manifest
        settings = self.manifest["settings"]
        self.temperature: float = settings["temperature"]
        self.top_k: int = settings["top_k"]
        self.vocab_size: int = settings["vocab_size"]
        self.pad_id: int = self.manifest["about"]["pad_id"]
        self.kept_mass: float = self.manifest["kept_mass"]
        expected = {"temperature": temperature, "top_k": top_k, "vocab_size": vocab_size}
        for name, value in expected.items():
            if value is not None and value != settings[name]:
                raise CacheError(f"{name}: {path} was made with {settings[name]}, expected {value}")
        self.check_tokenizer(tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """CacheError, naming the tokens, unless every id that the cache holds is the same token to `tokenizer`. None is not checked.

        Ids after the greatest in its rows and lists, tokens that were added to either tokenizer, may differ; the log names them.
        """
        stored, given = self.manifest["settings"]["tokenizer"], tokenizer_fingerprint(tokenizer)
        if given is None or given == stored:
            return
        path, about = self.shards.folder, self.manifest["about"]
        if stored is None:
            raise CacheError(f"tokenizer: {path} was made from token ids, without one to compare with")
        differing = differing_tokens(tokenizer, self._vocabulary())
        held = {index: tokens for index, tokens in differing.items() if index <= self.manifest["totals"]["max_id"]}
        if held:
            raise CacheError(
                f"tokenizer: {path} was made with that of {about['model'] or 'a model without a name'}, and an id is another token "
                f"here than there ({name_tokens(held)}), so the lists mean nothing to it"
            )
        logger.warning(
            "tokenizer: not that of %s, here and there %s; no row or list of the cache holds such an id",
            path,
            name_tokens(differing),
        )

    def _vocabulary(self) -> dict[str, int]:
        """{token: id} of the tokenizer that the cache was made with."""
        path = self.shards.folder / VOCABULARY
        try:
            tokens = json.loads(path.read_text())
        except FileNotFoundError:
            raise CacheError(
                f"{path}: missing, so it is not known which ids are other tokens to this tokenizer"
            ) from None
        except json.JSONDecodeError as error:
            raise CacheError(f"{path}: truncated or edited, it is no JSON ({error})") from None
        if tokenizer_fingerprint(tokens) != self.manifest["settings"]["tokenizer"]:
            raise CacheError(f"{path}: edited or foreign, its tokens do not have the fingerprint in the manifest")
        return tokens

    def verify(self) -> None:
        """Reads everything once and compares it with the manifest; CacheError says what is wrong with which file."""
        self.shards.verify()

    def __len__(self) -> int:
        return self.shards.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """{"input_ids", "labels": [L], "teacher_ids", "teacher_log_probs": [L, K], "teacher_tail": [L], "row_id"}.

        Ids are -1 where a token has no list.
        """
        file, place = self.shards.find(int(row))
        start, stop = file.get_slice("row_starts")[place : place + 2].tolist()
        tokens = file.get_slice("tokens")[start:stop].long()
        labels = tokens.where(file.get_slice("keep")[start:stop].bool(), IGNORE)
        first, last = file.get_slice("list_starts")[place : place + 2].tolist()
        names = set(file.keys())
        lists = unpack_lists({name: file.get_slice(name)[first:last] for name in LISTS if name in names})
        filled = []
        there = has_list(labels)
        for values, empty in zip(lists, (-1, 0.0, 1.0)):
            whole = values.new_full((len(tokens), *values.shape[1:]), empty)
            whole[there] = values
            filled.append(whole)
        return {
            "input_ids": tokens, "labels": labels, "row_id": int(row),
            "teacher_ids": filled[0], "teacher_log_probs": filled[1], "teacher_tail": filled[2],
        }  # fmt: skip

    def collate(self, items: Sequence[Mapping[str, Any]], length: int = 0) -> dict[str, Tensor]:
        """Items as one batch, padded on the right (to `length` at least): label -100, mask 0, list ids -1. A DataLoader's collate_fn."""
        return {
            **collate_rows(items, self.pad_id, length),
            "teacher_ids": padded([item["teacher_ids"] for item in items], -1, length),
            "teacher_log_probs": padded([item["teacher_log_probs"] for item in items], 0.0, length),
            "teacher_tail": padded([item["teacher_tail"] for item in items], 1.0, length),
        }

    def rows(self, ids: Sequence[int] | Tensor, input_ids: Tensor | None = None) -> dict[str, Tensor]:
        """The batch of some rows, each found in constant time.

        input_ids: [B, L], what the caller takes these rows for, padded on the right: other tokens are an error, and the batch
            comes back as wide as this. Use its labels: a token that had none when the cache was made has no list.
        """
        items = [self[int(row)] for row in ids]
        if input_ids is None:
            return self.collate(items)
        if len(input_ids) != len(items):
            raise ValueError(f"input_ids: expected {len(items)} rows, one for each id, got {len(input_ids)}")
        for item, theirs in zip(items, input_ids.cpu()):
            _check_tokens(item["row_id"], item["input_ids"], theirs)
        return self.collate(items, input_ids.shape[1])

    def pop_teacher(self, batch: MutableMapping[str, Any]) -> TopKTeacher:
        """Takes the lists out of a batch, which then holds what the student's model takes, as the teacher of a loss."""
        return TopKTeacher(
            batch.pop("teacher_ids"), batch.pop("teacher_log_probs"), batch.pop("teacher_tail"), self.temperature
        )


def _check_tokens(row: int, ours: Tensor, theirs: Tensor) -> None:
    """That the caller's row is this row: the same tokens, and after them nothing but one token, the padding."""
    if len(theirs) < len(ours):
        raise ValueError(f"input_ids: row {row} has {len(ours)} tokens in the cache, {len(theirs)} here")
    wrong = theirs[: len(ours)] != ours
    if wrong.any():
        at = int(wrong.int().argmax())
        raise ValueError(
            f"input_ids: row {row} has token {int(ours[at])} at place {at} in the cache, {int(theirs[at])} here: "
            "other data, another order of the rows, or padding on the left"
        )
    rest = theirs[len(ours) :]
    if (rest != rest[:1]).any():
        raise ValueError(f"input_ids: row {row} has {len(ours)} tokens in the cache, more than that here")
