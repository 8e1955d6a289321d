"""GPU kernels in Triton: `kdfast.triton.<op>` beside `kdfast.ops.<op>`, functions on tensors with the op's own arguments.

Importing this package imports no Triton: an op's module, and Triton with it, is imported at the first call on a GPU tensor.
So kdfast works where Triton is not installed, and costs nothing where no GPU is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast._library import lib

# The ops that have kernels here, as `kdfast.ops` names them.
OPS: tuple[str, ...] = (
    "divergence", "selective_kl", "route_topk", "make_plan", "dispatch", "combine",
    "knn_graph", "token_graph_kl", "pairwise_cost", "pairwise_infonce", "relation_mse", "relation_kl",
    "sinkhorn", "sinkhorn_kd_loss", "sinkhorn_cost_points", "pairwise_softmin", "grouped_linear", "grouped_mlp",
)  # fmt: skip


def _installed() -> bool:
    if "triton" in sys.modules:  # None there: an import that is blocked
        return sys.modules["triton"] is not None
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # None: a folder of that name on the path


INSTALLED = _installed()  # looked up once: a rule may run inside a compiled graph, where nothing can be imported


def reason(op: str, *tensors: Tensor) -> str | None:
    """Why the Triton kernels of `op` cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}"
    if not INSTALLED:
        return "triton is not installed"
    if op not in OPS:
        return f"{op} has no Triton kernel in this version"
    for tensor in tensors:
        if tensor.dim() > 5 and not tensor.is_contiguous():  # more than four row axes that may not join
            return f"a tensor of {tensor.dim()} dimensions has to be contiguous"
    return None


def register(op: str, module: str, function: str) -> None:
    """Makes `kdfast.triton.<module>.<function>` what the op `kdfast::<op>` runs on a GPU.

    Where the op's schema ends in `bool cuda=False` (kdfast.cuda has kernels for it), true means `kdfast.cuda.<module>.<function>`.
    """
    kernels: dict[str, Callable[..., Any]] = {}
    schema = getattr(torch.ops.kdfast, op).default._schema.arguments
    switched = len(schema) if schema[-1].name == "cuda" else -1

    def run(*args: Any) -> Any:  # torch leaves trailing arguments out that are the schema's default
        package = "cuda" if len(args) == switched and args[-1] else "triton"
        if package not in kernels:
            kernels[package] = getattr(importlib.import_module(f"kdfast.{package}.{module}"), function)
        return kernels[package](*args[: switched - 1] if switched > 0 else args)

    lib.impl(op, run, "CUDA")


def info() -> dict[str, Any]:
    """For `kdfast.backend_info`: whether GPU tensors run here, else why not; the ops that have kernels."""
    if not INSTALLED:
        return {"available": False, "reason": "triton is not installed"}
    try:
        import triton
    except ImportError as error:
        return {"available": False, "reason": f"triton cannot be imported ({error})"}
    found: dict[str, Any] = {"available": False, "reason": None, "version": triton.__version__, "ops": list(OPS)}
    if not OPS:
        return found | {"reason": "kdfast has no Triton kernels in this version"}
    if not torch.cuda.is_available():
        return found | {"reason": "torch sees no GPU"}
    return found | {"available": True}
