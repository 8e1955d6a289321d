"""`kdfast doctor`: backend_info in words, and a few seconds of measured speed against plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from kdfast.losses import distillation_loss, divergence_loss, kd_loss


def describe(info: Mapping[str, Any]) -> Iterator[str]:
    """backend_info() as lines: versions, then each backend with what it has or the reason why it is absent."""
    yield f"kdfast {info['kdfast']}, torch {info['torch']}, GPU: {info.get('gpu') or 'none'}"
    for name in ("cpu", "triton", "cuda"):
        found = info.get(name)
        if found is None:
            continue
        details = ", ".join(
            f"{key} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
            for key, value in found.items()
            if key not in ("available", "reason") and value is not None
        )
        state = "available" if found["available"] else f"not used: {found['reason']}"
        yield f"{name:9} {state}" + (f" ({details})" if details else "")
    yield "reference available (plain torch: every option, every device; used where nothing faster can run)"
    if info.get("forced_backend"):
        yield f"KDFAST_BACKEND forces {info['forced_backend']}"
    if not info["compiled"]:
        yield "The compiled core is missing: install a C++17 compiler and reinstall with KDFAST_CORE=1, which says what fails."


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _eager_kl(s: torch.Tensor, t: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    log_s, log_t = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


# What people write by hand, beside ours: (name, shape, ours, plain torch).
CASES: tuple[tuple[str, tuple[int, int], Loss, Loss], ...] = (
    ("kd_loss, T=4", (64, 10), lambda s, t, y: kd_loss(s, t), lambda s, t, y: _eager_kl(s, t, 4.0)),
    ("kd_loss, T=4", (128, 1000), lambda s, t, y: kd_loss(s, t), lambda s, t, y: _eager_kl(s, t, 4.0)),
    ("forward KL", (128, 16000), lambda s, t, y: divergence_loss(s, t), lambda s, t, y: _eager_kl(s, t)),
    (
        "CE + KL in one pass", (128, 16000), lambda s, t, y: distillation_loss(s, t, y).loss,
        lambda s, t, y: 0.5 * F.cross_entropy(s, y) + 0.5 * _eager_kl(s, t),
    ),
)  # fmt: skip


def bench_lines(seconds: float = 0.6) -> Iterator[str]:
    """Each case of CASES, ours and plain torch in turn for `seconds`: the ratio is the median over the turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"forward + backward on {device}, {torch.get_num_threads()} threads, float32 (a quick look; docs/benchmarks.md measures)"
    for name, (rows, classes), ours, plain in CASES:
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(rows, classes, generator=generator).to(device).requires_grad_()
        teacher = torch.randn(rows, classes, generator=generator).to(device)
        labels = torch.randint(classes, (rows,), generator=generator).to(device)

        def timed(loss: Loss, s=student, t=teacher, y=labels) -> float:
            start = time.perf_counter()
            torch.autograd.grad(loss(s, t, y), s)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        for loss in (ours, plain, ours, plain):  # first calls load code and memory
            timed(loss)
        turns: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while len(turns) < 5 or time.perf_counter() < end:
            turns.append((timed(ours), timed(plain)))
        ratio = median(theirs / mine for mine, theirs in turns)
        mine, theirs = (1000 * median(column) for column in zip(*turns))
        yield f"{name:20} {rows:>4} x {classes:<6} {mine:8.3f} ms   plain torch {theirs:8.3f} ms   {ratio:5.1f}x"
