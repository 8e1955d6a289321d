"""The main job: a teacher, then the student with labels alone, with plain KD and with a method, over seeds; report from the numbers.

Every finished piece (a teacher of a seed, an arm of a seed) is a file in `out`; a run that was stopped goes on with the rest.
Figures are of the test split; settings come from the validation split (docs/training.md). Nothing is chosen on the test split.
"""

from __future__ import annotations

import inspect
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from kdfast import __version__, backend_info
from kdfast._files import write_text
from kdfast.data import Task, load_task, models
from kdfast.losses import LossOutput
from kdfast.methods import Context, load
from kdfast.metrics.comparison import compare, sentence, summary
from kdfast.report import draw, markdown
from kdfast.train import Distiller

Measure = Callable[[Distiller, Mapping[str, DataLoader]], dict[str, float]]


@dataclass(frozen=True)
class Arm:
    """One way to train the student: a method's slug, or None for labels alone.

    student: a model of the method's own. start: an earlier arm, whose trained student this one goes on from. teacher: an earlier arm,
    whose trained student is this one's teacher. rounds: times the steps of the run, where an arm sees fewer images in a step than
    another. Without a method the options are those of `Labels`.
    """

    name: str
    method: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    student: Callable[[], nn.Module] | None = None
    start: str | None = None
    rounds: int = 1
    teacher: Arm | None = None


