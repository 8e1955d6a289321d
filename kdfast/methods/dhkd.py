"""DHKD: labels train the student's own head, a per-class logit loss trains a second one, and their gradients meet in the backbone.

Paper: Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head. Yang, Zong, Huang, Feng, An; 2024;
https://arxiv.org/abs/2411.08937
Based on: the authors' code, github.com/penghui-yang/DHKD at 7976c69: distiller_zoo/BinaryKLNorm.py and BinaryKL.py, models/classifier.py,
    helper/optimizer.py (gradient alignment).
Differs from the code: sigmoid and log are taken together, in a stable form. There, in float32, 1 - 1e-8 is 1: the upper clamp does
    nothing and the loss is infinite beyond a difference of 17 T. The constant value and zero gradient beyond the clamp, which it has
    in float64, are kept (`clamp_eps`); clamp_eps=None keeps the gradient everywhere and behaves better.
    No flattened copies of all gradients: two sums of products and one update.
Differs from the paper: it introduces BinaryKL first; code and default here are the stabilised BinaryKL-Norm, both are there.
Symbols: a [N, C] logits of the second head, z [N, C] of the own one, t [N, C] the teacher's; d = (a - t) / T; sigma the sigmoid.

    BinaryKL-Norm = T^2 / N sum_nc KL( 1/2 || sigma(d) )            = T^2 / N sum_nc log cosh(d / 2)
    BinaryKL      = T^2 / N sum_nc KL( sigma(t/T) || sigma(a/T) )   of two Bernoulli distributions per class
    loss = gamma CE(z, y) + alpha BinaryKL-Norm(a, t)
    aligned: g1, g2 the gradients of the two terms for all parameters; where <g2, g1> < 0, g2 <- g2 - <g2, g1> / |g1|^2 g1;
             the step takes g1 + g2

g1 is never changed. The two heads are disjoint, so <g2, g1> comes from the backbone; |g1|^2 and the update include the own head, whose
step grows by the factor 1 - <g2, g1> / |g1|^2. Inference: the own head alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_number, check_pair
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import DualHead, DualOutput, dual_heads, remove_dual_heads, replace_head

LOSSES = ("binary_kl_norm", "binary_kl")
HEADS = ("nonlinear", "linear", "none")


# ---------------------------------------------------------------- the logit loss
def binary_kl_norm_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, clamp_eps: float | None = 1e-8, mask: Tensor | None = None,
    reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """BinaryKL-Norm of the module docstring; the gradient is T / (2N) tanh((a - t) / (2T)).

    Args:
        student, teacher: logits [N, C]; the teacher is a constant.
        clamp_eps: in (0, 0.5): sigma(d) is kept in [eps, 1 - eps], so beyond |d| = log((1 - eps) / eps) the term is constant and its
            gradient 0, as released. None: no clamp.
        mask: [N] bool, True = keep. reduction: "mean" over kept rows (classes are summed), "sum" or "none".

    >>> loss = binary_kl_norm_loss(aux_logits, teacher)
    """
    bound = _bound(student, teacher, temperature, clamp_eps)
    dtype = compute_dtype(student, teacher)
    d = ((student.to(dtype) - teacher.detach().to(dtype)) / temperature).clamp(-bound, bound)
    return temperature**2 * divergence_loss(
        d, torch.zeros_like(d), kind="binary", mask=mask, reduction=reduction, backend=backend
    )  # fmt: skip


def binary_kl_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, clamp_eps: float | None = 1e-8, mask: Tensor | None = None,
    reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """BinaryKL of the module docstring, both sigmoids kept in [eps, 1 - eps]; the gradient is T / N (sigma(a/T) - sigma(t/T)).

    Arguments: `binary_kl_norm_loss`; the gradient is 0 where |a| / T is beyond the clamp.
    """
    bound = _bound(student, teacher, temperature, clamp_eps)
    dtype = compute_dtype(student, teacher)
    a, t = ((z.to(dtype) / temperature).clamp(-bound, bound) for z in (student, teacher))
    return temperature**2 * divergence_loss(a, t, kind="binary", mask=mask, reduction=reduction, backend=backend)


def _bound(student: Tensor, teacher: Tensor, temperature: float, clamp_eps: float | None) -> float:
    """The checks of both, and log((1 - eps) / eps)."""
    check_pair(student, teacher)
    check_number("temperature", temperature, low=0.0, open_low=True)
    if student.dim() != 2 or student.shape[0] == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"student, teacher: expected logits [N, C] of one shape, N > 0 (flatten other axes), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if clamp_eps is None:
        return math.inf
    if not 0 < clamp_eps < 0.5:
        raise ValueError(f"clamp_eps: expected None or a number in (0, 0.5), got {clamp_eps}")
    return math.log((1 - clamp_eps) / clamp_eps)


# ---------------------------------------------------------------- gradient alignment
def align_gradients(
    task: Sequence[Tensor | None], other: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], Tensor]:
    """(g1 + g2 with g2 projected where it opposes g1, <g2, g1>), a tensor per parameter; None is a gradient of zeros.

    >>> merged, dot = align_gradients([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 2.0])])
    >>> merged[0].tolist(), dot.item()
    ([1.0, 2.0], -1.0)
    """
    pairs = [(g1, g2) for g1, g2 in zip(task, other, strict=True) if g1 is not None and g2 is not None]
    known = [g for g in (*task, *other) if g is not None]
    zero = known[0].new_zeros((), dtype=compute_dtype(known[0])) if known else torch.zeros(())
    dot = sum(((g1 * g2).sum().to(zero) for g1, g2 in pairs), start=zero)
    square = sum((g1.square().sum().to(zero) for g1 in task if g1 is not None), start=zero)
    factor = 1 - torch.where(dot < 0, dot / torch.where(square > 0, square, 1.0), 0.0)  # of g1 in the sum
    merged: list[Tensor | None] = []
    for g1, g2 in zip(task, other):
        merged.append(g2 if g1 is None else g1 * factor.to(g1) if g2 is None else g1 * factor.to(g1) + g2)
    return merged, dot


def aligned_loss(task: Tensor, other: Tensor, parameters: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(task + other, with a backward that gives the aligned gradient; <g2, g1>).

    Both gradients are taken here, in two passes through the shared graph, so any loop, optimizer or accumulation works.
    Under fp16 autocast they are taken before the loss is scaled: prefer bf16. Under DDP each process aligns its own.

    Args: parameters: those to train; None finds every leaf that one of the losses reaches.
    Raises: ValueError: a loss that reaches no parameter.
    """
    if parameters is None:
        parameters = list({id(leaf): leaf for loss in (task, other) for leaf in graph_leaves(loss)}.values())
    gradients = []
    for name, loss in (("task", task), ("other", other)):
        found: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(f"{name}: expected a loss that reaches a parameter, got one without a gradient")
        gradients.append(found)
    merged, dot = align_gradients(*gradients)
    kept = [(p, g) for p, g in zip(parameters, merged) if g is not None]
    value = (task + other).detach()
    return _Given.apply(value, len(kept), *(p for p, _ in kept), *(g for _, g in kept)), dot


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that a backward of `loss` would reach, each once."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    leaves, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return leaves


