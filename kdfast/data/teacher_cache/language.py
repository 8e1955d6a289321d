"""`cache_teacher`: the lists of a causal language model over rows of tokens, on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdfast._checks import check_choice, check_int, check_number
from kdfast._extras import needs, processes
from kdfast.data.teacher_cache.lists import FORMS, has_list, list_bytes, pack_lists, top_k_lists
from kdfast.data.teacher_cache.reader import KIND, VOCABULARY, TeacherCache
from kdfast.data.teacher_cache.store import SHARD_BYTES, Progress, check_space, fill, weights_fingerprint
from kdfast.data.text import (
    IGNORE,
    TokenRows,
    collate_rows,
    differing_tokens,
    load_tokenizer,
    name_tokens,
    token_rows,
    tokenizer_fingerprint,
    vocabulary,
)
from kdfast.nn.causal_lm import Reader, States
from kdfast.nn.modes import evaluating
from kdfast.ops.linear_divergence import head_logits

CHUNK_BYTES = 256 << 20


class Estimate(NamedTuple):
    """Of a cache before it is made: at most so many bytes, since tokens without a label have no list."""

    rows: int
    tokens: int
    bytes_per_token: int
    bytes: int
    shards: int
    free: int

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens in {self.rows:,} rows x {self.bytes_per_token} bytes = {_human(self.bytes)} "
            f"in {self.shards} shards; {_human(self.free)} are free"
        )


def cache_teacher(
    model: str | Path | nn.Module,
    data: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    top_k: int = 64,
    temperature: float = 1.0,
    log_probs: str = "float16",
    vocab_size: int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int = 8,
    rows_per_shard: int | None = None,
    on_start: Callable[[Estimate], None] | None = None,
    on_progress: Progress | None = None,
    **text: Any,
) -> TeacherCache:
    """Runs a teacher over a data set once and keeps, per token, its `top_k` most probable next tokens and the mass of the rest.

        log p = log softmax(z[:vocab_size] / T),  ids and log p of the greatest k,  tail = sum of p over all others

    in a folder of safetensors shards under a manifest (docs/language-models.md). Called again with the same arguments it goes on
    where it was stopped; under `accelerate launch` the processes share the shards. A token whose successor has no label (-100: a
    prompt, the first token of a packed document) gets no list, and takes no space.

    Args:
        model: id or folder of a causal LM of transformers (safetensors weights only), or such a module, used where it is.
        data: what `kdfast.data.text.token_rows` reads, with its options as further arguments (max_length, packing, column, split,
            config, limit, num_proc); or its rows; or any sequence of {"input_ids", "labels"}, labels being tokens or -100.
        tokenizer: name, folder or object; None: the model's, when that is an id or folder. Its fingerprint goes to the manifest, its
            tokens beside it: a student's tokenizer has to mean the same by every id that the cache holds.
        top_k: entries of a list. temperature: T > 0; a loss at another one refuses the cache.
        log_probs: "float16" or "uint8"; the errors stand in `kdfast.data.teacher_cache.lists`.
        vocab_size: the first so many logits are classes; None: all. (The rest of a padded head is no token.)
        revision: of the model. dtype, device_map: as in `from_pretrained`; "auto" spreads a large teacher over all GPUs.
        batch_size: rows in a forward pass. rows_per_shard: None for about 128 MB, and 16 shards at least.
        on_start: called with an `Estimate` before the first forward pass. on_progress: (tokens done, tokens in all) of this process.
    Returns:
        the opened TeacherCache.
    Raises:
        CacheError: the folder holds a cache made with other settings (the first that differs is named), or is too small.
        ValueError: bad arguments; logits that are NaN or infinite, naming the row.
    """
    check_int("top_k", top_k, low=1)
    check_int("batch_size", batch_size, low=1)
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_choice("log_probs", log_probs, FORMS)
    out = Path(out)
    name = model if isinstance(model, (str, Path)) else None
    tokenizer = load_tokenizer(name if tokenizer is None else tokenizer)
    with processes().main_process_first():  # the others find what it tokenized
        rows = _rows(data, tokenizer, text)
    teacher = _load(name, revision, dtype, device_map) if name is not None else model
    assert isinstance(teacher, nn.Module)
    classes = _classes(teacher, vocab_size, top_k)
    lengths = (
        rows.lengths if isinstance(rows, TokenRows) else np.array([len(rows[i]["input_ids"]) for i in range(len(rows))])
    )
    per_token = list_bytes(top_k, log_probs, classes) + 5
    total = per_token * int(lengths.sum())
    if rows_per_shard is None:
        shards = max(-(-total // SHARD_BYTES), 16)
        rows_per_shard = -(-max(len(rows) // shards, 1) // batch_size) * batch_size
    check_int("rows_per_shard", rows_per_shard, low=1)
    estimate = Estimate(
        len(rows), int(lengths.sum()), per_token, total, -(-len(rows) // rows_per_shard), check_space(out, total)
    )
    if on_start is not None:
        on_start(estimate)
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    manifest = {
        "kind": KIND,
        "settings": {
            "model": {"weights": weights_fingerprint(teacher), "dtype": str(next(teacher.parameters()).dtype)},
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": _data_fingerprint(rows),
            "vocab_size": classes,
            "temperature": float(temperature),
            "top_k": top_k,
            "log_probs": log_probs,
        },
        "about": {
            "model": None if name is None else str(name),
            "revision": getattr(teacher.config, "_commit_hash", None) or revision,
            "data": str(data) if isinstance(data, (str, Path)) else type(data).__name__,
            "pad_id": pad_id,
        },
        "rows": len(rows),
        "rows_per_shard": rows_per_shard,
    }
    make = _Lists(teacher, rows, classes, top_k, temperature, log_probs, batch_size, pad_id)
    tokens = {} if tokenizer is None else {token: index for index, token in vocabulary(tokenizer)}
    beside = {VOCABULARY: json.dumps(tokens)} if tokens else {}
    explain = partial(_other_tokens, out, tokenizer)
    with evaluating(teacher), torch.inference_mode():
        fill(out, manifest, make, lengths.tolist(), on_progress, _kept_mass, beside, explain)
    return TeacherCache(out)


class _Lists:
    """The shard of some rows: forward passes over rows of like length, stored in the order of the rows."""

    def __init__(self, teacher, rows, classes, k, temperature, form, batch_size, pad_id) -> None:
        self.rows, self.k, self.temperature, self.form = rows, k, temperature, form
        self.classes, self.batch_size, self.pad_id = classes, batch_size, pad_id
        self.device = next(teacher.parameters()).device
        # weights that are loaded for a layer's own forward (offloaded to CPU or disk) cannot be read from outside
        self.teacher, self.reader = teacher, Reader("teacher", any(p.is_meta for p in teacher.parameters()))
        self.tokens = teacher.get_input_embeddings().weight.shape[0]

    def __call__(self, part: range, advance: Callable[[int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = [_row(self.rows[i], i) for i in part]
        for row in rows:
            if not 0 <= int(row["input_ids"].min()) <= int(row["input_ids"].max()) < self.tokens:
                raise ValueError(
                    f"data: expected token ids below the model's {self.tokens}, row {row['row_id']} has others"
                )
        kept = [has_list(row["labels"]) for row in rows]
        lists: list[tuple[Tensor, ...]] = [()] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            counts = [int(kept[i].sum()) for i in chosen]
            found = self._batch([rows[i] for i in chosen], sum(counts))
            for i, *parts in zip(chosen, *(tensor.split(counts) for tensor in found)):
                lists[i] = tuple(parts)
            advance(sum(len(rows[i]["input_ids"]) for i in chosen))
        ids, log_probs, tail = (torch.cat(parts) for parts in zip(*lists))
        counted = torch.tensor([0, *(int(mask.sum()) for mask in kept)])
        lengths = torch.tensor([0, *(len(row["input_ids"]) for row in rows)])
        tensors = {
            "tokens": torch.cat([row["input_ids"] for row in rows]).int(),
            "keep": torch.cat([row["labels"] != IGNORE for row in rows]).to(torch.uint8),
            "row_starts": lengths.cumsum(0),
            "list_starts": counted.cumsum(0),
            **pack_lists(ids, log_probs, tail, self.form, self.classes),
        }
        kept_mass = float((1 - tail.double()).sum())
        facts = {"tokens": int(lengths.sum()), "lists": len(tail), "kept_mass_sum": kept_mass}
        # A token that the cache holds nowhere may be another one to a student.
        return tensors, facts | {"max_id": int(torch.cat((tensors["tokens"].long(), ids.flatten())).max())}

    def _batch(self, rows: Sequence[Mapping[str, Any]], count: int) -> tuple[Tensor, ...]:
        batch = collate_rows(rows, self.pad_id)
        kept = torch.stack([has_list(labels) for labels in batch["labels"]])
        if count == 0:
            return torch.empty(0, self.k, dtype=torch.long), torch.empty(0, self.k), torch.empty(0)
        move = lambda tensor: tensor.to(self.device)  # noqa: E731
        states = self.reader(self.teacher, {name: move(batch[name]) for name in ("input_ids", "attention_mask")})
        chunks = logit_chunks(states, kept, self.classes)
        done = [tuple(t.cpu() for t in top_k_lists(chunk, self.k, self.temperature)) for chunk in chunks]
        ids, log_probs, tail = (torch.cat(parts) for parts in zip(*done))
        bad = ~(tail <= 2) | log_probs[:, 0].isnan()  # NaN compares as False
        if bad.any():
            row = rows[int(kept.nonzero()[int(bad.int().argmax()), 0])]["row_id"]
            raise ValueError(f"model: expected finite logits, got NaN or infinity in row {row}")
        return ids, log_probs, tail


def _kept_mass(totals: Mapping[str, Any]) -> dict[str, float]:
    """Of a list, on the average: the share of the teacher's mass that the k classes have."""
    return {"kept_mass": totals["kept_mass_sum"] / max(totals["lists"], 1)}


