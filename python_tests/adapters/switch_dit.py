"""Vectors of Switch-DiT: the mixture of a layer with its gate, and the prior loss with its matching."""

import torch

from kdfast.methods.switch_dit import (
    TimestepMoE,
    assignment_table,
    diffusion_prior_loss,
    diffusion_prior_table,
    match_columns,
    matching_cost,
    timestep_route,
)
from kdfast.ops import make_plan


def run(inputs, params):
    return prior(inputs, params) if "gate_logits_per_layer" in inputs else mixture(inputs, params)


def mixture(inputs, params):
    experts, k, x = params["num_experts"], params["k"], inputs["x"]
    layer = TimestepMoE(x.shape[-1], experts, k).double()
    weight = inputs["expert.weight"]
    if "out, in" in params.get("expert_weight_layout", "(E, in, out)"):
        weight = weight.transpose(1, 2)
    parameters = {
        "gate.weight": inputs["gate.weight"], "gate.bias": inputs["gate.bias"], "weight": weight, "bias": inputs["expert.bias"],
    }  # fmt: skip
    arguments = x, inputs["timestep_embedding_table"], inputs["timesteps"]
    mask, probs, assignment = torch.func.functional_call(layer, parameters, arguments)
    active = probs[inputs["timesteps"]]
    plan = make_plan(timestep_route(active, k).ids, experts)
    return {
        "mask": mask,
        "active_probs": active,
        "expert_count_in_batch": plan.counts,
        "binary_assignment_table": assignment,
        "route_sample_grouped_by_expert": plan.order[plan.order >= 0] // k,
    }


def prior(inputs, params):
    probs = inputs["gate_logits_per_layer"].softmax(-1)
    sizes = params["num_timesteps"], params["depth"], params["num_experts"], params["k"]
    table = diffusion_prior_table(*sizes, alpha=params["alpha"])
    cost = matching_cost(assignment_table(probs, params["k"]).movedim(0, 1).flatten(1), table)
    return {
        "prior_table": table,
        "matching_cost": cost[torch.arange(cost.shape[0]), match_columns(cost)].sum(),
        "jsd_loss": diffusion_prior_loss(
            probs,
            inputs["timesteps"],
            table,
            params["k"],
            columns=inputs["prior_column_for_gate_column"],
            eps=params["eps"],
        ),
    }
