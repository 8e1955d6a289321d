"""Writes docs/methods.md from the catalogue, the methods' docstrings and benchmarks/results/methods/<slug>.json and costs.json.

python tools/methods_page.py            (make methods-page)
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kdfast.catalogue import BASELINES, CATALOGUE, Row  # noqa: E402
from kdfast.metrics.comparison import mean_and_error  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "benchmarks" / "results" / "methods"


def page(results: Path = RESULTS) -> str:
    rows = (*BASELINES, *CATALOGUE)
    lines = [
        "# Methods", "",
        "Written by `make methods-page` from the catalogue, the docstrings and `benchmarks/results/methods/`; not by hand. `make experiments`",
        "runs the experiment of every method that has no result yet. `kdfast methods <slug>` prints a section without its figures.", "",
        "A verdict is computed: *gain* when the 95 % Student interval of the difference, paired by seed, lies above 0, *loss* when below,",
        "else *no difference*. Settings are chosen on validation data; the test split is read once, at the end of each arm.", "",
        "| method | paper | status | task | figures |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        name = f"[{row.slug}](#{row.slug})" if row.status == "ready" else row.slug
        there = "yes" if (results / f"{row.slug}.json").exists() else "-"
        lines.append(f"| {name} | {row.title} | {row.status} | {row.task} | {there} |")
    if (results / "costs.json").exists():
        lines += ["", *costs(json.loads((results / "costs.json").read_text()))]
    for row in rows:
        if row.status == "ready":
            lines += ["", *section(row, results / f"{row.slug}.json")]
    return "\n".join(lines) + "\n"


def costs(found: dict[str, Any]) -> Iterator[str]:
    """The table of benchmarks/method_costs.py; bold: the method is faster on the reference path."""
    yield from (
        "## What a step costs", "",
        "One training step of each method beside the plain form on the same task (`python -m benchmarks.method_costs`, which says how):",
        "milliseconds; times the plain form; peak memory of the step and of the plain form's; and how many times as long the method",
        "takes with `KDFAST_BACKEND=reference`, plain torch (bold: it is faster). On networks this small a step is mostly Python and",
        "small kernels; what the fused ops save grows with batch and classes ([benchmarks.md](benchmarks.md)).", "",
        "| method | task | beside | ms per step | times | peak MB | beside, MB | reference |", "|---|---|---|---|---|---|---|---|",
    )  # fmt: skip
    for slug, one in found.items():
        slower = one["reference / method"]
        reference = f"{slower:.2f}x" if slower >= 1 else f"**{slower:.2f}x**"
        cells = [
            f"{slug}, {one['arm']}" if one["arm"] != slug else slug, one["task"], one["beside"], f"{one['ms']['method']:.2f}",
            f"{one['method / beside']:.2f}x", f"{one['peak_mb']['method']:.2f}", f"{one['peak_mb']['beside']:.2f}", reference,
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"
    machines = [one["machine"] for one in found.values()]
    commits = ", ".join(sorted({one["commit"] for one in machines}))
    device, cores, torch_version = (machines[-1][name] for name in ("device", "cores", "torch"))
    yield from ("", f"{device}, {cores} cores, torch {torch_version}, commit {commits}.")


def section(row: Row, result: Path) -> Iterator[str]:
    module = importlib.import_module(f"kdfast.methods.{row.slug}")
    yield from (f"## {row.slug}", "", f"{row.title} ([{row.arxiv}](https://arxiv.org/abs/{row.arxiv}), {row.year})", "")
    facts = {"Needs": row.needs, "ops": row.ops, "shares": row.parts}
    yield "; ".join(f"{name}: {', '.join(values)}" for name, values in facts.items() if values) + "."
    yield from (
        "",
        f"    kdfast distill --data {row.task} --method {row.slug}",
        "",
        "```text",
        inspect.getdoc(module) or "",
        "```",
    )
    if result.exists():
        yield from ("", *figures(json.loads(result.read_text()), row.slug))
    else:
        yield from ("", f"No figures yet: `python -m benchmarks.experiments {row.slug}` makes them.")


def figures(results: dict[str, Any], slug: str) -> Iterator[str]:
    """Tables of the arms, then the computed sentences, then how to make them again."""
    for name, found in (results.get("data") or {"": results}).items():
        if "arms" in found:
            yield from (f"On {name or found['settings']['data']}, {found['task']}:", "", *arms_table(found), "")
        elif "summary" in found:  # an experiment with a loop of its own
            yield from ("| arm | test accuracy, % | n |", "|---|---|---|")
            for arm, one in found["summary"].items():
                error = one["standard_error"]
                shown = f"{100 * one['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
                yield f"| {arm} | {shown} | {one['n']} |"
            yield ""
    yield from (f"- {sentence}" for sentence in results.get("sentences", ()))
    found = next(iter((results.get("data") or {"": results}).values()))
    commit = found.get("commit") or found.get("versions", {}).get("commit") or "unknown"
    threads = found.get("machine", {}).get("threads")
    where = f"{threads} thread(s), " if threads else ""
    yield from (
        "",
        f"{where}torch {found['versions']['torch']}, commit {', '.join(dict.fromkeys(one[:12] + '+' * one.endswith('+') for one in commit.split(', ')))}; `python -m benchmarks.experiments {slug}`.",
    )


def arms_table(found: dict[str, Any]) -> Iterator[str]:
    measures = list(dict.fromkeys(name for arm in found["arms"].values() for name in arm.get("measures", {})))
    heads = ["arm", f"test {found['score']}, % (mean ± standard error)", "n", "ms per step", "seconds", *measures]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, arm in found["arms"].items():
        seconds = arm.get("seconds")
        cells = [name, mean_and_error(arm["test"]), str(arm["n"]), f"{arm['ms_per_step']:.2f}"]
        cells.append("-" if not seconds else f"{sum(seconds) / len(seconds):.1f}")
        for measure in measures:
            values = arm.get("measures", {}).get(measure)
            cells.append("-" if not values else mean_and_error(values, scale=1.0, digits=3))
        yield "| " + " | ".join(cells) + " |"
    peak = found.get("machine", {}).get("peak_rss_mb")
    if peak:
        yield from ("", f"Peak memory of the whole process: {peak:.0f} MB.")


def main() -> None:
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
