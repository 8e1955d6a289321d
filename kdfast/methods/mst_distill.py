"""MST-Distill: a one-modality student learns, sample by sample, from the masked variant of several teachers that a gate picks for it.

Paper: MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation. Li et al.; 2025;
https://arxiv.org/abs/2507.07015
Based on: the authors' code, github.com/Gray-OREO/MST-Distill at 093b2fe: KD_methods/MST.py, main-MST-Distill.py.
Differs from the code: one mask per variant; there the hook of the first variant stays on while the second runs
    (`cumulative_masks=True`). Masks and student are the last ones of their stage, not the best on validation. Teachers run only on
    the samples routed to them. All masks of stage 2 take their steps together: they share no parameter, so that is the same.
As in the code, though a reader may expect otherwise: the KD is unweighted, so the gate learns from the balance term alone
    (`gate_gradient="weighted"` lets it learn from KD); the KL balance has an extra 1/E (`batchmean_quirk`).
Symbols: s [B, C] student logits, Z [E, B, C] of E = 2 teachers times R masked layers, y [B]; dense: [.., C, H, W], [B, H, W].

    stage 1   sum over three networks of CE + sum over their 6 ordered pairs of KL_T, with gradient on both sides
    stage 2   sum over the masks of KL_T(masked teacher <- sg s);   mask m = FeatureMask(f), the layer gives m f
    stage 3   p = softmax(gate(s));  idx = top-k of p;  KD = 1/k sum_j KL_T(s <- sg Z[idx_j])
              L = w_task CE + w_kl KD + w_lb LB,   LB = (1/E) sum_e (1/E) log((1/E) / pbar_e), or std / mean of the usage

KL_T(a <- b) = T^2 KL(softmax(b/T) || softmax(a/T)), a mean over samples (and pixels). Inference: the student alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._library import readable
from kdfast.data.two_view_digits import networks
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss, uniform_kl_loss, usage_cv_loss
from kdfast.methods._protocol import Context, Setup, epoch_at
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import FeatureMask, attach_mask, call_frozen
from kdfast.ops import route_topk

BALANCES, GRADIENTS = ("kl", "cv"), ("none", "weighted")
SOURCES = ("routed", "average", "multimodal", "cross", "none")


# ---------------------------------------------------------------- the losses of the three stages
def kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, both: bool = False) -> Tensor:
    """KL_T(student <- teacher), a mean over all rows; both: the teacher gets its gradient too."""
    return divergence_loss(student, teacher, temperature=temperature, scale_t2=True, teacher_grad=both, dim=1)


def mutual_stage_loss(
    logits: Sequence[Tensor], target: Tensor, *, temperature: float = 4.0, ignore_index: int = -100
) -> LossOutput:
    """Stage 1 of any number of networks: CE of each, and KL_T of every ordered pair without stop-gradient."""
    ce = torch.stack([cross_entropy_loss(z, target, ignore_index=ignore_index, dim=1) for z in logits]).sum()
    pairs = [(a, b) for i, a in enumerate(logits) for j, b in enumerate(logits) if i != j]
    mutual = torch.stack([kl(a, b, temperature=temperature, both=True) for a, b in pairs]).sum()
    return LossOutput(ce + mutual, {"ce": ce.detach(), "mutual": mutual.detach()})


def route(gate_logits: Tensor, top_k: int) -> Tensor:
    """The k most probable teachers of each sample: [B, k], descending, ties to the lower id."""
    if not 1 <= check_int("top_k", top_k) <= gate_logits.shape[-1]:
        raise ValueError(f"top_k: expected 1 to {gate_logits.shape[-1]} teachers, got {top_k}")
    return route_topk(gate_logits.detach(), top_k, score="softmax").ids.long()


def routed_kd(student: Tensor, chosen: Tensor, *, temperature: float = 4.0, weights: Tensor | None = None) -> Tensor:
    """(1/k) sum_j KL_T(s <- chosen_j), or (1/B) sum_b sum_j w_bj KL_bj with weights [B, k] that learn.

    Args: student: [B, C] or [B, C, H, W]. chosen: [k, B, C, ...], logits of each sample's teachers, constants.
    """
    rows = torch.stack(
        [
            divergence_loss(student, z, temperature=temperature, scale_t2=True, dim=1, reduction="none")
            .flatten(1)
            .mean(1)
            if student.dim() > 2
            else divergence_loss(student, z, temperature=temperature, scale_t2=True, reduction="none")
            for z in chosen
        ]
    )  # [k, B]
    return rows.mean() if weights is None else (weights.T * rows).sum(0).mean()


def mst_loss(
    student: Tensor, teachers: Tensor | Sequence[Tensor], gate_logits: Tensor, target: Tensor, *, top_k: int = 1,
    temperature: float = 4.0, balance: str | None = "kl", w_task: float = 1.0, w_kl: float = 1.0, w_balance: float = 1.0,
    gate_gradient: str = "none", batchmean_quirk: bool = True, ignore_index: int = -100, index: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Stage 3: w_task CE + w_kl KD + w_lb LB.

    Args:
        student: s [B, C] or [B, C, H, W]. target: [B] or [B, H, W] integers or `ignore_index`, which leaves CE only.
        teachers: Z [E, B, C, ...] or a list; with `index` [B, k] (from `route`) only the chosen ones [k, B, C, ...].
        gate_logits: [B, E], of the undetached student. balance: "kl", "cv" or None. gate_gradient: "none", KD does not reach the gate;
            "weighted", it does, with p renormalised over the chosen (nothing with k = 1: that weight is 1). batchmean_quirk: the extra 1/E of "kl".
    Returns:
        LossOutput(loss, {"task", "kd", "balance", "num_teacher_0", ...}), without weights; how often each teacher was chosen.
    Raises:
        ValueError: k < 1 or k > E, T <= 0, shapes that differ, no teacher, NaN gates, labels outside [0, C).

    >>> loss, parts = mst_loss(s, variants, gate(s), labels)
    """
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_choice("gate_gradient", gate_gradient, GRADIENTS)
    if balance is not None:
        check_choice("balance", balance, BALANCES)
    check_float_tensor("student", student)
    if not isinstance(teachers, Tensor):
        if not teachers:
            raise ValueError("teachers: expected at least one, got none")
        teachers = torch.stack(list(teachers))
    if gate_logits.shape[:1] != student.shape[:1] or gate_logits.dim() != 2:
        raise ValueError(f"gate_logits: expected [B, E] with B = {student.shape[0]}, got {tuple(gate_logits.shape)}")
    experts = gate_logits.shape[1] if index is None else top_k
    if teachers.shape != (experts, *student.shape):
        raise ValueError(f"teachers: expected {(experts, *student.shape)}, got {tuple(teachers.shape)}")
    p = torch.softmax(gate_logits, -1)
    ids = route(gate_logits, top_k) if index is None else index
    chosen = teachers.detach()
    if index is None:
        chosen = chosen[ids.T, torch.arange(len(ids), device=ids.device)]  # [k, B, C, ...]
    weights = None
    if gate_gradient == "weighted":
        weights = p.gather(1, ids)
        weights = weights / weights.sum(1, keepdim=True)
    task = cross_entropy_loss(student, target, ignore_index=ignore_index, dim=1)
    kd = routed_kd(student, chosen, temperature=temperature, weights=weights)
    even = balance_loss(p, balance, batchmean_quirk=batchmean_quirk)
    counts = torch.zeros(p.shape[1], device=p.device).index_add_(
        0, ids.flatten(), torch.ones(ids.numel(), device=p.device)
    )
    parts = {"task": task.detach(), "kd": kd.detach(), "balance": even.detach()}
    parts |= {f"num_teacher_{e}": number for e, number in enumerate(counts.unbind())}
    return LossOutput(w_task * task + w_kl * kd + w_balance * even, parts)


