"""Vectors of nd_loss: the ND term, and KD++ with each part as it enters the sum."""

from kdfast.methods.nd_loss import nd_loss_total, norm_direction_loss, warmup

TOTAL = ("ce_weight", "kd_weight", "temperature", "epoch", "warmup_epochs")


def run(inputs, params):
    features = inputs["student_feature"], inputs["teacher_feature"], inputs["class_means"]
    labels, weight = inputs.get("labels"), params.get("nd_weight", 1.0)
    mode = {"mode": params.get("mode", "nd")}
    outputs = {"nd_loss": weight * norm_direction_loss(*features, labels, **mode)}
    if "student_logits" not in inputs:
        return outputs
    options = {name: params[name] for name in TOTAL if name in params}
    logits = inputs["student_logits"], inputs["teacher_logits"], labels
    loss, parts = nd_loss_total(*logits, *features, nd_weight=weight, **mode, **options)
    r = warmup(params.get("epoch", 0), params.get("warmup_epochs", 0))
    return outputs | {
        "kd_loss": r * params.get("kd_weight", 1.0) * parts["kd"],
        "ce_loss": params.get("ce_weight", 1.0) * parts["ce"],
        "total": loss,
    }
