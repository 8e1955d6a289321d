"""The figure, the page and the sentences of `kdfast distill-lm`, from its results alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from kdfast.metrics.comparison import compare, mean_and_error, sentence, summary
from kdfast.report import ARM_COLOURS, TEACHER_COLOUR

UNIT = "validation bits per byte"
PLAIN, OURS = "plain torch", "kdfast"


def bits(values: list[float]) -> str:
    return mean_and_error(values, scale=1.0, digits=4)


def comparisons(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every arm against labels alone, and what comes from the cache against the live teacher of the same kind."""
    pairs = [(arm, "ce") for arm in scores if arm != "ce" and "ce" in scores]
    pairs += [(arm, live) for arm in scores if (live := arm.removeprefix("topk_")) != arm and live in scores]
    return [
        {
            "arm": a, "against": b, **compare(scores[a], scores[b], lower_is_better=True),
            "sentence": sentence(a, scores[a], b, scores[b], unit=UNIT, scale=1.0, digits=4, lower_is_better=True),
        }
        for a, b in pairs
    ]  # fmt: skip


def cost_sentences(cost: dict[str, Any]) -> list[str]:
    """One of each measured part: speed and memory of our loss over those of the plain one."""
    found = []
    for part, forms in cost["parts"].items():
        ours, plain = forms[OURS], forms[PLAIN]
        speed = plain["ms"] / ours["ms"]
        word = "faster" if speed > 1 else "slower"
        text = (
            f"{part}: {ours['tokens_per_second']:.0f} tokens/s against {plain['tokens_per_second']:.0f} of the plain loss, "
            f"{max(speed, 1 / speed):.2f} times {word}"
        )
        if ours["peak_mb"] is not None:
            text += f"; peak memory {ours['peak_mb']:.1f} MB against {plain['peak_mb']:.1f}, {ours['peak_mb'] / plain['peak_mb']:.2f} of it"
        found.append(text + ".")
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: bits per byte of every seed, mean and standard error. Middle: while training. Right: speed and memory over the plain loss."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    colour = {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(arms)}
    figure = Figure(figsize=(15.0, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1.3, 1.0))

    for place, (arm, found) in enumerate(arms.items()):
        values = found["bits_per_byte"]
        left.bar(place, found["mean"], 0.7, yerr=found["standard_error"], capsize=4, color=colour[arm], alpha=0.55)
        spread = [0.3 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
        left.plot([place + offset for offset in spread], values, "o", color=colour[arm], markersize=4)
        left.annotate(
            f"{found['mean']:.3f}",
            (place, found["mean"]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    every = [value for found in arms.values() for value in found["bits_per_byte"]] + [
        results["teacher"]["bits_per_byte"]
    ]
    reach = max(max(every) - min(every), 0.01)
    left.set_ylim(min(every) - 0.3 * reach, max(every) + 0.35 * reach)
    left.set_xticks(range(len(arms)), list(arms), rotation=20, ha="right", fontsize=9)
    left.set_title(f"{UNIT} (axis cut; lower is better)", fontsize=10, loc="left")

    for arm, found in arms.items():
        curves = found["curves"]
        steps = [point[0] for point in curves[0]]
        columns = [[curve[i][1] for curve in curves] for i in range(len(steps))]
        mean = [summary(column)["mean"] for column in columns]
        middle.plot(steps, mean, color=colour[arm], marker="o", markersize=3, linewidth=1.5, label=arm)
    middle.set_title(f"{UNIT} while training", fontsize=10, loc="left")
    middle.set_xlabel("optimizer step")
    for axes in (left, middle):
        axes.axhline(
            results["teacher"]["bits_per_byte"], color=TEACHER_COLOUR, linestyle="--", linewidth=1.2, label="teacher"
        )
    middle.legend(frameon=False, fontsize=8)

    bars = []
    for part, forms in results["cost"]["parts"].items():
        ours, plain = forms[OURS], forms[PLAIN]
        bars.append((f"time,\n{part}", ours["ms"] / plain["ms"]))
        if ours["peak_mb"] is not None:
            bars.append((f"peak memory,\n{part}", ours["peak_mb"] / plain["peak_mb"]))
    shown = right.barh(range(len(bars)), [value for _, value in bars], 0.6, color="#50a060")
    right.bar_label(shown, [f"{value:.2f}" for _, value in bars], padding=3, fontsize=9)
    right.axvline(1.0, color="black", linewidth=1.0)
    right.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set_title("kdfast's loss over the plain PyTorch loss", fontsize=10, loc="left")
    for axes in (left, middle, right):
        axes.grid(axis="x" if axes is right else "y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def tables(results: dict[str, Any]) -> list[str]:
    """The two tables and the sentences, as lines of markdown: for report.md and for docs/language-models.md."""
    teacher = results["teacher"]
    lines = [
        f"| arm | {UNIT} (mean ± standard error) | n | tokens/s |", "|---|---|---|---|",
        f"| teacher, {teacher['parameters'] / 1e6:.2f} M parameters | {teacher['bits_per_byte']:.4f} | 1 | "
        + (f"{teacher['tokens_per_second']:.0f} |" if "tokens_per_second" in teacher else "|"),
    ]  # fmt: skip
    lines += [
        f"| {arm} | {bits(found['bits_per_byte'])} | {found['n']} | {found['tokens_per_second']:.0f} |"
        for arm, found in results["arms"].items()
    ]
    lines += ["", *(f"- {each['sentence']}" for each in results["comparisons"])]
    cost = results["cost"]
    lines += [
        "", f"The loss against the plain PyTorch loss with the logits of both models ({cost['rows']} tokens, {cost['classes']} classes, "
        f"{cost['rounds']} interleaved rounds):", "", "| | form | ms | tokens/s | peak MB above what the models hold |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for part, forms in cost["parts"].items():
        for form, row in forms.items():
            peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            lines.append(f"| {part} | {form} | {row['ms']:.1f} | {row['tokens_per_second']:.0f} | {peak} |")
    return [*lines, "", *(f"- {text}" for text in cost_sentences(cost))]


def markdown(results: dict[str, Any]) -> str:
    """report.md: the tables, the figure, what they say, and how to make it again."""
    settings, versions, text = results["settings"], results["versions"], results["text"]
    names = {key: settings[key] or "embedded" for key in ("teacher", "student", "data")}
    lines = [
        "# Distilling a language model", "", ", ".join(f"{key}: {value}" for key, value in names.items())
        + f"; student {results['student']['parameters'] / 1e6:.2f} M parameters, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['length']} tokens; {len(results['seeds'])} seeds.", "", *tables(results), "",
        "![bits per byte, curves and cost](curves.png)", "",
        f"Bits per byte: the negative log2-probability of all {text['val']['tokens']} tokens of the validation text over its {text['val']['bytes']} "
        f"bytes, in windows of {settings['length']} tokens. A seed is the student's initial weights and the order of batches, the same for every arm; "
        "all arms share one teacher, its cache and their settings. tokens/s: forward of the models, loss, backward and update, the median step.", "",
    ]  # fmt: skip
    if "cache" in results:
        cache = results["cache"]
        lines += [
            f"The cache holds the {cache['rows']} rows that a student reads, {cache['per_token']} classes a token: {100 * cache['kept_mass']:.1f} % of the teacher's mass, "
            f"{cache['bytes_per_token']:.0f} bytes a token, made at {cache['tokens_per_second']:.0f} tokens/s.", "",
        ]  # fmt: skip
    lines += [
        "; ".join(f"{name} {version}" for name, version in versions.items()) + f"; {results['machine']['system']}, "
        f"threads: {results['machine']['threads']}, commit {results['commit'] or 'unknown'}.", "", f"    {command(results)}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def command(results: dict[str, Any]) -> str:
    """The command line that makes these results."""
    settings = results["settings"]
    words = ["kdfast", "distill-lm", "--seeds", str(len(results["seeds"])), "--kinds", ",".join(settings["arms"])]
    for name in ("teacher", "student", "data", "steps", "teacher_steps", "batch_size", "length", "lr", "temperature"):
        if settings[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return shlex.join(words)