def balance_loss(probs: Tensor, balance: str | None, *, batchmean_quirk: bool = True) -> Tensor:
    """LB of gate probabilities [B, E]; a mean probability of 0 is clamped at the smallest normal number, with a warning on the CPU."""
    if balance is None:
        return probs.new_zeros(())
    if balance == "cv":
        return usage_cv_loss(probs)
    mean, tiny = probs.mean(0), torch.finfo(probs.dtype).tiny
    if readable(mean) and bool((mean < tiny).any()):
        warnings.warn("gate_logits: a teacher has probability 0 everywhere; its logarithm is clamped", stacklevel=2)
    mean = mean.clamp_min(tiny)
    return uniform_kl_loss(mean, divide_by_experts=batchmean_quirk)


def weights_at(epoch: int, *, w_kl: float = 1.0, w_balance: float = 1.0) -> tuple[float, float]:
    """(w_kl, w_lb) during epoch e of stage 3, from 0: halved at the end of epochs 0, 30, 60, ..., times 0.9 at the end of 0, 10, 20, ...

    >>> [weights_at(epoch)[0] for epoch in (0, 1, 30, 31)]
    [1.0, 0.5, 0.5, 0.25]
    """
    return w_kl * 0.5 ** math.ceil(epoch / 30), w_balance * 0.9 ** math.ceil(epoch / 10)


