"""HyperFormer on the digit graph: what qualifiers, context (neighbours and interaction) and experts add to the filtered MRR.

2400 statements over 300 digits and 10 classes, 600 steps of 128; arms: triples only, with qualifiers, the whole model with
dense layers of equal active width, the whole model with 8 experts of which 2 are active. The settings are the method's
defaults but for the small sizes. The claim to look at: qualifiers above triples, clearly. The rest is reported as found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_own
from kdfast.data import Task

# (arm, against): what each comparison isolates
CLAIMS = (("qualifiers", "triples"), ("whole", "qualifiers"), ("whole", "dense"))


def run(
    out: Path, *, seeds: int = 3, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(out, "digit_graph", "hyperformer", CLAIMS, seeds=seeds, steps=steps, task=task, work=work)
