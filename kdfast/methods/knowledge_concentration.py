"""Knowledge Concentration: one student for all classes from specialists that each know one part of them, every part at its own pace.

Paper: Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN. Gao, Guo, Li, Nevatia; 2017;
https://arxiv.org/abs/1711.07607
Based on: a public summary that reprints the paper's formulas, figures and tables; no public code was found. Certain: the sigmoid cross-entropies with their sums, the
    teacher by the label's vertical, zeros outside it and below the top K, the four layouts and their sizes, the norm and the scale per
    vertical, gamma's start.
Reconstructed: ReLU and biases in the extra layers, the order [shared, private] of a hidden vector, ties to the lower class, 1e-12 under the
    norm, one vertical per image; `label_weight`, which mixes the true label in (0 in the paper).
Symbols: B rows, N classes in M verticals of N_v, stored one vertical after the other; h [B, s_b] base feature; x [B, N] logits, y paced ones;
    p [B, N_v] probabilities of the row's specialist; gamma [M] or [N]; s1, s2 hidden widths, s_g the shared part of s2.

    specialist  L_t = -(1/B) sum_i sum_j [ z_ij log sig(x_ij) + (1 - z_ij) log(1 - sig(x_ij)) ],   z multi-hot (class and its ancestors)
    target      z*_ij = p_ij for the K greatest of the row's own vertical, else 0: all other classes are negatives
    pace        y_v = gamma_v x_v / |x_v|  over the N_v logits of each vertical; gamma starts at N(sqrt(N_v), 1e-3)
    student     L_s = (1/B) sum_i [ sum_j softplus(y_ij) - sum_kept z*_ij y_ij ]
    layouts     fc-fc   FC(s1) FC(s2)     s_b s1 + s1 s2 + s2 N weights          sc-sc   SC(s1) SC(s2)   M s_b s1 + M s1 s2 + s2 N
                fc-sc   FC(s1) SC(s2)     s_b s1 + M s1 s2 + s2 N;  with s_g shared: s_b s1 + s1 s_g + M s1 (s2 - s_g) + s2 N
    SC is a layer that every vertical has for itself. Inference: the student alone, scores sig(y).
A greater gamma means greater gradients: it acts as a learning rate of the vertical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, multi_label_loss, sparse_multi_label_loss
from kdfast.losses.multi_label import check_probabilities
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import replace_head

LAYOUTS, PACES = ("fc-fc", "fc-sc", "sc-sc"), ("vertical", "class")
Targets = tuple[Tensor, Tensor]  # (index [B, K], value [B, K])


# ---------------------------------------------------------------- verticals
def check_sizes(vertical_sizes: Sequence[int]) -> list[int]:
    sizes = list(vertical_sizes)
    if not sizes or any(check_int("vertical_sizes", size) < 1 for size in sizes):
        raise ValueError(f"vertical_sizes: expected at least one vertical and none empty, got {sizes}")
    return sizes


def vertical_order(verticals: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(the classes in the order in which they are stored, the sizes) of verticals given as sets of classes.

    >>> vertical_order([[0, 3], [2, 1, 4]])
    ([0, 3, 2, 1, 4], [2, 3])
    """
    order = [c for vertical in verticals for c in vertical]
    sizes = check_sizes([len(vertical) for vertical in verticals])
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"verticals: expected every class of 0 to {len(order) - 1} in one of them, once, got {sorted(order)}")  # fmt: skip
    return order, sizes


