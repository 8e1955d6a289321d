"""The commands behind `kdfast.cli`: this module imports typer and rich, which come with the train extra."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kdfast import backend_info, doctor
from kdfast.catalogue import BASELINES, CATALOGUE, Row, find
from kdfast.data import TASKS
from kdfast.methods import load

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Knowledge distillation with fused kernels.", pretty_exceptions_enable=False
)  # fmt: skip
console = Console()


def stop(error: Exception) -> typer.Exit:
    """A mistake of the user is one line, not a trace."""
    print(f"error: {error}", file=sys.stderr)
    return typer.Exit(2)


@app.command()
def distill(
    data: Annotated[
        str | None, typer.Option(help="Task: " + ", ".join(TASKS) + "; default: the method's own, else digits.")
    ] = None,
    method: Annotated[str, typer.Option(help="A method's name, see `kdfast methods`.")] = "kd",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to SEEDS-1.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder; a stopped run goes on where it was.")] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of the student; default: the task's.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, NAME=VALUE; may be repeated.")] = None,
) -> None:
    """Trains a teacher, then the student with labels alone, plain KD and the method; writes a report."""
    try:
        from kdfast.experiment import run
    except ImportError as error:
        raise stop(error) from None
    try:
        if data is None:
            own = next((row.task for row in (*BASELINES, *CATALOGUE) if row.slug == method), "digits")
            data = own if own in TASKS else "digits"
        with _progress() as report:
            results = run(
                data, method, seeds=seeds, out=out, steps=steps, options=_options(option or []), on_progress=report
            )
    except (ValueError, TypeError) as error:
        raise stop(error) from None
    console.print(_table(results))
    for comparison in results["comparisons"]:
        console.print("- " + comparison["sentence"], highlight=False)
    # Alone on its line and unwrapped, so that scripts can read it.
    console.print(f"report: {out / 'report.md'}", highlight=False, soft_wrap=True)


@app.command()
def methods(slug: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None) -> None:
    """Lists the catalogue: what exists, from which paper, with which ops."""
    if slug is None:
        for line, ready in _catalogue_lines((*BASELINES, *CATALOGUE)):
            # In a terminal a title is cut to its width; in a pipe lines are whole.
            style, fit = None if ready else "dim", "ellipsis" if console.is_terminal else "ignore"
            console.print(line, style=style, highlight=False, no_wrap=True, overflow=fit, crop=console.is_terminal)  # type: ignore[arg-type]
        return
    try:
        row = find(slug)
    except ValueError as error:
        raise stop(error) from None
    for name, value in row._asdict().items():
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        console.print(f"[bold]{name:8}[/bold] {shown or '-'}", highlight=False)
    if row.status == "ready":
        console.print(f"\n{inspect.getdoc(sys.modules[load(row.slug).__module__])}", markup=False, highlight=False)


@app.command("doctor")
def doctor_command(
    bench: Annotated[bool, typer.Option("--bench", help="Also a few seconds of speed against plain torch.")] = False,
) -> None:
    """Says what this installation can use, and why it cannot use the rest."""
    for line in doctor.describe(backend_info()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in doctor.bench_lines() if bench else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- pieces of the output
def _options(pairs: list[str]) -> dict[str, Any]:
    """["temperature=2.0", "kind=js"] as {"temperature": 2.0, "kind": "js"}: JSON where it is JSON, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"option: expected NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['settings']['method']} on {results['task']}", title_justify="left")
    for heading in ("arm", f"test {results['score']}, %", "standard error", "n", "ms per step"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in results["arms"].items():
        error = arm["standard_error"]
        shown = "-" if error is None else f"{100 * error:.2f}"
        table.add_row(name, f"{100 * arm['mean']:.2f}", shown, str(arm["n"]), f"{arm['ms_per_step']:.2f}")
    return table


def _catalogue_lines(rows: tuple[Row, ...]) -> Iterator[tuple[str, bool]]:
    """(line, ready) of each method."""
    yield f"{'method':27} {'status':8} {'task':17} {'arXiv':11} paper", True
    for row in rows:
        yield f"{row.slug:27} {row.status:8} {row.task:17} {row.arxiv:11} {row.title}", row.status == "ready"
