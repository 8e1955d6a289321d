"""Text as rows of token ids: a HF dataset, JSONL, parquet or a folder of text, one document per row or packed.

    rows = token_rows("corpus/", tokenizer, max_length=1024, packing=True)
    rows[3]                  {"input_ids": [L], "labels": [L], "row_id": 3}
    collate_rows([rows[3], rows[7]])     padded, with an attention mask

A row's id is its place: the same data, tokenizer and options give the same rows, so a teacher's cache and a training loop mean the
same tokens by the same id. Labels are the tokens themselves, not shifted, and -100 where a token counts in no loss.

Documents end with the tokenizer's end-of-text token. One document per row cuts a document at `max_length` and drops the rest.
`packing=True` joins documents and cuts the stream into rows of `max_length`, dropping nothing; the first token of each document
has the label -100, since nothing predicts it. Attention sees the whole row, in the teacher as in the student.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast._checks import check_int
from kdfast._extras import needs

IGNORE = -100
# What a folder is searched for, in this order; the loader of `datasets` for each. A .txt file is one document.
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


class TokenRows(Dataset):
    """Rows of token ids over a table of `datasets` (memory-mapped), with columns "input_ids", "length" and, if not all count, "keep".

    rows[i]: {"input_ids": int64 [L], "labels": int64 [L], "row_id": i}.
    """

    def __init__(self, table: Any) -> None:
        self.table = table.with_format("numpy")
        self.lengths = np.asarray(self.table["length"][:], dtype=np.int64)
        self._masked = "keep" in table.column_names

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[int(index)]
        tokens = torch.from_numpy(row["input_ids"].astype(np.int64))
        labels = tokens
        if self._masked:
            labels = tokens.where(torch.from_numpy(row["keep"].astype(np.bool_)), IGNORE)
        return {"input_ids": tokens, "labels": labels, "row_id": int(index)}


def token_rows(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    packing: bool = False,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    num_proc: int | None = None,
) -> TokenRows:
    """Tokenizes `data` (see `load_text`) into rows of at most `max_length` tokens.

    Args:
        tokenizer: of transformers or of tokenizers, or the name or folder of one.
        packing: rows of `max_length` tokens from joined documents, else one document per row. (A thousand documents are joined at
            a time, so one row in each thousand documents is shorter.)
        column: of the text. A dataset with a column "input_ids" is taken as it is, cut at max_length, without the tokens whose
            "attention_mask" is 0 if it has one; its "labels", if any, are the tokens or -100.
        split, config, revision: as in `datasets.load_dataset`. limit: the first so many documents. num_proc: processes that tokenize;
            with packing each joins its own share of the documents, so another number gives other rows.

    >>> rows = token_rows(["one document", "another"], "Qwen/Qwen2.5-0.5B", max_length=16)   # doctest: +SKIP
    """
    check_int("max_length", max_length, low=2)
    documents = load_text(data, split=split, config=config, revision=revision)
    if limit is not None:
        documents = documents.select(range(min(check_int("limit", limit, low=1), len(documents))))
    tokenizer = load_tokenizer(tokenizer)
    ready = "input_ids" in documents.column_names
    if not ready and column not in documents.column_names:
        raise ValueError(f"column: expected one of {', '.join(documents.column_names)}, got {column!r}")
    eos = getattr(tokenizer, "eos_token_id", None)

    def work(batch: Mapping[str, list]) -> dict[str, list]:
        if ready:
            tokens, keep = _unpadded(batch)
        else:
            tokens, keep = [_ended(row, eos) for row in encode(tokenizer, batch[column])], None
        if packing:
            keep = [[True] * len(row) for row in tokens] if keep is None else keep
            keep = [[False, *row[1:]] if row else [] for row in keep]  # an empty document has no first token
            tokens, keep = _packed(tokens, max_length), _packed(keep, max_length)
        columns: dict[str, list] = {"input_ids": [row[:max_length] for row in tokens if row]}
        columns["length"] = [len(row) for row in columns["input_ids"]]
        if keep is not None:
            columns["keep"] = [row[:max_length] for row in keep if row]
        return columns

    # What a vocabulary does not tell: special tokens, merges, normaliser. Packing joins what one process was given.
    probe = [] if ready else encode(tokenizer, ["Two words,\n\tÄ 12345", "x"])
    shares = (num_proc or 1) if packing else 0
    options = json.dumps([shares, max_length, column, eos, tokenizer_fingerprint(tokenizer), probe, ready])
    name = hashlib.sha256(f"kdfast {documents._fingerprint} {options}".encode()).hexdigest()[:16]
    masked = packing or (ready and "labels" in documents.column_names)
    table = documents.map(
        work, batched=True, batch_size=1000, num_proc=num_proc, remove_columns=documents.column_names,
        features=_features(masked), new_fingerprint=name, desc="tokenizing",
    )  # fmt: skip
    if len(table) == 0:
        raise ValueError("data: expected text, got no token at all")
    return TokenRows(table)


def load_text(data: Any, *, split: str = "train", config: str | None = None, revision: str | None = None) -> Any:
    """A `datasets.Dataset` of documents.

    data: a list of strings; a .jsonl, .json, .parquet or .txt file (one document per file of .txt); a folder of one of these kinds;
        a folder that `save_to_disk` wrote; the id of a dataset on the Hub; or a `datasets.Dataset`, returned as it is.
    """
    datasets = needs("datasets", "hf")
    if isinstance(data, datasets.Dataset):
        return data
    if isinstance(data, Sequence) and not isinstance(data, str):
        if not all(isinstance(text, str) for text in data):
            raise TypeError("data: expected strings, a path, an id or a datasets.Dataset, got a list of something else")
        return datasets.Dataset.from_dict({"text": list(data)})
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data: expected strings, a path, an id or a datasets.Dataset, got {type(data).__name__}")
    path = Path(data)
    if not path.exists():
        if isinstance(data, Path) or path.suffix in FORMATS or path.is_absolute() or str(data).startswith("."):
            raise ValueError(f"data: no file or folder {str(data)!r}")
        return datasets.load_dataset(data, config, split=split, revision=revision)
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    for suffix, loader in FORMATS.items():
        files = [path] if path.suffix == suffix else sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []
        if files:
            options = {"sample_by": "document"} if loader == "text" else {}
            return datasets.load_dataset(loader, data_files=[str(file) for file in files], split=split, **options)
    raise ValueError(f"data: expected {', '.join(FORMATS)} or a folder of them, found none at {str(data)!r}")


def collate_rows(rows: Sequence[Mapping[str, Any]], pad_id: int = 0, length: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths as a batch: padded on the right with `pad_id` (to `length` at least), label -100, mask 0."""
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id, length),
        "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0, length),
        "labels": padded([row["labels"] for row in rows], IGNORE, length),
        "row_id": torch.tensor([row["row_id"] for row in rows]),
    }


