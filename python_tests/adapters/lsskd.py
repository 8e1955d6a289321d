"""Vectors of lsskd: the softened target, all terms of the loss, the turned batch and the read-out of a joint head."""

from kdfast.methods.lsskd import class_logits, joint_labels, lsskd_loss, rotation_expand, soft_targets

OPTIONS = ("alpha", "temperature", "feature_weight", "kl_weight", "teacher")


def run(inputs, params):
    if "previous_probs" in inputs:
        return {"target": soft_targets(inputs["hard_labels"], inputs["previous_probs"], params["alpha"])}
    outputs = {}
    if "images" in inputs:
        labels = inputs.get("labels")
        labels = labels if labels is not None else inputs["images"].new_zeros(len(inputs["images"])).long()
        outputs["rotated"], outputs["joint_labels"] = rotation_expand(inputs["images"], labels)
    if "joint_logits" in inputs:
        outputs["class_logits"] = class_logits(inputs["joint_logits"], params["n_classes"])
    if "class_logits" in inputs:
        options = {name: params[name] for name in OPTIONS if name in params}
        turns = params.get("n_transforms", 4)
        loss, parts = lsskd_loss(
            inputs["class_logits"], list(inputs["branch_logits"]), list(inputs["branch_features"]), inputs["labels"],
            inputs.get("previous_class_probs"), inputs.get("previous_branch_probs"), num_transforms=turns, **options,
        )  # fmt: skip
        outputs |= {"loss": loss, "joint_labels": joint_labels(inputs["labels"], turns), **parts}
    return outputs
