"""Vectors of kd_data_pruning: the loss, EL2N with its selection, forgetting events, ridge regression."""

import torch

from kdfast.data.pruning import ForgettingTracker, el2n, select
from kdfast.methods.kd_data_pruning import pruned_kd_loss, ridge_student


def run(inputs, params):
    if "student_logits" in inputs:
        return loss(inputs, params)
    if "logits_per_seed" in inputs:
        scores = el2n(inputs["logits_per_seed"], inputs["labels"])
        keep = params.get("keep_fraction", 0.5)
        kept = {
            f"keep_{mode}est": select(scores, keep=keep, mode=m) for mode, m in (("hard", "hard"), ("easi", "easy"))
        }
        return {"el2n": scores} | kept
    if "correct" in inputs:
        tracker = ForgettingTracker(inputs["correct"].shape[1])
        for epoch in inputs["correct"]:
            tracker.update(torch.arange(len(epoch)), epoch)
        return {"forgetting_events": tracker.events, "never_learned": tracker.never_learned, "scores": tracker.scores()}
    teacher, student = ridge_student(inputs["X"], inputs["y"], inputs["keep"], params["lam"], params["alpha"])
    return {"teacher": teacher, "student": student}


def loss(inputs, params):
    tensors = inputs["student_logits"], inputs["teacher_logits"], inputs["labels"]
    temperature = params.get("temperature", 4.0)

    def total(alpha):
        return pruned_kd_loss(*tensors, alpha=alpha, temperature=temperature).loss

    return {"loss": total(params.get("alpha", 0.5)), "ce": total(0.0), "kd": total(1.0)}