def padded(tensors: Sequence[Tensor], value: float, length: int = 0) -> Tensor:
    """[B, L, ...] from tensors [L_b, ...], filled up with `value` to the longest, and to `length` at least."""
    length = max(length, *(len(tensor) for tensor in tensors))
    out = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for row, tensor in zip(out, tensors):
        row[: len(tensor)] = tensor
    return out


# ---------------------------------------------------------------- tokenizers
def load_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a name, a folder or a tokenizer.json; a tokenizer is returned as it is."""
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    if Path(tokenizer).is_file():
        return needs("tokenizers", "hf").Tokenizer.from_file(str(tokenizer))
    return needs("transformers", "hf").AutoTokenizer.from_pretrained(str(tokenizer))


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with what the tokenizer adds itself (a beginning-of-text token)."""
    if callable(tokenizer):
        return tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    if hasattr(tokenizer, "encode_batch"):
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    raise TypeError(
        f"tokenizer: expected one of transformers or tokenizers, or its name, got {type(tokenizer).__name__}"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of which token each id is, added tokens included: equal for tokenizers that mean the same by an id.

    tokenizer: of transformers or tokenizers, a mapping {token: id}, or None, whose fingerprint is None.
    """
    return None if tokenizer is None else hashlib.sha256(json.dumps(vocabulary(tokenizer)).encode()).hexdigest()


def vocabulary(tokenizer: Any) -> list[tuple[int, str]]:
    """(id, token) of a tokenizer of transformers or of tokenizers, or of a mapping {token: id}, added tokens included, by id."""
    known = tokenizer if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
    return sorted((int(index), token) for token, index in known.items())


def differing_tokens(ours: Any, theirs: Any) -> dict[int, tuple[str | None, str | None]]:
    """{id: (its token in ours, in theirs)}, ascending, for ids that do not mean the same; None: the id is no token there."""
    pairs = vocabulary(ours), vocabulary(theirs)
    a, b = (dict(side) for side in pairs)
    return {index: (a.get(index), b.get(index)) for index in sorted({i for i, _ in set(pairs[0]) ^ set(pairs[1])})}


def name_tokens(differing: Mapping[int, tuple[str | None, str | None]]) -> str:
    """The first three of `differing_tokens` in words, and how many there are."""
    said = [" and ".join("no token" if token is None else repr(token) for token in two) for two in differing.values()]
    some = "; ".join(f"id {index} is {words}" for index, words in zip(differing, said[:3]))
    return some if len(said) <= 3 else f"{some}; {len(said)} ids in all"


# ---------------------------------------------------------------- pieces
def _ended(tokens: list[int], eos: int | None) -> list[int]:
    return tokens if eos is None or not tokens or tokens[-1] == eos else [*tokens, eos]


def _unpadded(batch: Mapping[str, list]) -> tuple[list[list], list[list] | None]:
    """(tokens, which have a label or None for all) of rows of token ids, which may be padded."""
    tokens, labels = batch["input_ids"], batch.get("labels")
    if labels is not None:
        for row, wanted in zip(tokens, labels):
            if len(row) != len(wanted) or any(label not in (token, IGNORE) for token, label in zip(row, wanted)):
                raise ValueError(
                    f"data: expected labels that are the input_ids or {IGNORE}, not shifted, got "
                    f"input_ids {_some(row)} and labels {_some(wanted)}"
                )
    keep = None if labels is None else [[label != IGNORE for label in row] for row in labels]
    if "attention_mask" in batch:
        masks = batch["attention_mask"]
        tokens = [list(compress(row, mask)) for row, mask in zip(tokens, masks)]
        keep = None if keep is None else [list(compress(row, mask)) for row, mask in zip(keep, masks)]
    return tokens, keep


def _some(row: list[int]) -> str:
    return str(row) if len(row) <= 8 else f"{row[:8]} of {len(row)}"


def _packed(rows: list[list], length: int) -> list[list]:
    stream = [entry for row in rows for entry in row]
    return [stream[at : at + length] for at in range(0, len(stream), length)]


def _features(masked: bool) -> Any:
    datasets = needs("datasets", "hf")
    columns = {"input_ids": datasets.Sequence(datasets.Value("int32")), "length": datasets.Value("int32")}
    return datasets.Features(columns | ({"keep": datasets.Sequence(datasets.Value("bool"))} if masked else {}))
