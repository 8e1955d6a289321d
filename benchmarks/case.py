"""What one benchmark case is. A case holds no measurement code: `bench_cases.py` measures every case the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]  # called with the inputs by name, returns the scalar loss

# malloc reads its environment at start, so each mode is a process of its own.
# default: glibc unmaps every block above 32 MB when it is freed, so each temporary of that size is paged in again.
# tuned: nothing is given back to the system, the usual advice for training on a CPU.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"},
}
# mode -> factor handed to backward; None: forward alone, under no_grad. The factor 3 shows what a loss that stores its
# gradient in the forward pays for a second pass over it.
MODES: dict[str, float | None] = {"fwd": None, "fwd+bwd": 1.0, "fwd+bwd, upstream 3": 3.0}

PLAIN, COMPILED, OURS = "eager", "torch.compile", "kdfast"


@dataclass(frozen=True)
class Target:
    """Wanted: time(versus) / time(kdfast) >= at_least, the median over interleaved rounds."""

    versus: str
    at_least: float
    allocator: str = "default"
    mode: str = "fwd+bwd"


@dataclass(frozen=True)
class Case:
    name: str  # also the result's file name
    op: str  # python_tests/ops/test_<op>.py must be green before a number is reported
    title: str
    shape: str
    dtype: str
    inputs: Callable[[], Inputs]  # a fresh, seeded set; the leaves require grad
    ours: Function  # must also take backend="reference": the float64 truth of the error column
    plain: Function  # what one would write in torch; measured as it is and under torch.compile
    traffic: (
        int  # bytes that any implementation must move, forward + backward: inputs read once, gradients written once
    )
    leaves: tuple[str, ...] = ("student",)
    peers: dict[str, Callable[[], Function]] = field(
        default_factory=dict
    )  # loaders; ImportError = not installed, row left out
    targets: tuple[Target, ...] = ()
    repeat: int = 1  # calls per timing, for calls that take microseconds
    tests: tuple[str, ...] = ()  # more test files that must be green
    compiled: bool = True  # False: torch.compile is not measured (say why beside the case)


def table_targets(default: tuple[float, float], tuned: tuple[float, float]) -> tuple[Target, ...]:
    """(versus eager, versus torch.compile) for each allocator, the form the goals are written in."""
    return tuple(
        Target(versus, value, allocator)
        for allocator, pair in (("default", default), ("tuned", tuned))
        for versus, value in zip((PLAIN, COMPILED), pair)
    )
