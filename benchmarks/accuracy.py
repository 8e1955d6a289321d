"""Loss accuracy late in training: teacher logits = student + sigma noise, V = 131072, float32, against float64.

    python -m benchmarks.accuracy        measures and writes benchmarks/results/accuracy.json

The smaller sigma, the more the textbook sum of p (log p - log q) cancels: at sigma = 1e-3 the KL is 5e-7 and its terms are
a thousand times larger than their sum's share. The kernels sum non-negative terms instead. Each number is the worst
relative error of a row; a minus sign in the last column says that some row came out negative, which no divergence is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from benchmarks import machine
from kdfast.ops import divergence

CLASSES, ROWS = 131072, 16
SIGMAS = (1e-3, 1e-2, 0.3)
KINDS = ("forward_kl", "reverse_kl", "js")
RESULT = Path(__file__).with_name("results") / "accuracy.json"
BETA = 0.5


def textbook(kind: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum p (log p - log q), the mixture by logaddexp."""
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - BETA) * (log_q.exp() * (log_q - log_m)).sum(-1)


def kl_div(kind: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """F.kl_div with log_target."""

    def rows(log_input: Tensor, log_target: Tensor) -> Tensor:
        return F.kl_div(log_input, log_target, log_target=True, reduction="none").sum(-1)

    if kind == "forward_kl":
        return rows(log_q, log_p)
    if kind == "reverse_kl":
        return rows(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * rows(log_m, log_p) + (1 - BETA) * rows(log_m, log_q)


def m_log_m(kind: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Entropies subtracted: p log p - p log q, and for JS beta p log p + (1-beta) q log q - m log m."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (p * log_p).sum(-1) - (p * log_q).sum(-1)
    if kind == "reverse_kl":
        return (q * log_q).sum(-1) - (q * log_p).sum(-1)
    m = BETA * p + (1 - BETA) * q
    return (BETA * p * log_p + (1 - BETA) * q * log_q - m * m.log()).sum(-1)


FORMS: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "eager": textbook, "F.kl_div": kl_div, "M log M": m_log_m,
}  # fmt: skip


def measure() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for sigma in SIGMAS:
        student = torch.randn(ROWS, CLASSES, generator=generator)
        teacher = student + sigma * torch.randn(ROWS, CLASSES, generator=generator)
        for kind in KINDS:
            truth = divergence(student.double(), teacher.double(), kind=kind, beta=BETA, backend="reference")
            values = {"kdfast": divergence(student, teacher, kind=kind, beta=BETA)}
            log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
            values |= {name: form(kind, log_q, log_p) for name, form in FORMS.items()}
            for name, value in values.items():
                error = ((value.double() - truth) / truth).abs().max()
                rows.append({
                    "kind": kind, "sigma": sigma, "form": name, "truth": float(f"{truth.mean():.3g}"),
                    "error": float(f"{error:.2g}"), "negative": bool((value < 0).any()),
                })  # fmt: skip
    return rows


def update(force: bool = False) -> None:
    """Measures unless the result in the folder belongs to these sources."""
    if (
        not force
        and RESULT.exists()
        and json.loads(RESULT.read_text())["fingerprint"] == machine.fingerprint("divergence")
    ):
        return
    assert kdfast.backend_info()["compiled"], "the compiled core is missing"
    print("accuracy", flush=True)
    result = {
        "fingerprint": machine.fingerprint("divergence"),
        "rows": measure(),
        "classes": CLASSES,
        "count": ROWS,
        **machine.identity(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    update(force=True)
    for row in json.loads(RESULT.read_text())["rows"]:
        print(
            f"{row['kind']:12} sigma {row['sigma']:<6} {row['form']:9} {row['error']:.1e} {'negative' if row['negative'] else ''}"
        )
