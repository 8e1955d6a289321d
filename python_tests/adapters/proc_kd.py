"""Vectors of proc_kd: the prototype learning module, or the augmentation, with given matrices [out, in]."""

import torch
from torch.func import functional_call

from kdfast.nn import PrototypeAugment, PrototypeLearner


def run(inputs, params):
    tokens, prototypes = inputs["tokens"], inputs["prototypes"]
    if "assign_weight" not in inputs:
        names = {"encode": "encode", "aug1": "aug1", "aug2": "aug2"}
        module = PrototypeAugment(tokens.shape[-1], bias="encode_bias" in inputs).double()
        output, alignment = functional_call(module, matrices(inputs, names), (tokens, prototypes))
        return {"output": output, "alignment": alignment}
    names = {"assign": "assign", "fc": "fc", "fuse1": "fuse1", "fuse2": "fuse2"}
    module = Fused(tokens.shape[-1], len(prototypes), bias="assign_bias" in inputs).double()
    given = {"prototypes": prototypes} | matrices(inputs, names)
    output, descriptor, assignment = functional_call(module, given, (tokens,))
    return {"output": output, "descriptor": descriptor, "assignment": assignment}


def matrices(inputs, names):
    return {
        f"{ours}.{part}": inputs[f"{theirs}_{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if f"{theirs}_{part}" in inputs
    }


class Fused(PrototypeLearner):
    """From the tokens after `cat`."""

    def forward(self, tokens: torch.Tensor):
        return self.fuse(tokens)
