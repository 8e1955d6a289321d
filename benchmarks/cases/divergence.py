"""Divergence rows: the goals of the release first, then every other kind, small class counts, maps, and whole heads with peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import divergence as plain
from benchmarks.baselines import peers
from benchmarks.case import PLAIN, Case, Inputs, Target, table_targets
from kdfast import losses


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Student and teacher that agree roughly, as in the middle of a training; labels drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, generator=generator) * 2
    teacher = student + torch.randn(*shape, generator=generator)
    return {"student": student.to(dtype).requires_grad_(), "teacher": teacher.to(dtype)}


def with_labels(*shape: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed + 1)
    return logits(*shape, seed=seed) | {"labels": torch.randint(shape[-1], shape[:-1], generator=generator)}


def head(rows: int, classes: int, width: int) -> Inputs:
    """Hidden states and output layers of both models; about a fifth of the rows is ignored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(classes, width) / width**0.5
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[: rows // 5]] = -100
    return {
        "hidden": draw(rows, width).requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher_hidden": draw(rows, width) * 2,
        "teacher_weight": draw(classes, width) / width**0.5,
        "labels": labels,
    }


def ours(kind: str, **options) -> Callable[..., Tensor]:
    return partial(losses.divergence_loss, kind=kind, **options)


def ours_head(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, backend=None
) -> Tensor:
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    return losses.divergence_loss(student, teacher, mask=labels != -100, backend=backend)


def one_pass(student: Tensor, teacher: Tensor, labels: Tensor, backend=None) -> Tensor:
    return losses.distillation_loss(student, teacher, labels, backend=backend).loss


def two_losses() -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        ce = losses.distillation_loss(student, teacher, labels, ce_weight=1.0, kd_weight=0.0).loss
        return 0.5 * ce + 0.5 * losses.divergence_loss(student, teacher)

    return loss


def torch_ce_and_ours() -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(student, labels) + 0.5 * losses.divergence_loss(student, teacher)

    return loss


def upcast() -> Callable[..., Tensor]:
    """The careful form for bf16 logits: float32 before the softmax."""
    return lambda student, teacher: plain.forward_kl(student.float(), teacher.float())


def traffic(elements: int, size: int = 4) -> int:
    """Student and teacher read once, the student's gradient written once."""
    return 3 * elements * size


LLM = 512 * 32000
TESTS = ("python_tests/losses/test_divergence.py",)

CASES = (
    Case(
        name="forward_kl_512x32000_fp32", op="divergence", title="forward KL", shape="512x32000", dtype="float32",
        inputs=partial(logits, 512, 32000), ours=ours("forward_kl"), plain=plain.forward_kl, traffic=traffic(LLM),
        peers={"TRL generalized_jsd_loss": partial(peers.trl_jsd, 0.0)},
        targets=table_targets(default=(15, 4), tuned=(4, 2.5)), tests=TESTS,
    ),
    Case(
        name="js_512x32000_fp32", op="divergence", title="JS, beta 0.5", shape="512x32000", dtype="float32",
        inputs=partial(logits, 512, 32000), ours=ours("js"), plain=plain.js, traffic=traffic(LLM),
        peers={"TRL generalized_jsd_loss": partial(peers.trl_jsd, 0.5)},
        targets=table_targets(default=(15, 3), tuned=(5, 2)), tests=TESTS,
    ),
    Case(
        name="forward_kl_128x151936_bf16", op="divergence", title="forward KL, bf16", shape="128x151936", dtype="bfloat16",
        inputs=partial(logits, 128, 151936, dtype=torch.bfloat16), ours=ours("forward_kl"), plain=plain.forward_kl,
        traffic=traffic(128 * 151936, 2), peers={"eager in float32": upcast},
        targets=table_targets(default=(10, 4), tuned=(3.5, 3.5)), tests=TESTS,
    ),
    Case(
        name="distillation_loss_512x32000_fp32", op="divergence", title="CE + forward KL in one pass", shape="512x32000",
        dtype="float32", inputs=partial(with_labels, 512, 32000), ours=one_pass, plain=plain.ce_and_forward_kl, traffic=traffic(LLM),
        peers={"two kdfast losses": two_losses, "F.cross_entropy + kdfast KL": torch_ce_and_ours},
        targets=tuple(Target("two kdfast losses", 1.6, allocator) for allocator in ("default", "tuned")), tests=TESTS,
    ),
    Case(
        name="kd_loss_64x10_fp32", op="divergence", title="kd_loss, T = 4", shape="64x10", dtype="float32",
        inputs=partial(logits, 64, 10), ours=losses.kd_loss, plain=partial(plain.forward_kl, temperature=4.0), traffic=traffic(640),
        peers={"torchdistill KDLoss": partial(peers.torchdistill_kd, 4.0)},
        targets=(Target(PLAIN, 1.0),), repeat=200, tests=TESTS,
    ),
    Case(
        name="reverse_kl_512x32000_fp32", op="divergence", title="reverse KL", shape="512x32000", dtype="float32",
        inputs=partial(logits, 512, 32000), ours=ours("reverse_kl"), plain=plain.reverse_kl, traffic=traffic(LLM),
        peers={"TRL generalized_jsd_loss": partial(peers.trl_jsd, 1.0)}, tests=TESTS,
    ),
    Case(
        name="tvd_512x32000_fp32", op="divergence", title="total variation", shape="512x32000", dtype="float32",
        inputs=partial(logits, 512, 32000), ours=ours("tvd"), plain=plain.tvd, traffic=traffic(LLM), tests=TESTS,
    ),
    Case(
        name="alpha_512x32000_fp32", op="divergence", title="alpha divergence, order 0.5", shape="512x32000", dtype="float32",
        inputs=partial(logits, 512, 32000), ours=ours("alpha"), plain=plain.alpha, traffic=traffic(LLM), tests=TESTS,
    ),
    Case(
        name="dkd_loss_4096x1000_fp32", op="divergence", title="decoupled KD", shape="4096x1000", dtype="float32",
        inputs=partial(with_labels, 4096, 1000), ours=losses.dkd_loss, plain=plain.dkd, traffic=traffic(4096 * 1000), tests=TESTS,
    ),
    Case(
        name="kd_loss_4096x1000_fp32", op="divergence", title="kd_loss, T = 4", shape="4096x1000", dtype="float32",
        inputs=partial(logits, 4096, 1000), ours=losses.kd_loss, plain=partial(plain.forward_kl, temperature=4.0),
        traffic=traffic(4096 * 1000), peers={"torchdistill KDLoss": partial(peers.torchdistill_kd, 4.0)}, tests=TESTS,
    ),
    Case(
        name="kd_loss_65536x100_fp32", op="divergence", title="kd_loss, T = 4", shape="65536x100", dtype="float32",
        inputs=partial(logits, 65536, 100), ours=losses.kd_loss, plain=partial(plain.forward_kl, temperature=4.0),
        traffic=traffic(65536 * 100), tests=TESTS,
    ),
    Case(
        name="forward_kl_nchw_4x21x256x256_fp32", op="divergence", title="forward KL over dim 1", shape="4x21x256x256", dtype="float32",
        inputs=partial(logits, 4, 21, 256, 256), ours=ours("forward_kl", dim=1), plain=plain.forward_kl_nchw,
        traffic=traffic(4 * 21 * 256 * 256), tests=TESTS,
    ),
    Case(
        name="head_forward_kl_512x32000_h256_fp32", op="divergence", title="two output layers + forward KL", shape="512x32000, H 256",
        dtype="float32", inputs=partial(head, 512, 32000, 256), ours=ours_head, plain=plain.head_forward_kl,
        # Logits of both models written and read, gradient written and read twice (for the hidden states and the weight).
        traffic=7 * LLM * 4, leaves=("hidden", "weight"),
        peers={
            "Liger chunked JSD, beta 0": partial(peers.liger_head, 0.0),
            "TRL generalized_jsd_loss": partial(peers.trl_head, 0.0),
            "F.linear_cross_entropy": peers.torch_linear_cross_entropy,
        },
        tests=TESTS,
    ),
)  # fmt: skip
