"""What one training step of every method costs beside plain KD on the same task, and on the reference path: time and memory.

    python -m benchmarks.method_costs                 every ready method that has no result yet      (make method-costs)
    python -m benchmarks.method_costs sinkd trg       these, measured again
    make methods-page                                 the table in docs/methods.md, again

A step is batch -> loss -> backward -> optimizer -> after_step, on the task of the method's row in the catalogue, at its batch size and
threads, near the end of a run (the stage it ends in, schedules at their last values); reading the batch is not in it. Each method is a
process of its own. There four forms take turns, a few steps each, round by round: plain KD and the method, each with the
backends that kdfast chooses and with KDFAST_BACKEND=reference. Times are medians over the rounds, ratios medians of the rounds' ratios. Memory
is the peak of what torch's allocator handed out during one step above what was there before it. Teachers are not trained: a step costs the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.optim import AdamW

from benchmarks.machine import ROOT, identity
from kdfast._files import write_text
from kdfast.catalogue import BASELINES, CATALOGUE, find
from kdfast.data import Task, load_task
from kdfast.experiment import Arm, arms_of, distiller_of, threads

RESULT = ROOT / "benchmarks" / "results" / "methods" / "costs.json"
READY = tuple(row.slug for row in (*BASELINES, *CATALOGUE) if row.status == "ready")
# (the arm to measure, the one beside it), where a method names its own arms, or its task has no plain KD: the plain form of the same size
ARMS = {
    "hyperformer": ("whole", "dense"), "switch_dit": ("whole", "dit"), "mst_distill": ("mst", "multimodal"), "mdcs": ("mdcs", "ce"),
    "rotnet": ("rotnet", "supervised"), "knowledge_concentration": ("knowledge_concentration", "ce"), "lad": ("lad", "kd"),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"kd3": {"cutoff": 0.05}}  # a teacher that is not trained is sure of nothing
FORMS = ("method", "beside", "method on the reference path", "beside on the reference path")
END = 10**6  # a run so long that no schedule moves while it is measured


def pair(slug: str) -> tuple[Task, Arm, Arm]:
    """The task of a method, its arm, and the arm it is measured beside: KD (of two students: mutual), for KD itself labels alone."""
    task = load_task(find(slug).task)
    arms = {arm.name: arm for arm in arms_of(task, slug, OPTIONS.get(slug, {}))}
    name, beside = ARMS.get(slug, (slug, list(arms)[-2]))
    return task, arms[name], arms[beside]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """KDFAST_BACKEND inside the block; "" is automatic."""
    before = os.environ.get("KDFAST_BACKEND", "")
    os.environ["KDFAST_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ["KDFAST_BACKEND"] = before


def stepper(task: Task, arm: Arm, backend: str) -> Callable[[], None]:
    """A function that makes one training step with `backend`, after a short run that prepares the method."""
    splits = task.splits(0)
    distiller = distiller_of(task, arm, 0)
    torch.manual_seed(0)
    loader = task.train_loader(splits["student"], 4)
    with using(backend):
        distiller.fit(loader, 1, eval_loader=task.eval_loader(splits["val"]))
    distiller.net.train()
    distiller.step, distiller.total_steps = END - 10_000, END
    batches = list(loader)
    made = (task.optimizer or partial(AdamW, lr=task.lr))([p for p in distiller.net.parameters() if p.requires_grad])
    optimizers = made if isinstance(made, list) else [made]
    after: Callable[..., None] = getattr(distiller.method, "after_step", lambda *_: None)

    def step() -> None:
        with using(backend):
            distiller.loss(batches[distiller.step % len(batches)]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        distiller.step += 1
        after(distiller.student, distiller.teacher, distiller.step)

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The highest sum of what torch allocated and freed during one step."""
    with profile(profile_memory=True) as record:
        step()
    results = record.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds_of(step: Callable[[], None], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        step()
    return (time.perf_counter() - start) / number


def measure(slug: str, *, seconds: float) -> dict[str, Any]:
    """The numbers of one method; `seconds` for all its rounds."""
    task, arm, beside = pair(slug)
    with threads(task.threads):
        steps = dict(
            zip(FORMS, (stepper(task, one, backend) for backend in ("", "reference") for one in (arm, beside)))
        )
        number = max(
            1, round(0.03 / max(seconds_of(step, 2) for step in steps.values()))
        )  # steps of a turn: about 30 ms
        rounds: dict[str, list[float]] = {form: [] for form in FORMS}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rounds[FORMS[0]]) < 3:
            for form, step in steps.items():
                rounds[form].append(seconds_of(step, number))
        memory = {form: peak_bytes(step) / 2**20 for form, step in steps.items()}
        used = torch.get_num_threads()

    def times(form: str, other: str) -> float:
        return median(a / b for a, b in zip(rounds[form], rounds[other]))

    return {
        "task": task.name, "batch": task.batch_size, "threads": used, "arm": arm.name, "beside": beside.name, "options": OPTIONS.get(slug, {}),
        "rounds": len(rounds[FORMS[0]]), "steps_per_round": number,
        "ms": {form: 1000 * median(values) for form, values in rounds.items()},
        "peak_mb": memory,
        "method / beside": times(FORMS[0], FORMS[1]),
        "reference / method": times(FORMS[2], FORMS[0]),
        "reference / beside": times(FORMS[3], FORMS[1]),
        "machine": identity(),
    }  # fmt: skip


def apart(slug: str, seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.method_costs", "--one", slug, "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120 + 4 * seconds)
    if done.returncode != 0:
        raise RuntimeError(f"{slug}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_costs")
    parser.add_argument("slugs", nargs="*", help="methods to measure again; default: all that have no result")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds for each method")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one method
    given = parser.parse_args(arguments)
    if given.one is not None:
        print(json.dumps(measure(given.one, seconds=given.seconds)))
        return
    for slug in given.slugs:
        find(slug)  # an unknown one raises
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    failed = []
    for slug in given.slugs or [slug for slug in READY if slug not in found]:
        start = time.perf_counter()
        try:
            found[slug] = apart(slug, given.seconds)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed.append(str(error))
            print(f"{slug}: failed", flush=True)
            continue
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, json.dumps({name: found[name] for name in READY if name in found}, indent=1) + "\n")
        one = found[slug]
        print(
            f"{slug}: {one['ms']['method']:.2f} ms, {one['method / beside']:.2f} x {one['beside']}, reference {one['reference / method']:.2f} x; "
            f"{time.perf_counter() - start:.0f} s", flush=True,
        )  # fmt: skip
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
