"""Vectors of mix_kd: the loss on given logits, or the mixing of a batch with given draws."""

import torch

from kdfast.data.mixing import MixDraw, mix, soft_labels
from kdfast.methods.mix_kd import mix_kd_loss


def run(inputs, params):
    if "images" in inputs:
        unmixed = inputs.get("unmixed_index", torch.empty(0)).long()
        draw = MixDraw(inputs["lam_drawn"], inputs["perm1"], inputs["perm2"], unmixed)
        mixed, *labels = mix(inputs["images"].double(), inputs["labels"], draw)
        return {"mixed_images": mixed, "mixed_labels": soft_labels(*labels, params["num_classes"])}
    weights = {"ce_weight": params.get("ce_weight", 0.1), "kd_weight": params.get("kd_weight", 0.9)}
    options = {name: params[name] for name in ("temperature", "eps") if name in params}
    labels = (
        inputs["soft_labels"] if "soft_labels" in inputs else tuple(inputs[n] for n in ("labels_a", "labels_b", "lam"))
    )

    def total(**changed):
        return mix_kd_loss(
            inputs["student_logits"], inputs["teacher_logits"], labels, **weights | changed, **options
        ).loss

    return {"total": total(), "loss_ce": total(kd_weight=0.0), "loss_kd": total(ce_weight=0.0)}
