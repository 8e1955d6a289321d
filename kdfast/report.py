"""The figure and the page of an experiment, from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdfast.metrics.comparison import mean_and_error, summary

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey.
ARM_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SENTENCES = 10  # under the figure
TEACHER_COLOUR = "#7f7f7f"


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: test score of every seed, with mean and standard error. Right: validation score while training, mean and its error."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    arms = results["arms"]
    students = [name for name in arms if name != "teacher"]
    colour = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(students)} | {"teacher": TEACHER_COLOUR}
    many = len(arms) > 6
    figure = Figure(figsize=(10.5 + 0.9 * max(0, len(arms) - 6), 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(len(arms) / 4, 1.35) if many else (1, 1.35))

    seeds = len(results["seeds"])
    spread = [0.30 * ((i + 0.5) / seeds - 0.5) for i in range(seeds)]  # side by side in their order
    for i in range(seeds):  # a seed's arms are a pair: same split, same start
        places = [list(arms).index(name) + spread[i] for name in students]
        left.plot(places, [arms[name]["test"][i] for name in students], color="#bbbbbb", linewidth=0.7, zorder=1)
    for place, name in enumerate(arms):
        test = arms[name]["test"]
        left.plot(
            [place + offset for offset in spread],
            test,
            "o",
            color=colour[name],
            alpha=0.45,
            markersize=4.5,
            markeredgewidth=0,
        )
        error = arms[name]["standard_error"]
        left.errorbar(
            place + 0.27, arms[name]["mean"], yerr=error, fmt="D", color=colour[name], markersize=6, capsize=4, linewidth=1.6
        )  # fmt: skip
        left.annotate(
            mean_and_error(test), (place + 0.27, arms[name]["mean"]), xytext=(9, 0), textcoords="offset points", va="center",
            fontsize=9, color=colour[name], bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )  # fmt: skip
    left.set_xticks(
        [i + 0.1 for i in range(len(arms))], list(arms), rotation=30 if many else 0, ha="right" if many else "center"
    )
    left.set_xlim(-0.45, len(arms) + 0.12)
    left.set_title(f"test {results['score']}: seeds, mean ± standard error", fontsize=10, loc="left")

    for name in students:
        curves = arms[name]["curves"]
        steps = [point[0] for point in min(curves, key=len)]  # as far as all seeds went
        columns = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        mean = [sum(column) / len(column) for column in columns]
        right.plot(steps, mean, color=colour[name], label=name, linewidth=1.8)
        if len(curves) > 1:
            errors = [summary(column)["standard_error"] for column in columns]
            low, high = ([m + sign * e for m, e in zip(mean, errors)] for sign in (-1, 1))
            right.fill_between(steps, low, high, color=colour[name], alpha=0.15, linewidth=0)
    if "teacher" in arms:
        level = sum(arms["teacher"]["val"]) / len(arms["teacher"]["val"])
        right.axhline(level, color=colour["teacher"], linestyle="--", linewidth=1.2, label="teacher")
    right.set_title(f"validation {results['score']} while training (band: standard error)", fontsize=10, loc="left")
    right.set_xlabel("optimizer step")
    final = min(min(curve[-1][1] for curve in arms[name]["curves"]) for name in students)
    right.set_ylim(bottom=max(0.0, final - 0.25))  # the first steps, near chance, would flatten the rest
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['settings']['method']} on {results['task']}", fontsize=11, x=0.01, ha="left")
    if 0 < len(results["comparisons"]) <= SENTENCES:  # more of them leave no room for the axes; report.md has all
        text = "\n".join(comparison["sentence"] for comparison in results["comparisons"])
        figure.supxlabel(text, fontsize=8.5, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def markdown(results: dict[str, Any]) -> str:
    """report.md: the table, the figure, what it says, and how to make it again."""
    settings, versions = results["settings"], results["versions"]
    lines = [
        f"# {settings['method']} on {settings['data']}", "", f"{results['task']}; {len(results['seeds'])} seeds.", "",
        f"| arm | test {results['score']}, % (mean ± standard error) | n | ms per step |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {name} | {mean_and_error(arm['test'])} | {arm['n']} | {arm['ms_per_step']:.2f} |"
        for name, arm in results["arms"].items()
    ]
    lines += ["", "![test scores and validation curves](curves.png)", ""]
    lines += [f"- {comparison['sentence']}" for comparison in results["comparisons"]]
    chosen = results["student"]
    options = " ".join(f"--option {name}={value}" for name, value in settings["options"].items())
    lines += [
        "", f"`student.safetensors` is the student of arm {chosen['arm']}, seed {chosen['seed']}, the best of them on the validation split.", "",
        "Each seed has its own split, initial weights and batch order, the same for every arm. The test split is read once, at the end of "
        "a run; nothing is chosen on it. ms per step is the median time of forward, loss, backward and update.", "",
        f"kdfast {versions['kdfast']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{results['machine']['system']}, threads: {results['machine']['threads']}, commit {results['commit'] or 'unknown'}.", "",
        f"    kdfast distill --data {settings['data']} --method {settings['method']} --seeds {len(results['seeds'])} --steps {settings['steps']} {options}".rstrip(), "",
    ]  # fmt: skip
    return "\n".join(lines)