# ---------------------------------------------------------------- networks
class GateNet(nn.Module):
    """Logits [B, E] of the teachers from the student's own: Linear(C, 2C), Linear(2C, E), nothing between.

    dense: maps [B, C, H, W] through a 1x1 convolution, ReLU, a depthwise 3x3 of stride 2, ReLU, the mean and a Linear(2C, E).
    """

    def __init__(self, classes: int, teachers: int, *, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        if dense:
            self.conv_point = nn.Conv2d(classes, 2 * classes, 1)
            self.conv_depthwise = nn.Conv2d(2 * classes, 2 * classes, 3, stride=2, padding=1, groups=2 * classes)
            self.fc = nn.Linear(2 * classes, teachers)
        else:
            self.fc1, self.fc2 = nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, teachers)

    def forward(self, student: Tensor) -> Tensor:
        if not self.dense:
            return self.fc2(self.fc1(student))
        maps = torch.relu(self.conv_depthwise(torch.relu(self.conv_point(student))))
        return self.fc(maps.mean((2, 3)))


class MSTOutput(NamedTuple):
    """Of a training batch. students: stage 1 all three networks', else the student's logits; teachers: masked or chosen ones."""

    stage: int
    students: Tensor
    teachers: Tensor | None = None
    gate: Tensor | None = None
    ids: Tensor | None = None


