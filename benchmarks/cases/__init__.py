"""Every module here has a tuple CASES; a file <module>.toml beside it gives, by case name, the reason for a missed target."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path

from benchmarks.case import Case

MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def load() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name in MODULES:
        for case in importlib.import_module(f"{__name__}.{name}").CASES:
            if case.name in cases:
                raise ValueError(f"two benchmark cases are called {case.name!r}")
            cases[case.name] = case
    return cases


def reasons() -> dict[str, str]:
    """Case name -> why a target is missed, in words and arithmetic."""
    found: dict[str, str] = {}
    for name in MODULES:
        path = Path(__file__).with_name(f"{name}.toml")
        if path.exists():
            found |= tomllib.loads(path.read_text())
    return found
