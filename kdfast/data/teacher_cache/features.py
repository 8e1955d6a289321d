"""Features and logits of a vision model (or any with inputs of one shape), kept per row: `cache_features`, `FeatureCache`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from kdfast._checks import check_choice, check_int
from kdfast._extras import processes
from kdfast.data.teacher_cache.store import (
    SHARD_BYTES,
    CacheError,
    Progress,
    Shards,
    check_space,
    fill,
    weights_fingerprint,
)
from kdfast.nn.capture import capture_outputs
from kdfast.nn.modes import evaluating

KIND = "features"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def cache_features(
    model: nn.Module,
    data: Dataset | Sequence[Any],
    out: str | Path,
    *,
    layers: Mapping[str, str],
    output: str | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    rows_per_shard: int | None = None,
    model_name: str | None = None,
    collate: Callable[[list], Any] = default_collate,
    on_start: Callable[[int], None] | None = None,
    on_progress: Progress | None = None,
) -> FeatureCache:
    """Runs a model over a data set once and keeps what some of its submodules return: feature maps, hidden states, logits.

    As `cache_teacher`: resumable, shared out among accelerate's processes, under the same checked manifest.

    Args:
        model: put on this process's device, run in eval mode.
        data: rows (inputs, ...) or inputs alone, or dicts of the model's keyword arguments (and "labels", which it does not get).
            All of one shape, and the same every time they are read: a row that is not (random augmentation) is an error.
        layers: {name: dotted path of a submodule}; of a tuple the first tensor counts. output: name for what the model returns, or None.
        dtype: "float16" (relative error 2^-11, values to 65504), "bfloat16" (2^-8) or "float32" (exact).
        model_name: kept in the manifest. collate: rows -> batch. on_start: called with the bytes it will take.
        on_progress: (rows done, rows in all) of this process.
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    check_int("batch_size", batch_size, low=1)
    if not layers and output is None:
        raise ValueError("layers: expected at least one submodule, or a name for output, got neither")
    if output in layers:
        raise ValueError(f"output: expected another name than the layers', got {output!r}")
    count = len(data)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("data: expected at least one row, got none")
    out = Path(out)
    model.to(processes().device)
    make = _Features(model, data, layers, output, DTYPES[dtype], batch_size, collate)
    with evaluating(model), torch.no_grad():
        shapes = {name: list(tensor.shape[1:]) for name, tensor in make.batch(range(1)).items()}
        per_row = sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
        if rows_per_shard is None:
            shards = max(-(-per_row * count // SHARD_BYTES), 16)
            rows_per_shard = -(-max(count // shards, 1) // batch_size) * batch_size
        check_int("rows_per_shard", rows_per_shard, low=1)
        check_space(out, per_row * count)
        if on_start is not None:
            on_start(per_row * count)
        settings = {
            "model": weights_fingerprint(model), "data": make.data_fingerprint(), "layers": dict(layers), "output": output,
            "dtype": dtype, "shapes": shapes,
        }  # fmt: skip
        manifest = {
            "kind": KIND, "settings": settings, "about": {"model": model_name or type(model).__name__},
            "rows": count, "rows_per_shard": rows_per_shard,
        }  # fmt: skip
        fill(out, manifest, make, [1] * count, on_progress)
    return FeatureCache(out)


class _Features:
    """The shard of some rows."""

    def __init__(self, model, data, layers, output, dtype, batch_size, collate) -> None:
        self.model, self.data, self.layers, self.output = model, data, layers, output
        self.dtype, self.batch_size, self.collate = dtype, batch_size, collate
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __call__(self, part: range, advance: Callable[[int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        batches = []
        for start in range(0, len(part), self.batch_size):
            chosen = part[start : start + self.batch_size]
            batches.append(self.batch(chosen))
            advance(len(chosen))
        shapes = [{name: tensor.shape[1:] for name, tensor in batch.items()} for batch in batches]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"data: expected inputs of one shape, got features of several in rows {part.start} to {part.stop - 1}"
            )
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, {}

    def batch(self, part: range) -> dict[str, Tensor]:
        inputs = self.collate([self.inputs(row) for row in part])
        with capture_outputs(self.model, self.layers) as found:
            if isinstance(inputs, Mapping):
                result = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
            else:
                result = self.model(inputs.to(self.device))
        if self.output is not None:
            found[self.output] = result
        return {name: self._stored(name, value, part) for name, value in found.items()}

    def inputs(self, row: int) -> Any:
        entry = self.data[row]
        if isinstance(entry, Mapping):
            return {name: torch.as_tensor(value) for name, value in entry.items() if name != "labels"}
        return entry[0] if isinstance(entry, (tuple, list)) else entry

    def _stored(self, name: str, value: Any, part: range) -> Tensor:
        if not isinstance(value, Tensor):
            values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
            value = next((one for one in values if isinstance(one, Tensor)), None)
        if value is None or len(value) != len(part):
            raise ValueError(
                f"layers[{name!r}]: expected a tensor with one entry per row, or a tuple that begins with one"
            )
        stored = value.detach().to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"layers[{name!r}]: NaN or infinity in rows {part.start} to {part.stop - 1}"
                + (", or more than 65504: dtype='bfloat16' or 'float32' hold it" if self.dtype == torch.float16 else "")
            )
        return stored.contiguous()

    def data_fingerprint(self) -> str:
        """sha256 of the inputs of up to 64 evenly spaced rows, each read twice."""
        digest = hashlib.sha256()
        for row in range(0, len(self.data), -(-len(self.data) // 64)):
            first, again = _bytes(self.inputs(row)), _bytes(self.inputs(row))
            if first != again:
                raise ValueError(
                    f"data: row {row} is another one when it is read again; a cache needs data without augmentation"
                )
            digest.update(first)
        return digest.hexdigest()[:32]


def _bytes(inputs: Any) -> bytes:
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return b"".join(
        torch.as_tensor(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors
    )


class FeatureCache(Dataset):
    """A cache that `cache_features` wrote, by row id, in constant time.

    cache[3]: {name: tensor}; cache.rows([3, 1]): {name: [2, ...]}. layers: names the caller needs. verify: as in `TeacherCache`.
    """

    def __init__(self, path: str | Path, *, layers: Sequence[str] = (), verify: bool = True) -> None:
        self.shards = Shards(Path(path), KIND, verify)
        self.manifest = self.shards.manifest
        self.shapes: dict[str, list[int]] = self.manifest["settings"]["shapes"]
        missing = [name for name in layers if name not in self.shapes]
        if missing:
            raise CacheError(f"layers: {path} holds {', '.join(self.shapes)}, and not {', '.join(missing)}")

    def verify(self) -> None:
        """Reads everything once and compares it with the manifest; CacheError says what is wrong with which file."""
        self.shards.verify()

    def __len__(self) -> int:
        return self.shards.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        file, place = self.shards.find(int(row))
        return {name: file.get_slice(name)[place] for name in self.shapes}

    def rows(self, ids: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """{name: [B, ...]} of some rows."""
        found = [self[int(row)] for row in ids]
        return {name: torch.stack([row[name] for row in found]) for name in self.shapes}
