"""Vectors of general_knowledge_transfer: who teaches, the flips, and the KL, of one teacher or several; names as in the authors' code."""

from kdfast.methods.general_knowledge_transfer import data_partition_loss, flip_masks, select_teacher, teacher_mask

NAMES = {
    "most-conf": "most_confident", "most-conf_u": "most_confident_unsupervised", "flip-st": "flip_student", "flip-t": "flip_teacher",
    "flip-avg": "flip_average", "self-dist": "self", "none": "none",
}  # fmt: skip


def run(inputs, params):
    student, teacher, frozen = (inputs[f"{name}_logits"] for name in ("student", "teacher", "frozen_student"))
    labels, name = inputs.get("labels"), params.get("strategy", "most-conf")
    several = teacher.dim() == 3
    if several and "strategy" not in params:
        name = "most-conf_u" if params.get("unsupervised", False) else "most-conf"
    strategy = NAMES.get(name, name)
    options = {
        "temperature": params.get("temperature", 1.0),
        "ce_weight": 1.0 - params.get("alpha", params.get("lambda", 1.0)),
    }
    top_k = None if several else params.get("top_k")
    outputs = {
        "loss": data_partition_loss(student, teacher, frozen, labels, strategy=strategy, top_k=top_k, **options).loss
    }
    if several:
        selected = select_teacher(teacher, frozen, None if "unsupervised" in strategy else labels)
        return outputs | {"selected": selected, "teacher_mask": selected >= 0}
    outputs["teacher_mask"] = teacher_mask(student, teacher, frozen, labels, strategy=strategy)
    if labels is None:
        return outputs
    return outputs | {f"{kind}_flip": rows for kind, rows in flip_masks(student, teacher, labels)._asdict().items()}
