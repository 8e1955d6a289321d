"""The parts that the reasons in cases/*.toml name, measured apart:  python -m benchmarks.parts

Prints only. Run it on a quiet machine, after a change that touches one of these parts, and bring the reasons up to date.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.baselines import divergence as plain
from benchmarks.cases.divergence import logits as draw
from kdfast import losses, ops


def best_ms(call: Callable[[], object], seconds: float = 1.0) -> float:
    """The shortest of the calls that fit into `seconds`, after three that do not count."""
    for _ in range(3):
        call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def routing() -> None:
    for rows in (16, 4096):
        logits = torch.randn(rows, 256)
        print(f"route_topk forward {rows}x256 k=8: {best_ms(partial(ops.route_topk, logits, 8)):.3f} ms")
    ids = ops.route_topk(torch.randn(4096, 256), 8).ids
    print(f"make_plan 4096x8 of 256: {best_ms(partial(ops.make_plan, ids, 256)):.3f} ms")


def products() -> None:
    """Large; those of an expert; those of a chunk of an LM head: all classes or a part, few rows or twice as many, and bfloat16."""
    head = [(rows, 512, classes) for rows in (96, 208) for classes in (4096, 151936)]
    for dtype, shapes in ((torch.float32, [(2048, 2048, 2048), (128, 512, 1024), *head]), (torch.bfloat16, head[:1])):
        for n, k, m in shapes:
            a, b = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype).T
            rate = 2e-6 * n * k * m / best_ms(partial(torch.mm, a, b))
            print(f"product {n}x{k}x{m} {str(dtype).removeprefix('torch.')}: {rate:.0f} GFLOP/s")


def short_rows() -> None:
    """kd_loss, forward + backward, where calls weigh as much as arithmetic."""

    def step(loss: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor) -> None:
        loss(student, teacher).backward()
        student.grad = None

    for rows, classes in ((64, 10), (256, 10), (1024, 10), (1024, 100)):
        inputs = draw(rows, classes).values()
        forms = (losses.kd_loss, partial(plain.forward_kl, temperature=4.0))
        ours, eager = (best_ms(partial(step, form, *inputs)) for form in forms)
        print(f"kd_loss {rows}x{classes}: {ours:.3f} ms, plain torch {eager:.3f} ms")


if __name__ == "__main__":
    routing()
    products()
    short_rows()
