"""A folder of safetensors shards under a manifest: written by any number of processes, resumed after a kill, checked when read.

    manifest.json               what is inside, and size and sha256 of every shard; sealed with a sha256 of itself
    vocabulary.json             of a language model's cache: {token: id}, whose fingerprint the manifest has
    shard-00000.safetensors     rows 0 to R - 1; shard s holds rows s R to (s + 1) R - 1
    shard-00000.json            while the cache is being written: the shard's line of the manifest

A shard appears by a rename when all of it is on the disk, its line after it; the manifest lists the shards when all are there. A
kill at any moment so costs the shards in work and nothing else: they have no line, and are computed again. Which rows a shard
holds depends on neither the number of processes nor on where a run was stopped, so the bytes are the same.

Why safetensors and not parquet: a row is a slice of a memory-mapped tensor, found by two divisions, without decoding a page of
other rows; and nothing in such a file can be executed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast import __version__
from kdfast._extras import needs, processes
from kdfast._files import write_bytes, write_text

FORMAT, VERSION, MANIFEST = "kdfast teacher cache", 1, "manifest.json"
SHARD_BYTES = 128 << 20
Progress = Callable[[int, int], None]
# (rows of a shard, to be called with the work done) -> (its tensors, more entries of its line)
MakeShard = Callable[[range, Callable[[int], None]], tuple[dict[str, Tensor], dict[str, Any]]]


class CacheError(ValueError):
    """A cache that cannot be used, with the file and what is wrong with it."""


# ---------------------------------------------------------------- writing
def fill(
    folder: Path,
    manifest: dict[str, Any],
    make: MakeShard,
    work: Sequence[int],
    on_progress: Progress | None,
    summary: Callable[[dict[str, Any]], dict[str, Any]] = lambda totals: {},
    beside: Mapping[str, str] | None = None,
    explain: Callable[[str], str] = lambda setting: "",
) -> None:
    """Writes the shards that are not there, shared out among accelerate's processes, then the list of all.

    manifest: kind, settings (what decides the content: equal or an error when a run goes on), about, rows, rows_per_shard.
    work: of each row, in the unit of on_progress(done, total), which is told the share of this process.
    summary: what the finished manifest says besides, of the sums of the shards' numbers (the greatest of those named max_).
    beside: {name: content} of further files, which the settings decide. explain: of a setting that differs, more words for the error.
    """
    state = processes()
    stored = begin(folder, manifest, state.is_main_process, beside or {}, explain)
    state.wait_for_everyone()
    if stored["shards"] is not None:
        if state.is_main_process:
            _sweep(folder)
        return
    size, rows = stored["rows_per_shard"], stored["rows"]
    todo = [number for number in range(-(-rows // size)) if not _written(folder, number)]
    state.wait_for_everyone()  # every process has seen the same shards
    mine = [
        range(number * size, min((number + 1) * size, rows))
        for number in todo[state.process_index :: state.num_processes]
    ]
    done, total = 0, int(sum(work[row] for part in mine for row in part))

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(done, total)

    advance(0)
    for part in mine:
        tensors, facts = make(part, advance)
        _write_shard(folder, stored["id"], part, part.start // size, tensors, facts)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, stored, summary)
    state.wait_for_everyone()


def begin(
    folder: Path, manifest: dict[str, Any], write: bool, beside: Mapping[str, str], explain: Callable[[str], str]
) -> dict[str, Any]:
    """The manifest of this run, or that of the run it goes on with; CacheError where they differ."""
    manifest = {"format": FORMAT, "version": VERSION, "kdfast": __version__, **manifest, "shards": None}
    manifest["id"] = _digest({key: manifest[key] for key in ("kind", "settings", "rows")})[:16]
    if (folder / MANIFEST).exists():
        stored = read_manifest(folder, manifest["kind"])
        if stored["id"] != manifest["id"]:
            had, have = ({**_flat(one["settings"]), "rows": one["rows"]} for one in (stored, manifest))
            key = next(key for key in {**had, **have} if had.get(key) != have.get(key))
            raise CacheError(
                f"out: {folder} holds a cache with {key} {had.get(key)!r}, this run has {have.get(key)!r}{explain(key)}; "
                "a run goes on with the same settings, others need another folder"
            )
        return stored
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"out: expected a folder, {folder} is a file")
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in beside.items():  # before the manifest, which says that all is there
            write_text(folder / name, content)
        _seal(folder, manifest)
    return manifest


def finish(folder: Path, manifest: dict[str, Any], summary: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The manifest with its shards; then their lines, and what a kill left behind, are needed no more."""
    count = -(-manifest["rows"] // manifest["rows_per_shard"])
    lines = [json.loads(_line(folder, number).read_text()) for number in range(count)]
    totals = {
        key: (max if key.startswith("max_") else sum)(line[key] for line in lines)
        for key in lines[0]
        if key not in ("file", "sha256", "first_row")
    }
    _seal(folder, manifest | {"shards": lines, "totals": totals, **summary(totals)})
    _sweep(folder)


def _sweep(folder: Path) -> None:
    for path in (*folder.glob("shard-*.json"), *folder.glob("*.tmp")):
        path.unlink(missing_ok=True)


def _write_shard(folder, cache: str, rows: range, number: int, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
    # one entry: safetensors keeps several in no particular order, and the bytes are to be the same every time
    name = {"kdfast": json.dumps({"cache": cache, "shard": number})}
    data = needs("safetensors.torch", "train").save({key: tensors[key].contiguous() for key in sorted(tensors)}, name)
    path = _shard(folder, number)
    write_bytes(path, data)
    line = {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_text(_line(folder, number), json.dumps({**line, "first_row": rows.start, "rows": len(rows), **facts}))


def _written(folder: Path, number: int) -> bool:
    line, shard = _line(folder, number), _shard(folder, number)
    return line.exists() and shard.exists() and shard.stat().st_size == json.loads(line.read_text())["bytes"]


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1) + "\n")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _line(folder: Path, number: int) -> Path:
    return _shard(folder, number).with_suffix(".json")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    pairs = (
        {f"{name}{key}": entry} if not isinstance(entry, Mapping) else _flat(entry, f"{name}{key}.")
        for key, entry in value.items()
    )
    return {key: entry for pair in pairs for key, entry in pair.items()}


def check_space(folder: Path, needed: int) -> int:
    """Free bytes where the folder is or will be; CacheError when they are fewer than needed, less what is there already."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    free = shutil.disk_usage(place).free
    if needed - there > free:
        raise CacheError(f"out: {folder} needs up to {needed - there:,} bytes more, and {free:,} are free there")
    return free


# ---------------------------------------------------------------- reading
def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder, whole and of this version and kind; finished or not."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"{path}: no such file, so {folder} is no teacher cache") from None
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise CacheError(f"{path}: truncated or edited, it is no JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheError(f"{path}: a foreign file, it is not the manifest of a kdfast teacher cache")
    if manifest.get("version") != VERSION:
        raise CacheError(
            f"{path}: format version {manifest.get('version')}, and kdfast {__version__} reads version {VERSION}"
        )
    seal = manifest.pop("sha256", None)
    if _digest(manifest) != seal:
        raise CacheError(f"{path}: edited, its content is not what its sha256 was made of")
    if manifest["kind"] != kind:
        raise CacheError(f"{path}: a cache of {manifest['kind']}, expected one of {kind}")
    return manifest


class Shards:
    """The finished cache of a folder: sizes are checked at once, contents when a shard is first read, or by `verify()`.

    Each process opens the shards itself: in a worker nothing is inherited.
    """

    def __init__(self, folder: Path, kind: str, check_contents: bool = True) -> None:
        self.folder, self.manifest, self.check_contents = folder, read_manifest(folder, kind), check_contents
        self.size, self.rows = self.manifest["rows_per_shard"], self.manifest["rows"]
        count = -(-self.rows // self.size)
        if self.manifest["shards"] is None:
            done = sum(_written(folder, number) for number in range(count))
            raise CacheError(
                f"{folder}: unfinished, {done} of {count} shards are written; the same command goes on with it"
            )
        for line in self.manifest["shards"]:
            path = folder / line["file"]
            if not path.exists():
                raise CacheError(f"{path}: missing, the manifest lists it with rows {_rows(line)}")
            size = path.stat().st_size
            if size != line["bytes"]:
                what = "truncated" if size < line["bytes"] else "edited"
                raise CacheError(f"{path}: {what}, it has {size:,} bytes and the manifest says {line['bytes']:,}")
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def find(self, row: int) -> tuple[Any, int]:
        """(the shard of a row, its place there): two divisions, whatever the size of the cache."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row: expected an id from 0 to {self.rows - 1}, got {row}")
        number, place = divmod(int(row), self.size)
        if number not in self._open:
            if self.check_contents:
                self.check(number)
            path = self.folder / self.manifest["shards"][number]["file"]
            self._open[number] = needs("safetensors", "train").safe_open(path, framework="pt")
        return self._open[number], place

    def verify(self) -> None:
        """Reads every shard and compares its sha256 with the manifest's."""
        for number in range(len(self.manifest["shards"])):
            self.check(number)

    def check(self, number: int) -> None:
        line = self.manifest["shards"][number]
        path = self.folder / line["file"]
        with open(path, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got == line["sha256"]:
            return
        raise CacheError(
            f"{path}: {self._foreign(path, number)}; sha256 {got[:12]}, the manifest says {line['sha256'][:12]}"
        )

    def _foreign(self, path: Path, number: int) -> str:
        try:
            with needs("safetensors", "train").safe_open(path, framework="pt") as file:
                name = json.loads((file.metadata() or {}).get("kdfast", "null"))
        except Exception as error:  # whatever it calls a broken header; the error is passed on in words
            return f"edited or damaged, it is no safetensors file ({error})"
        if name is None:
            return "a foreign file, not written by kdfast"
        if name["cache"] != self.manifest["id"]:
            return f"a foreign file, a shard of the cache {name['cache']} and not of {self.manifest['id']}"
        if name["shard"] != number:
            return f"shard {name['shard']} in the place of shard {number}"
        return f"edited or damaged, in rows {_rows(self.manifest['shards'][number])}"


def _rows(line: Mapping[str, Any]) -> str:
    return f"{line['first_row']} to {line['first_row'] + line['rows'] - 1}"


# ---------------------------------------------------------------- what a model is
@torch.no_grad()
def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 of name, type, shape and up to 64 evenly spaced values of every parameter and buffer: another model, another one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            digest.update(flat[:: -(-flat.numel() // 64)].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:32]
