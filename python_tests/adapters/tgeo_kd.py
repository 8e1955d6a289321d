"""Vectors of tgeo_kd: the state, the lower level in both forms, and the small network."""

from torch.func import functional_call

from kdfast.data.class_means import ClassMeans
from kdfast.methods.tgeo_kd import FusionRatioNet, sample_terms, trilateral_state, weighted_kd_ce


def run(inputs, params):
    if "student_prob" in inputs:
        s, t, labels = inputs["student_prob"], inputs["teacher_prob"], inputs["labels"]
        if "class_mean" in inputs:
            mean = inputs["class_mean"]
        else:  # of the given rows
            means = ClassMeans(params.get("num_classes", s.shape[1]))
            means.update(t, labels)
            mean = means.compute(missing="nan")[labels]
        return {"state": trilateral_state(s, t, labels, mean, state=params.get("state", "full"))}
    if "state" in inputs:
        return network(inputs, params)
    student, teacher, labels = inputs["student_logits"], inputs["teacher_logits"], inputs["labels"]
    on = "probs" if str(params.get("cross_entropy_on", "logits")).startswith("prob") else "logits"
    options = {"ce_on": on} | {name: params[name] for name in ("temperature", "ignore_index") if name in params}
    loss = weighted_kd_ce(student, teacher, labels, inputs["fusion_ratio"], **options).loss
    kd, ce = sample_terms(student, teacher, labels, **options)
    return {"lower_loss": loss, "loss": loss, "kd_per_sample": kd, "ce_per_sample": ce}


def network(inputs, params):
    """fc1, fc2, ... are the Linear layers, with an activation after each but the last."""
    layers = sorted(int(name[2:-7]) for name in inputs if name.startswith("fc") and name.endswith("_weight"))
    hidden = [len(inputs[f"fc{layer}_bias"]) for layer in layers[:-1]]
    net = FusionRatioNet(inputs["state"].shape[1], hidden=hidden, negative_slope=params.get("negative_slope", 0.01))
    weights = {
        f"{2 * place}.{kind}": inputs[f"fc{layer}_{kind}"] for place, layer in enumerate(layers) for kind in ("weight", "bias")
    }  # fmt: skip
    return {"fusion_ratio": functional_call(net.double(), weights, (inputs["state"],))}
