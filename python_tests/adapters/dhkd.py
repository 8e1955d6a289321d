"""Vectors of dhkd: both logit losses, the projection of gradients, and a small network from end to end."""

import torch
import torch.nn.functional as F

from kdfast.methods.dhkd import align_gradients, aligned_loss, binary_kl_loss, binary_kl_norm_loss, dhkd_loss

LOSSES = {"binary_kl_norm": binary_kl_norm_loss, "binary_kl": binary_kl_loss}


def run(inputs, params):
    options = {"temperature": params["temperature"]} if "temperature" in params else {}
    if "eps" in params:
        options["clamp_eps"] = params["eps"]
    if "grad_task" in inputs:
        return gradients(inputs)
    if "backbone_weight" in inputs:
        return end_to_end(inputs, params, options)
    loss = LOSSES[params.get("loss", "binary_kl_norm")]
    return {"loss": loss(inputs["student_logits"], inputs["teacher_logits"], **options)}


def gradients(inputs):
    """Each entry is a parameter of its own, so that the flags say which loss touches it."""
    task, kd = (
        [g if has else None for g, has in zip(inputs[f"grad_{name}"], inputs[f"has_grad_{name}"])]
        for name in ("task", "kd")
    )
    merged, dot = align_gradients(task, kd)
    return {"merged": torch.stack([torch.zeros(()).double() if g is None else g for g in merged]), "dot": dot}


def end_to_end(inputs, params, options):
    names = ("backbone", "task_head", "aux_head")
    weights = [inputs[f"{name}_weight"].detach().requires_grad_() for name in names]
    features = F.linear(inputs["x"], weights[0])
    activation = params.get("activation") or "identity"
    if activation not in ("identity", "none", "linear"):
        features = getattr(torch, activation)(features)
    logits = [F.linear(features, weight) for weight in weights[1:]]
    factors = {name: params.get(name, 1.0) for name in ("gamma", "alpha")}
    loss, parts = dhkd_loss(
        *logits, inputs["teacher_logits"], inputs["labels"], align=True, parameters=weights, **factors, **options
    )
    got = torch.autograd.grad(loss, weights)
    outputs = {"loss_ce": parts["ce"], "loss_kd": parts["kd"], "total": loss}
    plain = [dhkd_loss(*logits, inputs["teacher_logits"], inputs["labels"], **one, **options).loss for one in (
        factors | {"alpha": 0.0}, factors | {"gamma": 0.0})]  # fmt: skip
    outputs["backbone_dot"] = aligned_loss(*plain, weights[:1])[1]
    return outputs | {f"aligned_grad_{name}": gradient for name, gradient in zip(names, got)}
