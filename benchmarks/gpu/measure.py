"""Times, memory and bandwidth of one case on a device.

Every round calls each candidate once, in turn, each after 256 MB were overwritten (no input is left in L2), between two events:
the time of the device, launch gaps of eager code included. A graph's replay has no such gaps. Without a GPU (`--device cpu`, to
try the program) the clock is the wall's and there are no graphs.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import kdfast
from benchmarks.case import COMPILED, PLAIN, Function
from benchmarks.gpu.cases import CUDA, TRITON, GpuCase, Target
from benchmarks.machine import git

FLUSH = 256 << 20
MODES = {"fwd": None, "fwd+bwd": 1.0, "fwd+bwd, upstream 3": 3.0}


class Clock:
    """Milliseconds of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.flushed = torch.empty(FLUSH if self.gpu else 1 << 20, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def round(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """One time of each call; nothing waits between them but the device."""
        events = {}
        for name, call in calls.items():
            self.flushed.zero_()
            if self.gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events[name] = (start, end)
            else:
                begin = time.perf_counter()
                call()
                events[name] = 1e3 * (time.perf_counter() - begin)
        self.synchronize()
        return {name: e if isinstance(e, float) else e[0].elapsed_time(e[1]) for name, e in events.items()}

    def rounds(self, calls: dict[str, Callable[[], object]], seconds: float, most: int = 100) -> dict[str, list[float]]:
        self.round(calls)
        begin = time.perf_counter()
        self.round(calls)
        count = int(min(max(seconds / (time.perf_counter() - begin), 5), most))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(count):
            for name, value in self.round(calls).items():
                times[name].append(value)
        return times


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second of a copy, read and write counted."""
    size = (4 << 30) if clock.gpu else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    times = clock.rounds({"copy": lambda: target.copy_(source)}, 1.0, 30)["copy"]
    return 2 * size / (1e-3 * statistics.median(times))


class Bench:
    """A case's inputs on the device, and every candidate that can run here."""

    def __init__(self, case: GpuCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.inputs = case.inputs(torch.Generator(device).manual_seed(0))
        self.leaves = [self.inputs[name] for name in case.leaves]
        self.cotangent = self.inputs.pop(case.upstream) if case.upstream else None
        self.left_out: dict[str, str] = {}
        self.candidates: dict[str, Function] = {}
        for name, backend in ((TRITON, "triton"), (CUDA, "cuda")) if device.type == "cuda" else (("kdfast", None),):
            self.add(name, lambda backend=backend: lambda **inputs: case.ours(**inputs, backend=backend))
        if case.plain is not None:
            self.add(PLAIN, lambda: case.plain)
            if case.compiled and device.type == "cuda":
                self.add(COMPILED, lambda: torch.compile(case.plain, dynamic=False))
        for name, load in case.peers.items():
            if device.type == "cuda":
                self.add(name, load)
        self.values = self.agree()

    def add(self, name: str, load: Callable[[], Function]) -> None:
        """Loads and calls it once; what cannot run is left out with its reason."""
        try:
            function = load()
            self.step(function, 1.0)()
            self.candidates[name] = function
        except Exception as error:  # Triton's errors are no RuntimeErrors
            self.left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        self.clear()

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def step(self, function: Function, upstream: float | None) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                function(**self.inputs)

        def both() -> None:
            self.clear()
            out = function(**self.inputs)
            given = out.new_ones(()) if self.cotangent is None else self.cotangent
            out.backward((given if upstream == 1.0 else given * upstream).to(out.dtype))

        return forward if upstream is None else both

    def agree(self) -> dict[str, float]:
        """A number of each candidate's output; one that computes something else is an error, not a slow peer."""
        with torch.no_grad():
            found = {
                name: float(f(**self.inputs).double().square().mean().sqrt()) for name, f in self.candidates.items()
            }
        ours = next(iter(found.values()), 0.0)
        for name, value in found.items():
            if abs(value - ours) > self.case.tolerance * abs(ours):
                raise AssertionError(f"{name} is no peer of {self.case.name}: {value} against {ours}")
        return found

    def peak(self, name: str) -> int | None:
        """Bytes above the live inputs, of a forward and backward; the gradients are part of it."""
        if self.device.type != "cuda":
            return None
        self.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(self.candidates[name], 1.0)()
        torch.cuda.synchronize()
        self.clear()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, function: Function, upstream: float | None) -> Callable[[], None]:
        """A captured step; capture fails where a candidate waits for the device."""
        step, stream = self.step(function, upstream), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.clear()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        return captured.replay


def measure(case: GpuCase, device: torch.device, seconds: float) -> dict[str, Any]:
    """The result of one case, as it is written."""
    clock, bench = Clock(device), Bench(case, device)
    copy = copy_bandwidth(clock)
    rows: list[dict[str, Any]] = []
    modes = {
        mode: {n: bench.step(f, upstream) for n, f in bench.candidates.items()} for mode, upstream in MODES.items()
    }
    if case.graph and device.type == "cuda":
        graphs: dict[str, float | None] = {"graph forward": None, "graph": 1.0}
        modes |= {mode: {} for mode in graphs}
        for name, function in bench.candidates.items():  # ours first: a capture that fails may spoil later ones
            for mode, upstream in graphs.items():
                before = torch.cuda.current_stream()
                try:
                    modes[mode][name] = bench.graph(function, upstream)
                except RuntimeError as error:
                    torch.cuda.set_stream(before)
                    bench.left_out[f"{name}, {mode}"] = str(error).splitlines()[0][:200]
    for mode, calls in modes.items():
        times = clock.rounds(calls, seconds) if calls else {}
        for name, values in times.items():
            low, median, high = _quantiles(values)
            row: dict[str, Any] = {
                "candidate": name, "mode": mode, "median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": len(values),
            }  # fmt: skip
            if mode in ("fwd+bwd", "graph"):
                row["gb_s"] = case.traffic / median * 1e-6
                row["of_copy"] = row["gb_s"] * 1e9 / copy
                if case.flop:
                    row["tflop_s"] = case.flop / median * 1e-9
            if mode == "fwd+bwd" and (peak := bench.peak(name)) is not None:
                row["peak_mb"] = peak / 2**20
            rows.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()})
        bench.clear()
    result = {
        "case": case.name, "op": case.op, "title": case.title, "shape": case.shape, "dtype": case.dtype,
        "traffic_bytes": case.traffic, "flop": case.flop, "copy_gb_s": float(f"{copy / 1e9:.4g}"), "rows": rows,
        "output_rms": bench.values, "left_out": bench.left_out, **identity(device),
    }  # fmt: skip
    return result | {"targets": [vars(t) | judge(t, rows) for t in case.targets]}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def judge(target: Target, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"measured": number or None, "met": bool}"""

    def pick(name: str) -> dict[str, Any] | None:
        return next((r for r in rows if r["candidate"] == name and r["mode"] == target.mode), None)

    own = [row for row in map(pick, (target.of,) if target.of else (TRITON, CUDA, "kdfast")) if row is not None]
    other = pick(target.versus)
    if not own:
        return {"measured": None, "met": False}
    best = min(own, key=lambda row: row["median_ms"])
    at_most = target.what in ("ms", "mb")
    value: float | None
    if target.what == "ms":
        value = best["median_ms"]
    elif target.what == "mb":
        value = best.get("peak_mb")
    elif target.what == "copy":
        value = best.get("of_copy")
    elif target.what == "x":
        value = other["median_ms"] / best["median_ms"] if other else None
    elif target.what == "memory":
        value = other["peak_mb"] / best["peak_mb"] if other and "peak_mb" in best else None
    else:
        raise ValueError(f"what: expected ms, mb, copy, x or memory, got {target.what!r}")
    if value is None:
        return {"measured": None, "met": False}
    return {
        "measured": float(f"{value:.4g}"),
        "met": bool(value <= target.value if at_most else value >= target.value),
    }


def identity(device: torch.device) -> dict[str, Any]:
    """Device and versions, in every file."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "kdfast": kdfast.__version__,
        "kdfast_cuda": kdfast.backend_info()["cuda"],
        "commit": git("rev-parse", "--short=12", "HEAD") or os.environ.get("KDFAST_COMMIT") or None,
    }
