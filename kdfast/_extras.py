"""Packages that an extra brings, imported when they are needed: an installation without them imports kdfast all the same."""

from __future__ import annotations

import importlib
from typing import Any


def needs(module: str, extra: str) -> Any:
    """The module; without it an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} comes with the {extra!r} extra ({error}): pip install 'kdfast[{extra}]'"
        ) from error
