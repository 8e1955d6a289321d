"""Vectors of entropic_student: GDN1, the prior with its likelihoods, rates and tables, and the losses of both stages."""

from itertools import count, takewhile

import torch

from kdfast.methods.entropic_student import fine_tuning_loss, rate_distortion_loss, rate_loss
from kdfast.nn import GDN1, EntropyBottleneck


def with_parameters(module, values):
    """The module with tensors of the case in place of its parameters, so that gradients reach them."""
    for name, value in values.items():
        del module._parameters[name]
        setattr(module, name, value)
    return module


def prior(inputs, params):
    names = [name for name in inputs if name.rstrip("0123456789") in ("matrix", "bias", "factor", "quantiles")]
    filters = params.get("filters") or [inputs[f"bias{i}"].shape[1] for i in range(names_of(inputs, "factor"))]
    options = {name: params[name] for name in ("tail_mass", "likelihood_bound") if name in params}
    module = EntropyBottleneck(len(inputs["quantiles"]), filters, **options).double()
    return with_parameters(module, {name: inputs[name] for name in names})


def names_of(inputs, start):
    return sum(1 for _ in takewhile(lambda i: f"{start}{i}" in inputs, count()))


def run(inputs, params):
    if "gamma" in inputs:
        module = GDN1(len(inputs["beta"]), inverse=params["inverse"], beta_min=params.get("beta_min", 1e-6)).double()
        return {"y": with_parameters(module, {name: inputs[name] for name in ("beta", "gamma")})(inputs["x"])}
    if "quantiles" in inputs:
        module = prior(inputs, params).train(params["training"])
        y_hat, likelihood = module(inputs["x"], inputs.get("noise"))
        module.update()
        tables = [row[:n] for row, n in zip(module.quantized_cdf.tolist(), module.cdf_length.tolist())]
        same = len({len(table) for table in tables}) == 1
        return {
            "y_hat": y_hat, "likelihood": likelihood, "bits_sum": rate_loss(likelihood),
            "bits_batchmean": rate_loss(likelihood, reduction="batchmean"), "bpp_mean": rate_loss(likelihood, reduction="mean"),
            "aux_loss": module.aux_loss(), "cdf_offset": module.offset, "cdf_length": module.cdf_length,
            "quantized_cdf": torch.tensor(tables) if same else tables,
        }  # fmt: skip
    if "likelihood" in inputs:
        maps = [
            [inputs[f"{side}{i}"] for i in range(names_of(inputs, side))] for side in ("student", "teacher")
        ]  # fmt: skip
        options = {name: params[name] for name in ("beta", "reduction") if name in params}
        return {"loss": rate_distortion_loss(*maps, inputs["likelihood"], **options).loss}
    options = {name: params[name] for name in ("alpha", "temperature", "ignore_index") if name in params}
    return {
        "loss": fine_tuning_loss(inputs["student_logits"], inputs["teacher_logits"], inputs["target"], **options).loss
    }