def own_range(vertical_index: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(o_v [B], N_v [B]) of each row's vertical: its classes are o_v .. o_v + N_v - 1."""
    check_labels(vertical_index, vertical_index.shape[:1], vertical_index.device, "vertical_index")
    if len(vertical_index) == 0:
        raise ValueError("vertical_index: expected at least one row, got an empty batch")
    if readable(vertical_index) and not 0 <= int(vertical_index.min()) <= int(vertical_index.max()) < len(sizes):
        raise ValueError(
            f"vertical_index: expected verticals in [0, {len(sizes)}), got {int(vertical_index.min())} to {int(vertical_index.max())}"
        )
    offsets = torch.tensor([0, *accumulate(sizes)][:-1], device=vertical_index.device)
    return offsets[vertical_index.long()], torch.tensor(sizes, device=vertical_index.device)[vertical_index.long()]


# ---------------------------------------------------------------- the losses
def specialist_targets(
    teacher_probs: Tensor, vertical_index: Tensor, vertical_sizes: Sequence[int], top_k: int = 100
) -> Targets:
    """z* as (index [B, k], value [B, k]), k = min(K, max N_v): classes in 0 .. N - 1 in falling order, -1 (value 0) where there are fewer.

    Args: teacher_probs: [B, W], W >= the N_v of every row; columns from N_v on are ignored, since specialists differ in width.
    Ties go to the lower class. Made once it can be kept beside the data.
    """
    sizes = check_sizes(vertical_sizes)
    check_int("top_k", top_k, low=1)
    check_float_tensor("teacher_probs", teacher_probs)
    offset, number = own_range(vertical_index, sizes)
    if teacher_probs.dim() != 2 or len(teacher_probs) != len(offset):
        raise ValueError(f"teacher_probs: expected [{len(offset)}, N_v], got {tuple(teacher_probs.shape)}")
    width = teacher_probs.shape[1]
    if readable(number) and width < int(number.max()):
        raise ValueError(f"teacher_probs: expected the {int(number.max())} classes of the row's vertical, got {width}")
    own = torch.arange(width, device=number.device) < number[:, None]
    probs = torch.where(own, teacher_probs.detach(), 0.0)
    check_probabilities("teacher_probs", probs)
    value, place = torch.where(own, probs, -1.0).sort(dim=1, descending=True, stable=True)
    value, place = value[:, : min(top_k, max(sizes))], place[:, : min(top_k, max(sizes))]
    return torch.where(value < 0, -1, offset[:, None] + place), value.clamp_min(0)


def self_pace(logits: Tensor, vertical_sizes: Sequence[int], gamma: Tensor) -> Tensor:
    """y_v = gamma_v x_v / max(|x_v|, 1e-12), [B, N]. gamma: [M], or [N] with a scale for each class."""
    sizes = check_sizes(vertical_sizes)
    if logits.dim() != 2 or logits.shape[1] != sum(sizes):
        raise ValueError(f"logits: expected [B, {sum(sizes)}], the classes of all verticals, got {tuple(logits.shape)}")
    if gamma.shape not in ((len(sizes),), (sum(sizes),)):
        raise ValueError(
            f"gamma: expected {len(sizes)} numbers, of verticals, or {sum(sizes)}, of classes, got {tuple(gamma.shape)}"
        )
    dtype = compute_dtype(logits, gamma)
    directions = torch.cat([F.normalize(v, dim=1, eps=1e-12) for v in logits.to(dtype).split(sizes, 1)], 1)
    if len(gamma) == len(sizes):
        gamma = gamma.repeat_interleave(torch.tensor(sizes, device=gamma.device), output_size=sum(sizes))
    return gamma.to(dtype) * directions


def knowledge_concentration_loss(
    logits: Tensor, teacher: Tensor | Targets, vertical_index: Tensor, *, vertical_sizes: Sequence[int], gamma: Tensor | None = None,
    top_k: int = 100, labels: Tensor | None = None, label_weight: float = 0.0,
) -> LossOutput:  # fmt: skip
    """L_s.

    Args:
        logits: x [B, N], or y where the model paces them itself and `gamma` is None. teacher: p of each row's specialist, as in
            `specialist_targets`, or the pair that it made. vertical_index: [B]. gamma: of `self_pace`.
        labels: multi-hot [B, N], for label_weight w > 0: the target is (1 - w) z* + w labels; with w = 1 nothing of the teacher is read.
    Returns:
        LossOutput(loss, {"kd", "label"}), without their weights.
    """
    sizes = check_sizes(vertical_sizes)
    check_float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] != sum(sizes):
        raise ValueError(f"logits: expected [B, {sum(sizes)}], the classes of all verticals, got {tuple(logits.shape)}")
    offset, number = own_range(vertical_index, sizes)
    if vertical_index.shape != logits.shape[:1]:
        raise ValueError(f"vertical_index: expected [{len(logits)}], one per row, got {tuple(vertical_index.shape)}")
    y = logits if gamma is None else self_pace(logits, sizes, gamma)
    w = check_number("label_weight", label_weight, low=0.0, high=1.0)
    kd = label = y.new_zeros((), dtype=compute_dtype(y))
    if w < 1:
        given = isinstance(teacher, Tensor)
        index, value = specialist_targets(teacher, vertical_index, sizes, top_k) if given else teacher  # type: ignore[arg-type]
        inside = (index < 0) | ((index >= offset[:, None]) & (index < (offset + number)[:, None]))
        if not given and readable(inside) and not bool(inside.all()):
            raise ValueError("teacher: expected classes of the row's own vertical, got an index outside it")
        kd = sparse_multi_label_loss(y, index, value)
    if w > 0:
        if labels is None:
            raise ValueError(f"labels: expected multi-hot labels [B, {sum(sizes)}] for label_weight = {w:g}, got None")
        label = multi_label_loss(y, labels)
    return LossOutput((1 - w) * kd + w * label, {"kd": kd.detach(), "label": label.detach()})


