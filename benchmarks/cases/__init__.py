"""Every module here has a tuple CASES; a file <module>.toml beside it gives, by case name, the reason for a missed target."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path

from benchmarks.case import Case

MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__))


# Targets of peak memory: that of the plain form over ours, at least.
MEMORY = {
    "sinkhorn_cost_512x512_fp32": 10,
    "sinkhorn_cost_2048x2048_fp32": 10,
    "token_graph_loss_4096x512_512_fp32": 20,
    "linear_forward_kl_2048x151936_h512_fp32": 10,
    "linear_forward_kl_2048x151936_h512_bf16": 10,
}


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