class MSTNetworks(nn.Module):
    """Student, multimodal and cross-modal teacher, a mask per (teacher, layer) and the gate; in evaluation the student alone.

    Every network takes the whole input and reads its modalities of it.

    Args:
        mask_layers: (path, width) of R layers in each teacher. source: who teaches in stage 3; other than "routed" are baselines:
            the mean of all variants, one unmasked teacher, or nobody (then in stage 1 neither).
    """

    def __init__(
        self, student: nn.Module, multimodal: nn.Module, cross: nn.Module, classes: int, mask_layers: Sequence[tuple[str, int]], *,
        top_k: int = 1, source: str = "routed", cumulative_masks: bool = False, dense: bool = False, heads: int = 3, factor: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source = check_choice("source", source, SOURCES)
        self.student, self.teachers = student, nn.ModuleList([multimodal, cross])
        self.layers = [(t, path) for t in range(2) for path, _ in mask_layers]
        self.masks = nn.ModuleList(
            FeatureMask(width, heads=heads, factor=factor, spatial=dense) for _ in range(2) for _, width in mask_layers
        )
        self.gate = GateNet(classes, len(self.masks), dense=dense)
        self.top_k, self.cumulative, self.stage = top_k, cumulative_masks, 1

    def set_stage(self, stage: int) -> None:
        self.stage = stage
        self.train(self.training)

    def train(self, mode: bool = True) -> MSTNetworks:
        super().train(mode)
        if self.stage >= 2:
            self.teachers.eval()
            (self.student if self.stage == 2 else self.masks).eval()
        return self

    def variant(self, e: int, images: Tensor) -> Tensor:
        """Logits of variant e; the teacher's weights are constants, its mask's are not."""
        t, _ = self.layers[e]
        teacher = self.teachers[t]
        with ExitStack() as stack:
            for other, (owner, path) in enumerate(self.layers[: e + 1]):
                if other == e or (self.cumulative and owner == t):
                    stack.enter_context(attach_mask(teacher, path, self.masks[other]))  # type: ignore[arg-type]
            return call_frozen(teacher, images)

    def forward(self, images: Tensor) -> Any:
        if not self.training:
            return self.student(images)
        if self.stage == 1:
            networks = [self.student] if self.source == "none" else [self.student, *self.teachers]
            return MSTOutput(1, torch.stack([network(images) for network in networks]))
        if self.stage == 2:
            with torch.no_grad():
                s = self.student(images)
            return MSTOutput(2, s, torch.stack([self.variant(e, images) for e in range(len(self.masks))]))
        s = self.student(images)
        with torch.no_grad():
            if self.source in ("multimodal", "cross"):
                return MSTOutput(3, s, self.teachers[SOURCES.index(self.source) - 2](images).unsqueeze(0))
            if self.source == "average":
                return MSTOutput(
                    3, s, torch.stack([self.variant(e, images) for e in range(len(self.masks))]).mean(0, keepdim=True)
                )
        if self.source == "none":
            return MSTOutput(3, s)
        gate = self.gate(s)
        index = route(gate, self.top_k)
        return MSTOutput(3, s, self.routed(images, index, s), gate, index)

    @torch.no_grad()
    def routed(self, images: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """[k, B, C, ...]: each variant runs on the samples that chose it, and on no other."""
        chosen = like.new_zeros((self.top_k, *like.shape))
        for e in range(len(self.masks)):
            rows, slots = (index == e).nonzero(as_tuple=True)
            if len(rows):
                chosen[slots, rows] = self.variant(e, images[rows]).to(chosen)
        return chosen


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The three stages in one run, on `MSTNetworks` and batches {"images", "labels"}; the student is what `deploy` gives.

    Args:
        stage1_steps, stage2_steps: optimizer steps; the rest is stage 3, which counts as `epochs` for `weights_at`.
        Others: `mst_loss` (top_k is the networks').
    """

    uses_teacher = False

    def __init__(
        self, *, stage1_steps: int = 200, stage2_steps: int = 100, epochs: int = 100, temperature: float = 4.0, balance: str | None = "kl",
        w_task: float = 1.0, w_kl: float = 1.0, w_balance: float = 1.0, gate_gradient: str = "none", batchmean_quirk: bool = True,
        ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("gate_gradient", gate_gradient, GRADIENTS)
        self.ends = (check_int("stage1_steps", stage1_steps), stage1_steps + check_int("stage2_steps", stage2_steps))
        self.epochs, self.temperature = (
            check_int("epochs", epochs, low=1),
            check_number("temperature", temperature, low=0.0, open_low=True),
        )
        self.weights = {"w_kl": w_kl, "w_balance": w_balance}
        self.options: dict[str, Any] = {
            "balance": balance, "w_task": w_task, "gate_gradient": gate_gradient, "batchmean_quirk": batchmean_quirk,
            "ignore_index": ignore_index, "temperature": temperature,
        }  # fmt: skip

    @staticmethod
    def students(
        *, classes: int, stage1_steps: int, stage2_steps: int, epochs: int
    ) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
        """The student alone, taught by one teacher, by the mean of all variants, by the routed ones, by those of a gate that learns."""
        steps: dict[str, Any] = {"stage1_steps": stage1_steps, "stage2_steps": stage2_steps, "epochs": epochs}

        def arm(source: str, top_k: int = 1, **options: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
            layers = [("first", 64), ("second", 64)]
            return lambda: MSTNetworks(*networks(), classes, layers, source=source, top_k=top_k), steps | options

        return {
            "alone": arm("none"), "multimodal": arm("multimodal"), "cross": arm("cross"), "average": arm("average"),
            "weighted": arm("routed", top_k=2, gate_gradient="weighted"), "mst": arm("routed"),
        }  # fmt: skip

    def stage(self, step: int) -> int:
        return 1 + sum(step >= end for end in self.ends)

    def start(self, setup: Setup) -> None:
        self._set(setup.student, setup.step)

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        self._set(student, step)

    def _set(self, student: nn.Module, step: int) -> None:
        if isinstance(student, MSTNetworks) and student.stage != self.stage(step):
            student.set_stage(self.stage(step))

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        out: MSTOutput = context.student
        ignore = self.options["ignore_index"]
        if out.stage == 1:
            if len(out.students) == 1:
                ce = cross_entropy_loss(out.students[0], context.labels, ignore_index=ignore, dim=1)
                return LossOutput(ce, {"ce": ce.detach()})
            return mutual_stage_loss(
                out.students.unbind(), context.labels, temperature=self.temperature, ignore_index=ignore
            )
        if out.stage == 2:
            assert out.teachers is not None
            loss = torch.stack([kl(z, out.students, temperature=self.temperature) for z in out.teachers]).sum()
            return LossOutput(loss, {"masks": loss.detach()})
        epoch = epoch_at(context.step - self.ends[1], context.total_steps - self.ends[1], self.epochs)
        w_kl, w_balance = weights_at(epoch, **self.weights)
        if out.gate is not None:
            assert out.teachers is not None and out.ids is not None
            return mst_loss(
                out.students, out.teachers, out.gate, context.labels, top_k=out.ids.shape[1], index=out.ids, w_kl=w_kl,
                w_balance=w_balance, **self.options,
            )  # fmt: skip
        task = cross_entropy_loss(out.students, context.labels, ignore_index=ignore, dim=1)
        if out.teachers is None:
            return LossOutput(self.options["w_task"] * task, {"task": task.detach()})
        kd = routed_kd(out.students, out.teachers, temperature=self.temperature)
        return LossOutput(self.options["w_task"] * task + w_kl * kd, {"task": task.detach(), "kd": kd.detach()})

    def deploy(self, setup: Setup) -> nn.Module:
        return setup.student.student if isinstance(setup.student, MSTNetworks) else setup.student
