"""Routing scores: which k of E experts each row goes to, and with which weight.

With z the logits of one row [E] and c a bias for the selection only, every score s(z) has its log l, and S are the k
experts with the largest selection score (ties to the lower id, listed by descending score):

    score                s_e                      selected by
    softmax_after_topk   softmax(z_S) over S      z            the same as "softmax" with normalise=1
    softmax              p_e = softmax(z)_e       p + c
    sigmoid              1 / (1 + e^-z)           s + c        (DeepSeek-V3: normalise=1, bias, groups, route_scale)
    sqrt_softplus        sqrt(log(1 + e^z))       s + c
    logits               z                        z + c
    mean                 1/k, constant            z + c

    w_j = r s_j                                         (normalise=None; r is route_scale)
    w_j = r s_j / (|s_S|_q + eps)                       (normalise=q, the q-norm over S)

Exact gradient for dw: with dl_j = w_j dw_j - pi_j sum_l w_l dw_l, where pi_j = s_j^q / sum_S s^q times |s|/(|s| + eps)
(no second term when normalise is None):

    softmax:        dz_e = [e in S] dl_e - p_e sum_S dl         for ALL e (the sum is 0 when normalised and eps = 0)
    sigmoid:        dz_j = (1 - s_j) dl_j                       on S, else 0
    sqrt_softplus:  dz_j = dl_j sigmoid(z_j) / (2 s_j^2)        on S, else 0
    logits:         dz_j = r dw_j                               on S, else 0

The selection is never differentiated and c gets no gradient. Normalised weights are made from l, so they do not
underflow. Column means of p and the log-sum-exp of every row come along for the balance and z losses:

    mean_probs_e = mean_n p_ne (kept rows)        lse_n = log sum_e exp z_ne        dz_n += p_n (h - <p_n, h>)/N + dlse_n p_n

Group limit: the experts form G equal groups; a group scores the sum of its two best selection scores with a bias, its
best without one, its only one when it has one; the best `topk_groups` (ties to the lower group) stay, the others get
selection score -inf. An expert of selection score -inf has weight 0 where it must still be chosen.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_float_tensor, check_int, check_number, check_row_tensor
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    address,
    applied,
    compute_dtype,
    contiguous,
    direct,
    first_derivative_only,
    lib,
    operand,
    readable,
)
from kdfast.cuda import MOST_EXPERTS
from kdfast.cuda import reason as cuda_reason
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

SCORES = ("softmax_after_topk", "softmax", "sigmoid", "sqrt_softplus", "logits", "mean")


class Routing(NamedTuple):
    """What `route_topk` returns. ids never repeat in a row; -1 marks the slots of a row outside `mask`."""

    ids: Tensor  # [N, k] int32, by descending selection score
    weights: Tensor  # [N, k] float32 (float64 for float64 logits)
    counts: Tensor  # [E] int32, rows per expert
    mean_probs: Tensor  # [E] mean of softmax(logits) over the kept rows
    lse: Tensor  # [N] log-sum-exp of the logits, 0 outside `mask`


# ---------------------------------------------------------------- reference: the definition, with every option
def route_topk_reference(
    logits: Tensor,
    k: int = 2,
    *,
    score: str = "softmax_after_topk",
    normalise: float | None = None,
    eps: float = 0.0,
    route_scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    mask: Tensor | None = None,
) -> Routing:
    """The equations of this module in plain torch. Any order of derivative."""
    experts = logits.shape[-1]
    z = logits.to(compute_dtype(logits))  # [N, E]
    bad = torch.isnan(z).any(-1) | (z == math.inf).any(-1) | (z == -math.inf).all(-1)  # [N] weights become NaN
    kept = torch.ones_like(bad) if mask is None else mask
    clean = torch.where((bad | ~kept).unsqueeze(-1), 0.0, z)  # gradients of the other rows stay clean
    lse = clean.logsumexp(-1)
    probs = (clean - lse.unsqueeze(-1)).exp()
    log_score = _log_score(score, clean, lse)
    chosen_by = _selection_score(score, z, bad, bias, groups, topk_groups)  # [N, E]
    ids = _sorted_ids(chosen_by)[:, :k]  # [N, k] int64
    dead = chosen_by.gather(-1, ids) == -math.inf
    if score == "mean":
        weights = torch.full_like(ids, 1.0 / k, dtype=z.dtype)
    elif score == "logits":
        weights = route_scale * torch.where(dead, 0.0, clean.gather(-1, ids))
    else:
        weights = _weights(log_score.gather(-1, ids), dead, score, normalise, eps, route_scale)
    weights = torch.where(dead, 0.0, weights)
    weights = torch.where(bad.unsqueeze(-1), math.nan, weights)
    counts = torch.zeros(experts, dtype=torch.int32, device=z.device)
    counts.index_add_(0, ids.flatten(), kept.to(torch.int32).unsqueeze(-1).expand_as(ids).flatten())
    probs = torch.where(bad.unsqueeze(-1), math.nan, probs)
    mean_probs = torch.where(kept.unsqueeze(-1), probs, 0.0).sum(0) / kept.sum().clamp_min(1)
    return Routing(
        torch.where(kept.unsqueeze(-1), ids, -1).to(torch.int32),
        torch.where(kept.unsqueeze(-1), weights, 0.0),
        counts,
        mean_probs,
        torch.where(kept, torch.where(bad, math.nan, lse), 0.0),
    )


def _log_score(score: str, z: Tensor, lse: Tensor) -> Tensor:
    if score == "sigmoid":
        return F.logsigmoid(z)
    if score == "sqrt_softplus":
        low = z < -37.0  # log(log(1 + e^z)) is z to the last bit, and softplus may underflow
        return 0.5 * torch.where(low, z, F.softplus(torch.where(low, 0.0, z), threshold=40.0).log())
    return z - lse.unsqueeze(-1) if score == "softmax" else z


def _selection_score(score: str, z: Tensor, bad: Tensor, bias, groups: int, topk_groups: int) -> Tensor:
    z = z.detach()
    forms = {
        "softmax": lambda z: z.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda z: F.softplus(z, threshold=40.0).sqrt(),
    }
    plain = bad.unsqueeze(-1) | (z == -math.inf)  # a bad row goes by its logits, so that NaN stays behind the others
    chosen_by = torch.where(plain, z, forms.get(score, lambda z: z)(z))
    if bias is not None:
        chosen_by = chosen_by + bias.detach().to(z.dtype)
    if groups > 1:
        per_group = chosen_by.unflatten(-1, (groups, -1))  # [N, G, E/G]
        sortable = per_group.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        best = sortable.topk(min(2 if bias is not None else 1, sortable.shape[-1]), -1).values.sum(-1)  # [N, G]
        kept_groups = _sorted_ids(best)[:, :topk_groups]
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept_groups, True).unsqueeze(-1)
        chosen_by = torch.where(allowed | torch.isnan(per_group), per_group, -math.inf).flatten(-2)
    return chosen_by


def _sorted_ids(values: Tensor) -> Tensor:
    """Column ids by descending value, equal values by ascending id, NaN behind everything: a total order."""
    nan = torch.isnan(values)
    order = torch.where(nan, -math.inf, values).sort(dim=-1, descending=True, stable=True).indices
    nan_last = nan.gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices
    return order.gather(-1, nan_last)


def _weights(log_score: Tensor, dead: Tensor, score: str, normalise, eps: float, route_scale: float) -> Tensor:
    """w [N, k] from the logs of the chosen scores; a dead slot counts as score 0."""
    log_score = torch.where(dead, -math.inf, log_score)
    log_score = torch.where(dead.all(-1, keepdim=True), 0.0, log_score)  # the caller writes zeros there
    q = 1.0 if score == "softmax_after_topk" else normalise
    if q is None:
        return route_scale * log_score.exp()
    if eps:
        return route_scale * log_score.exp() / (((q * log_score).logsumexp(-1, keepdim=True) / q).exp() + eps)
    log_score = log_score - log_score.detach().amax(
        -1, keepdim=True
    )  # the norm cancels it; differences keep their digits
    return route_scale * (log_score - (q * log_score).logsumexp(-1, keepdim=True) / q).exp()


# ---------------------------------------------------------------- registration
# Last, whether a GPU runs the CUDA kernels instead of Triton's: a default, which torch never hands to a kernel.
_OPTIONS = "int k, str score, float norm, float eps, float route_scale, int groups, int topk_groups, bool cuda=False"

lib.define(
    f"routing_scores(Tensor logits, Tensor? bias, Tensor? mask, bool validate, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "routing_scores_backward(Tensor? grad_weights, Tensor? grad_mean_probs, Tensor? grad_lse, Tensor logits, Tensor ids, "
    f"Tensor lse, Tensor alive, {_OPTIONS}) -> Tensor"
)


@torch.library.register_fake("kdfast::routing_scores")
def _(logits, bias, mask, validate, k, score, norm, eps, route_scale, groups, topk_groups, cuda=False):
    rows, experts = logits.shape
    dtype = compute_dtype(logits)
    return (
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=dtype),
        logits.new_empty(experts, dtype=torch.int32),
        logits.new_empty(experts, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=torch.int32),
    )


@torch.library.register_fake("kdfast::routing_scores_backward")
def _(
    grad_weights,
    grad_mean_probs,
    grad_lse,
    logits,
    ids,
    lse,
    alive,
    k,
    score,
    norm,
    eps,
    route_scale,
    groups,
    topk_groups,
    cuda=False,
):
    return logits.new_empty(logits.shape)


def _call(logits, ids, lse, alive, k, score, norm, eps, route_scale, groups, topk_groups):
    """The arguments both core functions start with."""
    options = k, SCORES.index(score), norm, eps, route_scale, groups, topk_groups
    return *operand(logits), logits.shape, *options, address(ids), address(lse), address(alive)


@torch.library.impl(lib, "routing_scores", "CPU")
def _routing_scores_cpu(logits, bias, mask, validate, k, *options):
    (rows, experts), dtype = logits.shape, compute_dtype(logits)
    ids, alive = torch.empty((rows, k), dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    weights, lse = torch.empty((rows, k), dtype=dtype), torch.empty(rows, dtype=dtype)
    counts, mean_probs = torch.empty(experts, dtype=torch.int32), torch.empty(experts, dtype=dtype)
    bias, mask = contiguous(bias, dtype), contiguous(mask, torch.bool)
    _core.core.routing_scores(
        *_call(logits, ids, lse, alive, k, *options), address(bias), address(mask), address(weights), address(counts),
        address(mean_probs), validate,
    )  # fmt: skip
    return ids, weights, counts, mean_probs, lse, alive


@torch.library.impl(lib, "routing_scores_backward", "CPU")
def _routing_scores_backward_cpu(grad_weights, grad_mean_probs, grad_lse, logits, ids, lse, alive, *options):
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    grads = [contiguous(g, lse.dtype) for g in (grad_weights, grad_mean_probs, grad_lse)]
    _core.core.routing_scores_backward(
        *_call(logits, ids, lse, alive, *options), *(address(g) for g in grads), address(grad)
    )
    return grad


register("routing_scores", "routing", "scores")
register("routing_scores_backward", "routing", "scores_backward")

# ---------------------------------------------------------------- autograd
_scores_op = direct(torch.ops.kdfast.routing_scores.default, _routing_scores_cpu)
_scores_backward_op = direct(torch.ops.kdfast.routing_scores_backward.default, _routing_scores_backward_cpu)


class _Scores(torch.autograd.Function):
    """Saves the logits and O(N k) more; the softmax is computed again in the backward, only where a gradient needs it."""

    @staticmethod
    def forward(logits, bias, mask, validate, options):
        return _scores_op(logits, bias, mask, validate, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, _, counts, _, lse, alive = output
        ctx.save_for_backward(inputs[0], ids, lse, alive)
        ctx.options = inputs[4]
        ctx.mark_non_differentiable(ids, counts, alive)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx, _ids, grad_weights, _counts, grad_mean_probs, grad_lse, _alive):
        logits, ids, lse, alive = ctx.saved_tensors
        grad = _scores_backward_op(grad_weights, grad_mean_probs, grad_lse, logits, ids, lse, alive, *ctx.options)
        return grad, None, None, None, None


_apply_scores = applied(_Scores)


# ---------------------------------------------------------------- public
def route_topk(
    logits: Tensor,
    k: int = 2,
    *,
    score: str = "softmax_after_topk",
    normalise: float | None = None,
    eps: float = 0.0,
    route_scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    mask: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Routing:
    """Top-k expert ids and weights of every row, with what the balance losses need; equations at the top of this module.

    Args:
        logits: [N, E] float16, bfloat16, float32 or float64; scores are float32 (float64 for float64). -inf masks an expert.
        k: experts per row, 1 <= k <= E.
        score: one of SCORES. normalise: q > 0, divide by the q-norm over the chosen ones ("softmax_after_topk" always
            has q = 1; "logits" and "mean" take none). eps >= 0: added to that norm. route_scale: r, multiplies the weights.
        bias: [E], added for the selection only, without gradient. groups, topk_groups: the group limit.
        mask: [N] bool, True = keep. Other rows (padding) are not read: ids -1, weights 0, not counted.
        validate: read the values: NaN, +inf or a row of only -inf raises. Default: on the CPU and under
            `kdfast.debug()`. Without it such a row has NaN weights and distinct ids inside [0, E), NaN sorted last.
        backend: "cpu", "cuda", "triton", "reference" or None for the best that can run.
    Returns:
        Routing(ids, weights, counts, mean_probs, lse).
    Differentiable: weights, mean_probs and lse in logits, once; `backend="reference"` gives every derivative. With k = 1 a
        normalised weight is constant: the router then gets no gradient from the task, and a warning says so.
    Raises:
        ValueError: k outside [1, E] or above what the group limit leaves, E not divisible by groups, bad values or options.
    Source: the gates of Shazeer et al. 2017 (form "softmax_after_topk"), Switch/GShard ("softmax"), DeepSeek-V3
        ("sigmoid" with bias and groups, arXiv 2412.19437, eq. 12-16).

    >>> routing = route_topk(torch.randn(6, 8), k=2, score="sigmoid", normalise=1.0, route_scale=2.5)
    """
    _check(logits, k, score, normalise, eps, route_scale, bias, groups, topk_groups, mask)
    if validate is None:
        validate = logits.device.type == "cpu" or debugging()
    if bias is not None and validate and readable(bias) and bool((torch.isnan(bias) | (bias == math.inf)).any()):
        raise ValueError("bias: expected finite values or -inf, got NaN or +inf")
    rules = {
        "cpu": lambda: _cpu_reason(logits),
        "cuda": lambda: _cuda_reason(logits),
        "triton": lambda: triton_reason("route_topk", logits),
    }
    chosen = choose("route_topk", backend, rules, (logits,))
    if chosen != "cpu" and validate and (readable(logits) or debugging()):  # the CPU kernel looks itself
        _check_values(logits, mask)
    if chosen == "reference":
        return route_topk_reference(
            logits, k, score=score, normalise=normalise, eps=eps, route_scale=route_scale, bias=bias, groups=groups,
            topk_groups=topk_groups, mask=mask,
        )  # fmt: skip
    cuda = (True,) if chosen == "cuda" else ()
    options = (k, score, float(normalise or 0.0), float(eps), float(route_scale), groups, topk_groups, *cuda)
    return Routing(*_apply_scores(logits, bias, mask, validate, options)[:5])


def _cpu_reason(logits: Tensor) -> str | None:
    if (why := core_reason()) is not None:
        return why
    return None if logits.device.type in ("cpu", "meta") else f"the tensors are on {logits.device}"


def _cuda_reason(logits: Tensor) -> str | None:
    if (why := cuda_reason("route_topk", logits)) is not None:
        return why
    if logits.dtype == torch.float64:
        return "float64 logits are Triton's"
    experts = logits.shape[1]
    return f"it takes at most {MOST_EXPERTS} experts, got {experts}" if experts > MOST_EXPERTS else None


def dense_weights(routing: Routing, num_experts: int | None = None) -> Tensor:
    """[N, E] with the weights at their ids and 0 elsewhere (dropped slots add nothing); differentiable in the weights.

    >>> dense_weights(route_topk(torch.randn(6, 8), k=2)).shape
    torch.Size([6, 8])
    """
    experts = routing.counts.shape[0] if num_experts is None else num_experts
    ids = routing.ids.long()
    kept = torch.where(ids >= 0, routing.weights, 0.0)
    return kept.new_zeros(ids.shape[0], experts).scatter_add(1, ids.clamp_min(0), kept)


# ---------------------------------------------------------------- checks
def _check(logits, k, score, normalise, eps, route_scale, bias, groups, topk_groups, mask) -> None:
    check_float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [N, E] with at least one expert, got {tuple(logits.shape)}")
    rows, experts = logits.shape
    check_int("k", k, low=1)
    if k > experts:
        raise ValueError(f"k: expected at most the number of experts ({experts}), got {k}")
    if rows * k >= 2**31:
        raise ValueError(f"logits: expected fewer than 2^31 slots (rows times k), got {rows} times {k}")
    check_choice("score", score, SCORES)
    if normalise is not None:
        check_number("normalise", normalise, low=0.0, open_low=True)
        if score in ("logits", "mean"):
            raise ValueError(f"normalise: score={score!r} has no norm to divide by, got {normalise}")
        if score == "softmax_after_topk" and normalise != 1:
            raise ValueError(f"normalise: score='softmax_after_topk' is normalised with 1, got {normalise}")
    check_number("eps", eps, low=0.0)
    if eps and (normalise is None or score == "softmax_after_topk"):
        raise ValueError(f"eps: it is added to the norm, so it needs normalise with another score, got {eps}")
    check_number("route_scale", route_scale)
    if score == "mean" and route_scale != 1:
        raise ValueError(f"route_scale: score='mean' has constant weights 1/k, got {route_scale}")
    check_int("groups", groups, low=1)
    check_int("topk_groups", topk_groups, low=1)
    if experts % groups:
        raise ValueError(f"groups: expected a divisor of the number of experts ({experts}), got {groups}")
    if topk_groups > groups:
        raise ValueError(f"topk_groups: expected at most groups ({groups}), got {topk_groups}")
    if k > topk_groups * (experts // groups):
        left = topk_groups * (experts // groups)
        raise ValueError(f"k: expected at most the {left} experts that the group limit leaves, got {k}")
    if bias is not None:
        check_float_tensor("bias", bias)
        if bias.shape != (experts,) or bias.device != logits.device:
            raise ValueError(f"bias: expected [{experts}] on {logits.device}, got {tuple(bias.shape)} on {bias.device}")
    if mask is not None:
        check_row_tensor("mask", mask, torch.Size((rows,)), logits.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool (True = keep), got {mask.dtype}")
    constant = score == "softmax_after_topk" or (normalise is not None and eps == 0)
    if k == 1 and constant and logits.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            f"route_topk: with k=1 and score={score!r} normalised, every weight is constant, so the router gets no gradient "
            "from the task; use score='softmax' or 'sigmoid' without normalise",
            stacklevel=3,
        )


def _check_values(logits: Tensor, mask: Tensor | None) -> None:
    z = logits.detach() if mask is None else logits.detach()[mask]
    if bool((torch.isnan(z) | (z == math.inf)).any()):
        raise ValueError("logits: expected finite values or -inf, got NaN or +inf")
    if bool((z == -math.inf).all(-1).any()):
        raise ValueError("logits: expected an expert that is not -inf in every row, got a row of only -inf")
