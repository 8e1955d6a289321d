"""Methods by name: one paper, one file. `load("kd")` gives the class that `kdfast.train.Distiller(..., "kd")` builds."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from torch import nn

from kdfast.methods._protocol import Context, LogitMethod, Method, Setup

__all__ = ["Context", "LogitMethod", "Method", "Setup", "available", "load"]


def available() -> list[str]:
    """The slugs that run by name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(slug: str) -> type[nn.Module]:
    """The class `Method` of `kdfast/methods/<slug>.py`; ValueError, with near names, for a name without a file."""
    if slug not in available():
        near = difflib.get_close_matches(slug, available(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(available())}"
        raise ValueError(f"method: there is no {slug!r}; {hint}")
    return importlib.import_module(f"kdfast.methods.{slug}").Method
