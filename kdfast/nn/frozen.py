"""A network as a constant function: the gradient passes through it, its weights get none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def call_frozen(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    """module(*inputs, **named) with its parameters as constants, whatever their `requires_grad` says; its mode is the caller's.

    >>> logits = call_frozen(teacher_head, student_features)  # a gradient for the features alone
    """
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, inputs, named)
