"""Vectors of dho: the loss of a labelled and an unlabelled batch, and the combined prediction with its search."""

import torch

from kdfast.methods.dho import dho_loss, dual_head_probs, dual_head_search

OPTIONS = ("temperature", "ce_weight", "kd_weight")


def run(inputs, params):
    if "ce_head_labeled" in inputs:
        options = {name: params[name] for name in OPTIONS if name in params}
        labelled = (inputs[name] for name in ("ce_head_labeled", "kd_head_labeled", "labels", "teacher_labeled"))
        unlabelled = [inputs.get(name) for name in ("kd_head_unlabeled", "teacher_unlabeled")]
        unlabelled = [
            None if rows is None or not rows.numel() else rows for rows in unlabelled
        ]  # [] has lost its classes
        loss = dho_loss(*labelled, *unlabelled, **options)
        return {"total": loss.loss, **loss.parts}
    ce, kd, labels = inputs["ce_head"], inputs["kd_head"], inputs["labels"]
    pair = {name: params[name] for name in ("alpha", "beta") if name in params}
    grid = {f"{name}s": params[f"{name}_grid"] for name in ("alpha", "beta") if f"{name}_grid" in params}
    one = {f"{name}s": (value,) for name, value in ({"alpha": 0.5, "beta": 0.5} | pair).items()}
    alpha, beta, best = dual_head_search(ce, kd, labels, **grid)
    outputs = {
        "accuracy_percent": dual_head_search(ce, kd, labels, **one)[2], "search_best_accuracy_percent": best,
        "search_best_alpha": alpha, "search_best_beta": beta,
    }  # fmt: skip
    outputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in outputs.items()}
    return outputs | {"combined_probs": dual_head_probs(ce, kd, **pair)}
