"""LSSKD: branches after every stage learn class and rotation together, from softened labels, from the deepest branch, no teacher.

Paper: A Layered Self-Supervised Knowledge Distillation Framework for Efficient Multimodal Learning on the Edge. 2025;
https://arxiv.org/abs/2506.07055
Based on: the abstract and published summaries, which quote the two softened targets; no public code was found. The branches and the
    joint labels are those of HSAKD (github.com/winycg/HSAKD at 28c8dc2), which needs a teacher. Certain: auxiliary classifiers
    after every stage predict class and transformation; labels are softened with the network's own predictions of the previous
    epoch, for the last classifier and for each branch; KL and squared distance of features between stages; branches go after training.
Reconstructed, and therefore arguments: which branch teaches which (`teacher`), the weights, tau^2, the feature (`feature`), alpha's
    size and growth, where earlier predictions come from (`memory`).
    The summary writes the joint target with a sum over the transformations; here: for each transformed copy, averaged in the loss.
Symbols: C classes, M = 4 quarter turns, L branches; x [B] images, their turns interleaved, row i M + j; joint label y M + j; z [B, C] logits
    of the unturned images; q_l [B M, C M] and f_l [B M, D] of branch l; p-, q-_l predictions of the previous epoch; sg() stop-gradient.

    g = (1 - alpha) onehot(y) + alpha p-,        g_l = (1 - alpha) onehot(y M + j) + alpha q-_l
    L_LS = CE(g, z) + sum_l CE(g_l, q_l)                                                    means over their rows
    L_KL = sum_{l < L} tau^2 KL( softmax(sg(q_L) / tau) || softmax(q_l / tau) )
    L_L2 = sum_{l < L} mean_n |f_l,n - sg(f_L,n)|^2
    loss = L_LS + w_kl L_KL + w_f L_L2,          alpha_e = alpha_T e / E in epoch e, 0 in the first
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype, readable
from kdfast.data.predictions import PredictionMemory
from kdfast.data.rotations import rotate4
from kdfast.losses import LossOutput, cross_entropy_loss, kd_loss
from kdfast.losses.divergence import reduce_rows
from kdfast.methods._protocol import Context, Setup, call_model, epoch_at
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import capture_outputs, conv_block

TEACHERS = ("deepest", "next", "main")
MEMORIES = ("snapshot", "table", "topk")
TURNS = 4


# ---------------------------------------------------------------- turned images and joint labels
def joint_labels(labels: Tensor, num_transforms: int = TURNS, *, ignore_index: int = -100) -> Tensor:
    """[B] -> [B M]: y M + j, interleaved; `ignore_index` stays.

    >>> joint_labels(torch.tensor([0, 2]), 2).tolist()
    [0, 1, 4, 5]
    """
    y = labels.long().repeat_interleave(num_transforms)
    j = torch.arange(num_transforms, device=labels.device).repeat(len(labels))
    return torch.where(y == ignore_index, y, y * num_transforms + j)


def rotation_expand(images: Tensor, labels: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Square images [B, C, S, S] with labels [B] -> ([4 B, C, S, S], joint labels [4 B]), counter-clockwise quarter turns."""
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images: expected square images [B, C, S, S] for quarter turns, got {tuple(images.shape)}")
    return rotate4(images)[0], joint_labels(labels, ignore_index=ignore_index)


def class_logits(joint: Tensor, num_classes: int, *, softmax: bool = False, copies: int = 1) -> Tensor:
    """Class scores of a branch: each row [C M] viewed [C, M] and summed over M.

    Args: softmax: probabilities are summed instead of raw logits. copies: mean over so many rows in turn, the copies of an image.
    """
    if joint.dim() != 2 or joint.shape[1] % num_classes or joint.shape[0] % copies:
        raise ValueError(
            f"joint: expected [rows, {num_classes} M] with rows a multiple of {copies}, got {tuple(joint.shape)}"
        )
    scores = torch.softmax(joint, -1) if softmax else joint
    return scores.unflatten(1, (num_classes, -1)).sum(-1).unflatten(0, (-1, copies)).mean(1)


