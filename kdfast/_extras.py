"""Packages that an extra brings, imported when they are needed: an installation without them imports kdfast all the same."""

from __future__ import annotations

import importlib
from typing import Any

import torch


def needs(module: str, extra: str) -> Any:
    """The module; without it an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} comes with the {extra!r} extra ({error}): pip install 'kdfast[{extra}]'"
        ) from error


def processes() -> Any:
    """accelerate's state of this process. By itself it takes several processes without a GPU for one each."""
    accelerate = needs("accelerate", "train")
    on_cpu = accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return accelerate.PartialState(cpu=on_cpu)
