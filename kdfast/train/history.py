"""What a run measured: rows by step, written as CSV, JSON and curves."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from kdfast._files import write_text


class History:
    """Rows {"step", "epoch", "loss", a part each, "lr"} and, after an evaluation, {"step", "epoch", "eval_<metric>"}."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows = rows or []

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def last(self, name: str) -> Any:
        """The newest value of a column; KeyError naming the columns there are."""
        for row in reversed(self.rows):
            if name in row:
                return row[name]
        raise KeyError(f"{name}: the history has {', '.join(self.columns()) or 'no rows'}")

    def column(self, name: str) -> list[Any]:
        """All values of a column, in their order."""
        return [row[name] for row in self.rows if name in row]

    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def write(self, folder: Path, *, curves: bool = True) -> None:
        """history.csv, history.json and (a third of a second) curves.png."""
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns(), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(folder / "history.csv", text.getvalue())
        write_text(folder / "history.json", json.dumps(self.rows, indent=1))
        if curves:
            self._draw(folder / "curves.png")

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        scores = [name for name in self.columns() if name.startswith("eval_")]
        losses = [name for name in self.columns() if name not in ("step", "epoch", "lr", "ms_per_step", *scores)]
        panels = [(names, title) for names, title in ((losses, "training loss"), (scores, "evaluation")) if names]
        if not panels:
            return
        figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
        for axes, (names, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for name in names:
                points = [(row["step"], row[name]) for row in self.rows if name in row]
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points), label=name.removeprefix("eval_"), marker=marker, markersize=3)
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
