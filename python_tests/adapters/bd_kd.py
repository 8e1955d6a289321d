"""Vectors of bd_kd: both losses with the rows they are made of, and the calibration error."""

import torch

from kdfast.methods.bd_kd import balance, bd_kd_loss
from kdfast.metrics import expected_calibration_error

WEIGHTS = ("delta", "weighting", "emphasise")


def run(inputs, params):
    if "logits" in inputs:
        error = expected_calibration_error(inputs["logits"], inputs["labels"], n_bins=params.get("n_bins", 15))
        return {"ece": torch.tensor(error, dtype=torch.float64)}
    student, teacher, labels = inputs["student_logits"], inputs["teacher_logits"], inputs["labels"]
    options = {name: params[name] for name in (*WEIGHTS, "temperature") if name in params}
    total = {name: params[name] for name in ("teacher_loss", "ignore_index") if name in params}
    # the two losses share no gradient: L_s is the offline form, L_t the rest
    student_loss = bd_kd_loss(student, teacher, labels, online=False, **options, **total).loss
    both = bd_kd_loss(student.detach(), teacher, labels, **options, **total)
    offline = bd_kd_loss(student.detach(), teacher, labels, online=False, **options, **total)
    return {
        "student_loss": student_loss, "teacher_loss": both.loss - offline.loss,
        **balance(student, teacher, **options)._asdict(),
    }  # fmt: skip
