"""What is measured on a GPU. Plain forms and peers are those of the CPU's benchmarks (benchmarks/baselines)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import divergence as plain
from benchmarks.baselines import linear as plain_linear
from benchmarks.baselines import pairwise as plain_pairwise
from benchmarks.baselines import selective, sinkhorn, token_graph
from benchmarks.case import COMPILED, PLAIN, Function, Inputs
from benchmarks.cases import linear as linear_cases
from kdfast import losses, ops

TRITON, CUDA = "kdfast triton", "kdfast cuda"  # `ours` with backend="triton" and "cuda"; the second where it can run
Source = torch.Generator


@dataclass(frozen=True)
class Target:
    """Wanted of `of` (the faster of ours unless named). `what`:

    "ms": at most; "x": time(versus) / time at least; "copy": share of the copy bandwidth at `traffic` at least;
    "memory": peak(versus) / peak at least; "mb": peak at most.
    """

    what: str
    value: float
    versus: str = PLAIN
    mode: str = "fwd+bwd"
    of: str | None = None


@dataclass(frozen=True)
class GpuCase:
    name: str  # also the result's file name
    op: str
    title: str
    shape: str
    dtype: str
    inputs: Callable[[Source], Inputs]  # on the generator's device; the leaves require grad
    ours: Function  # takes backend=
    plain: Function | None
    traffic: int  # bytes that any implementation must move, forward + backward
    leaves: tuple[str, ...] = ("student",)
    upstream: str | None = (
        None  # the input that is handed to backward instead of to the functions; None: they return a loss
    )
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)  # loaders; ImportError: left out
    targets: tuple[Target, ...] = ()
    graph: bool = False  # also as a replayed CUDA graph
    flop: float = 0.0  # of the matrix products, forward + backward
    compiled: bool = True
    tolerance: float = 0.05  # of a peer's loss against ours


def draw(source: Source, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=source, device=source.device) * scale).to(dtype)


def integers(source: Source, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=source, device=source.device)


# ---------------------------------------------------------------- divergences
def logits(rows: int, classes: int, dtype: torch.dtype, source: Source) -> Inputs:
    """Student and teacher that agree roughly, as in the middle of a training."""
    student = draw(source, rows, classes, dtype=dtype, scale=2.0)
    teacher = (student + draw(source, rows, classes, dtype=dtype)).to(dtype)
    return {"student": student.requires_grad_(), "teacher": teacher}


def liger_kl() -> Function:
    """Liger's KL, with the two log-softmaxes it leaves to its caller."""
    from liger_kernel.transformers import LigerKLDIVLoss

    module = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda student, teacher: module(student.log_softmax(-1), teacher.log_softmax(-1))


def liger_jsd() -> Function:
    from liger_kernel.transformers import LigerJSD

    module = LigerJSD(beta=0.5)
    return lambda student, teacher: module(student.log_softmax(-1), teacher.log_softmax(-1))


def divergence_case(
    rows: int, classes: int, dtype: torch.dtype, kind: str, form: Function, targets: tuple[Target, ...], **extra
) -> GpuCase:
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return GpuCase(
        name=f"{kind}_{rows}x{classes}_{short}", op="divergence", title=kind.replace("_", " "), shape=f"{rows}x{classes}",
        dtype=short, inputs=partial(logits, rows, classes, dtype), ours=partial(losses.divergence_loss, kind=kind), plain=form,
        traffic=3 * rows * classes * dtype.itemsize, targets=targets, **extra,
    )  # fmt: skip


LLM_KL = (
    Target("ms", 2.9, of=TRITON), Target("ms", 2.0, of=CUDA), Target("x", 6, PLAIN), Target("x", 1.5, COMPILED),
)  # fmt: skip


# ---------------------------------------------------------------- the other ops
def maps(batch: int, classes: int, height: int, width: int, source: Source) -> Inputs:
    """Two models that each know half of the pixels better; 5 % of the pixels has no label."""
    labels = integers(source, classes, batch, height, width)
    right = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float() * 2
    a, b = (draw(source, batch, classes, height, width) + right for _ in range(2))
    labels[torch.rand(labels.shape, generator=source, device=source.device) < 0.05] = 255
    return {"logits_a": a.requires_grad_(), "logits_b": b, "labels": labels}


