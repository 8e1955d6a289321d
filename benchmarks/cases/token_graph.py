"""Token graphs: both models' graphs, loss and the student's gradient. Targets of time and memory are for 4096 tokens."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.baselines.token_graph import token_graph
from benchmarks.case import PLAIN, Case, Inputs, Target
from kdfast import losses


def tokens(n: int, student: int, teacher: int) -> Inputs:
    """Tokens of images: clusters with spread, so that neighbours are near and the graphs are not empty."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(max(n // 32, 2), (n,), generator=generator)
    parts = []
    for width in (student, teacher):
        centre = torch.randn(max(n // 32, 2), width, generator=generator)
        parts.append(centre[centres] + torch.randn(n, width, generator=generator))
    return {"student": parts[0].requires_grad_(), "teacher": parts[1]}


def ours(student: torch.Tensor, teacher: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """The loss. The yardstick of the loss error, float64, also comes from the kernel: the reference forms every difference of
    two tokens, which takes minutes at n = 4096; the op's tests hold the kernel against it at smaller n."""
    return losses.token_graph_loss(student, teacher, backend=None if student.dtype == torch.float64 else backend)


def case(n: int, student: int, teacher: int, targets: tuple[Target, ...] = (), repeat: int = 1, **extra) -> Case:
    shape = f"n={n}, D={student}/{teacher}, k=8"
    return Case(
        name=f"token_graph_loss_{n}x{student}_{teacher}_fp32", op="token_graph", title="token_graph_loss", shape=shape,
        dtype="float32", inputs=partial(tokens, n, student, teacher), ours=ours, plain=token_graph,
        traffic=4 * n * (2 * student + teacher), targets=targets, repeat=repeat, **extra,
    )  # fmt: skip


CASES = (
    case(64, 64, 64, repeat=50),
    case(512, 192, 384, repeat=5),
    case(4096, 512, 512, targets=(Target(PLAIN, 3.0), Target(PLAIN, 3.0, "tuned"))),
)