# ---------------------------------------------------------------- the student's layers
def grouped_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """[x_v W_v^T + b_v] of all verticals side by side, [B, sum N_v]. x: [B, M, s], or [B, s] for all alike; W_v [N_v, s]; b_v [N_v]."""
    parts = x.unbind(1) if x.dim() == 3 else [x] * len(weights)
    return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True)], -1)


def private_hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(W_v x_v + b_v) for every vertical, [B, M, o]. x: [B, s] or [B, M, s]; weight [M, o, s]; bias [M, o]."""
    if x.dim() == 2:  # one product for all
        return torch.relu(F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape))
    return torch.relu(torch.einsum("bms,mos->bmo", x, weight) + bias)


def structurally_connected(
    x: Tensor, weight: Tensor, bias: Tensor, out_weights: Sequence[Tensor], out_biases: Sequence[Tensor],
    shared_weight: Tensor | None = None, shared_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits W2_v [relu(Wg x + bg); relu(W1_v x_v + b1_v)] + b2_v of all verticals, [B, N]."""
    hidden = private_hidden(x, weight, bias)
    if shared_weight is not None:
        common = torch.relu(F.linear(x, shared_weight, shared_bias))
        hidden = torch.cat((common.unsqueeze(1).expand(-1, len(weight), -1), hidden), -1)
    return grouped_linear(hidden, out_weights, out_biases)


def check_layout(layout: str, first: int, hidden: int, shared_dim: int) -> None:
    check_choice("layout", layout, LAYOUTS)
    check_int("first", first, low=1)
    if check_int("shared_dim", shared_dim) > check_int("hidden", hidden, low=1) or (shared_dim and layout != "fc-sc"):
        raise ValueError(
            f"shared_dim: expected 0 to {hidden} in layout fc-sc and 0 in the others, got {shared_dim} in {layout}"
        )


