"""Transport problems: SinKD's loss of a batch, one large problem, many small ones; gradients through every iteration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import sinkhorn as baselines
from benchmarks.case import COMPILED, PLAIN, Case, Inputs, Target
from kdfast import losses, ops

KD_TESTS = ("python_tests/losses/test_sinkhorn.py", "python_tests/ops/test_pairwise.py")


def models(batch: int, classes: int) -> Inputs:
    """A student that half agrees with its teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    student = teacher / 2 + torch.randn(batch, classes, generator=generator)
    return {"student": student.requires_grad_(), "teacher": teacher}


def kd(student: Tensor, teacher: Tensor, backend: str | None = None) -> Tensor:
    return losses.sinkhorn_kd_loss(student, teacher, backend=backend)


def costs(*shape: int) -> Inputs:
    """Distances between random points of the unit cube, below 2: what exp(-C / 0.1) holds in float32."""
    generator = torch.Generator().manual_seed(0)
    *batch, n, m = shape
    x, y = torch.rand(*batch, n, 3, generator=generator), torch.rand(*batch, m, 3, generator=generator)
    return {"cost": torch.cdist(x, y).requires_grad_()}


def transport(cost: Tensor, backend: str | None = None) -> Tensor:
    return ops.sinkhorn_cost(cost, backend=backend).sum()


def points(n: int, m: int, width: int) -> Inputs:
    """Points of the unit cube, squared distances up to 1."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, width, generator=generator), torch.rand(m, width, generator=generator)
    return {"x": (x / width**0.5).requires_grad_(), "y": (y / width**0.5).requires_grad_()}


def transport_of_points(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    return ops.sinkhorn_cost_points(x, y, backend=backend).sum()


def pot() -> Callable[..., Tensor]:
    """POT's differentiable solver. Its 20 iterations begin with the columns; marginals of ones, as ours."""
    import ot

    def solve(cost: Tensor) -> Tensor:
        a, b = cost.new_ones(cost.shape[0]), cost.new_ones(cost.shape[1])
        return (ot.sinkhorn(a, b, cost, 0.1, numItermax=20, stopThr=0, warn=False) * cost).sum()

    return solve


def kd_case(batch: int, classes: int) -> Case:
    return Case(
        name=f"sinkhorn_kd_loss_{batch}x{classes}_fp32", op="sinkhorn", title="sinkhorn_kd_loss", shape=f"{batch}x{classes}",
        dtype="float32", inputs=partial(models, batch, classes), ours=kd, plain=baselines.sinkhorn_kd,
        traffic=3 * batch * classes * 4, targets=(Target(PLAIN, 5), Target(COMPILED, 2)), repeat=20 if classes < 100 else 4,
        tests=KD_TESTS,
    )  # fmt: skip


def large_case(size: int) -> Case:
    return Case(
        name=f"sinkhorn_cost_{size}x{size}_fp32", op="sinkhorn", title="sinkhorn_cost", shape=f"{size}x{size}", dtype="float32",
        inputs=partial(costs, size, size), ours=transport, plain=baselines.transport_cost, peers={"POT": pot},
        # The cost read and its gradient written; the iterations themselves could stay in cache.
        traffic=2 * size * size * 4, leaves=("cost",), targets=(Target(PLAIN, 8), Target("POT", 3)),
    )  # fmt: skip


CASES = (
    kd_case(16, 3),
    kd_case(64, 3),
    kd_case(16, 1000),
    kd_case(64, 1000),
    large_case(512),
    large_case(2048),
    Case(
        name="sinkhorn_cost_1024x16x16_fp32", op="sinkhorn", title="sinkhorn_cost", shape="1024 problems 16x16", dtype="float32",
        inputs=partial(costs, 1024, 16, 16), ours=transport, plain=baselines.transport_cost, traffic=2 * 1024 * 256 * 4,
        leaves=("cost",), targets=(Target(PLAIN, 10),),
    ),
    Case(
        name="sinkhorn_cost_points_2048x2048_d3_fp32", op="sinkhorn", title="sinkhorn_cost_points, no table of pairs",
        shape="2048 and 2048 points, D=3", dtype="float32", inputs=partial(points, 2048, 2048, 3), ours=transport_of_points,
        plain=baselines.transport_of_points, traffic=4 * 2048 * 3 * 4, leaves=("x", "y"),
        tests=("python_tests/ops/test_sinkhorn_points.py", "python_tests/ops/test_softmin.py"),
    ),
)  # fmt: skip
