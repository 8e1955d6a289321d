"""Mixture-of-experts routing: scores with a plan, the weighted sum of expert outputs, and a whole sparse layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import routing as baselines
from benchmarks.case import PLAIN, Case, Inputs, Target
from kdfast import ops

EXPERTS = 256


def draw(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def router_inputs(rows: int, experts: int, k: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = draw(generator, rows, experts)
    return {"logits": logits.requires_grad_(), "cotangent": 1 + draw(generator, rows, k)}


def route(logits: Tensor, cotangent: Tensor, backend: str | None = None) -> Tensor:
    k = cotangent.shape[1]
    routing = ops.route_topk(logits, k, score="softmax", normalise=1.0, backend=backend)
    ops.make_plan(routing.ids, logits.shape[1], backend=backend)
    return (routing.weights * cotangent).sum()


def combine_inputs(tokens: int, width: int, k: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    routing = ops.route_topk(draw(generator, tokens, EXPERTS), k)
    plan = ops.make_plan(routing.ids, EXPERTS)
    rows = draw(generator, tokens * k, width)
    return {
        "rows": rows.requires_grad_(), "weights": routing.weights.requires_grad_(), "order": plan.order, "inverse": plan.inverse,
        "cotangent": 0.1 + draw(generator, tokens, width),
    }  # fmt: skip


def combine(
    rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, cotangent: Tensor, backend: str | None = None
) -> Tensor:
    """Of a plan, combine reads order and inverse only."""
    plan = ops.Plan(order, inverse, order, order, inverse, order, order, order, 1)
    return (ops.combine(rows, weights, plan, backend=backend) * cotangent).sum()


def layer_inputs(tokens: int, width: int, hidden: int, experts: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": draw(generator, tokens, width),
        "gate": draw(generator, experts, width, scale=width**-0.5),
        "w1": draw(generator, experts, hidden, width, scale=width**-0.5),
        "w2": draw(generator, experts, width, hidden, scale=hidden**-0.5),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()} | {
        "cotangent": 0.1 + draw(generator, tokens, width)
    }


def layer(
    x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, cotangent: Tensor, k: int, backend: str | None = None
) -> Tensor:
    routing = ops.route_topk(x @ gate.t(), k, backend=backend)
    plan = ops.make_plan(routing.ids, gate.shape[0], backend=backend)
    y = ops.grouped_mlp(x, plan, w1, None, w2, None, routing.weights, backend=backend)
    return (y * cotangent).sum()


CASES = (
    Case(
        name="route_topk_make_plan_4096x256_k8_fp32", op="routing", title="route_topk + make_plan", shape="4096x256, k=8", dtype="float32",
        inputs=partial(router_inputs, 4096, 256, 8), ours=route, plain=baselines.route,
        # Logits read twice, gradient written once; ids, weights and the plan are a tenth of that.
        traffic=3 * 4096 * 256 * 4, leaves=("logits",), targets=(Target(PLAIN, 8),), tests=("python_tests/ops/test_routing_plan.py",),
        compiled=False,  # argsort and bincount fall back to eager: nothing is compiled but the softmax
    ),
    Case(
        name="combine_1024x7168_k8_fp32", op="routing", title="combine", shape="1024x7168, k=8", dtype="float32",
        inputs=partial(combine_inputs, 1024, 7168, 8), ours=combine, plain=baselines.combine,
        # Rows read in the forward and, for the weights' gradient, in the backward; their gradient written.
        traffic=3 * 8 * 1024 * 7168 * 4, leaves=("rows", "weights"), targets=(Target(PLAIN, 3),),
        tests=("python_tests/ops/test_routing_plan.py",),
    ),
    Case(
        name="sparse_moe_2048x512x1024_e32_k2_fp32", op="routing", title="SparseMoE layer", shape="2048x512, F=1024, E=32, k=2",
        dtype="float32", inputs=partial(layer_inputs, 2048, 512, 1024, 32), ours=partial(layer, k=2),
        plain=partial(baselines.expert_loop, k=2),
        # Both weight tensors read twice (forward, backward) and their gradients written.
        traffic=3 * 2 * 32 * 512 * 1024 * 4, leaves=("x", "gate", "w1", "w2"), targets=(Target(PLAIN, 2),),
        tests=("python_tests/ops/test_routing_plan.py", "python_tests/nn/test_sparse_moe.py"),
        compiled=False,  # the loop's row counts depend on the data: every expert breaks the graph
    ),
)  # fmt: skip