def _other_tokens(out: Path, tokenizer: Any, setting: str) -> str:
    """Which tokens differ, where the tokenizer does."""
    path = out / VOCABULARY
    if setting != "tokenizer" or tokenizer is None or not path.exists():
        return ""
    return f" (here and there {name_tokens(differing_tokens(tokenizer, json.loads(path.read_text())))})"


def logit_chunks(states: States, kept: Tensor, classes: int) -> Iterator[Tensor]:
    """Logits [n, classes] of the kept [B, L] tokens, a few rows at a time: those of a whole batch are never held."""
    rows, head = states.rows[kept.to(states.rows.device)], states.head
    for chunk in rows.split(max(CHUNK_BYTES // (4 * classes), 1)):
        if head is None:
            yield chunk[:, :classes]
        else:
            chunk = chunk.to(head.weight.device)
            yield head_logits(chunk, head.weight, head.bias, head.scale, head.softcap or 0.0, classes)


# ---------------------------------------------------------------- arguments
def _rows(data: Any, tokenizer: Any, text: Mapping[str, Any]) -> Any:
    rows: Any = data
    sequence = isinstance(data, (Dataset, Sequence)) and not isinstance(data, str)
    if sequence and len(rows) == 0:
        raise ValueError("data: expected at least one row, got none")
    ready = isinstance(data, TokenRows) or (sequence and isinstance(rows[0], Mapping))
    if not ready:
        return token_rows(data, tokenizer, **text)
    if text:
        raise ValueError(f"{next(iter(text))}: an option of text, and the data are rows of tokens already")
    return data


def _row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    tokens = torch.as_tensor(row["input_ids"]).long()
    labels = torch.as_tensor(row.get("labels", tokens)).long()
    if len(tokens) == 0 or labels.shape != tokens.shape or not ((labels == tokens) | (labels == IGNORE)).all():
        raise ValueError(
            f"data: expected at least one token, and labels that are the tokens or {IGNORE}, in row {index}"
        )
    return {"input_ids": tokens, "labels": labels, "row_id": index}


def _load(name: str | Path, revision: str | None, dtype: str, device_map: str | None) -> nn.Module:
    """use_safetensors: a .bin file is a pickle, and whoever loads one runs what it says."""
    transformers = needs("transformers", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(name), revision=revision or "main", dtype=dtype, device_map=device_map, use_safetensors=True
    )
    return model if device_map is not None else model.to(processes().device)


def _classes(model: nn.Module, vocab_size: int | None, top_k: int) -> int:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model: expected a causal LM of transformers, got {type(model).__name__}")
    width = config.get_text_config().vocab_size
    if vocab_size is not None and check_int("vocab_size", vocab_size, low=1) > width:
        raise ValueError(f"vocab_size: expected at most the model's {width}, got {vocab_size}")
    classes = width if vocab_size is None else vocab_size
    if top_k > classes or classes > 1 << 24:
        raise ValueError(f"top_k: expected at most the vocabulary's {classes} classes (2^24 at most), got {top_k}")
    return classes


def _data_fingerprint(rows: Any) -> str:
    """sha256 of the number of rows and of the tokens of up to 256 evenly spaced ones."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in range(0, len(rows), -(-len(rows) // 256)):
        row = _row(rows[index], index)
        digest.update(torch.stack((row["input_ids"], row["labels"])).numpy().tobytes())
    return digest.hexdigest()[:32]


def _human(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
