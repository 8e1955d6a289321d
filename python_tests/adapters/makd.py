"""Vectors of makd: the loss and its two terms, each with its weight."""

from kdfast.methods.makd import multi_aspect_loss


def run(inputs, params):
    tensors = inputs["student_logits"], inputs["labels"], inputs["aspect_targets"]
    weights = {"alpha": params.get("alpha", 4.0), "ce_weight": params.get("ce_weight", 1.0)}

    def total(**changed):
        return multi_aspect_loss(*tensors, num_classes=params["num_classes"], **weights | changed).loss

    return {"total": total(), "loss_ce": total(alpha=0.0), "loss_aspect": total(ce_weight=0.0)}
