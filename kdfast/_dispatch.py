"""Which backend runs an op, and why the others do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kdfast import _core
from kdfast._version import __version__

# A backend's rule: None when it can run these inputs, else the reason in words. Called with the op's own arguments.
Reason = str | None
BACKENDS = ("cuda", "triton", "cpu", "reference")


def forced_backend() -> str | None:
    """KDFAST_BACKEND, checked; it only replaces `backend=None`."""
    name = os.environ.get("KDFAST_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"KDFAST_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def core_reason() -> Reason:
    """Why the compiled core cannot be used at all, or None."""
    return None if _core.core is not None else _core.reason


def choose(op: str, backend: str | None, rules: Mapping[str, Callable[[], Reason]], tensors: tuple[Any, ...]) -> str:
    """The name of the backend to run. `rules` lists the fused backends, best first; "reference" always can.

    backend=None takes the first rule without a reason; a named backend that cannot run raises with every reason.
    """
    backend = backend or forced_backend()
    if backend == "reference":
        return backend
    if backend is None:
        for name, rule in rules.items():
            if rule() is None:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    reasons = {name: rule() for name, rule in rules.items()}
    why = reasons.get(backend, f"{op} has no {backend} backend")
    if why is None:
        return backend
    seen = "; ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors if isinstance(t, torch.Tensor))
    others = "; ".join(f"{name}: {text or 'can run'}" for name, text in reasons.items() if name != backend)
    raise ValueError(
        f"{op}: backend={backend!r} cannot run these inputs: {why}. Inputs: {seen}."
        + (f" Other backends: {others}; reference: can run." if others else " backend='reference' can run.")
    )


_debug = False


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Turns value checks (labels in range, finite logits) on everywhere inside the block, at the cost of a device sync.

    On the CPU the kernels check values anyway; on a GPU they are read only here.

    >>> with kdfast.debug():
    ...     loss = kdfast.losses.kd_loss(student, teacher)
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def debugging() -> bool:
    return _debug


def backend_info() -> dict[str, Any]:
    """What this installation can use, as plain values: versions, instruction set, threads, and each backend or the reason it is absent."""
    core = _core.core
    info: dict[str, Any] = {
        "kdfast": __version__,
        "torch": torch.__version__,
        "compiled": core is not None,
        "cpu": {"available": core is not None, "reason": core_reason()},
    }
    if core is not None:
        info["cpu"] |= {
            "isa": core.isa(),
            "isas": core.isas(),
            "threads": torch.get_num_threads(),
            "pool": core.pool(),
        }
    from kdfast import cuda, triton  # not at the top: they are above this module

    info["triton"], info["cuda"] = triton.info(), cuda.info()
    info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info["forced_backend"] = forced_backend()
    return info