def ensemble_probs(logits: Tensor, branch_logits: Sequence[Tensor], *, num_transforms: int = TURNS) -> Tensor:
    """[B, C]: the mean of softmax(z) and of each branch's class probabilities over the turned copies; for evaluation with branches."""
    votes = [
        class_logits(q, logits.shape[1], softmax=True, copies=num_transforms) for q in branch_logits
    ]  # fmt: skip
    return torch.stack([torch.softmax(logits, -1), *votes]).mean(0)


# ---------------------------------------------------------------- softened labels
def lsskd_alpha(epoch: int, epochs: int, alpha: float = 0.8) -> float:
    """alpha_e = alpha e / E.

    >>> [lsskd_alpha(epoch, 4) for epoch in (0, 2, 4)]
    [0.0, 0.4, 0.8]
    """
    check_int("epochs", epochs, low=1)
    return alpha * min(max(epoch, 0), epochs) / epochs


def soft_targets(labels: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """g = (1 - alpha) onehot(y) + alpha p-, [N, C]. The loss does not build it: `soft_label_cross_entropy`."""
    return (1 - alpha) * F.one_hot(labels.long(), previous.shape[-1]) + alpha * previous


def soft_label_cross_entropy(
    logits: Tensor, labels: Tensor, previous: Tensor | None, alpha: float, *, ignore_index: int = -100
) -> Tensor:
    """-mean_i sum_c g_ic log softmax(z)_ic with g of `soft_targets`, as (1 - alpha) CE(z, y) + alpha CE(z, p-).

    Args: logits: [N, C]. labels: [N] integers or `ignore_index`, left out. previous: probabilities [N, C]; None for alpha = 0.
    """
    if not 0 <= check_number("alpha", alpha) < 1:
        raise ValueError(f"alpha: expected a number in [0, 1), got {alpha}")
    hard = cross_entropy_loss(logits, labels, ignore_index=ignore_index)
    if alpha == 0:
        return hard
    if previous is None:
        raise ValueError(f"previous: expected predictions of the previous epoch for alpha = {alpha:g}, got None (the first epoch has alpha 0)")  # fmt: skip
    check_float_tensor("previous", previous)
    if previous.shape != logits.shape:
        raise ValueError(f"previous: expected shape {tuple(logits.shape)}, got {tuple(previous.shape)}")
    dtype = compute_dtype(logits, previous)
    previous = previous.detach().to(dtype)
    if readable(previous) and previous.numel():
        off = (previous.sum(-1) - 1).abs().max()
        if not off <= 1e-3:
            raise ValueError(f"previous: expected rows that sum to 1, one is off by {float(off):g}")
    rows = F.cross_entropy(logits.to(dtype), previous, reduction="none")
    soft = reduce_rows(rows, labels.long() != ignore_index, None, "mean")
    return (1 - alpha) * hard + alpha * soft


# ---------------------------------------------------------------- the total
def branch_transfer(
    logits: Tensor,
    branch_logits: Sequence[Tensor],
    *,
    temperature: float,
    teacher: str,
    mask: Tensor,
    num_transforms: int,
) -> Tensor:
    """L_KL: "deepest" teaches the others, "next": each branch the one before, "main": z teaches the class part of every branch."""
    terms = [logits.new_zeros((), dtype=compute_dtype(logits))]
    if teacher == "main":
        z = logits.repeat_interleave(num_transforms, 0) / temperature
        for q in branch_logits:  # log of the probabilities summed over the transformations
            own = torch.logsumexp(q.unflatten(1, (-1, num_transforms)) / temperature, -1)
            terms.append(temperature**2 * kd_loss(own, z, temperature=1.0, mask=mask))
    else:
        for level, q in enumerate(branch_logits[:-1]):
            above = branch_logits[level + 1] if teacher == "next" else branch_logits[-1]
            terms.append(kd_loss(q, above, temperature=temperature, mask=mask))
    return torch.stack(terms).sum()


def lsskd_loss(
    logits: Tensor,
    branch_logits: Sequence[Tensor],
    branch_features: Sequence[Tensor],
    labels: Tensor,
    previous: Tensor | None = None,
    previous_branches: Sequence[Tensor] | None = None,
    *,
    alpha: float = 0.8,
    temperature: float = 3.0,
    kl_weight: float = 1.0,
    feature_weight: float = 1e-2,
    teacher: str = "deepest",
    num_transforms: int = TURNS,
    maps: Sequence[Callable[[Tensor], Tensor]] | None = None,
    ignore_index: int = -100,
) -> LossOutput:
    """The loss of the module docstring.

    Args:
        logits: z [B, C]. branch_logits: L of [B M, C M], shallow first (or one tensor [L, B M, C M]). branch_features: L of [B M, ...] of
            one shape, or brought to it by `maps`, one for each of the first L - 1. labels: [B] integers or `ignore_index`.
        previous, previous_branches: predictions of the previous epoch of the same shapes; None with alpha = 0.
        teacher: "deepest", "next" or "main", see `branch_transfer`. alpha: in [0, 1), of this epoch (`lsskd_alpha`).
    Returns:
        LossOutput(loss, {"label_ce", "branch_ce", "branch_kl", "feature_l2"}): unweighted, KL with tau^2.

    >>> loss, parts = lsskd_loss(z, branch_logits, branch_features, labels, alpha=0.0)
    """
    check_choice("teacher", teacher, TEACHERS)
    check_number("temperature", temperature, low=0.0, open_low=True)
    for name, value in (("kl_weight", kl_weight), ("feature_weight", feature_weight)):
        check_number(name, value, low=0.0)
    check_float_tensor("logits", logits)
    check_labels(labels, logits.shape[:1], logits.device)
    rows, classes = logits.shape
    for q in branch_logits:
        if q.shape != (rows * num_transforms, classes * num_transforms):
            raise ValueError(
                f"branch_logits: expected [{rows * num_transforms}, {classes * num_transforms}] for {num_transforms} transformations, got {tuple(q.shape)}"
            )
    joint = joint_labels(labels, num_transforms, ignore_index=ignore_index)
    zero = logits.new_zeros((), dtype=compute_dtype(logits))
    if (
        alpha != 0
        and len(branch_logits)
        and (previous_branches is None or len(previous_branches) != len(branch_logits))
    ):
        raise ValueError(f"previous_branches: expected {len(branch_logits)} predictions for alpha = {alpha:g}, got {None if previous_branches is None else len(previous_branches)}")  # fmt: skip
    before = previous_branches if previous_branches is not None else [None] * len(branch_logits)
    label_ce = soft_label_cross_entropy(logits, labels, previous, alpha, ignore_index=ignore_index)
    branch_ce = sum(
        (
            soft_label_cross_entropy(q, joint, p, alpha, ignore_index=ignore_index)
            for q, p in zip(branch_logits, before)
        ),
        start=zero,
    )
    loss, branch_kl, feature_l2 = label_ce + branch_ce, zero, zero
    if kl_weight > 0 and len(branch_logits):
        if len(branch_logits) == 1 and teacher != "main":
            warnings.warn("branch_logits: one branch has nobody to learn from, L_KL is 0", stacklevel=2)
        branch_kl = branch_transfer(
            logits, branch_logits, temperature=temperature, teacher=teacher, mask=joint != ignore_index,
            num_transforms=num_transforms,
        )  # fmt: skip
        loss = loss + kl_weight * branch_kl
    if feature_weight > 0 and len(branch_features) > 1:
        feature_l2 = _feature_distance(branch_features, maps, joint != ignore_index)
        loss = loss + feature_weight * feature_l2
    parts = {"label_ce": label_ce, "branch_ce": branch_ce, "branch_kl": branch_kl, "feature_l2": feature_l2}
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()})


