"""The compiled core, if there is one. It includes no torch header: Python hands it addresses, sizes, strides and torch's thread pool.

Nothing here fails when the core is missing: `core` is None, `reason` says why, and one warning is given.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path
from typing import Any

import torch

core: Any = None  # the module kdfast._C; Any, since only the compiled module knows its functions
reason: str = ""


def _torch_parallel_for() -> int:
    """Address of torch's own parallel loop (exported by libtorch_cpu since 2.10), 0 if this torch has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _load() -> None:
    global core, reason
    try:
        import kdfast._C as _C
    except ImportError as error:
        reason = f"the compiled core kdfast._C could not be imported ({error})"
        warnings.warn(
            f"kdfast: {reason}; the slower reference path is used. `kdfast doctor` says more.",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    wanted = os.environ.get("KDFAST_CPU_ISA")
    if wanted:
        _C.set_isa(wanted)  # ValueError naming the choices when the machine or the build has no such one
    _C.set_parallel(_torch_parallel_for())
    # torch's pool does not survive a fork: a child that used it would hang, so it runs serially.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_C.set_serial)
    core = _C


_load()