@dataclass(frozen=True)
class Labels:
    """Cross-entropy, or the `loss` of a task, of the student, and of the second network where it is a student too."""

    ignore_index: int = -100
    trains_teacher: bool = False
    label_smoothing: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, context: Context) -> LossOutput:
        networks = (context.student, context.teacher)[: 2 if self.trains_teacher else 1]
        assert context.labels is not None
        loss = self.loss or partial(
            F.cross_entropy, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
        losses = [loss(logits, context.labels) for logits in networks]
        total = losses[0] + losses[1] if self.trains_teacher else losses[0]
        return LossOutput(total, {"ce": total.detach()})


def arms_of(task: Task, method: str, options: Mapping[str, Any]) -> list[Arm]:
    """Labels alone, the plain form (KD, or mutual learning of two students), the method; every option checked.

    A method without a teacher (mixture of experts, diffusion) names the models to compare itself: one arm each.
    """
    students = getattr(load(method), "students", None)
    if bool(task.sizes) != (students is not None):
        kinds = {True: "brings its own models, without a teacher", False: "trains the student of a task"}
        raise ValueError(
            f"method: {method} {kinds[students is not None]}; {task.name} is for one that {kinds[bool(task.sizes)]}"
        )
    if students is not None:
        arms = [
            Arm(name, method, {**own, **options}, student) for name, (student, own) in students(**task.sizes).items()
        ]
        for arm in arms:
            load(method)(**arm.options)
        return arms
    plain = "mutual" if task.peers else "kd"
    arms = [Arm("ce", None)]
    for slug, given in ((plain, options if method == plain else {}), (method, options)):
        # the method is the plain form, or the task has none
        if slug == arms[-1].method or (slug != method and task.loss is not None):
            continue
        kind = load(slug)
        wanted = getattr(kind, "captures", ())
        absent = [name for name in wanted if name not in task.layers]
        if absent:
            raise ValueError(
                f"method: {slug} reads {', '.join(absent)}; {task.name} has {', '.join(task.layers) or 'no features'}"
            )
        absent = [name for name in getattr(kind, "columns", ()) if name not in task.columns]
        if absent:
            raise ValueError(f"method: {slug} reads {', '.join(absent)} from the batch, {task.name} has none")
        bound = bind(task, slug, given)
        # a wrong option is refused now, not after the teacher's training
        made = kind(*([task.widths] if wanted else []), **bound)
        if getattr(made, "trains_teacher", False) != task.peers:
            kinds = {True: "two students that teach each other", False: "a trained teacher"}
            raise ValueError(f"method: {slug} is for {kinds[not task.peers]}, {task.name} has {kinds[task.peers]}")
        own = getattr(made, "own_teacher", None)
        teacher = None if own is None else Arm(f"{slug} teacher", slug, {**bound, **own})
        start = "ce" if getattr(kind, "starts_trained", False) else None
        arms += ([] if teacher is None else [teacher]) + [Arm(slug, slug, bound, start=start, teacher=teacher)]
    return arms


def bind(task: Task, slug: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, with what the task knows and the method asks for: ignore_index, dim, num_classes."""
    known = inspect.signature(load(slug)).parameters
    of_task = {"ignore_index": task.ignore_index, "dim": task.dim, "num_classes": task.classes, **task.hints}
    return {name: value for name, value in of_task.items() if name in known and value is not None} | dict(options)


def run(
    data: str | Task,
    method: str,
    *,
    seeds: int = 5,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    arms: Sequence[Arm] | None = None,
    measure: Measure | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Runs what is not in `out` yet; writes results.json, curves.png, report.md, student.safetensors; returns the results.

    Args:
        data: a task of `kdfast.data.TASKS`. method: a slug (`kdfast methods`). seeds: 0 to seeds-1, each with its own split,
            weights and batch order. options: of the method. steps: optimizer steps of the student (default: the task's).
        arms: in place of labels, plain form and method. measure: (distiller after training, {split: loader}) -> more numbers
            of an arm, {name: number}.
    Raises:
        ValueError: unknown names, features the task does not have, or an `out` that holds a run with other settings.
    """
    task = load_task(data) if isinstance(data, str) else data
    if seeds < 1:
        raise ValueError(f"seeds: expected >= 1, got {seeds}")
    steps = task.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps: expected >= 1, got {steps}")
    named = arms is not None
    arms = arms_of(task, method, options or {}) if arms is None else list(arms)
    settings = {
        "data": task.name, "method": method, "options": dict(options or {}), "steps": steps, "teacher_steps": task.teacher_steps,
        "batch_size": task.batch_size, "lr": task.lr,
    }  # fmt: skip
    if task.patience is not None:
        settings["patience"] = task.patience
    if named:
        settings["arms"] = {
            arm.name: {"method": arm.method, "options": dict(arm.options)}
            | ({"rounds": arm.rounds} if arm.rounds > 1 else {})
            | ({"start": arm.start} if arm.start else {})
            | ({"teacher": arm.teacher.name} if arm.teacher else {})
            for arm in arms
        }
    out = Path(out)
    claim(out, settings)
    names = [*_teacher(task, arms), *(arm.name for arm in arms)]
    pieces: dict[str, Callable[[int], dict[str, Any]]] = {"teacher": lambda seed: _train_teacher(task, seed, out)}
    pieces |= {arm.name: partial(_train_arm, task, arm, steps=steps, out=out, measure=measure) for arm in arms}
    rows: list[dict[str, Any]] = []
    total = seeds * len(names)
    with threads(task.threads):
        for seed in range(seeds):
            for name in names:
                on_progress(f"seed {seed}: {name}", len(rows), total)
                row = once(out / "runs" / f"{name}-{seed}.json", partial(pieces[name], seed))
                rows.append({"arm": name, "seed": seed, **row})
    on_progress("report", total, total)
    results = _results(task, settings, names, [arm.name for arm in arms], rows)
    best = max((row for row in rows if row["arm"] == arms[-1].name), key=lambda row: row["val"])
    results["student"] = {"arm": best["arm"], "seed": best["seed"], "chosen by": "validation score"}
    student = (out / "runs" / f"{best['arm']}-{best['seed']}.safetensors").read_bytes()
    (out / "student.safetensors").write_bytes(student)
    draw(results, out / "curves.png")
    write_text(out / "results.json", json.dumps(results, indent=1))
    write_text(out / "report.md", markdown(results))
    return results


# ---------------------------------------------------------------- the pieces
def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Pieces of different settings must not be mixed in one folder."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    path, text = out / "settings.json", json.dumps(settings, indent=1)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"out: {out} holds a run with other settings ({path}); choose another folder or remove it")
    write_text(path, text)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch's threads inside the block: `number`, or as many as are set."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def _teacher(task: Task, arms: Sequence[Arm]) -> tuple[str, ...]:
    """The arm that comes before the others, where one of them has a teacher."""
    return ("teacher",) if any(_taught(task, arm) for arm in arms) else ()


def _taught(task: Task, arm: Arm) -> bool:
    """Whether an arm reads the task's trained teacher."""
    alone = task.peers or arm.student is not None or arm.method is None or arm.teacher is not None
    return not alone and _uses_teacher(task, arm)


def _uses_teacher(task: Task, arm: Arm) -> bool:
    """Whether an arm's method has a second network, with its options."""
    slug = arm.method or ""
    widths = [task.widths] if getattr(load(slug), "captures", ()) else []
    with torch.random.fork_rng(devices=[]):  # a method that is made to be asked draws nothing from the run
        made = load(slug)(*widths, **bind(task, slug, arm.options))
    return bool(getattr(made, "uses_teacher", True))


def _train_teacher(task: Task, seed: int, out: Path) -> dict[str, Any]:
    _, teacher = models(task, seed)
    own = {} if task.teacher_optimizer is None else {"optimizer": task.teacher_optimizer}
    distiller = Distiller(teacher, None, Labels(task.ignore_index, loss=task.loss), **_common(task, seed) | own)
    return _fit(task, distiller, "teacher", seed, task.teacher_steps, out / "runs" / f"teacher-{seed}.safetensors")


def _train_arm(
    task: Task, arm: Arm, seed: int, *, steps: int, out: Path, measure: Measure | None = None
) -> dict[str, Any]:
    teacher = arm.teacher.name if arm.teacher else "teacher" if _taught(task, arm) else None
    taught = None if teacher is None else out / "runs" / f"{teacher}-{seed}.safetensors"
    start = None if arm.start is None else out / "runs" / f"{arm.start}-{seed}.safetensors"
    distiller = distiller_of(task, arm, seed, taught, start)
    return _fit(
        task, distiller, "student", seed, steps * arm.rounds, out / "runs" / f"{arm.name}-{seed}.safetensors", measure
    )


def distiller_of(
    task: Task, arm: Arm, seed: int, taught: Path | None = None, start: Path | None = None, **changes: Any
) -> Distiller:
    """The Distiller of an arm: the task's models with the seed's initial weights, what the method asks for bound.

    Args: taught: weights of the trained teacher, None for two students or models of the method's own. start: weights of the student to
        go on from. changes: of the Distiller.
    """
    own = {name: value for name in ("optimizer", "scheduler") if (value := getattr(task, name)) is not None}
    common = _common(task, seed) | own | changes
    if arm.student is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = arm.student()
        return Distiller(student, None, arm.method or "", options=arm.options, **common)
    student, other = models(task, seed)
    if start is not None:
        load_model(student, start)
    uses = arm.method is not None and _uses_teacher(task, arm)
    if arm.teacher is not None:
        other = distiller_of(task, arm.teacher, seed).student
    torch.manual_seed(seed)  # for the parameters of the method
    if taught is not None:
        load_model(other, taught)
    if arm.method is None:
        labels = Labels(task.ignore_index, trains_teacher=task.peers, **{"loss": task.loss, **arm.options})
        return Distiller(student, other if task.peers else None, labels, **common)
    kind = load(arm.method)
    wanted = getattr(kind, "captures", ())
    return Distiller(
        student, other if uses else None, arm.method, options=bind(task, arm.method, arm.options),
        capture={name: task.layers[name] if uses else (task.layers[name][0], None) for name in wanted},
        widths={name: task.widths[name] for name in wanted}, **common,
    )  # fmt: skip


def _common(task: Task, seed: int) -> dict[str, Any]:
    return {
        "optimizer": lambda parameters: AdamW(parameters, lr=task.lr), "ignore_index": task.ignore_index, "metrics": task.metrics,
        "predict": task.predict, "log_every": task.eval_every, "seed": seed, "progress": False,
    }  # fmt: skip


def _fit(
    task: Task, distiller: Distiller, part: str, seed: int, steps: int, weights: Path, measure: Measure | None = None
) -> dict[str, Any]:
    """Trains on one part, validates every `eval_every` steps, and reads the test split once, at the end."""
    start = time.perf_counter()
    splits = task.splits(seed)
    epochs = max(1, round(steps / task.eval_every))
    data = splits[part]
    if part == "student" and hasattr(distiller.method, "choose"):
        data = distiller.method.choose(data, seed)
    loader = task.train_loader(data, max(1, steps // epochs))
    loaders = {name: task.eval_loader(data) for name, data in splits.items()}
    # a teacher of another task has validation and test data of its own
    loaders |= {name: loaders[f"{part}_{name}"] for name in ("val", "test") if f"{part}_{name}" in loaders}
    distiller.fit(loader, epochs, eval_loader=loaders["val"], patience=task.patience)
    seconds = time.perf_counter() - start
    score = next(iter(task.metrics))
    model = distiller.deploy(loaders["val"])
    networks = [model, distiller.teacher] if task.peers else [model]
    val, test = (
        [distiller.evaluate(loaders[name], network)[score] for network in networks] for name in ("val", "test")
    )
    counted = len(networks) if task.score_both else 1
    distiller.save(weights, model)
    rows = distiller.history.rows
    return {
        "test": sum(test[:counted]) / counted,
        "val": sum(val[:counted]) / counted,
        "each": test,
        "ms_per_step": median(row["ms_per_step"] for row in rows if "ms_per_step" in row),
        "seconds": seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "commit": commit(),
        "measures": {} if measure is None else measure(distiller, loaders),
        "curve": [[row["step"], row[f"eval_{score}"]] for row in rows if f"eval_{score}" in row],
        # Counts a method reports (of pixels, of tokens), means over the steps between two evaluations.
        "counts": {
            name: [row[name] for row in rows if name in row] for name in distiller.history.columns() if name.startswith("num_")
        },
    }  # fmt: skip


def _results(
    task: Task, settings: dict[str, Any], names: list[str], arms: list[str], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    by_arm = {name: [row for row in rows if row["arm"] == name] for name in names}
    score = next(iter(task.metrics))
    scores = {name: [row["test"] for row in found] for name, found in by_arm.items()}
    pairs = [(a, b) for i, a in enumerate(arms) for b in arms[:i]]
    return {
        "task": task.title,
        "score": score,
        "settings": settings,
        "seeds": [row["seed"] for row in by_arm[arms[0]]],
        "arms": {
            name: {
                "test": scores[name], **summary(scores[name]), "val": [row["val"] for row in found],
                "ms_per_step": median(row["ms_per_step"] for row in found), "seconds": [row["seconds"] for row in found],
                "curves": [row["curve"] for row in found],
                "measures": {key: [row["measures"][key] for row in found] for key in found[0]["measures"]},
                **({"each": [row["each"] for row in found], "counts": [row["counts"] for row in found]} if task.peers else {}),
            }
            for name, found in by_arm.items()
        },
        "comparisons": [
            {"arm": a, "against": b, **compare(scores[a], scores[b]), "sentence": sentence(a, scores[a], b, scores[b], score=score)}
            for a, b in pairs
        ],
        "versions": {"kdfast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(), "processor": platform.machine(), "threads": task.threads or torch.get_num_threads(),
            "peak_rss_mb": max(row["peak_rss_mb"] for row in rows),
        },
        "backend": backend_info(),
        "commit": joined(row.get("commit") for row in rows),
    }  # fmt: skip


def joined(commits: Iterable[str | None]) -> str | None:
    """The commits of all pieces, each once, in one text; None when there are none."""
    return ", ".join(sorted({one for each in commits if each for one in each.split(", ")})) or None


def commit() -> str | None:
    """The commit of the sources, with "+" when they were changed since; None when this is no checkout of kdfast."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "--full-name", ":/kdfast/catalogue.py"):  # installed inside somebody else's repository
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