def _feature_distance(
    features: Sequence[Tensor], maps: Sequence[Callable[[Tensor], Tensor]] | None, mask: Tensor
) -> Tensor:
    target, terms = features[-1].detach(), []
    for level, feature in enumerate(features[:-1]):
        own = feature if maps is None else maps[level](feature)
        if own.shape != target.shape:
            raise ValueError(
                f"branch_features: expected the shape of the deepest, {tuple(target.shape)} (give maps), got {tuple(own.shape)} for branch {level + 1}"
            )
        dtype = compute_dtype(own)
        rows = (own.to(dtype) - target.to(dtype)).square().flatten(1).sum(1)
        terms.append(reduce_rows(rows, mask, None, "mean"))
    return torch.stack(terms).sum()


# ---------------------------------------------------------------- the branches, and by name
class Branch(nn.Module):
    """The stages that follow, of the backbone's kind of block, then the mean over positions and a Linear: (logits, pooled, map).

    The branch of the last stage has one block of stride 1, so all end with the same width and resolution.

    Args: widths: channels of the stage the branch stands on and of all that follow; each of these halves the resolution.
    """

    def __init__(self, widths: Sequence[int], outputs: int, block: Callable[[int, int, int], nn.Module] = conv_block):
        super().__init__()
        pairs = list(pairwise(widths))
        self.stages = nn.Sequential(*(block(a, b, 2) for a, b in pairs) if pairs else [block(widths[0], widths[0], 1)])
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.stages(x)
        pooled = maps.mean((2, 3))
        return self.head(pooled), pooled, maps


