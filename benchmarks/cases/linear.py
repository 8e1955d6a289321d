"""LM heads: output layer and divergence from hidden states, at the vocabulary of Qwen. Time, and above all peak memory.

The plain form under torch.compile is left out: its code generator keeps the logits as well, and takes minutes for these shapes.
KDFAST_BENCH_HEAD="64,512,16": rows, classes and width of a trial at another size.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import linear as plain
from benchmarks.baselines import peers
from benchmarks.case import PLAIN, Inputs, Target
from benchmarks.large import LargeCase
from kdfast.losses import linear_distillation_loss

ROWS, CLASSES, WIDTH = map(int, os.environ.get("KDFAST_BENCH_HEAD", "2048,151936,512").split(","))


def head(rows: int, classes: int, width: int, dtype: torch.dtype, teacher_width: int | None = None) -> Inputs:
    """Hidden states and output layers of both models; a tenth of the rows is ignored."""
    generator = torch.Generator().manual_seed(0)
    teacher_width = teacher_width or width

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[: rows // 10]] = -100
    return {
        "hidden": draw(rows, width).requires_grad_(),
        "weight": draw(classes, width, scale=width**-0.5).requires_grad_(),
        "teacher_hidden": draw(rows, teacher_width, scale=2.0),
        "teacher_weight": draw(classes, teacher_width, scale=teacher_width**-0.5),
        "labels": labels,
    }


def ours(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, backend=None, kind="forward_kl"
) -> Tensor:  # fmt: skip
    return linear_distillation_loss(
        hidden, weight, teacher_hidden, labels, teacher_weight=teacher_weight, kind=kind, ce_weight=0.0, kd_weight=1.0,
        backend=backend,
    ).loss  # fmt: skip


def traffic(rows: int, classes: int, width: int, size: int) -> int:
    """Hidden states and heads of both models read, the gradients of the student's written; logits need not leave the caches."""
    return size * (3 * rows * width + 3 * classes * width)


def operations(rows: int, classes: int, width: int) -> float:
    """Logits of both models, gradients of the hidden states and of the head: four products of the rows that are kept."""
    return 4 * 2.0 * (rows - rows // 10) * classes * width


def targets(*names: str) -> tuple[Target, ...]:
    """At most 0.8 of the time of each."""
    return tuple(Target(name, 1.25) for name in (PLAIN, *names))


TESTS = ("python_tests/losses/test_linear.py", "python_tests/ops/test_sparse_divergence.py")
TORCHTUNE, LIGER, LIGER_JS, TORCH = (
    "torchtune's chunks",
    "Liger chunked JSD, beta 0",
    "Liger chunked JSD, beta 0.5",
    "F.linear_cross_entropy",
)

Case = partial(
    LargeCase, per_row=("hidden", "teacher_hidden", "labels"), leaves=("hidden", "weight"), compiled=False, tests=TESTS
)
SHAPE = f"{CLASSES}, H {WIDTH}"

CASES = (
    Case(
        name="linear_forward_kl_2048x151936_h512_fp32", op="linear_divergence", title="LM head + forward KL", shape=f"{ROWS}x{SHAPE}",
        dtype="float32", inputs=partial(head, ROWS, CLASSES, WIDTH, torch.float32), ours=ours, plain=plain.forward_kl,
        traffic=traffic(ROWS, CLASSES, WIDTH, 4), operations=operations(ROWS, CLASSES, WIDTH),
        peers={TORCHTUNE: plain.torchtune_chunks, LIGER: partial(peers.liger_head, 0.0), TORCH: peers.torch_linear_cross_entropy},
        targets=targets(TORCHTUNE, LIGER, TORCH),
    ),
    Case(
        name="linear_forward_kl_2048x151936_h512_bf16", op="linear_divergence", title="LM head + forward KL, bf16", shape=f"{ROWS}x{SHAPE}",
        dtype="bfloat16", inputs=partial(head, ROWS, CLASSES, WIDTH, torch.bfloat16), ours=ours, plain=plain.forward_kl,
        traffic=traffic(ROWS, CLASSES, WIDTH, 2), operations=operations(ROWS, CLASSES, WIDTH),
        peers={
            TORCHTUNE: plain.torchtune_chunks, LIGER: partial(peers.liger_head, 0.0),
        },
        targets=targets(TORCHTUNE, LIGER),
    ),
    Case(
        name="linear_js_512x151936_h512_bf16", op="linear_divergence", title="LM head + JS, bf16", shape=f"{ROWS // 4}x{SHAPE}",
        dtype="bfloat16", inputs=partial(head, ROWS // 4, CLASSES, WIDTH, torch.bfloat16), ours=partial(ours, kind="js"), plain=plain.js,
        traffic=traffic(ROWS // 4, CLASSES, WIDTH, 2), operations=operations(ROWS // 4, CLASSES, WIDTH),
        peers={LIGER_JS: partial(peers.liger_head, 0.5)}, targets=targets(LIGER_JS),
    ),
)  # fmt: skip
