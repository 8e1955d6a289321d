"""Vectors of kd3: weighted features, the contrastive term, mixed statistics, selection, the teacher's share."""

import torch

from kdfast.data.confidence import adaptive_confidence, teacher_share
from kdfast.data.mixing import mix_distribution
from kdfast.methods.kd3 import feature_weights, nt_xent_loss, weighted_feature_loss


def run(inputs, params):
    if "z" in inputs:
        loss = nt_xent_loss(inputs["z"], inputs["z_perturbed"], temperature=params.get("temperature", 0.3))
        return {"contrastive_loss": loss}
    if "images" in inputs:
        images = inputs["images"].double()
        return {"mixed": mix_distribution(images, inputs["lam"], inputs["perm"], eps=params.get("eps", 1e-6))}
    if "epoch" in inputs:
        options = {name: params[name] for name in ("max_epoch", "scale", "factor") if name in params}
        epochs = inputs["epoch"].reshape(-1).tolist()
        share = torch.tensor([teacher_share(epoch, **options) for epoch in epochs], dtype=torch.float64)
        return {"teacher_weight": share.reshape(inputs["epoch"].shape)}
    if "student_feature" in inputs:
        logits = inputs["student_logits"], inputs["teacher_logits"]
        loss = weighted_feature_loss(inputs["student_feature"], inputs["teacher_feature"], *logits)
        return {"weights": feature_weights(*logits), "feature_loss": loss}
    share = params.get("teacher_weight", params.get("share", 0.5))
    found = adaptive_confidence(
        inputs["teacher_logits"], inputs["student_logits"], share, cutoff=params.get("p_cutoff", 0.95)
    )
    return {"selected_index": found.rows, "class_threshold": found.threshold, "pseudo_label": found.pseudo_label}
