"""Vectors of cnn_vit_bsd (a = CNN, b = ViT): the inputs tell which term is meant."""

from functools import partial

import torch.nn.functional as F

from kdfast.losses import region_selection
from kdfast.methods.cnn_vit_bsd import hfd_loss
from kdfast.ops import selective_kl


def run(inputs, params):
    if "z_c" not in inputs:
        return hfd(inputs, params)
    maps_options = {"ignore_index": params.get("ignore_index", 255), "reliability": params.get("reliability", "label")}
    pixel_options = {"temperature": params.get("T", 1.0), "normalizer": params.get("normalizer", "valid")}
    pixel = selective_kl(inputs["z_c"], inputs["z_v"], inputs["labels"], **pixel_options, **maps_options)
    if "f_c" not in inputs:
        t2 = pixel_options["temperature"] ** 2
        losses = {"loss_to_cnn": pixel.loss_to_a * t2, "loss_to_vit": pixel.loss_to_b * t2}
        maps = {"ce_cnn": pixel.reliability_a, "ce_vit": pixel.reliability_b, "n_valid": pixel.num_valid}
        return losses | masks(pixel.direction) | maps
    options = {"grid": params.get("grid", (4, 4)), "distance": params.get("distance", "cosine")}
    region = region_selection(
        inputs["f_c"], inputs["f_v"], pixel.reliability_a, pixel.reliability_b, pixel.valid, **options
    )
    losses = {"loss_to_cnn": region.loss_to_a, "loss_to_vit": region.loss_to_b}
    return (
        losses
        | masks(region.direction)
        | {"region_ce_cnn": region.reliability_a, "region_ce_vit": region.reliability_b}
    )


def masks(direction):
    return {"mask_vit_to_cnn": direction == 1, "mask_cnn_to_vit": direction == -1}


def hfd(inputs, params):
    project_c, project_v = (
        partial(F.conv2d, weight=inputs[f"w_{s}"][:, :, None, None], bias=inputs.get(f"b_{s}")) for s in "cv"
    )
    alignment = params.get("alignment", "bilinear")
    loss_to_cnn, loss_to_vit = hfd_loss(inputs["f_c"], inputs["f_v"], project_c, project_v, alignment=alignment)
    return {"loss_to_cnn": loss_to_cnn, "loss_to_vit": loss_to_vit}