def select(logits_a: Tensor, logits_b: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
    return losses.selective_kd_loss(logits_a, logits_b, labels, backend=backend).loss


def batch(rows: int, classes: int, source: Source) -> Inputs:
    teacher = draw(source, rows, classes, scale=3.0)
    return {"student": (teacher / 2 + draw(source, rows, classes)).requires_grad_(), "teacher": teacher}


def costs(*shape: int, source: Source) -> Inputs:
    """Distances between random points of the unit cube."""
    *problems, n, m = shape
    x, y = (torch.rand(*problems, size, 3, generator=source, device=source.device) for size in (n, m))
    return {"cost": torch.cdist(x, y).requires_grad_()}


def transport(cost: Tensor, backend: str | None = None) -> Tensor:
    return ops.sinkhorn_cost(cost, backend=backend).sum()


def points(n: int, width: int, source: Source) -> Inputs:
    """Two sets of points of the unit cube, scaled to squared distances of at most 1."""
    x, y = (torch.rand(n, width, generator=source, device=source.device) / width**0.5 for _ in range(2))
    return {"x": x.requires_grad_(), "y": y.requires_grad_()}


def transport_of_points(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    return ops.sinkhorn_cost_points(x, y, backend=backend).sum()


def tokens(n: int, width: int, source: Source) -> Inputs:
    """Tokens of images: clusters with spread, so that neighbours are near and the graphs are not empty."""
    near = integers(source, max(n // 32, 2), n)
    student, teacher = (draw(source, max(n // 32, 2), width)[near] + draw(source, n, width) for _ in range(2))
    return {"student": student.requires_grad_(), "teacher": teacher}


def router(rows: int, experts: int, k: int, source: Source) -> Inputs:
    return {"logits": draw(source, rows, experts).requires_grad_(), "bias": draw(source, experts, scale=0.1),
            "cotangent": 1 + draw(source, rows, k)}  # fmt: skip


GROUPS, KEPT_GROUPS = 8, 4


def route(logits: Tensor, bias: Tensor, k: int = 8, backend: str | None = None) -> Tensor:
    """DeepSeek-V3's router: sigmoid scores, bias for the choice, 4 of 8 groups, weights divided by their sum."""
    routing = ops.route_topk(logits, k, score="sigmoid", normalise=1.0, bias=bias, groups=GROUPS, topk_groups=KEPT_GROUPS,
                             backend=backend)  # fmt: skip
    ops.make_plan(routing.ids, logits.shape[1], backend=backend)
    return routing.weights


def plain_route(logits: Tensor, bias: Tensor, k: int = 8) -> Tensor:
    scores = logits.sigmoid()
    choice = (scores + bias).unflatten(-1, (GROUPS, -1))
    groups = choice.topk(2, -1).values.sum(-1).topk(KEPT_GROUPS, -1).indices
    kept = torch.zeros_like(choice[..., 0], dtype=torch.bool).scatter(-1, groups, True)
    ids = choice.masked_fill(~kept[..., None], -torch.inf).flatten(-2).topk(k, -1).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    order = ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    torch.bincount(ids.flatten(), minlength=logits.shape[1]).cumsum(0)
    return weights


def expert_rows(rows: int, width: int, k: int, experts: int, source: Source) -> Inputs:
    chosen = ops.route_topk(draw(source, rows, experts), k)
    plan = ops.make_plan(chosen.ids, experts)
    return {
        "rows": draw(source, rows * k, width, dtype=torch.bfloat16).requires_grad_(), "weights": chosen.weights.requires_grad_(),
        "order": plan.order, "inverse": plan.inverse, "cotangent": draw(source, rows, width, dtype=torch.bfloat16),
    }  # fmt: skip


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, backend: str | None = None) -> Tensor:
    """Of a plan, combine reads order and inverse only."""
    plan = ops.Plan(order, inverse, order, order, inverse, order, order, order, 1)
    return ops.combine(rows, weights, plan, backend=backend)


def plain_combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    count, k = inverse.shape
    weighted = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, order // k, weighted)


def heads(rows: int, width: int, classes: int, source: Source) -> Inputs:
    half = torch.bfloat16
    return {
        "hidden": draw(source, rows, width, dtype=half).requires_grad_(),
        "weight": draw(source, classes, width, dtype=half, scale=width**-0.5).requires_grad_(),
        "teacher_hidden": draw(source, rows, width, dtype=half, scale=2.0),
        "teacher_weight": draw(source, classes, width, dtype=half, scale=width**-0.5),
        "labels": integers(source, classes, rows),
    }


def liger_linear_jsd() -> Function:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda hidden, weight, teacher_hidden, teacher_weight, labels: module(
        hidden, weight, teacher_hidden, teacher_weight
    )


def head_case(rows: int, width: int, classes: int, kind: str, form: Function, targets, **extra) -> GpuCase:
    return GpuCase(
        name=f"linear_{kind}_{rows}x{width}x{classes}_bf16", op="linear_divergence", title=f"LM head + {kind.replace('_', ' ')}",
        shape=f"{rows}x{width}x{classes}", dtype="bf16", inputs=partial(heads, rows, width, classes),
        ours=partial(linear_cases.ours, kind=kind), plain=form, traffic=2 * 3 * width * (rows + classes), leaves=("hidden", "weight"),
        flop=4 * 2.0 * rows * width * classes, targets=targets, compiled=False, **extra,
    )  # fmt: skip


HALF = torch.bfloat16
PIXELS = 8 * 512 * 1024
CASES = (
    divergence_case(8192, 128256, HALF, "forward_kl", plain.forward_kl, (*LLM_KL, Target("x", 4, "Liger KL + log-softmaxes")),
                    peers={"Liger KL + log-softmaxes": liger_kl}),
    divergence_case(8192, 128256, HALF, "reverse_kl", plain.reverse_kl, LLM_KL),
    divergence_case(8192, 128256, HALF, "js", plain.js, (Target("ms", 4.0), Target("x", 5, "Liger JSD + log-softmaxes")),
                    peers={"Liger JSD + log-softmaxes": liger_jsd}),
    divergence_case(65536, 1000, HALF, "forward_kl", plain.forward_kl, (Target("copy", 0.85),)),
    divergence_case(16384, 100, HALF, "forward_kl", plain.forward_kl, (Target("copy", 0.85),), graph=True),
    GpuCase("selective_kd_8x19x512x1024_fp32", "selective", "selective_kd_loss, one direction", "8x19x512x1024", "fp32",
            partial(maps, 8, 19, 512, 1024), select, selective.selective_kd, PIXELS * (19 * 4 * 3 + 8), ("logits_a",),
            targets=(Target("ms", 0.30), Target("x", 8, PLAIN), Target("x", 3, COMPILED))),
    GpuCase("sinkhorn_kd_64x1000_fp32", "sinkhorn", "sinkhorn_kd_loss, 20 iterations", "64x1000", "fp32", partial(batch, 64, 1000),
            losses.sinkhorn_kd_loss, sinkhorn.sinkhorn_kd, 3 * 64 * 1000 * 4, graph=True,
            targets=(Target("ms", 0.040, mode="graph"), Target("x", 20, PLAIN))),
    GpuCase("sinkhorn_cost_4096x64x64_fp32", "sinkhorn", "sinkhorn_cost, 20 iterations", "4096 problems 64x64", "fp32",
            lambda source: costs(4096, 64, 64, source=source), transport, sinkhorn.transport_cost, 2 * 4096 * 64 * 64 * 4, ("cost",),
            targets=(Target("x", 20, PLAIN), Target("x", 5, COMPILED))),
    GpuCase("sinkhorn_cost_2048x2048_fp32", "sinkhorn", "sinkhorn_cost, 20 iterations", "2048x2048", "fp32",
            lambda source: costs(2048, 2048, source=source), transport, sinkhorn.transport_cost, 2 * 2048 * 2048 * 4, ("cost",),
            targets=(Target("x", 5, PLAIN),)),
    GpuCase("sinkhorn_points_8192x64_fp32", "sinkhorn", "sinkhorn_cost_points, 20 iterations", "8192 and 8192 points, D=64", "fp32",
            partial(points, 8192, 64), transport_of_points, sinkhorn.transport_of_points, 4 * 8192 * 64 * 4, ("x", "y"),
            flop=20 * 2 * 5 * 2.0 * 8192 * 8192 * 64),
    GpuCase("token_graph_8192x768_k16_fp32", "token_graph", "token_graph_loss", "n=8192, D=768, k=16", "fp32",
            partial(tokens, 8192, 768), partial(losses.token_graph_loss, k=16), partial(token_graph.token_graph, k=16),
            3 * 8192 * 768 * 4, flop=2 * 2.0 * 8192 * 8192 * 768, targets=(Target("x", 4, PLAIN), Target("memory", 20, PLAIN))),
    GpuCase("token_contrast_8192x768_fp32", "pairwise", "token_contrast_loss", "n=8192, D=768", "fp32", partial(tokens, 8192, 768),
            losses.token_contrast_loss, plain_pairwise.token_contrast, 3 * 8192 * 768 * 4, flop=3 * 2.0 * 8192 * 8192 * 768),
    GpuCase("route_8192x256_k8_fp32", "routing", "route_topk (sigmoid, groups) + make_plan", "8192x256, k=8", "fp32",
            partial(router, 8192, 256, 8), route, plain_route, 3 * 8192 * 256 * 4, ("logits",), "cotangent", graph=True, compiled=False,
            targets=(Target("ms", 0.020, mode="graph forward"),)),
    GpuCase("combine_4096x7168_k8_bf16", "routing", "combine", "4096 tokens, H=7168, k=8", "bf16", partial(expert_rows, 4096, 7168, 8, 256),
            combine, plain_combine, 4096 * 7168 * 2 * (3 * 8 + 2), ("rows", "weights"), "cotangent", targets=(Target("copy", 0.80),)),
    head_case(8192, 4096, 128256, "forward_kl", plain_linear.forward_kl, (Target("ms", 52.0), Target("mb", 1100.0))),
    head_case(8192, 4096, 128256, "js", plain_linear.js, (Target("ms", 55.0), Target("x", 1.5, "Liger fused linear JSD")),
              peers={"Liger fused linear JSD": liger_linear_jsd}),
)  # fmt: skip
