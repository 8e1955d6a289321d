"""Vectors of knowledge_concentration: targets, paced logits and the loss; the structurally connected layers."""

import torch

from kdfast.methods.knowledge_concentration import (
    knowledge_concentration_loss,
    self_pace,
    specialist_targets,
    structurally_connected,
)


def rectangular(rows, sizes):
    """Probabilities [B, max N_v] of rows that may have different lengths."""
    if isinstance(rows, torch.Tensor):
        return rows
    return torch.tensor([row + [0.0] * (max(sizes) - len(row)) for row in rows], dtype=torch.float64)


def tensors(values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def run(inputs, params):
    sizes = params.get("vertical_sizes")
    if "hidden" in inputs:
        shared = [inputs.get(f"shared_{kind}") for kind in ("weight", "bias")]
        shared = [value if isinstance(value, torch.Tensor) and value.numel() else None for value in shared]
        private = inputs["private_weight"], inputs["private_bias"]
        out = tensors(inputs["out_weight"]), tensors(inputs["out_bias"])
        return {"logits": structurally_connected(inputs["hidden"], *private, *out, *shared)}
    logits, vertical = inputs["logits"], inputs["vertical_index"]
    gamma = inputs.get("gamma")
    index, value = specialist_targets(
        rectangular(inputs["teacher_probs_of_own_vertical"], sizes), vertical, sizes, params["top_k"]
    )
    dense = torch.zeros_like(logits).detach().scatter_add(1, index.clamp_min(0), value)
    return {
        "soft_targets": dense, "paced_logits": logits if gamma is None else self_pace(logits, sizes, gamma),
        "loss": knowledge_concentration_loss(logits, (index, value), vertical, vertical_sizes=sizes, gamma=gamma).loss,
    }  # fmt: skip
