"""Vectors of LAD: the names of the inputs tell which equation is meant."""

from kdfast.losses import channel_wise_kd_loss
from kdfast.methods.lad import dist_loss, encode_labels, lad_student_loss, lad_teacher_loss, segmentation_ce
from kdfast.methods.lad import symmetric_channel_wise_kd as consistency


def run(inputs, params):
    if "image" in inputs:
        options = {name: params[name] for name in ("noise_std", "scale", "ignore_index") if name in params}
        coded = encode_labels(
            inputs["image"], inputs["labels"], params["num_classes"], codes=inputs.get("class_codes"), noise=inputs.get("noise"), **options
        )  # fmt: skip
        return {"teacher_input": coded}
    if "labels" not in inputs:
        return {"loss": dist_loss(inputs["z_s"], inputs["z_t"], temperature=params.get("temperature", 1.0))}
    labels = inputs["labels"]
    common = {name: params[name] for name in ("ignore_index", "temperature", "aux_weight") if name in params}
    kd_options = {"temperature": params.get("temperature", 4.0)}
    if "a" in inputs:
        paths = [(inputs[name], inputs.get(f"{name}_aux")) for name in "ab"]
        weight = params.get("consistency_weight", 5.0)
        return {
            "loss": lad_teacher_loss(paths, labels, consistency_weight=weight, **common).loss,
            "task_loss": task(paths, labels, {"aux_weight": 0.4} | common),
            "consistency_loss": consistency(inputs["a"], inputs["b"], **kd_options),
        }
    heads = inputs["z_s"], inputs.get("z_aux")
    weight = params.get("kd_weight", 3.0)
    return {
        "loss": lad_student_loss(heads, inputs["z_t"], labels, kd_weight=weight, **common).loss,
        "task_loss": task([heads], labels, {"aux_weight": 0.02} | common),
        "cwd_loss": channel_wise_kd_loss(inputs["z_s"], inputs["z_t"], **kd_options),
    }


def task(paths, labels, options):
    ignore = options.get("ignore_index", -1)
    return sum(
        segmentation_ce(z, labels, ignore_index=ignore)
        + (0.0 if aux is None else options["aux_weight"] * segmentation_ce(aux, labels, ignore_index=ignore))
        for z, aux in paths
    )
