"""Selective KL: at every pixel the less reliable of two models learns from the more reliable one, in one pass over both maps.

With a, b the logits of one pixel, V the pixels that count (label not `ignore_index`), sg() a stop-gradient, T the temperature:

    reliability   l_S = -log softmax(S)[label]   ("label"),  or  l_S = entropy of softmax(S)   ("entropy"),  S in {a, b};  0 outside V
    direction     +1 (b teaches a) where l_b < l_a;  -1 (a teaches b) where l_a < l_b;  0 at ties and outside V
    loss_to_a     1/Z_a  sum over direction = +1 of  KL(softmax(sg(b)/T) || softmax(a/T))
    loss_to_b     1/Z_b  sum over direction = -1 of  KL(softmax(sg(a)/T) || softmax(b/T))
    Z             "valid": |V|;  "selected": the pixels in that sum;  "all": every pixel;  always at least 1

    d loss_to_a / da = (softmax(a/T) - softmax(b/T)) / (T Z_a)  where direction = +1, else 0;   d loss_to_a / db = 0, and mirrored.

Reliability is taken at temperature 1, and no gradient flows through it. A pixel where one model has only -inf is not in V; what
the logits are outside V does not matter, NaN included. An empty V gives exact zeros.

Source: the pixel-wise term of CNN-ViT collaborative learning (Zhu et al., ICCV 2023, arXiv 2307.12574); see
`kdfast.methods.cnn_vit_bsd` for what of it is reconstruction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_labels, check_number, check_pair
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    address,
    compute_dtype,
    contiguous,
    direct,
    first_derivative_only,
    gradient_like,
    lib,
    operand,
    scale_gradient,
    transforms_active,
)
from kdfast.ops.divergence import divergence_reference
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

NORMALIZERS = ("valid", "selected", "all")
RELIABILITIES = ("label", "entropy")


class SelectiveKL(NamedTuple):
    """What `selective_kl` returns. Only the two losses carry a gradient; maps have the shape of the labels."""

    loss_to_a: Tensor  # what a learns from b, scalar; its gradient reaches logits_a only
    loss_to_b: Tensor  # what b learns from a, scalar; its gradient reaches logits_b only
    direction: Tensor  # int8: +1 b teaches a, -1 a teaches b, 0 none
    valid: Tensor  # bool: the pixels of V
    reliability_a: Tensor  # l_a, lower = more reliable, 0 outside V
    reliability_b: Tensor
    num_valid: Tensor  # |V|, int64 scalar
    num_to_a: Tensor  # pixels with direction +1
    num_to_b: Tensor


# ---------------------------------------------------------------- reference: the definition, with every option
def selective_kl_reference(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    normalizer: str = "valid",
    reliability: str = "label",
) -> SelectiveKL:
    """The equations of this module in plain torch. Any order of derivative. A bad label or a NaN logit makes both losses NaN."""
    dtype = compute_dtype(logits_a, logits_b)
    a, b = logits_a.to(dtype), logits_b.to(dtype)  # [B, K, ...]
    labels = labels.long()  # [B, ...]; int8 cannot be compared with 255
    empty = (a == -math.inf).all(1) | (b == -math.inf).all(1)  # [B, ...]
    valid = (labels != ignore_index) & ~empty
    known = (labels >= 0) & (labels < a.shape[1])
    a, b = (torch.where(valid.unsqueeze(1), z, 0.0) for z in (a, b))
    index = torch.where(valid & known, labels, 0).unsqueeze(1)
    l_a, l_b = (_reliability(z.detach(), index, reliability) for z in (a, b))
    l_a, l_b = (torch.where(valid, torch.where(known, z, math.nan), 0.0) for z in (l_a, l_b))
    to_a, to_b = l_b < l_a, l_a < l_b
    broken = l_a.isnan() | l_b.isnan()
    losses = []
    for student, teacher, chosen in ((a, b, to_a), (b, a, to_b)):
        rows = divergence_reference(student, teacher.detach(), kind="forward_kl", temperature=temperature, dim=1)
        rows = torch.where(chosen | broken, rows, 0.0) + torch.where(broken, math.nan, 0.0)
        counted = {"valid": valid, "selected": chosen, "all": torch.ones_like(valid)}[normalizer]
        losses.append(rows.sum() / counted.sum().clamp_min(1))
    direction = to_a.to(torch.int8) - to_b.to(torch.int8)
    return SelectiveKL(losses[0], losses[1], direction, valid, l_a, l_b, valid.sum(), to_a.sum(), to_b.sum())


def _reliability(logits: Tensor, index: Tensor, kind: str) -> Tensor:
    log_p = logits.log_softmax(1)
    if kind == "label":
        return -log_p.gather(1, index).squeeze(1)
    return -(log_p.exp() * torch.where(log_p > -math.inf, log_p, 0.0)).sum(1)


# ---------------------------------------------------------------- registration
# Returns loss_to_a, loss_to_b, direction, valid, reliability_a, reliability_b, counts [3] (valid, to a, to b), grad_a, grad_b,
# scale [2]: the stored gradients times `scale` are the final ones. It is 1, but float16 keeps them unnormalised: 1/|V| below
# 6e-8 would lose them before a loss scaler's factor can arrive.
lib.define(
    "selective_kl(Tensor logits_a, Tensor logits_b, Tensor labels, float temperature, int ignore_index, str normalizer, "
    "str reliability, float factor, bool need_a, bool need_b) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _outputs(logits_a: Tensor, logits_b: Tensor, labels: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, ...]:
    dtype, shape = compute_dtype(logits_a, logits_b), labels.shape
    new = logits_a.new_empty
    return (
        new((), dtype=dtype), new((), dtype=dtype), new(shape, dtype=torch.int8), new(shape, dtype=torch.bool),
        new(shape, dtype=dtype), new(shape, dtype=dtype), new(3, dtype=torch.int64),
        gradient_like(logits_a, need_a), gradient_like(logits_b, need_b), new(2, dtype=dtype),
    )  # fmt: skip


@torch.library.register_fake("kdfast::selective_kl")
def _(logits_a, logits_b, labels, temperature, ignore_index, normalizer, reliability, factor, need_a, need_b):
    return _outputs(logits_a, logits_b, labels, need_a, need_b)


@torch.library.impl(lib, "selective_kl", "CPU")
def _selective_kl_cpu(
    logits_a, logits_b, labels, temperature, ignore_index, normalizer, reliability, factor, need_a, need_b
):
    out = _outputs(logits_a, logits_b, labels, need_a, need_b)
    labels = contiguous(labels, torch.int64)
    _core.core.selective_kl(
        *operand(logits_a), *operand(logits_b), tuple(logits_a.shape), address(labels), temperature, ignore_index,
        NORMALIZERS.index(normalizer), reliability == "entropy", factor,
        *operand(out[7]), *operand(out[8]), *(address(out[i]) for i in (0, 1, 2, 3, 4, 5, 6, 9)),
    )  # fmt: skip
    return out


register("selective_kl", "selective", "selective_kl")

# ---------------------------------------------------------------- autograd
_op = direct(torch.ops.kdfast.selective_kl.default, _selective_kl_cpu)
_OUTPUTS = 7  # of the op, that the caller sees


class _Selective(torch.autograd.Function):
    """The forward stores the final gradients of both losses, so each map is read once and not kept."""

    @staticmethod
    def forward(ctx, logits_a, logits_b, labels, options, need_a, need_b):
        out = _op(logits_a, logits_b, labels, *options, need_a, need_b)
        _Selective._save(ctx, out)
        return out[:_OUTPUTS]

    @staticmethod
    def _save(ctx, out):
        ctx.save_for_backward(*out[_OUTPUTS:])
        ctx.mark_non_differentiable(*out[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_to_a, grad_to_b, *_):
        grad_a, grad_b, scale = ctx.saved_tensors[:3]
        final = [
            scale_gradient(grad, upstream * scale[i] if grad.dtype == torch.float16 else upstream)
            if ctx.needs_input_grad[i] and upstream is not None
            else None
            for i, (grad, upstream) in enumerate(((grad_a, grad_to_a), (grad_b, grad_to_b)))
        ]
        return *final, None, None, None, None


class _SelectiveTransform(torch.autograd.Function):
    """`_Selective` in the form torch.func transforms ask for."""

    @staticmethod
    def forward(logits_a, logits_b, labels, options):
        return _op(logits_a, logits_b, labels, *options, True, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Selective._save(ctx, output)
        # the inputs too: a second derivative is refused where it would reach them
        ctx.save_for_backward(*output[_OUTPUTS:], *inputs[:2])

    @staticmethod
    def backward(ctx, grad_to_a, grad_to_b, *_):
        return _Selective.backward(ctx, grad_to_a, grad_to_b)[:4]


# ---------------------------------------------------------------- public
def selective_kl(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    normalizer: str = "valid",
    reliability: str = "label",
    backend: str | None = None,
) -> SelectiveKL:
    """Per pixel, the less reliable model learns from the more reliable one; the equations stand at the top of this module.

    Args:
        logits_a, logits_b: [B, K, ...] of the same shape, K >= 2; float16, bfloat16, float32 or float64. Any strides: NCHW
            and channels_last maps are read in place.
        labels: [B, ...] integers in [0, K) or `ignore_index`.
        temperature: T > 0, softens the KL only. There is no T^2 here (`kdfast.losses.selective_kd_loss` has it).
        normalizer: "valid", "selected" or "all". reliability: "label" or "entropy".
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        SelectiveKL; losses and reliabilities float32 (float64 for float64 input). Each loss has a gradient for its learner
        only, once; `backend="reference"` gives every derivative.
    Raises:
        ValueError: shapes that differ, a label outside [0, K) (named), K < 2, bad options; +inf or NaN logits in V on the
            CPU kernel. Elsewhere such a value makes both losses NaN.

    >>> out = selective_kl(torch.randn(2, 19, 8, 8), torch.randn(2, 19, 8, 8), torch.randint(19, (2, 8, 8)))
    >>> float(out.num_to_a + out.num_to_b) == float(out.num_valid)  # no ties between random maps
    True
    """
    return selective_total(
        logits_a, logits_b, labels, temperature=temperature, ignore_index=ignore_index, normalizer=normalizer,
        reliability=reliability, factor=1.0, backend=backend,
    )  # fmt: skip


def selective_total(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    ignore_index: int,
    normalizer: str,
    reliability: str,
    factor: float,
    backend: str | None,
) -> SelectiveKL:
    """`selective_kl` with both losses times `factor`, which the stored gradients then hold already."""
    _check(logits_a, logits_b, labels, temperature, ignore_index, normalizer, reliability)
    rules = {"cpu": lambda: _cpu_reason(logits_a), "triton": lambda: triton_reason("selective_kl", logits_a, logits_b)}
    chosen = choose("selective_kl", backend, rules, (logits_a, logits_b))
    if chosen != "cpu" and (labels.device.type == "cpu" or debugging()):  # the CPU kernel looks at them itself
        _check_label_values(labels, logits_a.shape[1], ignore_index)
    if chosen == "reference":
        out = selective_kl_reference(
            logits_a, logits_b, labels, temperature=temperature, ignore_index=ignore_index, normalizer=normalizer,
            reliability=reliability,
        )  # fmt: skip
        return out if factor == 1 else out._replace(loss_to_a=out[0] * factor, loss_to_b=out[1] * factor)
    options = (float(temperature), ignore_index, normalizer, reliability, float(factor))
    if transforms_active():
        out = _SelectiveTransform.apply(logits_a, logits_b, labels, options)[:_OUTPUTS]
    else:
        # Inside forward() nothing tells whether a graph is recorded: needs_input_grad is also True under no_grad.
        grad = torch.is_grad_enabled()
        out = _Selective.apply(
            logits_a, logits_b, labels, options, grad and logits_a.requires_grad, grad and logits_b.requires_grad
        )
    return SelectiveKL(*out[:6], *out[6].unbind())


# ---------------------------------------------------------------- checks and choice
def _check(logits_a, logits_b, labels, temperature, ignore_index, normalizer, reliability) -> None:
    check_pair(logits_a, logits_b, ("logits_a", "logits_b"))
    if logits_a.dim() < 2:
        raise ValueError(f"logits_a: expected [B, K, ...], got shape {tuple(logits_a.shape)}")
    if logits_a.shape != logits_b.shape:
        raise ValueError(
            f"logits_b: expected the shape of logits_a {tuple(logits_a.shape)}, got {tuple(logits_b.shape)}"
        )
    if logits_a.shape[1] < 2:
        raise ValueError(f"logits_a: expected at least 2 classes along dim 1, got shape {tuple(logits_a.shape)}")
    check_labels(labels, logits_a.shape[:1] + logits_a.shape[2:], logits_a.device)
    check_number("temperature", temperature, low=0.0, open_low=True)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_choice("reliability", reliability, RELIABILITIES)


def _check_label_values(labels: Tensor, classes: int, ignore_index: int) -> None:
    # A traced, fake or transformed tensor has no values to look at; there the reference answers with NaN.
    traced = torch.compiler.is_compiling() or transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    if traced or type(labels) is not Tensor or labels.is_meta:
        return
    labels = labels.long()
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bool(bad.any()):
        raise ValueError(
            f"labels: expected integers in [0, {classes}) or ignore_index={ignore_index}, got {int(labels[bad][0])} "
            f"at pixel {int(bad.flatten().nonzero()[0])}"
        )


def _cpu_reason(logits: Tensor) -> str | None:
    if (why := core_reason()) is not None:
        return why
    return None if logits.device.type in ("cpu", "meta") else f"the tensors are on {logits.device}"
