"""All pairs: InfoNCE over tokens of two models, similarity patterns inside images, L1 cost of two batches of outputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines.pairwise import l1_cost, token_context, token_contrast
from benchmarks.case import PLAIN, Case, Inputs, Target
from kdfast import losses, ops

NO_LOSS = (Target(PLAIN, 1.0),)  # these have no goal of their own but this


def pair(student: tuple[int, ...], teacher: tuple[int, ...]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(shape, generator=generator) for shape in (student, teacher))
    return {"student": s.requires_grad_(), "teacher": t}


def cost(student: Tensor, teacher: Tensor, backend: str | None = None) -> Tensor:
    return ops.pairwise_cost(student, teacher, p=1, backend=backend).mean()


def contrast(n: int, width: int, repeat: int = 1) -> Case:
    return Case(
        name=f"token_contrast_loss_{n}x{width}_fp32", op="pairwise", title="token_contrast_loss", shape=f"n={n}, D={width}",
        dtype="float32", inputs=partial(pair, (n, width), (n, width)), ours=losses.token_contrast_loss, plain=token_contrast,
        traffic=4 * n * 3 * width, targets=NO_LOSS, repeat=repeat,
    )  # fmt: skip


def context(images: int, tokens: int, student: int, teacher: int) -> Case:
    return Case(
        name=f"token_context_loss_{images}x{tokens}_fp32", op="relation", title="token_context_loss",
        shape=f"{images} images of {tokens} tokens, D={student}/{teacher}", dtype="float32",
        inputs=partial(pair, (images, tokens, student), (images, tokens, teacher)), ours=losses.token_context_loss,
        plain=token_context, traffic=4 * images * tokens * (2 * student + teacher), targets=NO_LOSS,
    )  # fmt: skip


def l1(n: int, width: int, repeat: int = 1) -> Case:
    return Case(
        name=f"pairwise_cost_l1_{n}x{width}_fp32", op="pairwise", title="pairwise_cost, p=1", shape=f"N=M={n}, C={width}",
        dtype="float32", inputs=partial(pair, (n, width), (n, width)), ours=cost, plain=l1_cost, traffic=4 * n * 3 * width,
        targets=NO_LOSS, repeat=repeat,
    )  # fmt: skip


CASES = (
    contrast(64, 64, repeat=50), contrast(4096, 512),
    context(16, 49, 64, 128), context(64, 196, 192, 384), context(1, 4096, 192, 384),
    l1(64, 1000, repeat=20), l1(64, 32000),
)  # fmt: skip
