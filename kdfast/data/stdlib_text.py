"""The sources of Python's own standard library as a corpus: on every machine, read where they lie, nothing to download or to ship.

Code, comments and docstrings, one document a file. A file belongs to "val" or "train" by the hash of its path, so a split stays
what it is when a Python version adds files; the text itself is that of the interpreter, which `corpus_identity` names.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "val")
VALIDATION_SHARE = 20  # one file in so many
END = "<|end|>"  # before and after each document
# Not the library: what is installed beside it, its tests; tables of numbers, of which one file would give away another.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "encodings"}


@cache
def stdlib_files() -> tuple[tuple[str, Path], ...]:
    """(path within the library, file) of every document, in one order on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        built = name.parts[0].startswith(("config-", "_sysconfigdata"))  # of this build, not of the version
        if not built and _LEFT_OUT.isdisjoint(name.parts) and file.stat().st_size > 0:
            found.append((name.as_posix(), file))
    return tuple(sorted(found))


def split_of(name: str) -> str:
    return "val" if hashlib.sha256(b"split " + name.encode()).digest()[0] * VALIDATION_SHARE < 256 else "train"


def stdlib_text(split: str, *, max_bytes: int | None = None) -> list[str]:
    """The documents of a split; with `max_bytes` the first ones of a fixed shuffled order that fit into so many bytes.

    >>> documents = stdlib_text("val", max_bytes=100_000)
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    names = [(name, file) for name, file in stdlib_files() if split_of(name) == split]
    if max_bytes is not None:  # by hash: neighbours in the alphabet are parts of one package
        names.sort(key=lambda pair: hashlib.sha256(b"order " + pair[0].encode()).digest())
    documents, left = [], max_bytes
    for _, file in names:
        text = file.read_text(encoding="utf-8", errors="replace")
        size = len(text.encode())
        if left is not None:
            if size > left:
                continue
            left -= size
        documents.append(text)
    if not documents:
        raise ValueError(f"max_bytes: no document of split {split!r} fits into {max_bytes} bytes")
    return documents


def corpus_identity(documents: Iterable[str]) -> dict[str, str | int]:
    """What a result depends on: how many documents and bytes, their hash, whose library."""
    digest, count, size = hashlib.sha256(), 0, 0
    for text in documents:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        count, size = count + 1, size + len(data)
    return {"documents": count, "bytes": size, "sha256": digest.hexdigest(), "python": platform.python_version()}


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens: any text is tokens and comes back byte for byte. `END` is its one special token."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError(f"a tokenizer needs the 'hf' extra ({error}): pip install 'kdfast[hf]'") from error
    if vocab_size < 257:
        raise ValueError(f"vocab_size: expected at least the 256 bytes and {END}, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )  # fmt: skip
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
