"""Noise for routers. It is never drawn from the global generator: pass the draws, or a `torch.Generator`.

Plain torch on small tensors; autograd gives the gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_float_tensor, check_number
from kdfast._library import compute_dtype


def noisy_logits(
    logits: Tensor,
    noise_logits: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    min_std: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """z' = z + noise * std with std = softplus(noise_logits) + min_std: noisy top-k gating (Shazeer et al. 2017, eq. 4).

    Args:
        logits, noise_logits: [N, E]; x W_g and x W_n. noise: [N, E] standard normal draws, or give a `generator`.
    Returns:
        (z', std), float32 (float64 for float64). For training only; route z' with "softmax_after_topk".

    >>> noisy, std = noisy_logits(x @ gate.T, x @ noise_gate.T, generator=generator)
    """
    check_float_tensor("logits", logits)
    if check_float_tensor("noise_logits", noise_logits).shape != logits.shape:
        raise ValueError(
            f"noise_logits: expected the shape of logits {tuple(logits.shape)}, got {tuple(noise_logits.shape)}"
        )
    dtype = compute_dtype(logits, noise_logits)
    std = F.softplus(noise_logits.to(dtype)) + min_std
    noise = _draws("noise", torch.randn, noise, logits.shape, dtype, logits.device, generator)
    return logits.to(dtype) + noise * std, std


def jitter(
    x: Tensor, amount: float = 0.01, *, uniform: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x times uniform[1 - amount, 1 + amount], element by element: Switch Transformer's jitter of the router's input.

    uniform: draws from [0, 1) in the shape of x, or give a `generator`. (FastMoE adds the noise instead of multiplying.)

    >>> logits = jitter(x, 0.01, generator=generator) @ gate.T
    """
    check_float_tensor("x", x)
    check_number("amount", amount, low=0.0, high=1.0)
    uniform = _draws("uniform", torch.rand, uniform, x.shape, compute_dtype(x), x.device, generator)
    return (x * (1 - amount + 2 * amount * uniform)).to(x.dtype)


def drop_second_choice(
    ids: Tensor, weights: Tensor, *, uniform: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """GShard's random routing: the second expert of a row is kept with probability min(1, 2 w_2), else its id is -1.

    Args:
        ids, weights: [N, 2] from `route_topk`. uniform: [N] draws from [0, 1), or give a `generator`.
    Returns:
        ids [N, 2], for `make_plan`.

    >>> ids = drop_second_choice(routing.ids, routing.weights, generator=generator)
    """
    if ids.dim() != 2 or ids.shape[1] != 2 or weights.shape != ids.shape:
        raise ValueError(f"ids, weights: expected [N, 2] both, got {tuple(ids.shape)} and {tuple(weights.shape)}")
    uniform = _draws("uniform", torch.rand, uniform, ids.shape[:1], weights.dtype, ids.device, generator)
    kept = uniform < 2 * weights.detach()[:, 1]
    return torch.stack((ids[:, 0], torch.where(kept, ids[:, 1], -1)), 1)


def _draws(name, draw, given, shape, dtype, device, generator) -> Tensor:
    if given is None:
        if generator is None:
            raise ValueError(f"{name}: expected the draws, or a generator to draw from; got neither")
        return draw(shape, generator=generator, dtype=dtype, device=device)
    if given.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(given.shape)}")
    return given.to(dtype)
