"""Vectors of HyperFormer: the mixture feed-forward, the smoothed cross-entropy, the pair interaction with its fusion."""

import warnings

import torch
from torch.func import functional_call

from kdfast.methods.hyperformer import FeedForward, FuseNet, PairInteraction, label_smoothing_cross_entropy
from kdfast.ops import route_topk


def run(inputs, params):
    with warnings.catch_warnings():  # one expert with a normalised weight: its gate has no gradient, as the numbers say
        warnings.filterwarnings("ignore", "route_topk: with k=1")
        return case(inputs, params)


def case(inputs, params):
    if "logits" in inputs:
        return {"loss": label_smoothing_cross_entropy(inputs["logits"], inputs["target"], params["smoothing"])}
    return interaction(inputs, params) if "conv_filt" in inputs else feed_forward(inputs, params)


def feed_forward(inputs, params):
    x, w1, w2 = inputs["x"], inputs["expert.w1"], inputs["expert.w2"]
    if "in, out" in params.get("expert_weight_layout", "(E, out, in)"):
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    combine = "softmax" if "softmax" in params.get("combine_weight", "softmax") else "logits"
    layer = FeedForward(
        x.shape[-1], w1.shape[1], params["num_experts"], params["top_k"], combine=combine, activation=params.get("activation", "relu")
    )  # fmt: skip
    layer = layer.double().eval()
    layer.norm.eps = params.get("ln_eps", 1e-5)
    names = {f"norm.{n}": f"ln.{n}" for n in ("weight", "bias")} | {
        f"moe.gate.{n}": f"gate.{n}" for n in ("weight", "bias")
    }
    names |= {f"moe.{n}": f"expert.{n}" for n in ("b1", "b2")}
    parameters = {ours: inputs[theirs] for ours, theirs in names.items()} | {"moe.w1": w1, "moe.w2": w2}
    u = torch.nn.functional.layer_norm(x, x.shape[-1:], inputs["ln.weight"], inputs["ln.bias"], layer.norm.eps)
    logits = u.flatten(0, -2) @ inputs["gate.weight"].t() + inputs["gate.bias"]
    routing = route_topk(logits, params["top_k"], score=layer.moe.route_options["score"])
    order = routing.ids.argsort(-1)
    return {
        "y": functional_call(layer, parameters, (x,)),
        "selected_expert_ascending_id": routing.ids.gather(1, order),
        "combine_weight_same_order": routing.weights.gather(1, order),
    }


def interaction(inputs, params):
    width = inputs["first"].shape[1]
    pair = PairInteraction(
        width, kernel_width=params["kernel_width"], kernel_height=params["kernel_height"], channels=params["channels"],
        kernel_size=params["kernel_size"], permutations=params.get("permutations", 1), dropouts=(params.get("dropouts", 0),) * 3,
        bn_eps=params.get("bn_eps", 1e-5), permutation=inputs["chequer_permutation"],
    )  # fmt: skip
    pair = pair.double().train(params.get("bn_training", True))
    own = {name: inputs[name] for name in pair.state_dict() if name in inputs}
    first, second = functional_call(pair, own, (inputs["first"], inputs["second"]))
    fuse = {f"linear.{n}": inputs[f"fuse_net.linear.{n}"] for n in ("weight", "bias")}
    return {
        "first_out": first,
        "second_out": second,
        "fused": functional_call(FuseNet(width).double(), fuse, (first, second)),
    }
