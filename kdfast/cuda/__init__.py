"""GPU kernels in CUDA C++ (csrc/cuda), part of the compiled core where nvcc built it: `kdfast.cuda.<op>` beside `kdfast.ops.<op>`.

They stand beside the Triton kernels, not in their place: an op whose CUDA kernel cannot take some inputs says why here, and
goes on with Triton. Nothing is asked of a GPU before the first tensor that lies on one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import _core

# The ops that have kernels here, as `kdfast.ops` names them: the lowest compute capability they run on.
OPS: dict[str, int] = {"divergence": 90, "route_topk": 80, "make_plan": 80, "sinkhorn": 80}

BUILT = hasattr(_core.core, "cuda_device")
MOST_EXPERTS: int = getattr(_core.core, "cuda_routing_most_experts", 0)


def reason(op: str, *tensors: Tensor) -> str | None:
    """Why the CUDA kernels of `op` cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}"
    if not BUILT:
        return info()["reason"]
    if op not in OPS:
        return f"{op} has no CUDA kernel in this version"
    return _device_reason(OPS[op], tensors[0].device.index)


@torch.compiler.assume_constant_result  # a compiled graph cannot ask the driver
def _device_reason(capability: int, index: int) -> str | None:
    return _reason_of(capability, index)


@functools.cache
def _reason_of(capability: int, index: int) -> str | None:
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    found = info()
    if not found["available"]:
        return found["reason"]
    device = _core.core.cuda_device(index)
    if device["capability"] < capability:
        return f"it needs compute capability {capability / 10}, {torch.cuda.get_device_name(index)} has {device['capability'] / 10}"
    return device["reason"]


@torch.compiler.assume_constant_result
def limit(name: str, index: int, *args: int) -> int:
    """What the kernels of a device's `index` can take at most: the core's `cuda_<name>(index, *args)`."""
    return _limit(name, index, *args)


@functools.cache
def _limit(name: str, *args: int) -> int:
    return getattr(_core.core, f"cuda_{name}")(*args)


def core() -> Any:
    return _core.core


def call(function: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    """function(stream, *args) with the tensor's device as the current one; nothing waits for it."""
    with torch.cuda.device(tensor.device):
        return function(torch.cuda.current_stream().cuda_stream, *args)


def info() -> dict[str, Any]:
    """For `kdfast.backend_info`: whether the kernels can run here, else why not; what they were built for."""
    if _core.core is None:
        return {"available": False, "reason": _core.reason}
    if not BUILT:
        return {"available": False, "reason": "this build has no CUDA kernels"}
    found = _core.core.cuda_info()
    del found["built"]
    why = found.pop("reason")
    return {"available": why is None, "reason": why, **found, "ops": list(OPS)}
