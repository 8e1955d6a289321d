"""Losses that keep a router's experts in use. They read the scores, never the experts, and count rows BEFORE any is dropped.

Counts are constants: the gradient goes through the probabilities only (and, for importance_load_loss, through the noise).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor
from kdfast._library import compute_dtype
from kdfast.losses.divergence import reduce_rows
from kdfast.losses.module import LossModule
from kdfast.ops.routing import Routing, dense_weights


def load_balancing_loss(routing: Routing, *, first_choice: bool = False) -> Tensor:
    """L = E sum_e f_e pbar_e, with f_e the share of the N k choices that went to e and pbar_e the mean probability of e.

    1 for a uniform router, E for one that sends all rows to one expert with certainty. dL/dz_n = p_n (h - <p_n, h>) / N
    with h_e = E f_e.

    Args:
        routing: from `route_topk`. first_choice: count the first expert of each row only (GShard).
    Source: Switch Transformer, eq. 4 (k = 1; arXiv 2101.03961), MegaBlocks (any k); GShard, section 2.2 (arXiv 2006.16668).

    >>> loss = task_loss + 0.01 * load_balancing_loss(routing)
    """
    counts = routing.counts
    if first_choice:
        first = routing.ids[:, 0].long()
        counts = torch.zeros_like(counts).index_add_(0, first.clamp_min(0), (first >= 0).to(counts.dtype))
    counts = counts.to(routing.mean_probs.dtype)
    return counts.shape[0] * (counts / counts.sum().clamp_min(1) * routing.mean_probs).sum()


def importance_load_loss(
    routing: Routing,
    *,
    logits: Tensor | None = None,
    noisy_logits: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """cv2(importance) + cv2(load), cv2(v) = var(v) / (mean(v)^2 + 1e-10) with E - 1 in the variance; 0 when E = 1.

    importance_e = sum_n w_ne. load_e = sum_n Phi((z_ne - thr_ne) / std_ne), the chance that e stays among the k best if
    its noise were drawn again: thr is the (k+1)-th value of the noisy row if e was chosen, else the k-th. Gradients reach
    z, std, the weights and, through thr, the noisy logits. With k = E, or without the three tensors (no noise: outside
    training), load is the hard count and has no gradient.

    Args:
        routing: of the noisy logits. logits: clean z [N, E]; noisy_logits, std: from `kdfast.ops.noisy_logits`.
    Source: Shazeer et al. 2017, eq. 6-11 (arXiv 1701.06538); epsilon and the form of thr as in FastMoE's noisy gate.

    >>> noisy, std = noisy_logits(z, raw_std, generator=generator)
    >>> loss = importance_load_loss(route_topk(noisy, 2), logits=z, noisy_logits=noisy, std=std)
    """
    given = [t is not None for t in (logits, noisy_logits, std)]
    if any(given) and not all(given):
        raise ValueError("logits, noisy_logits, std: expected all three or none")
    importance = dense_weights(routing).sum(0)  # [E]
    experts, k = routing.counts.shape[0], routing.ids.shape[1]
    if logits is None or noisy_logits is None or std is None or k == experts:
        load = routing.counts.to(importance.dtype)
    else:
        load = _smooth_load(routing, logits, noisy_logits, std)
    return _squared_variation(importance) + _squared_variation(load)


def _smooth_load(routing: Routing, logits: Tensor, noisy: Tensor, std: Tensor) -> Tensor:
    k = routing.ids.shape[1]
    kept = routing.ids[:, :1] >= 0  # [N, 1], False on padding rows
    noisy = torch.where(kept, noisy, 0.0)
    best = noisy.topk(k + 1, -1).values
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, routing.ids.long().clamp_min(0), True)
    threshold = torch.where(chosen, best[:, k : k + 1], best[:, k - 1 : k])  # [N, E]
    finite = kept & torch.isfinite(logits) & torch.isfinite(threshold)  # a masked expert (-inf) is never or always in
    distance = (torch.where(finite, logits, 0.0) - torch.where(finite, threshold, 0.0)) / torch.where(finite, std, 1.0)
    certain = (kept & (logits > -torch.inf) & (threshold == -torch.inf)).to(distance.dtype)
    return torch.where(finite, torch.special.ndtr(distance), certain).sum(0)


def _squared_variation(values: Tensor) -> Tensor:
    if values.shape[0] == 1:
        return values.sum() * 0.0
    return values.var() / (values.mean() ** 2 + 1e-10)


def router_z_loss(logits: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """(1/N) sum_n (log sum_e exp z_ne)^2: keeps router logits small. dz_n = (2/N) lse_n p_n.

    Args:
        logits: [N, E]. mask: [N] bool, True = keep. reduction: "mean" over kept rows, "sum" or "none".
    Typical weight 1e-3, summed over layers by the caller. Source: ST-MoE, eq. 5 (arXiv 2202.08906).

    >>> loss = task_loss + 1e-3 * router_z_loss(logits)
    """
    check_float_tensor("logits", logits)
    z = logits.to(compute_dtype(logits))
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0.0)
    return reduce_rows(z.logsumexp(-1).square(), mask, None, reduction)


def uniform_kl_loss(probs: Tensor, *, mask: Tensor | None = None, divide_by_experts: bool = True) -> Tensor:
    """KL(uniform || pbar) = sum_e (1/E) (log(1/E) - log pbar_e), pbar the mean of the rows; 0 when it is uniform.

    Args:
        probs: [N, E] probabilities (rows), or [E], their mean (`routing.mean_probs`). mask: [N] bool, True = keep.
        divide_by_experts: the extra factor 1/E that F.kl_div's "batchmean" puts there in MST-Distill's code.
    An expert that no row gives any probability makes the loss infinite, as the formula says.

    >>> loss = uniform_kl_loss(logits.softmax(-1))
    """
    mean = _mean_probs(probs, mask)
    experts = mean.shape[-1]
    divergence = -(mean * experts).log().mean()
    return divergence / experts if divide_by_experts else divergence


def usage_cv_loss(probs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Coefficient of variation of the experts' use: std(u) / mean(u), u = column sums of `probs`; std with E - 1.

    0 when E = 1, and the gradient is 0 where all columns are exactly equal. probs and mask as in `uniform_kl_loss`.

    >>> loss = usage_cv_loss(logits.softmax(-1))
    """
    mean = _mean_probs(probs, mask)
    if mean.shape[0] == 1:
        return mean.sum() * 0.0
    variance = mean.var()
    flat = variance == 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt() / mean.mean())


def _mean_probs(probs: Tensor, mask: Tensor | None) -> Tensor:
    check_float_tensor("probs", probs)
    if probs.dim() not in (1, 2) or (probs.dim() == 1 and mask is not None):
        raise ValueError(f"probs: expected [N, E], or [E] without a mask, got {tuple(probs.shape)}")
    if probs.dim() == 1:
        return probs
    if mask is None:
        return probs.mean(0)
    return torch.where(mask.unsqueeze(-1), probs, 0.0).sum(0) / mask.sum().clamp_min(1)


class LoadBalancingLoss(LossModule, function=load_balancing_loss): ...


class ImportanceLoadLoss(LossModule, function=importance_load_loss): ...


class RouterZLoss(LossModule, function=router_z_loss): ...


class UniformKLLoss(LossModule, function=uniform_kl_loss): ...


class UsageCVLoss(LossModule, function=usage_cv_loss): ...
