"""The Triton kernels on a GPU: values against the reference, no host synchronisation, capture in a CUDA graph."""

from __future__ import annotations

import os

import pytest
import torch
from tolerances import check_against_reference

from kdfast.losses import sinkhorn_kd_loss
from kdfast.ops import combine, dispatch, make_plan, route_topk, selective_kl, sinkhorn, sinkhorn_cost
from kdfast.ops.divergence import KINDS, divergence, divergence_reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU, not the interpreter",
)
EVERY_KIND = [(k, (1.0, 2.0) if k == "dkd" else 0.3) for k in KINDS]


def logits(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=g) * 3
    teacher = student + 0.7 * torch.randn(shape, generator=g)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
@pytest.mark.parametrize("shape", [(5, 100), (4, 32000), (600, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_within_the_error_budget(kind, beta, shape, dtype):
    student, teacher = logits(*shape, dtype=dtype)
    labels = torch.randint(shape[1], shape[:1]) if kind == "dkd" else None
    weight = torch.rand(shape[0])
    gradient = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for row_weight in (None, weight):

        def on(device, function, s, t, w=row_weight, **extra):
            moved = {k: v if v is None else v.to(device) for k, v in {"labels": labels, "row_weight": w}.items()}
            return function(s.to(device), t.to(device), kind=kind, beta=beta, temperature=2.0, **moved, **extra).cpu()

        check_against_reference(
            lambda s, t, on=on: on("cuda", divergence, s, t, backend="triton"),
            lambda s, t, on=on: on("cpu", divergence_reference, s, t),
            (student, teacher),
            floor=(1e-5, 1e-6),
            gradient_floor=(gradient, 2e-5),
        )


def check_capture(step, *inputs):
    """Capture fails on any host synchronisation; the replay must see new numbers in the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    for got, want in zip(captured, step()):
        assert torch.equal(got, want) and want.abs().max() > 0


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("shape", [(5, 100), (4, 32000), (600, 9000)])
def test_a_cuda_graph_captures_the_divergence(kind, shape):
    student, teacher = (x.detach().cuda() for x in logits(*shape))
    student.requires_grad_()
    weight = torch.full(shape[:1], 1 / shape[0], device="cuda")

    def step():
        loss = divergence(student, teacher, kind=kind, row_weight=weight, backend="triton")
        rows = divergence(student, teacher, kind=kind, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss * 2.0 + rows.sum(), student)

    check_capture(step, student)


@pytest.mark.parametrize("normalizer", ["valid", "selected", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selective_on_a_gpu_and_in_a_cuda_graph(normalizer, dtype):
    a, b = (x.detach().cuda().requires_grad_() for x in logits(2, 19, 33, 40, dtype=dtype))
    labels = torch.randint(19, (2, 33, 40), device="cuda")
    labels[:, 5] = 255

    def step(backend="triton"):
        out = selective_kl(a, b, labels, normalizer=normalizer, backend=backend)
        losses = out.loss_to_a.detach(), out.loss_to_b.detach()
        return *losses, *torch.autograd.grad(out.loss_to_a + 2.0 * out.loss_to_b, (a, b))

    for got, want in zip(step(), step("reference")):
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    check_capture(step, a)


@pytest.mark.parametrize("order", ["token", "choice"])
def test_routing_on_a_gpu_in_a_cuda_graph_and_the_same_bits_again(order):
    generator = torch.Generator().manual_seed(0)
    logits_ = torch.randn(700, 64, generator=generator).cuda().requires_grad_()
    x = torch.randn(700, 96, generator=generator).cuda().requires_grad_()

    def step(backend="triton"):
        routing = route_topk(logits_, 4, score="sigmoid", normalise=1.0, backend=backend)
        plan = make_plan(routing.ids, 64, capacity=60, order=order, backend=backend)
        y = combine(dispatch(x, plan, backend=backend) ** 2, routing.weights, plan, backend=backend)
        loss = (y**2).sum() + (routing.mean_probs**2).sum() + (routing.lse**2).sum()
        return routing.ids.float(), plan.order.float(), y.detach(), *torch.autograd.grad(loss, (logits_, x))

    first = step()
    for got, want in zip(first, step("reference")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step()))
    check_capture(step, x)


@pytest.mark.parametrize("options", [{}, {"order": "columns_first", "rho": (None, 0.5)}, {"tol": 1e-3}], ids=str)
@pytest.mark.parametrize("shape", [(3000, 4, 5), (40, 33, 64), (3, 128, 100), (2, 500, 300)], ids=str)
def test_sinkhorn_on_a_gpu_in_a_cuda_graph_and_the_same_bits_again(shape, options):
    """Several problems in a program, one, one of many registers, and passes."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(shape, generator=generator).cuda().requires_grad_()
    a = torch.full(shape[:-1], 1 / shape[-2], device="cuda", requires_grad=True)
    b = torch.full((*shape[:-2], shape[-1]), 1 / shape[-1], device="cuda", requires_grad=True)

    def step(backend="triton"):
        out = sinkhorn(cost, a, b, backend=backend, **options)
        value = sinkhorn_cost(cost, a, b, backend=backend, **options)
        loss = (value**2).sum() + (out.plan**2).sum() + out.f.sum()
        return value.detach(), *torch.autograd.grad(loss, (cost, a, b))

    first = step()
    for got, want in zip(first, step("reference")):
        scale = want.abs().max().item()
        # with tol a problem may stop an iteration later in other arithmetic: within tol of the marginals
        torch.testing.assert_close(got, want, rtol=1e-3, atol=(1e-2 if "tol" in options else 1e-5) * scale)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, step()))
    check_capture(step, cost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 3), (2, 40, 1000)], ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_kd_on_a_gpu_and_in_a_cuda_graph(shape, dtype, p):
    student, teacher = (x.detach().cuda() for x in logits(*shape, dtype=dtype))
    student.requires_grad_()

    def step(backend="triton"):
        loss = sinkhorn_kd_loss(student, teacher, p=p, reduction="mean", scale=1.0, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, student)

    for got, want in zip(step(), step("reference")):
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4 * scale)
    check_capture(step, student)
