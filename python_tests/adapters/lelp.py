"""Vectors of lelp: the fit of the subclass directions, or the targets and the loss with a given fit."""

import torch
import torch.nn.functional as F

from kdfast.methods.lelp import (
    SubclassProjection,
    fit_subclasses,
    lelp_loss,
    merge_subclass_logits,
    project_embeddings,
    subclass_kd_rows,
    subclass_targets,
)


def run(inputs, params):
    if "embeddings" in inputs:
        options = {name: params[name] for name in ("n_subclasses", "project_null_space") if name in params}
        fit = fit_subclasses(inputs["embeddings"], inputs["labels"], inputs.get("classifier_weight"), **options)
        return {"projector": fit.projector, "class_mean": fit.mean, "directions": fit.directions, "scale": fit.scale}
    mean, directions, scale = (inputs[name] for name in ("class_mean", "directions", "scale"))
    projection = SubclassProjection(mean, directions, scale, torch.empty(0))
    temperature = params.get("temperature", 1.0)
    h, student, labels = inputs["teacher_embedding"], inputs["student_subclass_logits"], inputs.get("labels")
    targets = subclass_targets(
        projection, h, inputs["teacher_logits"], temperature=temperature,
        subclass_temperature=params.get("subclass_temperature", 1.0),
    )  # fmt: skip
    classes = merge_subclass_logits(student, directions.shape[1])
    options = {"n_subclasses": directions.shape[1], "temperature": temperature, "alpha": params.get("alpha", 0.9)}
    outputs = {
        "projection": project_embeddings(projection, h),
        "subclass_target": targets,
        "class_logits": classes,
        "loss": lelp_loss(student, targets, labels, **options).loss,
        "kd": subclass_kd_rows(student, targets, temperature=temperature).mean(),
    }
    return outputs if labels is None else outputs | {"ce": F.cross_entropy(classes, labels)}
