"""The commands behind `kdfast.cli`: this module imports typer and rich, which come with the train extra."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

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


@app.command("distill-lm")
def distill_lm(
    teacher: Annotated[
        str | None, typer.Option(help="Id or folder of transformers; default: a small one, trained here.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Id or folder of transformers; default: a small one, from scratch.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Id, file or folder with a text column; default: Python's standard library.")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="By commas: ce; a divergence, as in js; topk_<divergence>, from the cache.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to SEEDS-1.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of a student.")] = None,
    out: Annotated[Path, typer.Option(help="Folder; a stopped run goes on where it was.")] = Path("runs/lm"),
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of the small teacher.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of students; default 4e-3 from scratch, 2e-5 by name.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the divergences and of the cache.")] = 1.0,
) -> None:
    """Trains a small teacher language model, caches it, distils students from it; or real models by name. Writes a report."""
    try:
        from kdfast import lm_experiment
        from kdfast.lm_report import cost_sentences

        given = {
            "teacher": teacher, "student": student, "data": data, "steps": steps, "teacher_steps": teacher_steps, "batch_size": batch_size,
            "length": length, "lr": lr, "temperature": temperature,
            "arms": None if kinds is None else tuple(kind.strip() for kind in kinds.split(",")),
        }  # fmt: skip
        settings = lm_experiment.Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        with _progress() as report:
            results = lm_experiment.run(settings, seeds=seeds, out=out, on_progress=report)
    except (ImportError, ValueError, TypeError, OSError) as error:
        raise stop(error) from None
    console.print(_lm_table(results))
    for comparison in results["comparisons"]:
        console.print("- " + comparison["sentence"], highlight=False)
    for text in cost_sentences(results["cost"]):
        console.print("- " + text, highlight=False)
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


@app.command("cache-teacher")
def cache_teacher_command(
    model: Annotated[str, typer.Option(help="Causal LM: an id on the Hub or a folder.")],
    data: Annotated[str, typer.Option(help="Data set id, .jsonl, .json, .parquet, .txt, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder; a stopped run goes on where it was.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes kept per token.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="T of the softmax; a loss at another one refuses the cache.")
    ] = 1.0,
    log_probs: Annotated[str, typer.Option(help="float16, or uint8: smaller, with a greater error.")] = "float16",
    vocab_size: Annotated[int | None, typer.Option(help="Logits that are tokens, of a padded head.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the model's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float32, ...")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="auto: one teacher over all GPUs.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 1024,
    packing: Annotated[bool, typer.Option("--packing", help="Join documents instead of cutting each.")] = False,
    column: Annotated[str, typer.Option(help="Of the text.")] = "text",
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Of the data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many documents.")] = None,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes that tokenize.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
) -> None:
    """Runs a teacher over text once; writes its top-k lists. On several GPUs: accelerate launch -m kdfast.cli cache-teacher ..."""
    try:
        from kdfast.data.teacher_cache import cache_teacher

        with _token_progress() as (say, report):
            cache = cache_teacher(
                model, data, out, tokenizer=tokenizer, top_k=top_k, temperature=temperature, log_probs=log_probs,
                vocab_size=vocab_size, revision=revision, dtype=dtype, device_map=device_map, batch_size=batch_size,
                max_length=max_length, packing=packing, column=column, split=split, config=config, limit=limit,
                num_proc=num_proc, on_start=say, on_progress=report,
            )  # fmt: skip
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise stop(error) from None
    if _is_main_process():
        totals = cache.manifest["totals"]
        written = f"{totals['bytes']:,} bytes, {totals['lists']:,} lists of {cache.top_k} that hold {cache.kept_mass:.2%} of the mass"
        console.print(written, highlight=False, soft_wrap=True)
        console.print(f"cache: {out}", highlight=False, soft_wrap=True)


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


class _TokenSpeed(ProgressColumn):
    """Tokens a second since the progress began."""

    def render(self, task: RichTask) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "- tokens/s")


@contextmanager
def _token_progress() -> Iterator[tuple[Callable[[Any], None], Callable[[int, int], None]]]:
    """(say, report) of the main process: a line before it starts, then tokens done, their speed and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _TokenSpeed(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not _is_main_process(), speed_estimate_period=120) as progress:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        task = progress.add_task("tokens" if world == 1 else f"tokens of process 1 of {world}", total=None, start=False)

        def say(estimate: Any) -> None:
            progress.console.print(str(estimate), highlight=False, soft_wrap=True)

        def report(done: int, total: int) -> None:
            if done == 0:
                progress.start_task(task)
            progress.update(task, completed=done, total=total)

        yield (say if _is_main_process() else lambda estimate: None), report


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['settings']['method']} on {results['task']}", title_justify="left")
    for heading in ("arm", f"test {results['score']}, %", "standard error", "n", "ms per step"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in results["arms"].items():
        error = arm["standard_error"]
        shown = "-" if error is None else f"{100 * error:.2f}"
        table.add_row(name, f"{100 * arm['mean']:.2f}", shown, str(arm["n"]), f"{arm['ms_per_step']:.2f}")
    return table


def _lm_table(results: dict[str, Any]) -> Table:
    table = Table(title="student language models", title_justify="left")
    for heading in ("arm", "validation bits per byte", "standard error", "n", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    table.add_row("teacher", f"{results['teacher']['bits_per_byte']:.4f}", "-", "1", "")
    for name, arm in results["arms"].items():
        error = arm["standard_error"]
        shown = "-" if error is None else f"{error:.4f}"
        table.add_row(name, f"{arm['mean']:.4f}", shown, str(arm["n"]), f"{arm['tokens_per_second']:.0f}")
    return table


def _catalogue_lines(rows: tuple[Row, ...]) -> Iterator[tuple[str, bool]]:
    """(line, ready) of each method."""
    yield f"{'method':27} {'status':8} {'task':17} {'arXiv':11} paper", True
    for row in rows:
        yield f"{row.slug:27} {row.status:8} {row.task:17} {row.arxiv:11} {row.title}", row.status == "ready"
