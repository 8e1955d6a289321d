"""TGeo-KD: a small network weighs the teacher against the label for every sample, so that the student does well on validation data.

Paper: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation. Hu, Li, Liu, et al.; ICLR 2024;
https://arxiv.org/abs/2312.15112
Based on: the authors' code, github.com/Chengming0501/TGeo-KD at 5a69cbe: state_design, student_train, Controller.
Reconstructed: the update of the small network. The paper states the bilevel problem; here it is solved by the customary one-step
    approximation (`one_step_hypergradient`).
Differs from the code: there the weights are computed without gradient and the upper loss never reaches the small network, which
    stays as it was drawn (controller_update="none"); its cross-entropy takes softmax outputs (ce_on="probs"); the class means are
    recomputed in each full-batch step. An older version there multiplied [B, 1] by [B], which loses the pairing: always [B] here.
Symbols: z_s, z_t logits, S, T their softmax at temperature 1, G one-hot labels, O the mean of T over the training samples of the
    class; u state; f_w the small network; theta the student; tau temperature; eta the length of the virtual step.

    u = [S, T, G, O, (O-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (O-G)^2]                          [B, 9C], without gradient into S and T
    alpha = f_w(u) in (0, 1)                                                                                                  [B]
    L_low(theta; alpha) = mean_i ( alpha_i tau^2 KD_i + (1 - alpha_i) CE_i ),              KD_i = KL(softmax(z_t/tau) || softmax(z_s/tau))
    L_up = CE on validation samples at theta' = theta - eta grad L_low,                     v = grad L_up(theta')
    dL_up / dalpha_i = -(eta / B) < grad_theta (tau^2 KD_i - CE_i), v >                     then back through f_w

alpha_i grows where following the teacher on sample i lowers the validation loss. All B products come from one directional derivative
of the student's logits along v. The validation data is used for training here: choose settings on other data. Inference: the student.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kdfast._checks import check_choice, check_int, check_labels, check_number, check_pair, check_row_tensor
from kdfast._library import compute_dtype, readable
from kdfast.data.class_means import ClassMeans
from kdfast.losses import LossOutput, cross_entropy_loss
from kdfast.losses.divergence import reduce_rows
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import evaluating
from kdfast.ops import divergence

STATES = {"full": 9, "probs": 4, "edges": 3, "angles": 2}  # numbers per class
UPDATES = ("one_step", "none")
PRODUCTS = ("jvp", "finite_difference")


# ---------------------------------------------------------------- the state and the small network
def state_width(state: str, num_classes: int) -> int:
    """Numbers in a state: 9C, 4C, 3C, 2C, or their sum for a union such as "probs+edges"."""
    for kind in state.split("+"):
        check_choice("state", kind, tuple(STATES))
    return num_classes * sum(STATES[kind] for kind in state.split("+"))


def trilateral_state(
    student_probs: Tensor, teacher_probs: Tensor, labels: Tensor, class_mean: Tensor, *, state: str = "full"
) -> Tensor:
    """u of the module docstring.

    Args:
        student_probs, teacher_probs: S, T [B, C]. labels: [B] integers in [0, C). class_mean: O [B, C], of each sample's class.
        state: "full"; "probs", [S, T, G, O]; "edges", [(O-S)^2, (G-S)^2, (T-S)^2]; "angles", [(O-S)(G-S), (T-S)(G-S)]; or unions,
            joined with "+".
    """
    s, t, o = student_probs.detach(), teacher_probs.detach(), class_mean.detach()
    if s.dim() != 2 or s.shape != t.shape or s.shape != o.shape:
        raise ValueError(
            f"student_probs, teacher_probs, class_mean: expected one shape [B, C], got {tuple(s.shape)}, {tuple(t.shape)} and {tuple(o.shape)}"
        )
    check_labels(labels, s.shape[:1], s.device)
    g = torch.zeros_like(s).scatter(1, labels.long().unsqueeze(1), 1.0)
    probs, edges = [s, t, g, o], [(o - s) ** 2, (g - s) ** 2, (t - s) ** 2]
    kinds = {
        "full": [*probs, *edges, (t - g) ** 2, (o - g) ** 2], "probs": probs, "edges": edges,
        "angles": [(o - s) * (g - s), (t - s) * (g - s)],
    }  # fmt: skip
    state_width(state, s.shape[1])
    return torch.cat([one for kind in state.split("+") for one in kinds[kind]], 1)


class FusionRatioNet(nn.Sequential):
    """f_w: state [B, in_features] -> alpha [B] in (0, 1). Linear and LeakyReLU layers of the `hidden` widths, Linear(1), sigmoid."""

    def __init__(self, in_features: int, *, hidden: Sequence[int] = (32, 16), negative_slope: float = 0.01) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise((in_features, *hidden)):
            layers += [nn.Linear(before, after), nn.LeakyReLU(negative_slope)]
        super().__init__(*layers, nn.Linear((in_features, *hidden)[-1], 1), nn.Sigmoid())
        self.in_features = in_features

    def forward(self, state: Tensor) -> Tensor:
        if state.dim() != 2 or state.shape[1] != self.in_features:
            raise ValueError(f"state: expected [B, {self.in_features}], got {tuple(state.shape)}")
        return super().forward(state).squeeze(1)  # [1] for one sample, not a number


# ---------------------------------------------------------------- the lower level
def sample_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.5, ce_on: str = "logits", ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(KD_i without tau^2, CE_i), both [B]; ce_on="probs" takes the cross-entropy of softmax outputs, as released."""
    check_choice("ce_on", ce_on, ("logits", "probs"))
    check_pair(student, teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected logits [B, C] of the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    kd = divergence(student, teacher.detach(), kind="forward_kl", temperature=temperature)
    scores = student if ce_on == "logits" else torch.softmax(student.to(compute_dtype(student)), -1)
    return kd, cross_entropy_loss(scores, labels, ignore_index=ignore_index, reduction="none")


def weighted_kd_ce(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: Tensor,
    *,
    temperature: float = 1.5,
    ce_on: str = "logits",
    ignore_index: int = -100,
) -> LossOutput:
    """L_low = mean_i ( alpha_i tau^2 KD_i + (1 - alpha_i) CE_i ); differentiable in `student` and, unless detached, in alpha.

    Args:
        student, teacher: logits [B, C]. labels: [B] integers or `ignore_index`, left out of the mean. alpha: [B] in [0, 1].
    Returns:
        LossOutput(loss, {"ce", "kd"}): unweighted means, kd with tau^2.
    Warns: logits that look like probabilities (on the CPU, where values can be read).

    >>> loss, parts = weighted_kd_ce(student, teacher, labels, torch.full((4,), 0.5))
    """
    kd, ce = sample_terms(
        student, teacher, labels, temperature=temperature, ce_on=ce_on, ignore_index=ignore_index
    )  # fmt: skip
    check_row_tensor("alpha", alpha, kd.shape, kd.device)
    if readable(alpha):
        weights = alpha.detach()
        if weights.numel() and not 0 <= float(weights.min()) <= float(weights.max()) <= 1:
            raise ValueError(f"alpha: expected numbers in [0, 1], got {weights.min():g} to {weights.max():g}")
        for name, logits in (("student", student), ("teacher", teacher)):
            z = logits.detach()
            if z.numel() and bool((z >= 0).all()) and bool(((z.sum(-1) - 1).abs() < 1e-4).all()):
                warnings.warn(f"{name}: expected logits, got rows of probabilities (they sum to 1)", stacklevel=2)
    keep = labels.long() != ignore_index
    rows = alpha * temperature**2 * kd + (1 - alpha) * ce
    parts = {"ce": ce, "kd": temperature**2 * kd}
    return LossOutput(
        reduce_rows(rows, keep, None, "mean"),
        {name: reduce_rows(part.detach(), keep, None, "mean") for name, part in parts.items()},
    )


def converged(losses: Sequence[float], *, window: int = 10, tolerance: float = 1e-5) -> bool:
    """The published rule to stop: the validation loss changed by less than `tolerance` over the last `window` epochs.

    >>> converged([1.0] * 10), converged([1.0] * 11)
    (False, True)
    """
    check_int("window", window, low=1)
    return len(losses) > window and abs(losses[-1] - losses[-1 - window]) < tolerance


# ---------------------------------------------------------------- the upper level
def one_step_hypergradient(
    forward: Callable[[dict[str, Tensor], Any], Tensor],
    parameters: dict[str, Tensor],
    batch: Any,
    teacher: Tensor,
    labels: Tensor,
    alpha: Tensor,
    val_batch: Any,
    val_labels: Tensor,
    *,
    eta: float,
    temperature: float = 1.5,
    ce_on: str = "logits",
    product: str = "jvp",
    ignore_index: int = -100,
) -> Tensor:
    """dL_up / dalpha [B] of the module docstring.

    Args:
        forward: (parameters, batch) -> logits, a pure function (batch norm and dropout in eval mode). parameters: theta by name.
        batch, teacher [B, C], labels [B], alpha [B]: of the lower level. val_batch, val_labels: of the upper one.
        product: "jvp", one forward-mode derivative; "finite_difference", two more forward passes, for models without one.
    Raises:
        ValueError: no parameters, an empty validation batch.
    """
    check_number("eta", eta)
    check_choice("product", product, PRODUCTS)
    if not parameters:
        raise ValueError("parameters: expected a student with parameters that require a gradient, got none")
    if val_labels.numel() == 0:
        raise ValueError("val_labels: expected at least one validation sample, got none")
    options: dict[str, Any] = {"temperature": temperature, "ce_on": ce_on, "ignore_index": ignore_index}
    names = list(parameters)
    with torch.enable_grad():
        theta = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        z = forward(theta, batch)
        lower = weighted_kd_ce(z, teacher, labels, alpha.detach(), **options).loss
        slopes = torch.autograd.grad(lower, list(theta.values()), allow_unused=True)
        stepped = {
            name: (theta[name] if slope is None else theta[name] - eta * slope).detach().requires_grad_()
            for name, slope in zip(names, slopes)
        }
        scores = forward(stepped, val_batch)
        scores = scores if ce_on == "logits" else torch.softmax(scores, -1)
        upper = cross_entropy_loss(scores, val_labels, ignore_index=ignore_index)
        found = torch.autograd.grad(upper, list(stepped.values()), allow_unused=True)
        v = {n: torch.zeros_like(theta[n]) if g is None else g for n, g in zip(names, found)}
        leaf = z.detach().requires_grad_()
        kd, ce = sample_terms(leaf, teacher, labels, **options)
        (slope_z,) = torch.autograd.grad((temperature**2 * kd - ce).sum(), leaf)  # [B, C]
    with torch.no_grad():
        fixed = {name: p.detach() for name, p in theta.items()}
        if product == "jvp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, from the first jvp of a process
                along = jvp(lambda p: forward(p, batch), (fixed,), (v,))[1]
        else:
            size = torch.stack([g.double().square().sum() for g in v.values()]).sum().sqrt()
            step = (1e-3 / size.clamp_min(1e-12)).to(z.dtype)
            ends = [forward({n: fixed[n] + sign * step * v[n] for n in names}, batch) for sign in (1, -1)]
            along = (ends[0] - ends[1]) / (2 * step)
        keep = labels.long() != ignore_index
        products = (slope_z * along.to(slope_z.dtype)).sum(-1)
        return -eta * torch.where(keep, products, 0.0) / keep.sum().clamp_min(1)


# ---------------------------------------------------------------- by name
class _Forward(nn.Module):
    """The model under the trainer's way to call it, so that functional_call sees one forward(batch)."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, batch: Any) -> Tensor:
        return self.call(self.model, batch)


class Method(MethodBase):
    """The student's step with alpha as a constant, and the small network's step from a validation batch, at the same time.

    Class means of the teacher are taken over the training data before the first step, and saved. The validation data is the
    `eval_loader` of `fit`; its batches take turns. The network joins the student's optimizer.

    Args:
        num_classes: C. state, hidden, negative_slope: of the small network. eta: length of the virtual step; None takes the
            learning rate. controller_update: "none" leaves the network as it was drawn, as released.
        every: update the network in every so many steps. Others: `weighted_kd_ce`, `one_step_hypergradient`.
    """

    class_means: Tensor

    def __init__(
        self, *, num_classes: int, temperature: float = 1.5, ce_on: str = "logits", state: str = "full",
        hidden: Sequence[int] = (32, 16), negative_slope: float = 0.01, controller_update: str = "one_step", eta: float | None = None,
        product: str = "jvp", every: int = 1, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("controller_update", controller_update, UPDATES)
        check_choice("product", product, PRODUCTS)
        check_choice("ce_on", ce_on, ("logits", "probs"))
        check_number("temperature", temperature, low=0.0, open_low=True)
        self.controller = FusionRatioNet(
            state_width(state, check_int("num_classes", num_classes, low=1)),
            hidden=hidden,
            negative_slope=negative_slope,
        )
        self.state, self.update, self.product, self.ignore_index = state, controller_update, product, ignore_index
        self.eta = None if eta is None else check_number("eta", eta)
        self.every = check_int("every", every, low=1)
        self.options: dict[str, Any] = {"temperature": temperature, "ce_on": ce_on, "ignore_index": ignore_index}
        self.register_buffer("class_means", torch.empty(0, num_classes))
        # In a tuple the student is no part of this module: (model under its call, learning rate, validation batches).
        self.upper: tuple[nn.Module, Callable[[], float], list[tuple[Any, Tensor]]] | None = None

    def start(self, setup: Setup) -> None:
        if not setup.resumed:
            means = ClassMeans(self.class_means.shape[1])
            for context in setup.sweep("train"):
                assert context.labels is not None
                means.update(torch.softmax(context.teacher, -1), context.labels, ignore_index=self.ignore_index)
            self.class_means = means.compute(missing="nan").to(self.class_means.dtype)
        if self.update == "none":
            return
        if not setup.has_val:
            raise ValueError("eval_loader: the small network learns from validation batches, got None")
        batches = [(context.batch, context.labels) for context in setup.sweep("val")]
        if not batches:
            raise ValueError("eval_loader: expected at least one validation batch, got none")
        self.upper = (_Forward(setup.student, setup.forward), setup.learning_rate, batches)  # type: ignore[assignment]

    def fusion_ratio(self, context: Context) -> Tensor:
        """alpha [B] of a batch, without gradient into the logits; of a row whose label is ignored it means nothing."""
        assert context.labels is not None
        if not self.class_means.numel():
            raise ValueError(
                "class_means: not there yet; Distiller.fit computes them, in your own loop call start(setup)"
            )
        labels = torch.where(context.labels.long() != self.ignore_index, context.labels.long(), 0)
        s, t = (torch.softmax(z.detach().to(compute_dtype(z)), -1) for z in (context.student, context.teacher))
        mean = self.class_means.to(s.dtype)[labels]
        if readable(mean) and bool(mean.isnan().any()):
            bad = sorted(set(labels[mean.isnan().any(1)].tolist()))
            raise ValueError(f"labels: no training sample of class {', '.join(map(str, bad))}, so it has no mean")
        state = trilateral_state(s, t, labels, mean, state=self.state)
        return self.controller(state.to(next(self.controller.parameters()).dtype))

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        alpha = self.fusion_ratio(context)
        loss, parts = weighted_kd_ce(
            context.student, context.teacher, context.labels, alpha.detach(), **self.options
        )  # fmt: skip
        parts = parts | {"alpha": alpha.detach().mean()}
        if self.upper is not None and torch.is_grad_enabled() and context.step % self.every == 0:
            pull = (self._hypergradient(context, alpha) * alpha).sum()
            loss = loss + (pull - pull.detach())  # adds nothing but the gradient of the small network
        return LossOutput(loss, parts)

    def _hypergradient(self, context: Context, alpha: Tensor) -> Tensor:
        assert self.upper is not None and context.labels is not None
        model, learning_rate, batches = self.upper
        val_batch, val_labels = batches[context.step // self.every % len(batches)]
        parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with evaluating(model):
            return one_step_hypergradient(
                lambda p, batch: functional_call(model, p, (batch,)), parameters, context.batch, context.teacher, context.labels,
                alpha, val_batch, val_labels, eta=learning_rate() if self.eta is None else self.eta, product=self.product,
                **self.options,
            )  # fmt: skip
