"""ProC-KD on digits: do prototypes of a teacher's tokens help a student on another task, and more than one of them more than one?

Teacher: a ViT of 4 blocks for digits 0 to 4. Targets: digits 5 to 9 with 10 labels each, and the quadrant of the larger of two digits
on 200 canvases; student: a ViT of 2 blocks, 300 AdamW steps of 32, of which 100 are stage 1 with prototypes. Arms: labels alone; a
linear map of the student's tokens to the teacher's; ProC-KD with one prototype (none to choose from); with eight. The claim to look
at: eight prototypes above labels alone on both targets, and not below one. y1 is scored in every arm; nothing is tuned. Stage 1 costs
ProC-KD a third of the student's steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_tasks, sentences
from kdfast.data import Task
from kdfast.data.other_digits import digit_quadrants_task, other_digits_task
from kdfast.experiment import Arm

STAGE1 = 100
ARMS = (
    Arm("ce", None),
    Arm("linear", "proc_kd", {"form": "linear"}),
    Arm("prototypes 1", "proc_kd", {"num_prototypes": 1, "prototype_steps": STAGE1}),
    Arm("prototypes 8", "proc_kd", {"num_prototypes": 8, "prototype_steps": STAGE1}),
)
SEEDS = {"other_digits": 10, "digit_quadrants": 5}
CLAIMS = (("prototypes 8", "ce"), ("prototypes 8", "prototypes 1"), ("prototypes 8", "linear"), ("linear", "ce"))


def run(
    out: Path, *, seeds: int | Mapping[str, int] = SEEDS, steps: int | None = None, tasks: list[Task] | None = None,
    work: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Both targets."""
    tasks = tasks or [other_digits_task(), digit_quadrants_task()]
    said = partial(sentences, claims=CLAIMS)
    return run_tasks(out, "proc_kd", tasks, said, seeds=seeds, steps=steps, work=work, arms=ARMS)
