"""Measures one case after another with pytest-benchmark. Usually started by `benchmarks/run.py`, once per allocator mode.

Peers are interleaved: pytest-benchmark calls `setup` before each of its rounds, and there every other candidate is timed
once. So round i holds one time of each, a slow moment of the machine hits all of them, and the ratio reported is the
median over rounds of time(candidate) / time(kdfast).
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import cases, machine
from benchmarks.case import COMPILED, MODES, OURS, PLAIN, Case, Inputs

CASES = cases.load()
BUDGET = float(os.environ.get("KDFAST_BENCH_BUDGET", "3"))  # seconds per case and mode, all candidates together
ROUNDS = (7, 61)  # at least, at most


class Bench:
    """One case with its inputs and candidates, shared by its modes so that nothing compiles twice."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs: Inputs = case.inputs()
        self.leaves = [self.inputs[name] for name in case.leaves]
        self.candidates: dict[str, Callable[..., Tensor]] = {OURS: case.ours, PLAIN: case.plain}
        if case.compiled:
            self.candidates[COMPILED] = torch.compile(case.plain, dynamic=False)
        self.missing: list[str] = []
        for name, load in case.peers.items():
            try:
                self.candidates[name] = load()
            except ImportError:
                self.missing.append(name)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def call(self, name: str, upstream: float | None) -> Callable[[], None]:
        function, inputs, leaves = self.candidates[name], self.inputs, self.leaves
        if upstream is None:

            def once() -> None:
                with torch.no_grad():
                    function(**inputs)

        else:
            factor = torch.tensor(upstream)

            def once() -> None:
                loss = function(**inputs)
                loss.backward(factor.to(loss.dtype))

        def repeated() -> None:
            for _ in range(self.case.repeat):
                for leaf in leaves:
                    leaf.grad = None
                once()

        return once if self.case.repeat == 1 else repeated

    @functools.cached_property
    def truth(self) -> float:
        """The reference on the same inputs in float64."""
        wide = {
            name: value.detach().double() if value.is_floating_point() else value for name, value in self.inputs.items()
        }
        with torch.no_grad():
            return float(self.case.ours(**wide, backend="reference"))

    def errors(self) -> dict[str, float]:
        """Relative error of each candidate's loss against float64. More than a tenth means it computes something else."""
        found = {}
        with torch.no_grad():
            for name, function in self.candidates.items():
                found[name] = abs(float(function(**self.inputs)) - self.truth) / abs(self.truth)
                assert found[name] < 0.1, f"{name} is no peer of {self.case.name}: its loss is off by {found[name]:.1%}"
        return found

    def peak(self, name: str) -> int | None:
        """Highest resident memory of one forward and backward above what was resident before: temporaries and gradient.

        torch's own counters do not see what a library allocates besides tensors, and a sampling thread misses short peaks;
        the kernel's high-water mark sees both. It starts at the live inputs, since free blocks are given back first. In
        the tuned allocator mode the answer would be the same plus what the allocator keeps: not measured there.
        """
        call = self.call(name, 1.0)
        self.clear()
        call()
        self.clear()
        gc.collect()
        if not machine.reset_peak():
            return None
        before, _ = machine.resident()
        call()
        _, peak = machine.resident()
        self.clear()
        return max(peak - before, 0)


@functools.lru_cache(maxsize=1)
def bench(name: str) -> Bench:
    return Bench(CASES[name])


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, mode: str, benchmark) -> None:
    b = bench(name)
    calls = {candidate: b.call(candidate, MODES[mode]) for candidate in b.candidates}
    round_time = 0.0
    for call in calls.values():
        b.clear()
        call()  # compiles, spins up threads
        b.clear()
        round_time += timed(call)
    rounds = int(min(max(BUDGET / round_time, ROUNDS[0]), ROUNDS[1]))

    others: dict[str, list[float]] = {candidate: [] for candidate in calls if candidate != OURS}

    def one_round_of_the_others() -> None:
        for candidate, times in others.items():
            b.clear()
            times.append(timed(calls[candidate]))
        b.clear()

    gc.collect()
    gc.disable()  # as timeit does
    try:
        benchmark.pedantic(calls[OURS], setup=one_round_of_the_others, rounds=rounds, warmup_rounds=1)
    finally:
        gc.enable()
    b.clear()
    times = {OURS: list(benchmark.stats.stats.data), **{candidate: data[1:] for candidate, data in others.items()}}
    benchmark.extra_info |= {
        "case": name,
        "mode": mode,
        "seconds": {candidate: [t / b.case.repeat for t in data] for candidate, data in times.items()},
        "missing": b.missing,
        "identity": machine.identity(),
    }
    if mode == "fwd+bwd":
        benchmark.extra_info["errors"] = b.errors()
        if "MALLOC_MMAP_MAX_" not in os.environ and b.case.repeat == 1:
            benchmark.extra_info["peak"] = {candidate: b.peak(candidate) for candidate in calls}
            benchmark.extra_info["copy_bandwidth"] = machine.copy_bandwidth()