class Method(MethodBase):
    """The whole network turned into its own teacher; reads the maps after the three stages, "stage1", "stage2", "stage3".

    Batches are expanded by their quarter turns before the student sees them. The branches belong to the method, so the student
    is what it was without them.

    Args:
        widths: {"stage1": (channels, anything), ...}. num_classes: C. block: (in, out, stride) -> the backbone's kind of block.
        memory: "snapshot", a frozen copy of student and branches from the end of the previous epoch predicts; "table" (with
            `samples`, their number), stored predictions, for batches (images, labels, index) or with "index"; "topk", of each the
            `kept` greatest (`kdfast.data.predictions`). A sample that was not seen yet has its hard label.
        epochs: the run is counted as so many epochs, epoch = floor(step epochs / total_steps), or `steps_per_epoch`. alpha, growth:
            "linear", `lsskd_alpha`, or "constant", from the second epoch on. previous_temperature: of the earlier predictions.
        branches: False leaves the self-distillation of the last classifier alone. feature: "pooled" or "map".
        Others: `lsskd_loss`.
    """

    captures = ("stage1", "stage2", "stage3")
    uses_teacher = False

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, num_classes: int, alpha: float = 0.8, growth: str = "linear",
        temperature: float = 3.0, kl_weight: float = 1.0, feature_weight: float = 1e-2, teacher: str = "deepest",
        memory: str = "snapshot", samples: int = 0, kept: int = 20, epochs: int = 30, steps_per_epoch: int | None = None,
        previous_temperature: float = 1.0, branches: bool = True, feature: str = "pooled",
        block: Callable[[int, int, int], nn.Module] = conv_block, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, weight in (("kl_weight", kl_weight), ("feature_weight", feature_weight)):
            check_number(name, weight, low=0.0)
        for name, value, choices in (
            ("growth", growth, ("linear", "constant")), ("teacher", teacher, TEACHERS), ("memory", memory, MEMORIES),
            ("feature", feature, ("pooled", "map")),
        ):  # fmt: skip
            check_choice(name, value, choices)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: expected a number in [0, 1), got {alpha}")
        self.alpha, self.growth, self.feature = alpha, growth, feature
        self.epochs, self.steps_per_epoch = check_int("epochs", epochs, low=1), steps_per_epoch
        self.previous_temperature = check_number("previous_temperature", previous_temperature, low=0.0, open_low=True)
        self.classes, self.total_steps, self.memory = num_classes, 0, memory
        self.options: dict[str, Any] = {
            "temperature": check_number("temperature", temperature, low=0.0, open_low=True), "kl_weight": kl_weight,
            "feature_weight": feature_weight, "teacher": teacher, "ignore_index": ignore_index,
        }  # fmt: skip
        channels = [widths[name][0] for name in self.captures]
        outputs = num_classes * TURNS
        self.branches = nn.ModuleList(
            Branch(channels[level:], outputs, block) for level in range(len(channels)) if branches
        )
        self.tables = nn.ModuleList()  # of the last classifier, then of each branch
        if memory != "snapshot":
            size: dict[str, Any] = {"samples": samples, "kept": kept if memory == "topk" else None}
            self.tables.append(PredictionMemory(classes=num_classes, **size))
            self.tables.extend(PredictionMemory(classes=outputs, copies=TURNS, **size) for _ in self.branches)
        self.previous = nn.ModuleDict()  # the network of the previous epoch
        self.paths = {name: name for name in self.captures}
        self.forward_student: Callable[[nn.Module, Any], Any] = call_model

    def adapt(self, student: nn.Module) -> nn.Module:
        if self.memory == "snapshot":
            pair = {"student": copy.deepcopy(student), "branches": copy.deepcopy(self.branches)}
            self.previous = nn.ModuleDict(pair).requires_grad_(False)
        return student

    def start(self, setup: Setup) -> None:
        self.paths, self.forward_student = dict(setup.capture), setup.forward

    def epoch(self, step: int) -> int:
        if self.steps_per_epoch is not None:
            return step // self.steps_per_epoch
        return epoch_at(step, self.total_steps, self.epochs)

    def prepare(self, batch: Any) -> Any:
        if not len(self.branches):
            return batch
        ignore = self.options["ignore_index"]
        if isinstance(batch, Mapping):
            name = next(key for key, value in batch.items() if isinstance(value, Tensor) and value.dim() == 4)
            images, labels = rotation_expand(batch[name], batch["labels"], ignore_index=ignore)
            return {**batch, name: images, "labels": labels}
        images, labels = rotation_expand(batch[0], batch[1], ignore_index=ignore)
        return (images, labels, *batch[2:])

    def outputs(self, logits: Tensor, features: Mapping[str, Tensor], branches: Any) -> tuple[Tensor, list[Any]]:
        """(z of the unturned images, [(q_l, pooled, map)])."""
        if not len(branches):
            return logits, []
        return logits[::TURNS], [branch(features[name]) for branch, name in zip(branches, self.captures)]

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        self.total_steps = context.total_steps
        epoch, ignore = self.epoch(context.step), self.options["ignore_index"]
        alpha = lsskd_alpha(epoch, self.epochs, self.alpha) if self.growth == "linear" else self.alpha * (epoch > 0)
        labels = context.labels.long()
        if len(self.branches):
            labels = labels[::TURNS]
            labels = torch.where(labels == ignore, labels, labels // TURNS)
        z, found = self.outputs(context.student, context.student_features, self.branches)
        q = [one[0] for one in found]
        before: tuple[Tensor | None, list[Tensor] | None] = (None, None)
        if len(self.tables):
            before = self._recall(context.batch, labels, z, q)
        elif alpha > 0:
            before = self._predict(context.batch)
        features = [one[2 if self.feature == "map" else 1] for one in found]
        return lsskd_loss(z, q, features, labels, *before, alpha=alpha, **self.options)

    @torch.no_grad()
    def _predict(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Probabilities of the previous epoch's network on this batch."""
        if not self.previous:
            raise ValueError(
                "previous: no copy of the student; the Distiller makes it, in your own loop call adapt(student)"
            )
        self.previous.eval()
        with capture_outputs(self.previous["student"], self.paths) as features:
            logits = self.forward_student(self.previous["student"], batch)
        z, found = self.outputs(logits, features, self.previous["branches"])
        return self._probs(z), [self._probs(one[0]) for one in found]

    def _probs(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.detach().to(compute_dtype(logits)) / self.previous_temperature, -1)

    def _recall(self, batch: Any, labels: Tensor, z: Tensor, q: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The stored predictions of this batch; the present ones take their place."""
        index = batch["index"] if isinstance(batch, Mapping) else batch[2]
        hard = torch.where(labels == self.options["ignore_index"], 0, labels)
        targets = [hard, *[joint_labels(hard, ignore_index=-1)] * len(q)]
        tables: Any = self.tables
        first, *others = (
            table.exchange(index, self._probs(logits), target)
            for table, logits, target in zip(tables, (z, *q), targets)
        )
        return first, others

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        if self.previous and self.epoch(step) != self.epoch(step - 1):
            self.previous["student"].load_state_dict(student.state_dict())
            self.previous["branches"].load_state_dict(self.branches.state_dict())
