"""Spec 16: SinKD's loss from logits, from points and from a kernel, its sequence form, and the appendix's POT and geomloss problems."""

import torch

from kdfast.losses import sinkhorn_divergence, sinkhorn_kd_loss
from kdfast.ops import pairwise_cost, sinkhorn, sinkhorn_cost

CONVERGED = {"n_iters": 20000, "tol": 1e-13}  # POT stops by its own test: both are run to the fixed point


def run(inputs, params):
    if "student_logits" in inputs:
        return from_logits(inputs["student_logits"], inputs["teacher_logits"], params)
    if "student" in inputs:
        order = "columns_first" if params.get("rows") == "teacher" else "rows_first"
        loss = sinkhorn_kd_loss(
            inputs["student"], inputs["teacher"], order=order, teacher_grad=True, **kd_options(params)
        )
        return {"loss": loss}
    if "kernel" in inputs:
        return {"plan": sinkhorn(-inputs["kernel"].log(), epsilon=1.0, n_iters=params["n_iters"]).plan}
    if "cost" in inputs:
        return with_marginals(inputs["cost"], inputs.get("a"), inputs.get("b"), params)
    if "blur" in params:
        names = ("p", "blur", "reach", "debias", "scaling", "diameter", "exact_unbalanced_grad")
        options = {name: params[name] for name in names if name in params}
        return {"value": sinkhorn_divergence(inputs["x"], inputs["y"], inputs.get("a"), inputs.get("b"), **options)}
    cost = pairwise_cost(inputs["x"], inputs["y"], p=params.get("p", 1))
    options = {"epsilon": params["epsilon"], "n_iters": params["n_iters"]}
    loss = params.get("scale", 1.0) * sinkhorn_cost(cost, **options).sum()
    return {"loss": loss, "cost": cost, "plan": sinkhorn(cost, **options).plan}


def kd_options(params):
    options = {name: params[name] for name in ("temperature", "epsilon", "n_iters", "p", "scale") if name in params}
    return options | {"reduction": "mean" if params.get("reduction") == "mean" else "sum"}


def from_logits(student, teacher, params):
    options = kd_options(params)
    temperature = options.get("temperature", 2.0)
    cost = pairwise_cost(torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1), p=1)
    order = "columns_first" if str(params.get("first_normalised", "rows")).startswith("columns") else "rows_first"
    plan = sinkhorn(cost, epsilon=options.get("epsilon", 0.1), n_iters=options.get("n_iters", 20), order=order).plan
    loss = sinkhorn_kd_loss(student, teacher, order=order, teacher_grad=True, **options)
    return {"loss": loss, "cost": cost, "plan": plan}


def with_marginals(cost, a, b, params):
    """POT: the balanced solver has the columns first, the unbalanced one the rows."""
    options = {"epsilon": params["reg"], **CONVERGED}
    if "reg_m" in params:
        rho = params["reg_m"]
        options |= {"rho": tuple(rho) if isinstance(rho, list) else rho, "reg_type": params.get("reg_type", "kl")}
    else:
        options |= {"order": "columns_first"}
    plan = sinkhorn(cost, a, b, **options).plan
    return {
        "plan": plan,
        "transport_cost": (plan * cost).sum(),
        "mass": plan.sum(),
        "row_sums": plan.sum(-1),
        "col_sums": plan.sum(-2),
    }
