"""Vectors of TransKD: the weights tell which module is meant, else the number of dimensions which loss."""

import torch
from torch.func import functional_call

from kdfast.methods.transkd import (
    EmbeddingAssistant,
    GlobalLocalMixer,
    SelectiveFusion,
    embedding_errors,
    hierarchical_context_loss,
    patch_embedding_loss,
)

# ours: theirs, where the rest of the name is the same
FUSION = {"reduce": "conv1", "expand": "conv2", "gate": "fc", "gate_single": "fc1", "heads": "fcs"}
MIXER = {"qkv": "attn4.qkv", "output": "attn4.proj", "value": "conv1", "gate": "conv2"}
ASSISTANT = {"embed.project": "patch_embed.proj", "embed.norm": "patch_embed.norm", "linear": "linear"}


def run(inputs, params):
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in params.get("weights", {}).items()} \
        if isinstance(params.get("weights"), dict) else {}  # fmt: skip
    if "conv1.0.weight" in weights:
        return fusion(inputs, params, weights)
    if "attn4.qkv.weight" in weights:
        return mixer(inputs, params, weights)
    if "patch_embed.proj.weight" in weights:
        return assistant(inputs, params, weights)
    stages = range(sum(name.startswith("s") and name[1:].isdigit() for name in inputs))
    student, teacher = ([inputs[f"{side}{i}"] for i in stages] for side in "st")
    if student[0].dim() == 4:
        return {"loss": hierarchical_context_loss(student, teacher, levels=params.get("levels", (4, 2, 1)))}
    return {
        "stage_mse": embedding_errors(student, teacher),
        "loss": patch_embedding_loss(student, teacher, weights=params["weights"]),
    }


def with_square(out, **more):
    return {"out": out, "out_sq": out.square().sum(), **more}


def renamed(weights, names):
    """Our names for the weights that are there."""
    longest = sorted(names.items(), key=lambda pair: -len(pair[1]))
    found = {}
    for name, value in weights.items():
        for ours, theirs in longest:
            if name.startswith(theirs + "."):
                found[ours + name[len(theirs) :]] = value
                break
    return found


def fusion(inputs, params, weights):
    own = renamed(weights, FUSION)
    mid, student = own["reduce.0.weight"].shape[:2]
    fuse = params.get("fuse", "y" in inputs)
    hidden = own["heads.0.weight"].shape[1] if fuse else None
    module = SelectiveFusion(student, len(own["expand.0.weight"]), mid, fuse=fuse, hidden=hidden).double()
    module.train(params.get("mode", "train") == "train")
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps = params.get("bn_eps", 1e-5)
    known = module.state_dict()
    own = {name: value for name, value in own.items() if name in known}
    out, residual = functional_call(module, own, (inputs["x"], inputs["y"] if fuse else None))
    return with_square(out, residual=residual)


def mixer(inputs, params, weights):
    own = renamed(weights, MIXER)
    x = inputs["x"]
    own["weights"] = torch.tensor([params["atten_weight"], params["conv_weight"]], dtype=torch.float64)
    module = GlobalLocalMixer(x.shape[2], params.get("num_heads", 8), add=params.get("add", False)).double()
    linear = [weights.get(f"embed4_linearproject.{name}") for name in ("weight", "bias")]
    mixed = functional_call(module, own, (x,))
    return with_square(mixed if linear[0] is None else torch.nn.functional.linear(mixed, *linear))


def assistant(inputs, params, weights):
    own = renamed(weights, ASSISTANT)
    own["weights"] = torch.tensor([params["w_projection"], params["w_assistant"]], dtype=torch.float64)
    entering = inputs["prev_feature" if "prev_feature" in inputs else "image"]
    tokens = inputs["student_embedding"]
    module = EmbeddingAssistant(
        entering.shape[1], tokens.shape[2], len(own["linear.weight"]), kernel=params["patch"], stride=params["stride"]
    ).double()
    module.embed.project.padding = (params.get("padding", params["patch"] // 2),) * 2
    module.embed.norm.eps = params.get("layernorm_eps", 1e-5)
    return with_square(functional_call(module, own, (tokens, entering)))
