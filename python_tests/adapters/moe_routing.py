"""Vectors of the router: scores and their gradients, balance losses, and dispatch plans."""

import warnings

import torch

from kdfast.losses import importance_load_loss, load_balancing_loss, router_z_loss, uniform_kl_loss, usage_cv_loss
from kdfast.ops import dense_weights, make_plan, noisy_logits, route_topk


def run(inputs, params):
    with warnings.catch_warnings():  # one expert with a normalised weight: its gate has no gradient, as the numbers say
        warnings.filterwarnings("ignore", "route_topk: with k=1")
        return plans(inputs, params) if "expert_ids" in inputs else gate(inputs, params)


def plans(inputs, params):
    ids, experts = inputs["expert_ids"], params["num_experts"]
    options = dict(block=params.get("block", 64))
    plan = make_plan(ids, experts, **options)
    order = plan.order[plan.order >= 0]
    padded = plan.padded_offsets[-1]
    out = {
        "slot_order_sorted_by_expert": order,
        "token_of_slot": order // ids.shape[1],
        "counts": plan.counts,
        "segment_ends": plan.offsets[1:],
        "padded_counts": plan.padded_offsets.diff(),
        "padded_segment_ends": plan.padded_offsets[1:],
        "padded_row_to_slot": plan.row_slot[:padded],
        "block_expert": plan.block_expert[plan.block_expert >= 0],
        "inverse": plan.inverse.flatten(),
    }
    for order in ("token", "choice"):
        limited = make_plan(ids, experts, capacity=params.get("capacity"), order=order, **options)
        out[f"position_in_expert_{order}_major"] = limited.position.flatten()
        out[f"kept_{order}_major"] = (limited.inverse.flatten() >= 0).long()
    return out


def score_of(name, params):
    """(score, normalise) for the description in `params`; the divisor of a softmax or sigmoid may be stated as normalise_p."""
    name = name.lower()
    if "noisy" in name or "after" in name:
        return "softmax_after_topk", None
    if "sigmoid" in name:
        return "sigmoid", params.get("normalise_p", 1.0)
    if "softmax" in name:
        return "softmax", params.get("normalise_p")
    return ("mean" if "mean" in name else "logits"), None


def linear(x, weight, bias):
    """x W^T for a weight stored (E, H), x W for one stored (H, E)."""
    weight = weight if weight.shape[1] == x.shape[-1] else weight.t()
    return torch.nn.functional.linear(x, weight, bias)


def gate(inputs, params):
    weight = inputs.get("gate.weight", inputs.get("w_gate"))
    logits = inputs["logits"] if "logits" in inputs else linear(inputs["x"], weight, inputs.get("gate.bias"))
    k = params["k"]
    score, normalise = score_of(params["score"], params)
    noisy, std = logits, None
    draws = inputs.get("standard_normal_noise")
    if draws is not None:
        name = next(n for n in inputs if "noise" in n and n != "standard_normal_noise")
        noisy, std = noisy_logits(logits, linear(inputs["x"], inputs[name], inputs.get("noise.bias")), noise=draws)
    routing = route_topk(
        noisy, k, score=score, normalise=normalise, route_scale=params.get("route_scale", 1.0),
        bias=inputs.get("selection_bias"), groups=params.get("n_groups", 1), topk_groups=params.get("topk_groups", 1),
    )  # fmt: skip
    ids, weights = routing.ids.long(), routing.weights
    ascending = ids.argsort(dim=-1)
    by_id = ids.gather(1, ascending), weights.gather(1, ascending)
    descending = by_id[1].argsort(dim=-1, descending=True, stable=True)  # equal weights: ascending id
    probs = logits.softmax(-1)
    if "noisy" in params["score"].lower():
        clean = None if std is None else logits
        balance = importance_load_loss(routing, logits=clean, noisy_logits=None if std is None else noisy, std=std)
    else:
        balance = load_balancing_loss(routing, first_choice="first" in str(params.get("balance", "")))
    return {
        "logits": logits,
        "noisy_logits": noisy,
        "std": std,
        "probs": probs,
        "lse": routing.lse,
        "mean_probs": routing.mean_probs,
        "experts_ascending_id": by_id[0],
        "weights_same_order": by_id[1],
        "experts_descending_weight": by_id[0].gather(1, descending),
        "weights": by_id[1].gather(1, descending),
        "tokens_per_expert": routing.counts,
        "dense_weights": dense_weights(routing),
        "importance": dense_weights(routing).sum(0),
        "balance_loss": params.get("balance_weight", 1.0) * balance,
        "router_z_loss": params.get("zloss_weight", 1.0) * router_z_loss(logits),
        "uniform_kl_loss": uniform_kl_loss(probs),
        "cv_loss": usage_cv_loss(probs),
    }
