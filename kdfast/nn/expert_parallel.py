"""Expert parallelism: the experts of a SparseMoE shared out over the ranks of a process group, rows travelling to them.

Each rank plans its own rows; in the plan they lie by expert, so also by rank. Counts are exchanged, then the rows; what came
is grouped by expert with a second plan, run, and sent back, and the gate's weights are applied where the row started. The
backward makes the same exchanges the other way round. Only rows travel, never weights or parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.ops.routing import Routing
from kdfast.ops.routing_plan import Plan, combine, dispatch, make_plan

if TYPE_CHECKING:
    from kdfast.nn.sparse_moe import SparseMoE

EXPERT_PARAMETERS = ("w1", "b1", "w2", "b2", "w3")
SYNC_BALANCE = (None, "load", "uniform_kl")


def expert_parallel(layer: SparseMoE, process_group: Any = None, *, sync_stats: bool = False) -> SparseMoE:
    """Keeps this rank's experts of `layer` and lets its rows travel; returns the layer, changed in place.

    Call it with equal layers on every rank, before the optimizer is made. Rank r of W keeps experts
    [r E / W, (r + 1) E / W); router and shared experts stay whole on each.

    With a loss that is the mean of the ranks' losses (what DistributedDataParallel computes) the experts' gradients are
    exact as they are: summed over all rows of the group and divided by W here. They differ from rank to rank, so keep DDP
    from averaging them:

        expert_parallel(layer)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameter_names(model))
        model = DistributedDataParallel(model)

    Args:
        process_group: its ranks share the experts; None: all. Every rank takes part in each forward, in the same order.
        sync_stats: the balance loss reads the counts and mean probabilities of all ranks (balance "load" or "uniform_kl");
            without it, of this rank.
    Capacity counts the rows of one rank. A state_dict holds this rank's experts.
    Raises:
        ValueError: num_experts not divisible by the number of ranks, no process group, a layer that is parallel already.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group: expected an initialised torch.distributed, call init_process_group first")
    if layer.exchange is not None:
        raise ValueError("layer: its experts are shared out already")
    world, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group: this rank is not a member of it")
    if layer.num_experts % world:
        raise ValueError(f"num_experts: expected a multiple of the {world} ranks of the group, got {layer.num_experts}")
    if sync_stats and layer.balance not in SYNC_BALANCE:
        raise ValueError(f"sync_stats: expected balance 'load' or 'uniform_kl', got {layer.balance!r}")
    share = layer.num_experts // world
    for name in EXPERT_PARAMETERS:
        whole = getattr(layer, name)
        if whole is not None:
            own = nn.Parameter(whole.detach()[rank * share : (rank + 1) * share].clone(), whole.requires_grad)
            if own.requires_grad:
                own.register_hook(lambda grad: grad / world)
            setattr(layer, name, own)
    layer.exchange = Exchange(process_group, world, sync_stats)
    return layer


def expert_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of `model` that differ from rank to rank, for DDP's list of what it ignores."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if getattr(module, "exchange", None) is not None
        for name in EXPERT_PARAMETERS
        if getattr(module, name) is not None
    ]


class Exchange:
    """What a layer needs of its process group."""

    def __init__(self, group: Any, world: int, sync_stats: bool) -> None:
        self.group, self.world, self.sync_stats = group, world, sync_stats

    def run(self, x: Tensor, plan: Plan, weights: Tensor, experts: Callable[[Tensor, Plan], Tensor]) -> Tensor:
        """combine(experts of all ranks (dispatch(x))): x [N, H] -> [N, H]. experts(rows, plan) runs this rank's, unweighted."""
        per_rank = plan.counts.view(self.world, -1)
        arriving = torch.empty_like(per_rank)  # [source rank, own expert]
        dist.all_to_all_single(arriving, per_rank.contiguous(), group=self.group)
        sent, received = torch.stack((per_rank.sum(1), arriving.sum(1))).tolist()  # one wait for the device
        rows = dispatch(x, plan)
        kept = sum(sent)
        here = _AllToAll.apply(rows[:kept], received, sent, self.group)
        own = torch.arange(per_rank.shape[1], dtype=torch.int32, device=x.device).repeat(self.world)
        ids = own.repeat_interleave(arriving.flatten(), output_size=sum(received)).unsqueeze(1)  # [R, 1]
        done = experts(here, make_plan(ids, per_rank.shape[1], validate=False))
        back = _AllToAll.apply(done, sent, received, self.group)
        return combine(torch.cat((back, back.new_zeros(len(rows) - kept, back.shape[1]))), weights, plan)

    def statistics(self, routing: Routing) -> Routing:
        """`routing` with the counts and mean probabilities of all ranks, if they are asked for."""
        if not self.sync_stats:
            return routing
        counts = routing.counts.clone()
        dist.all_reduce(counts, group=self.group)
        n = (routing.ids[:, 0] >= 0).sum().to(routing.mean_probs.dtype)
        total = n.clone()
        dist.all_reduce(total, group=self.group)
        share = torch.where(n > 0, n / total.clamp_min(1), 0.0)  # a rank without rows adds nothing
        probs = torch.where(n > 0, routing.mean_probs, 0.0)
        return routing._replace(counts=counts, mean_probs=_AllReduce.apply(probs * share, self.group))


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks and from them; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx, rows, received, sent, group):
        ctx.splits, ctx.group = (received, sent), group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx, grad):
        received, sent = ctx.splits
        return _exchange(grad, sent, received, ctx.group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks. Every rank's loss depends on every rank's part, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
