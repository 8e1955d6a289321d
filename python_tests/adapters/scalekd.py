"""Vectors of scalekd: both views, the logit term, the projector with its own or a passed query, its attention."""

import torch
from torch.func import functional_call

from kdfast.methods.scalekd import CrossAttention, CrossAttentionProjector, soft_target_ce, view_loss

PROJECTOR = {
    "positions": "pos_embed", "query": "query", "query_map.0": "proj_pos.0", "student.0": "proj_student.0", "student.1": "proj_student.1",
    "attention.q": "pos_attention.q", "attention.k": "pos_attention.k", "attention.v": "pos_attention.v",
    "attention.proj": "pos_attention.proj", "ffn.0": "ffn.fc1", "ffn.2": "ffn.fc2", "norm": "norm",
}  # fmt: skip


def run(inputs, params):
    if "student_logits" in inputs:
        alpha = params.get("alpha", 0.5)
        ce = soft_target_ce(
            inputs["student_logits"], inputs["teacher_logits"], temperature=params.get("temperature", 1.0)
        )
        return {"task_weight": 1 - alpha, "loss_kd": alpha * ce}
    if "student_tokens" in inputs:
        direct, alternating = params.get("alpha", (0.08, 0.06))
        pair = inputs["student_tokens"], inputs["teacher_map"]
        return {
            "loss_direct": direct * view_loss(*pair),
            "loss_alternating": alternating * view_loss(*pair, view="alternating"),
        }
    options = {
        "num_heads": params["num_heads"], "softmax_scale": params.get("softmax_scale", 5.0),
        "windows": tuple(params.get("window_shapes", (1, 1))),
    }  # fmt: skip
    if "student_map" not in inputs:
        tokens, query = inputs["tokens"], inputs["query"]
        module = CrossAttention(tokens.shape[2], query.shape[2], **options).double()
        weights = matrices(inputs, {name: name for name in ("q", "k", "v", "proj")})
        return {"out": functional_call(module, weights, (tokens, query))}
    maps, passed = inputs["student_map"], inputs.get("query")
    weights = matrices(inputs, PROJECTOR)
    if "query_map.0.weight" in weights:  # a 1x1 convolution there, a Linear here
        weights["query_map.0.weight"] = weights["query_map.0.weight"].flatten(1)
    width = inputs["w.norm.weight"].shape[0]
    tokens = passed.shape[1] if passed is not None else weights["query"].shape[0]
    module = CrossAttentionProjector(
        maps.shape[1], width, tuple(params.get("query_hw", (tokens, 1))), weights["positions"].shape[2:],
        own_query="query" in weights, **options,
    )  # fmt: skip
    module = module.double().train("running" not in params.get("batchnorm", "training statistics"))
    module.norm.eps, module.student[1].eps = params.get("layernorm_eps", 1e-5), params.get("batchnorm_eps", 1e-5)
    return {"tokens": functional_call(module, weights, (maps, passed))}


def matrices(inputs, names):
    found = {}
    for ours, theirs in names.items():
        for part in ("", ".weight", ".bias", ".running_mean", ".running_var"):
            if isinstance(inputs.get(f"w.{theirs}{part}"), torch.Tensor):
                found[ours if ours in ("positions", "query") else ours + part] = inputs[f"w.{theirs}{part}"]
    return found
