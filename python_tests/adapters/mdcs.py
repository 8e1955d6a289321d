"""Vectors of mdcs: the training loss of two views, or the plain cross-entropy of the mean logits that validation uses."""

import torch.nn.functional as F

from kdfast.methods.mdcs import consistency_loss, consistency_weight, diversity_loss, mdcs_loss, prior_offsets


def run(inputs, params):
    if "mean_logits" in inputs:
        return {"loss": F.cross_entropy(inputs["mean_logits"], inputs["target"])}
    logits, labels, counts = inputs["expert_logits"], inputs["target_one_view"], inputs["class_counts"]
    prior = {"powers": params.get("prior_powers", (-0.5, 1.0, 2.5)), "eps": params.get("prior_eps", 1e-9)}
    ramp = {"kd_weight": params.get("kd_weight", 0.6), "ramp_epochs": params.get("warmup_epochs", 20)}
    temperature, on = params.get("temperature", 1.0), params.get("consistency_on", "adjusted")
    adjusted = logits + prior_offsets(counts, **prior).unsqueeze(1)
    consistency, confident = consistency_loss(logits if on == "raw" else adjusted, labels, temperature=temperature)
    total = mdcs_loss(
        logits, labels, class_counts=counts, epoch=params["epoch"], temperature=temperature, consistency_on=on, **prior, **ramp
    )  # fmt: skip
    return {
        "loss": total.loss,
        "diversity_ce_sum": diversity_loss(adjusted, labels),
        "weighted_consistency": consistency_weight(params["epoch"], **ramp) * consistency,
        "confident_per_expert": confident,
    }
