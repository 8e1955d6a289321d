"""Every classification method on the same teacher, student, data and seeds: accuracy against cost, as table and plot.

    python -m benchmarks.leaderboard                 what is not there yet, then docs/leaderboard.md and .png      (make leaderboard)
    python -m benchmarks.leaderboard --report        only the pages, from benchmarks/results/leaderboard.json
    python -m benchmarks.leaderboard --seeds 1 --steps 2 --out build/leaderboard        a try

Task: digits, teacher CNN of three stages with 288k weights on 900 labels, student CNN with 18k weights on 200 of them. Every method runs with its
defaults, nothing is tuned for this task; what differs is in OPTIONS (start: it
goes on from the trained student of that arm, so it had more steps). Finished methods and seeds are read from the work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from kdfast._files import write_text
from kdfast.catalogue import BASELINES, CATALOGUE
from kdfast.data import Task, load_task
from kdfast.experiment import Arm, arms_of, joined, run
from kdfast.metrics.comparison import compare, mean_and_error, summary

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "leaderboard.json"
DOCS = ROOT / "docs"
WORK = ROOT / "runs" / "leaderboard"

# What the common setting asks for: a trained teacher that stays as it is, and the student of the last step for every method.
OPTIONS: dict[str, dict[str, Any]] = {"bd_kd": {"online": False}, "dho": {"search": "end"}}


def board_task() -> Task:
    """`digit_stages`: maps of every stage for the methods that read them, 200 labels, so room above the labels alone."""
    return dataclasses.replace(
        load_task("digit_stages"),
        name="leaderboard",
        title="handwritten digits (scikit-learn), CNN of 18k weights on 200 labels, its teacher of 288k on 900",
    )


def entries(task: Task) -> tuple[dict[str, Arm], dict[str, str]]:
    """({slug: its arm}, {slug: why it is left out}) of every method that is ready."""
    arms: dict[str, Arm] = {"ce": Arm("ce", None)}
    left_out: dict[str, str] = {}
    for row in (*BASELINES, *CATALOGUE):
        if row.status != "ready":
            continue
        try:
            arms[row.slug] = arms_of(task, row.slug, OPTIONS.get(row.slug, {}))[-1]
        except ValueError as error:
            left_out[row.slug] = str(error).removeprefix(f"method: {row.slug} ")
    return arms, left_out


def measure(task: Task, *, seeds: int, steps: int | None, work: Path) -> dict[str, Any]:
    """Runs each method in a folder of its own, all on the teachers that the first one trained."""
    arms, left_out = entries(task)
    found: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    peaks: list[float] = []
    commits: list[str | None] = []
    for slug in ("kd", *(slug for slug in arms if slug != "kd")):  # the first trains the teachers
        arm = arms[slug]
        folder = work / slug / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        sources = {"teacher": "kd"} | (
            {arm.start: arm.start} if arm.start else {}
        )  # a student to go on from is that of its arm
        for kind, source in sources.items():
            for file in (work / source / "runs").glob(f"{kind}-*"):
                if slug != source:
                    shutil.copyfile(file, folder / file.name)

        def tell(what: str, done: int, total: int, slug: str = slug) -> None:
            print(f"leaderboard {slug} {done}/{total} {what}", flush=True)

        results = run(
            task, arm.method or "kd", seeds=seeds, out=work / slug, steps=steps, arms=[arm], on_progress=tell
        )  # fmt: skip
        found[slug] = results["arms"][arm.name] | {
            "options": OPTIONS.get(slug, {}) | ({"start": arm.start} if arm.start else {})
        }
        teacher = results["arms"].get("teacher", teacher)
        peaks.append(results["machine"]["peak_rss_mb"])
        commits.append(results["commit"])
    return {
        "task": task.title, "score": results["score"], "seeds": results["seeds"], "steps": steps or task.steps,
        "teacher": {"test": teacher["test"], **summary(teacher["test"])},
        "methods": {
            slug: {key: one[key] for key in ("test", "val", "mean", "standard_error", "n", "ms_per_step", "seconds", "options")}
            | {"against_kd": compare(one["test"], found["kd"]["test"]), "against_ce": compare(one["test"], found["ce"]["test"])}
            for slug, one in found.items()
        },
        "left_out": left_out,
        **{key: results[key] for key in ("versions", "backend")},
        "machine": results["machine"] | {"peak_rss_mb": max(peaks)}, "commit": joined(commits),
    }  # fmt: skip


# ---------------------------------------------------------------- pages
def markdown(results: dict[str, Any]) -> str:
    methods = sorted(results["methods"].items(), key=lambda pair: -pair[1]["mean"])
    base = results["methods"]["ce"]["ms_per_step"]
    lines = [
        "# Leaderboard", "",
        "Written by `make leaderboard`, not by hand. Every classification method with its defaults on the same teacher, student, data and",
        f"seeds: {results['task']}; {len(results['seeds'])} seeds, {results['steps']} steps. Nothing is tuned, so the order says how the",
        "defaults do on this small task, not which method is best.", "",
        f"Teacher: {mean_and_error(results['teacher']['test'])} %.", "",
        "![accuracy against cost](leaderboard.png)", "",
        f"| method | test {results['score']}, % (mean ± standard error) | n | against kd | against labels alone | ms per step | times labels alone |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for slug, one in methods:
        options = ", ".join(f"{name}={value}" for name, value in one["options"].items())
        cells = [slug + (f" ({options})" if options else ""), mean_and_error(one["test"]), str(one["n"])]
        cells += ["-" if slug == other else _against(one[f"against_{other}"]) for other in ("kd", "ce")]
        cells += [f"{one['ms_per_step']:.2f}", f"{one['ms_per_step'] / base:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "*against*: the mean difference paired by seed, in points, and what its 95 % interval allows to say. *start*: goes on from the",
        "trained student of that arm, so it had more steps.",
        "",
    ]
    if results["left_out"]:
        lines += ["Left out, because the common setting does not fit:", ""]
        lines += [f"- {slug}: {reason}" for slug, reason in results["left_out"].items()]
        lines.append("")
    versions, machine = results["versions"], results["machine"]
    commits = ", ".join(one[:12] for one in (results["commit"] or "unknown").split(", "))
    lines.append(
        f"kdfast {versions['kdfast']}, torch {versions['torch']}, {machine['threads']} thread(s), peak memory {machine['peak_rss_mb']:.0f} MB, "
        f"commit {commits}."
    )
    return "\n".join(lines) + "\n"


def _against(found: dict[str, Any]) -> str:
    return f"{100 * found['mean']:+.1f}, {found['verdict']}"


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    axes = figure.subplots()
    placed = sorted(results["methods"].items(), key=lambda pair: pair[1]["ms_per_step"])
    for place, (slug, one) in enumerate(placed):
        colour = {"ce": "#7f7f7f", "kd": "#D55E00"}.get(slug, "#0072B2")
        axes.errorbar(
            one["ms_per_step"], one["mean"], yerr=one["standard_error"], fmt="o", color=colour, capsize=3, linewidth=1.2
        )
        axes.annotate(
            slug,
            (one["ms_per_step"], one["mean"]),
            xytext=(5, (4, -11)[place % 2]),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    axes.axhline(results["teacher"]["mean"], color="#7f7f7f", linestyle="--", linewidth=1, label="teacher")
    axes.set_xlabel("ms per training step")
    axes.set_ylabel(f"test {results['score']} (mean, standard error)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"{results['task']}, n = {len(results['seeds'])}", fontsize=9, loc="left")
    figure.savefig(path, dpi=130)


def write(results: dict[str, Any], docs: Path) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    write_text(docs / "leaderboard.md", markdown(results))
    draw(results, docs / "leaderboard.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaderboard")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of benchmarks/results, docs and runs")
    given = parser.parse_args(arguments)
    result, docs = (RESULT, DOCS) if given.out is None else (given.out / "leaderboard.json", given.out)
    if not given.report:
        work = WORK if given.out is None else given.out / "runs"
        results = measure(board_task(), seeds=given.seeds, steps=given.steps, work=work)
        result.parent.mkdir(parents=True, exist_ok=True)
        write_text(result, json.dumps(results, indent=1) + "\n")
    write(json.loads(result.read_text()), docs)
    print(docs / "leaderboard.md")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
