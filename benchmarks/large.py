"""Cases whose calls take many seconds: forward + backward only, a process for each candidate, a bounded number of rounds.

    python -m benchmarks.large CASE CANDIDATE      one such process, driven through its pipes by `measure`

Rounds interleave the candidates as in `bench_cases.py`. A process holds the inputs and one candidate, so its peak memory is that candidate's
alone, and all of them wait without work while one is timed. The first whole call finds the peak; it is a round only of a candidate that
takes longer than `LONG` (products in bfloat16 on a CPU without instructions for them).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, machine
from benchmarks.case import OURS, PLAIN, Case, Inputs

BUDGET = 100.0  # seconds of timed rounds for a case
ROUNDS = (2, 5)
LONG = 30.0  # seconds of a first call after which a candidate is not called again: that call is its round
SMALL_ROWS = 32  # of the call that pages the code in


@dataclass(frozen=True)
class LargeCase(Case):
    per_row: tuple[str, ...] = ()  # the inputs that have a row for each row of the loss
    operations: float = 0.0  # floating-point operations of the matrix products that any implementation must make


def candidates(case: Case) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Loaders by name, ours first."""
    return {OURS: lambda: case.ours, PLAIN: lambda: case.plain, **case.peers}


def measure(case: LargeCase, budget: float = BUDGET) -> list[dict[str, Any]]:
    """One record of the form that `bench_cases.py` writes, mode "fwd+bwd"."""
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        missing = []
        for name in candidates(case):  # one after the other: each makes its first call alone
            worker = stack.enter_context(Worker.of(case, name))
            if worker.first is None:
                missing.append(name)
            else:
                workers[name] = worker
                print(f"    {name}: {worker.first['seconds']:.1f} s at first", flush=True)
        truth = workers[OURS].ask("truth")
        errors = {name: abs(worker.first["loss"] - truth) / abs(truth) for name, worker in workers.items()}  # type: ignore[index]
        for name, error in errors.items():
            assert error < 0.1, f"{name} is no peer of {case.name}: its loss is off by {error:.1%}"
        slow = [name for name, worker in workers.items() if name != OURS and worker.first["seconds"] > LONG]  # type: ignore[index]
        times: dict[str, list[float]] = {name: [] for name in workers}
        start = time.perf_counter()
        while (done := len(times[OURS])) < ROUNDS[0] or (
            done < ROUNDS[1] and (time.perf_counter() - start) * (1 + 1 / done) < budget
        ):
            for name, worker in workers.items():
                if name not in slow:
                    times[name].append(worker.ask("time"))
        times |= {name: [workers[name].first["seconds"]] for name in slow}  # type: ignore[index]
        identity = workers[OURS].ask("identity")
        peaks = {name: worker.first["peak"] for name, worker in workers.items()}  # type: ignore[index]
    info = {
        "mode": "fwd+bwd", "seconds": times, "errors": errors, "peak": peaks, "missing": missing, "identity": identity,
        "copy_bandwidth": machine.copy_bandwidth(), "product_rate": machine.product_rate(case.dtype),
    }  # fmt: skip
    return [{"extra_info": info}]


class Worker:
    """A process that holds the inputs of a case and one candidate. first: {"peak", "loss", "seconds"}, None: not installed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first: dict[str, Any] | None = self._read()

    @classmethod
    @contextlib.contextmanager
    def of(cls, case: Case, candidate: str) -> Iterator[Worker]:
        command = [sys.executable, "-m", "benchmarks.large", case.name, candidate]
        with subprocess.Popen(
            command, cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield cls(process)
            finally:
                assert process.stdin is not None
                process.stdin.close()  # its loop ends

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a candidate's process ended: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return json.loads(line)


def serve(case: Case, candidate: str, out: Any) -> None:
    """Answers the lines "time", "truth" and "identity", after the first call's {"peak", "loss", "seconds"}."""

    def say(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        function = candidates(case)[candidate]()
    except ImportError:
        say(None)
        return
    inputs = case.inputs()
    leaves = [inputs[name] for name in case.leaves]

    def call(given: Inputs) -> float:
        loss = function(**given)
        loss.backward()
        return float(loss.detach())

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    rows = getattr(case, "per_row", ())
    call({name: value[:SMALL_ROWS] if name in rows else value for name, value in inputs.items()})
    clear()
    peak = None
    allowed = machine.reset_peak()
    before, _ = machine.resident() if allowed else (0, 0)
    start = time.perf_counter()
    loss = call(inputs)
    seconds = time.perf_counter() - start
    if allowed:
        peak = max(machine.resident()[1] - before, 0)
    say({"peak": peak, "loss": loss, "seconds": seconds})

    def timed() -> float:
        clear()
        start = time.perf_counter()
        call(inputs)
        return time.perf_counter() - start

    def truth() -> float:
        clear()
        wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            return float(case.ours(**wide, backend="reference"))

    answers: dict[str, Callable[[], Any]] = {"time": timed, "truth": truth, "identity": machine.identity}
    for line in sys.stdin:
        say(answers[line.strip()]())


if __name__ == "__main__":
    # Answers have a stream of their own: a library may print.
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(cases.load()[sys.argv[1]], sys.argv[2], answers)
