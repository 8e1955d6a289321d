"""Checkpoints that hold JSON and safetensors only, written so that a kill at any moment leaves a whole one.

accelerate's own save_state pickles optimizer, scheduler, scaler and RNG states, and whoever loads a pickle runs its code.
A state dict is numbers, strings, lists, dicts and tensors: here the tensors go to safetensors and the rest to JSON, and
Python floats survive JSON bit by bit. Each rank writes its file into `<name>.tmp`; the rename makes the folder exist.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MARKS = ("__tensor__", "__tuple__", "__pairs__")


def pack(value: Any, tensors: dict[str, Tensor], path: str = "state", seen: dict | None = None) -> Any:
    """`value` as JSON, its tensors moved to `tensors`. TypeError naming the place for anything else than plain data."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        # Tied weights are one tensor under several names: stored once.
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or same not in seen:
            seen[same] = str(len(tensors))
            tensors[seen[same]] = value.detach().to("cpu", copy=True).contiguous()
        return {"__tensor__": seen[same]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        return value.item()
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{path}[{i}]", seen) for i, item in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        items = [(key, pack(item, tensors, f"{path}[{key!r}]", seen)) for key, item in value.items()]
        if all(isinstance(key, str) and key not in _MARKS for key, _ in items):
            return dict(items)
        return {"__pairs__": [[pack(key, tensors, path, seen), item] for key, item in items]}
    raise TypeError(f"checkpoint: {path} is a {type(value).__name__}; expected tensors, numbers, strings, lists, dicts")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(unpack(value["__tuple__"], tensors))
    if "__pairs__" in value:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value["__pairs__"]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def write(folder: Path, name: str, value: Any) -> None:
    """`value` as folder/name.json and folder/name.safetensors, on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(value, tensors))
    (folder / f"{name}.json").write_text(text)
    save_file(tensors, folder / f"{name}.safetensors")
    for suffix in ("json", "safetensors"):
        with open(folder / f"{name}.{suffix}", "rb") as file:
            os.fsync(file.fileno())


def read(folder: Path, name: str) -> Any:
    return unpack(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def publish(temporary: Path, final: Path) -> None:
    """Makes the checkpoint exist in one step, then drops older ones and what a kill left unfinished."""
    os.rename(temporary, final)
    for other in final.parent.glob("step-*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    return max((path for path in folder.glob("step-*") if not path.name.endswith(".tmp")), default=None)


def rng_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators (every CUDA device), as plain data and tensors."""
    numpy = np.random.get_state(legacy=False)  # a dict; its one array is the generator's words
    keys = numpy["state"]["key"].tolist()
    numpy = {**numpy, "state": {**numpy["state"], "key": keys}}
    state: dict[str, Any] = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy = state["numpy"]
    words = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": words}})
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