class _Given(torch.autograd.Function):
    """A value whose gradient for `number` tensors is given beforehand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, number: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[number:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return (None, None, *(g * grads[0].to(g) for g in given), *(None for _ in given))


# ---------------------------------------------------------------- the total, and by name
def dhkd_loss(
    main: Tensor,
    aux: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    loss: str = "binary_kl_norm",
    clamp_eps: float | None = 1e-8,
    align: bool = False,
    parameters: Sequence[Tensor] | None = None,
    ignore_index: int = -100,
) -> LossOutput:
    """gamma CE(main, labels) + alpha L(aux, teacher); with align=True its backward gives the aligned gradient.

    ImageNet, ResNet34 to 18: alpha = 0.1, a linear second head, no alignment.

    Args:
        main, aux, teacher: logits [N, C]. labels: [N] integers or `ignore_index`, whose rows are in neither term.
        loss: "binary_kl_norm" or "binary_kl". parameters: of `aligned_loss`.
    Returns:
        LossOutput(loss, {"ce", "kd"}), and "conflict" with align: 1 where the gradients opposed each other, else 0.

    >>> loss, parts = dhkd_loss(z, a, teacher, labels)
    """
    check_choice("loss", loss, LOSSES)
    check_number("gamma", gamma, low=0.0)
    check_number("alpha", alpha, low=0.0)
    ce = cross_entropy_loss(main, labels, ignore_index=ignore_index)
    logit_loss = binary_kl_norm_loss if loss == "binary_kl_norm" else binary_kl_loss
    kd = logit_loss(aux, teacher, temperature=temperature, clamp_eps=clamp_eps, mask=labels.long() != ignore_index)
    parts = {"ce": ce.detach(), "kd": kd.detach()}
    if not align:
        return LossOutput(gamma * ce + alpha * kd, parts)
    total, dot = aligned_loss(gamma * ce, alpha * kd, parameters)
    return LossOutput(total, parts | {"conflict": (dot < 0).to(total.dtype)})


class Method(MethodBase):
    """Gives the student a second head for the training and takes it away afterwards.

    Args:
        aux: the second head, "nonlinear", "linear", or "none": both losses on the student's own head, to compare with.
        hidden, dropout: of the nonlinear one. head: dotted path of the student's head, default its last nn.Linear.
        align: gradient alignment. Others: `dhkd_loss`.
    """

    def __init__(
        self, *, temperature: float = 2.0, gamma: float = 1.0, alpha: float = 1.0, loss: str = "binary_kl_norm",
        clamp_eps: float | None = 1e-8, align: bool = True, aux: str = "nonlinear", hidden: int = 200, dropout: float = 0.1,
        head: str | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("aux", aux, HEADS)
        check_choice("loss", loss, LOSSES)
        for name, value in (("gamma", gamma), ("alpha", alpha)):
            check_number(name, value, low=0.0)
        self.aux, self.head = {"aux": aux, "hidden": hidden, "dropout": dropout}, head
        self.options: dict[str, Any] = {
            "temperature": temperature, "gamma": gamma, "alpha": alpha, "loss": loss, "clamp_eps": clamp_eps, "align": align,
            "ignore_index": ignore_index,
        }  # fmt: skip

    def adapt(self, student: nn.Module) -> nn.Module:
        if self.aux["aux"] == "none" or dual_heads(student):
            return student
        options: Any = self.aux
        return replace_head(student, lambda head: DualHead(head, **options), self.head)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        out = context.student
        main, aux = out if isinstance(out, DualOutput) else (out, out)
        return dhkd_loss(main, aux, context.teacher, context.labels, **self.options)

    def deploy(self, setup: Setup) -> nn.Module:
        return remove_dual_heads(copy.deepcopy(setup.student))