class StructurallyConnectedHead(nn.Module):
    """Base feature h [B, s_b] -> logits [B, N], classes of a vertical side by side.

    Args: vertical_sizes: N_v. first, hidden: s1, s2. shared_dim: s_g of "fc-sc". layout: "fc-fc", "fc-sc" or "sc-sc".
    Weights start as nn.Linear's.
    """

    def __init__(
        self, in_dim: int, vertical_sizes: Sequence[int], *, first: int = 4096, hidden: int = 512, shared_dim: int = 0,
        layout: str = "fc-sc",
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.layout = check_sizes(vertical_sizes), layout
        check_layout(layout, first, hidden, shared_dim)
        groups = len(self.sizes)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self._layer("first", (groups, first, in_dim) if layout == "sc-sc" else (first, in_dim))
        if layout == "fc-fc" or shared_dim:
            self._layer("common", (hidden if layout == "fc-fc" else shared_dim, first))
        if layout != "fc-fc":
            self._layer("private", (groups, hidden - shared_dim, first))
        self._layer("out", (sum(self.sizes), hidden))

    def _layer(self, name: str, shape: tuple[int, ...]) -> None:
        bound = shape[-1] ** -0.5
        self.weights[name] = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.biases[name] = nn.Parameter(torch.empty(shape[:-1]).uniform_(-bound, bound))

    def forward(self, feature: Tensor) -> Tensor:
        w, b = self.weights, self.biases
        if self.layout == "sc-sc":
            x = private_hidden(feature, w["first"], b["first"])
        else:
            x = torch.relu(F.linear(feature, w["first"], b["first"]))
        out, out_bias = w["out"], b["out"]
        if self.layout == "fc-fc":
            return F.linear(torch.relu(F.linear(x, w["common"], b["common"])), out, out_bias)
        common = (w["common"], b["common"]) if "common" in w else (None, None)
        return structurally_connected(
            x, w["private"], b["private"], out.split(self.sizes), out_bias.split(self.sizes), *common
        )


class SelfPace(nn.Module):
    """`self_pace` with its gamma. start: "sqrt", or a number; level: "vertical" or "class"; fixed: it does not learn."""

    def __init__(
        self, vertical_sizes: Sequence[int], *, level: str = "vertical", start: str | float = "sqrt", fixed: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes = check_sizes(vertical_sizes)
        check_choice("level", level, PACES)
        means = torch.tensor(self.sizes).sqrt()
        if isinstance(start, str):
            check_choice("start", start, ("sqrt",))
        else:
            means = torch.full_like(means, check_number("start", start))
        if level == "class":
            means = means.repeat_interleave(torch.tensor(self.sizes))
        self.gamma = nn.Parameter(means if fixed else torch.normal(means, 1e-3), requires_grad=not fixed)

    def forward(self, logits: Tensor) -> Tensor:
        return self_pace(logits, self.sizes, self.gamma)


class KnowledgeConcentrationLoss(nn.Module):
    """`knowledge_concentration_loss` with a gamma of its own: (logits, teacher, vertical_index) -> LossOutput.

    Args: pace: "vertical", "class" or None; gamma_init, gamma_fixed: `SelfPace`. At inference the scores need `pace` too.
    """

    def __init__(
        self, vertical_sizes: Sequence[int], *, top_k: int = 100, pace: str | None = "vertical", gamma_init: str | float = "sqrt",
        gamma_fixed: bool = False, label_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "vertical_sizes": check_sizes(vertical_sizes), "top_k": check_int("top_k", top_k, low=1),
            "label_weight": check_number("label_weight", label_weight, low=0.0, high=1.0),
        }  # fmt: skip
        self.pace = None if pace is None else SelfPace(vertical_sizes, level=pace, start=gamma_init, fixed=gamma_fixed)

    def forward(
        self, logits: Tensor, teacher: Tensor | Targets, vertical_index: Tensor, labels: Tensor | None = None
    ) -> LossOutput:
        gamma = None if self.pace is None else self.pace.gamma
        return knowledge_concentration_loss(logits, teacher, vertical_index, gamma=gamma, labels=labels, **self.options)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The student's head becomes the layout with its pace; reads "vertical" from the batch, whose labels are multi-hot.

    The teacher holds the trained specialists and gives logits [B, N] of which those of the row's vertical count.

    Args:
        first, hidden, shared_dim, layout: `StructurallyConnectedHead`. pace, gamma_init, gamma_fixed, top_k, label_weight: as in
            `KnowledgeConcentrationLoss`; the student paces itself, so that it scores as it was trained.
    """

    columns = ("vertical",)

    def __init__(
        self, *, vertical_sizes: Sequence[int], first: int = 4096, hidden: int = 512, shared_dim: int = 0, layout: str = "fc-sc",
        pace: str | None = "vertical", gamma_init: str | float = "sqrt", gamma_fixed: bool = False, top_k: int = 100,
        label_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        made = KnowledgeConcentrationLoss(
            vertical_sizes, top_k=top_k, pace=pace, gamma_init=gamma_init, gamma_fixed=gamma_fixed, label_weight=label_weight
        )  # fmt: skip
        self.options = made.options
        self.level, self.start_at, self.fixed = pace, gamma_init, gamma_fixed
        self.head: dict[str, Any] = {"first": first, "hidden": hidden, "shared_dim": shared_dim, "layout": layout}
        check_layout(**self.head)

    def adapt(self, student: nn.Module) -> nn.Module:
        def make(head: nn.Linear) -> nn.Module:
            sizes = self.options["vertical_sizes"]
            layers: list[nn.Module] = [StructurallyConnectedHead(head.in_features, sizes, **self.head)]
            if self.level is not None:
                layers.append(SelfPace(sizes, level=self.level, start=self.start_at, fixed=self.fixed))
            return nn.Sequential(*layers)

        return replace_head(student, make)

    def forward(self, context: Context) -> LossOutput:
        batch: Mapping[str, Tensor] = context.batch
        vertical, sizes = batch["vertical"], self.options["vertical_sizes"]
        offset, number = own_range(vertical, sizes)
        if context.teacher.dim() != 2 or context.teacher.shape[1] != sum(sizes):
            raise ValueError(
                f"teacher: expected logits [B, {sum(sizes)}], the classes of all verticals, got {tuple(context.teacher.shape)}"
            )
        columns = torch.arange(max(sizes), device=vertical.device)
        place = offset[:, None] + torch.minimum(columns, number[:, None] - 1)
        probs = torch.sigmoid(context.teacher.gather(1, place))  # columns from N_v on are not read
        return knowledge_concentration_loss(context.student, probs, vertical, labels=context.labels, **self.options)
