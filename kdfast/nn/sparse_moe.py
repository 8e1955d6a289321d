"""SparseMoE: a feed-forward layer of E experts of which each row uses k, for any model."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.losses.module import LossOutput
from kdfast.losses.routing import importance_load_loss, load_balancing_loss, uniform_kl_loss
from kdfast.nn.expert_parallel import Exchange
from kdfast.ops.routing import Routing, route_topk
from kdfast.ops.routing_experts import ACTIVATIONS, grouped_linear, grouped_mlp
from kdfast.ops.routing_noise import drop_second_choice, jitter, noisy_logits
from kdfast.ops.routing_plan import Plan, combine, dispatch, expert_capacity, make_plan

BALANCE = ("load", "first_choice", "importance_load", "uniform_kl")
NOISE = ("normal", "jitter", "second_choice")


class SparseMoE(nn.Module):
    """y = sum_{e in S(x)} w_e(x) MLP_e(x) + sum of the shared experts of x, on the last axis of any tensor.

    S and w come from `kdfast.ops.route_topk` of the router's logits (float32 whatever x is), each expert is
    W2 act(W1 x + b1) + b2, or W2 (act(W1 x + b1) * W3 x) + b2 when `gated`.

        layer = SparseMoE(512, 1024, num_experts=32, top_k=2)
        y = layer(x)                                          x [..., 512] -> y [..., 512]
        loss = task_loss + moe_losses(model).loss             the weighted balance and z losses of all layers

    Args:
        d_model, d_hidden, num_experts, top_k: H, F, E, k.
        score, normalise, route_scale, groups, topk_groups: as in `route_topk`.
        activation: relu, gelu, gelu_tanh, silu or identity. gated: SwiGLU-like experts. bias: of the experts.
        router_bias: of the router. dropout: on the hidden rows of the experts, in training.
        num_shared: experts that every row uses, as one dense MLP of width num_shared * d_hidden (DeepSeek).
        capacity_factor: None or 0 is dropless; else C = ceil(factor k N / E) slots per expert, `priority` "token" or
            "choice". What is dropped adds nothing: put a residual around the layer.
        noise: None, "normal" (noisy top-k, Shazeer et al.), "jitter" (Switch; `jitter_amount`) or "second_choice" (GShard, k = 2).
            In training only, and forward then needs `generator=` (or `noise=`, the draws).
        balance: None, "load", "first_choice", "importance_load" or "uniform_kl"; balance_weight, z_weight: their factors.
        selection_bias: a buffer c added for the selection only; `update_selection_bias()` after each optimizer step moves it
            towards balance (DeepSeek-V3: no balance loss needed). skip_zero: leave out slots of weight exactly 0.

    After a forward pass in training, `aux_loss` (with gradient) and `aux_parts` (detached, unweighted) hold its losses and
    `load` the rows of each expert; they are not part of the state and are not copied or pickled.
    Under autocast the experts run in the autocast dtype. `kdfast.nn.expert_parallel` shares the experts out over processes.
    """

    load: Tensor
    selection_bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score: str = "softmax_after_topk",
        normalise: float | None = None,
        route_scale: float = 1.0,
        groups: int = 1,
        topk_groups: int = 1,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        router_bias: bool = True,
        dropout: float = 0.0,
        num_shared: int = 0,
        capacity_factor: float | None = None,
        priority: str = "token",
        noise: str | None = None,
        jitter_amount: float = 0.01,
        balance: str | None = "load",
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        selection_bias: bool = False,
        skip_zero: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("d_model", d_model),
            ("d_hidden", d_hidden),
            ("num_experts", num_experts),
            ("top_k", top_k),
        ):
            check_int(name, size, low=1)
        check_int("num_shared", num_shared)
        if top_k > num_experts:
            raise ValueError(f"top_k: expected at most num_experts ({num_experts}), got {top_k}")
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_number("dropout", dropout, low=0.0, high=1.0)
        if noise is not None:
            check_choice("noise", noise, NOISE)
        if noise == "second_choice" and top_k != 2:
            raise ValueError(f"noise: 'second_choice' needs top_k=2, got top_k={top_k}")
        if balance is not None:
            check_choice("balance", balance, BALANCE)
        expert_capacity(capacity_factor, 1, top_k, num_experts)  # raises for a bad factor
        self.d_model, self.d_hidden, self.num_experts, self.top_k = d_model, d_hidden, num_experts, top_k
        self.route_options: dict[str, Any] = dict(
            score=score, normalise=normalise, route_scale=route_scale, groups=groups, topk_groups=topk_groups
        )
        self.activation, self.dropout = activation, dropout
        self.capacity_factor, self.priority, self.skip_zero = capacity_factor, priority, skip_zero
        self.noise, self.jitter_amount = noise, jitter_amount
        self.balance, self.balance_weight, self.z_weight = balance, balance_weight, z_weight
        self.gate = nn.Linear(d_model, num_experts, bias=router_bias)
        self.noise_gate = nn.Linear(d_model, num_experts, bias=False) if noise == "normal" else None
        self.w1 = nn.Parameter(torch.empty(num_experts, d_hidden, d_model))
        self.b1 = nn.Parameter(torch.empty(num_experts, d_hidden)) if bias else None
        self.w2 = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, d_model)) if bias else None
        self.w3 = nn.Parameter(torch.empty(num_experts, d_hidden, d_model)) if gated else None
        shared = num_shared * d_hidden
        self.shared_in = nn.Linear(d_model, shared, bias=bias) if shared else None
        self.shared_gate = nn.Linear(d_model, shared, bias=False) if shared and gated else None
        self.shared_out = nn.Linear(shared, d_model, bias=bias) if shared else None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int32), persistent=False)
        self.aux_loss: Tensor | None = None
        self.aux_parts: dict[str, Tensor] = {}
        self.exchange: Exchange | None = None  # set by expert_parallel
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as nn.Linear initialises itself: uniform in +-1/sqrt(inputs)."""
        for parameter, inputs in (
            (self.w1, self.d_model), (self.b1, self.d_model), (self.w3, self.d_model), (self.w2, self.d_hidden), (self.b2, self.d_hidden),
        ):  # fmt: skip
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        if self.noise_gate is not None:
            nn.init.zeros_(self.noise_gate.weight)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x [..., H] -> [..., H]. mask: [...] bool, True = keep; other rows (padding) use no expert and give 0 (plus shared)."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected {self.d_model} features on the last axis, got shape {tuple(x.shape)}")
        flat = x.reshape(-1, self.d_model)
        kept = None if mask is None else mask.reshape(-1)
        routing, extra = self._route(flat, kept, generator, noise)
        ids = routing.ids
        if self.training and self.noise == "second_choice":
            ids = drop_second_choice(ids, routing.weights, uniform=noise, generator=generator)
        capacity = expert_capacity(self.capacity_factor, flat.shape[0], self.top_k, self.num_experts)
        plan = make_plan(
            ids, self.num_experts, capacity=capacity, order=self.priority,
            skip_zero=routing.weights if self.skip_zero else None, validate=False,
        )  # fmt: skip
        self.aux_loss, self.aux_parts = self._aux(routing, extra) if self.training else (None, {})
        if self.training:
            self.load = self.load + routing.counts
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            y = self._experts(flat.to(dtype), plan, routing.weights, dtype)
            if self.shared_in is not None:
                y = y + self._shared(flat.to(dtype), dtype)
        return y.reshape(x.shape)

    def _route(self, flat, mask, generator, noise) -> tuple[Routing, dict[str, Tensor]]:
        with torch.autocast(flat.device.type, enabled=False):
            wide = compute_dtype(flat)
            rows = flat.to(wide)
            if self.training and self.noise == "jitter":
                rows = jitter(rows, self.jitter_amount, uniform=noise, generator=generator)
            logits = F.linear(rows, self.gate.weight.to(wide), _as(self.gate.bias, wide))  # [N, E]
            extra = {}
            if self.training and self.noise_gate is not None:
                raw = F.linear(rows, self.noise_gate.weight.to(wide))
                noisy, std = noisy_logits(logits, raw, noise=noise, generator=generator)
                extra = {"logits": logits, "noisy_logits": noisy, "std": std}
                logits = noisy
            return route_topk(
                logits, self.top_k, bias=self.selection_bias, mask=mask, **self.route_options
            ), extra  # fmt: skip

    def _aux(self, routing: Routing, extra: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.exchange is not None:
            routing = self.exchange.statistics(routing)
        if self.balance == "importance_load":
            terms["balance"] = self.balance_weight, importance_load_loss(routing, **extra)
        elif self.balance == "uniform_kl":
            terms["balance"] = self.balance_weight, uniform_kl_loss(routing.mean_probs)
        elif self.balance is not None:
            first = self.balance == "first_choice"
            terms["balance"] = self.balance_weight, load_balancing_loss(routing, first_choice=first)
        kept = (routing.ids[:, 0] >= 0).sum().clamp_min(1)
        terms["z"] = self.z_weight, routing.lse.square().sum() / kept
        total = routing.lse.new_zeros(())
        for weight, term in terms.values():
            total = total + weight * term if weight else total
        return total, {name: term.detach() for name, (_, term) in terms.items()}

    def _experts(self, flat: Tensor, plan: Plan, weights: Tensor, dtype: torch.dtype) -> Tensor:
        if self.exchange is None:
            return self._own_experts(flat, plan, weights, dtype)
        return self.exchange.run(flat, plan, weights, lambda rows, own: self._own_experts(rows, own, None, dtype))

    def _own_experts(self, flat: Tensor, plan: Plan, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        w1, w2 = self.w1.to(dtype), self.w2.to(dtype)
        b1, b2, w3 = _as(self.b1, dtype), _as(self.b2, dtype), _as(self.w3, dtype)
        if not (self.dropout and self.training):
            return grouped_mlp(flat, plan, w1, b1, w2, b2, weights, activation=self.activation, w3=w3)
        rows = dispatch(flat, plan)
        hidden = ACTIVATIONS[self.activation](grouped_linear(rows, plan, w1, b1))
        hidden = hidden if w3 is None else hidden * grouped_linear(rows, plan, w3)
        return combine(grouped_linear(F.dropout(hidden, self.dropout), plan, w2, b2), weights, plan)

    def _shared(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = ACTIVATIONS[self.activation](_linear(self.shared_in, flat, dtype))
        if self.shared_gate is not None:
            hidden = hidden * _linear(self.shared_gate, flat, dtype)
        return _linear(self.shared_out, F.dropout(hidden, self.dropout, self.training), dtype)

    @torch.no_grad()
    def update_selection_bias(self, gamma: float = 1e-3) -> None:
        """c_e += gamma sign(mean(n) - n_e) with n the rows of each expert since the last call; then n starts again at 0.

        Call it after each optimizer step, on every rank with the same counts (all-reduce `load` first). DeepSeek-V3, section 2.1.2.
        """
        if self.selection_bias is None:
            raise ValueError("selection_bias: this layer has none; build it with selection_bias=True")
        load = self.load.to(self.selection_bias.dtype)
        self.selection_bias += gamma * torch.sign(load.mean() - load)
        self.load = torch.zeros_like(self.load)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's losses: a graph can be neither copied nor pickled."""
        return {**super().__getstate__(), "aux_loss": None, "aux_parts": {}}  # type: ignore[dict-item]

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.d_hidden}, num_experts={self.num_experts}, top_k={self.top_k}"


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _linear(layer: nn.Linear | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    assert layer is not None
    return F.linear(x, layer.weight.to(dtype), _as(layer.bias, dtype))


def moe_losses(model: nn.Module) -> LossOutput:
    """The weighted auxiliary losses of every SparseMoE in `model`, from its last forward pass in training, summed.

    parts: "balance" and "z", means over the layers, unweighted. A model without one gives 0.

    >>> loss = task_loss + moe_losses(model).loss
    """
    layers = [m for m in model.modules() if isinstance(m, SparseMoE) and m.aux_loss is not None]
    if not layers:
        return LossOutput(torch.zeros(()), {})
    names = sorted({name for layer in layers for name in layer.aux_parts})
    parts = {n: torch.stack([la.aux_parts[n] for la in layers if n in la.aux_parts]).mean() for n in names}
    return LossOutput(torch.stack([la.aux_loss for la in layers if la.aux_loss is not None]).sum(), parts)
