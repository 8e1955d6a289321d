"""LELP: with few classes the teacher's probabilities say little, so its embeddings split each class into soft subclasses.

Paper: Linear Projections of Teacher Embeddings for Few-Class Distillation. Loo, Iliopoulos, Hu, Vee; 2024;
https://arxiv.org/abs/2409.20449
Based on: the paper and its summaries; no public code was found. Certain are: subclasses from the teacher's last embeddings without
    training it again; principal directions per class; the projection on the null space of the teacher's classifier; the teacher's
    class probability split over the subclasses; one loss over all of them; the class answer is the sum over subclasses.
Reconstruction, and therefore arguments: the scaling of the projections by their standard deviation; `subclass_temperature`; the
    factor T^2; `rotate`; `alpha` and every default (S = 10 suits two classes).
Symbols: h [N, D] teacher embedding, W [C, D] its classifier, z [N, C] its logits, y [N] labels; S subclasses of each of C classes;
    u [B, C S] student outputs, index class S + subclass.

    fit        P = I - W^+ W;  mu_c = mean of h in class c;  Z_c = (h - mu_c) P;  V_c = first S right singular vectors of Z_c, the
               entry of largest magnitude positive;  sigma_cs = sqrt(mean (Z_c V_c^T)_s^2)
    targets    a_cs = V_cs . (h - mu_c) / sigma_cs;  r_c = softmax_s(a_c / tau);  q_cs = softmax(z / T)_c r_cs
    loss       L_kd = -T^2 mean sum_cs q_cs log softmax(u / T)_cs;  ell_c = logsumexp_s u_cs
               L = alpha L_kd + (1 - alpha) CE(ell, y);  a row without a label has L_kd alone

With S = 1 this is plain KD in its cross-entropy form. Inference: argmax_c ell_c, since softmax(ell) sums softmax(u) over subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import replace_head
from kdfast.nn.heads import find_head


# ---------------------------------------------------------------- fit
class SubclassProjection(NamedTuple):
    """mean mu [C, D], directions V [C, S, D], scale sigma [C, S], projector P [D, D]."""

    mean: Tensor
    directions: Tensor
    scale: Tensor
    projector: Tensor


def fit_subclasses(
    embeddings: Tensor,
    labels: Tensor,
    classifier_weight: Tensor | None = None,
    *,
    n_subclasses: int = 10,
    project_null_space: bool = True,
    rotate: bool = False,
    random_directions: bool = False,
    generator: torch.Generator | None = None,
) -> SubclassProjection:
    """The fit of the module docstring, in float64; returned in the embeddings' precision (float32 or float64).

    Args:
        embeddings: [N, D]. labels: [N] integers in [0, C), true labels or the teacher's predictions.
        classifier_weight: W [C, D]; None: no projection, and C is the largest label + 1.
        project_null_space: False: P = I. rotate: V_c times one random orthogonal matrix, so that the subclasses share the variance.
        random_directions: random orthonormal V_c in the range of P, for comparison. generator: for the two.
    Raises:
        ValueError: a class with fewer than S + 1 rows, or of rank below S after the projection (names both); a null space smaller
            than S; labels, shapes; embeddings that are not finite; a direction without variance.

    >>> projection = fit_subclasses(embeddings, labels, teacher.head.weight, n_subclasses=5)
    """
    check_float_tensor("embeddings", embeddings)
    check_int("n_subclasses", n_subclasses, low=1)
    if embeddings.dim() != 2 or not embeddings.numel():
        raise ValueError(f"embeddings: expected [N, D], got shape {tuple(embeddings.shape)}")
    if not bool(embeddings.isfinite().all()):
        raise ValueError("embeddings: expected finite values, got NaN or infinity")
    check_labels(labels, embeddings.shape[:1], embeddings.device)
    h, width = embeddings.detach().double(), embeddings.shape[1]
    classes = int(labels.max()) + 1 if classifier_weight is None else classifier_weight.shape[0]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected integers in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    projector = torch.eye(width, dtype=torch.float64, device=h.device)
    if classifier_weight is not None:
        if classifier_weight.dim() != 2 or classifier_weight.shape[1] != width:
            raise ValueError(f"classifier_weight: expected [C, {width}], got {tuple(classifier_weight.shape)}")
        if project_null_space:
            w = classifier_weight.detach().double()
            projector = projector - torch.linalg.pinv(w) @ w
            left = width - int(torch.linalg.matrix_rank(w))
            if left < n_subclasses:
                raise ValueError(
                    f"n_subclasses: the null space of classifier_weight has {left} dimensions, expected {n_subclasses}"
                )
    turn = _orthonormal(n_subclasses, n_subclasses, generator).to(h) if rotate else None
    mean, directions, scale = [], [], []
    for c in range(classes):
        rows = h[labels == c]
        if len(rows) < n_subclasses + 1:
            raise ValueError(
                f"labels: class {c} has {len(rows)} rows, {n_subclasses} subclasses need one more than that"
            )
        mean.append(rows.mean(0))
        centred = (rows - mean[-1]) @ projector  # Z_c
        if random_directions:
            noise = torch.randn(width, n_subclasses, generator=generator, dtype=torch.float64).to(h)
            v = torch.linalg.qr(projector @ noise).Q.T
        else:
            _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
            tiny = values.max() * max(centred.shape) * torch.finfo(torch.float64).eps
            if (rank := int((values > tiny).sum())) < n_subclasses:
                raise ValueError(
                    f"embeddings: class {c} has rank {rank} after the projection, expected >= {n_subclasses}"
                )
            v = vectors[:n_subclasses]
            v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
        v = v if turn is None else turn @ v
        sigma = (centred @ v.T).square().mean(0).sqrt()
        if float(sigma.min()) < 1e-12:
            raise ValueError(f"embeddings: direction {int(sigma.argmin())} of class {c} has no variance")
        directions.append(v)
        scale.append(sigma)
    dtype = compute_dtype(embeddings)
    found = (torch.stack(mean), torch.stack(directions), torch.stack(scale), projector)
    return SubclassProjection(*(tensor.to(dtype) for tensor in found))


def _orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # without the signs the distribution is not uniform


# ---------------------------------------------------------------- targets
def project_embeddings(projection: SubclassProjection, embeddings: Tensor) -> Tensor:
    """a_cs = V_cs . (h - mu_c) / sigma_cs: [B, C, S] of h [B, D], by one product without a [B, C, D] table."""
    mean, directions, scale, _ = projection
    h = embeddings.to(compute_dtype(embeddings, mean))
    weight = (directions / scale.unsqueeze(-1)).to(h)  # [C, S, D]
    # The common part of the means is taken from h, so that little cancels in the product.
    middle = mean.mean(0).to(h)
    bias = torch.einsum("csd,cd->cs", weight, (mean.to(h) - middle))
    return ((h - middle) @ weight.flatten(0, 1).T).unflatten(1, bias.shape) - bias


def subclass_targets(
    projection: SubclassProjection, embeddings: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0,
    subclass_temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """q [B, C S]: the teacher's class probabilities at T, split by r = softmax_s(a / tau); no gradient.

    Args: embeddings: h [B, D]. teacher_logits: z [B, C]. temperature: T > 0. subclass_temperature: tau > 0.
    """
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_number("subclass_temperature", subclass_temperature, low=0.0, open_low=True)
    classes, _, width = projection.directions.shape
    for name, tensor, size in (("embeddings", embeddings, width), ("teacher_logits", teacher_logits, classes)):
        check_float_tensor(name, tensor)
        if tensor.shape != (embeddings.shape[0], size):
            raise ValueError(f"{name}: expected [B, {size}], got {tuple(tensor.shape)}")
    a = project_embeddings(projection, embeddings.detach())
    z = teacher_logits.detach().to(compute_dtype(teacher_logits))
    q = torch.softmax(z / temperature, -1).unsqueeze(-1) * torch.softmax(a / subclass_temperature, -1)
    return q.flatten(1)


# ---------------------------------------------------------------- loss
def merge_subclass_logits(logits: Tensor, n_subclasses: int) -> Tensor:
    """ell_c = logsumexp_s u_cs: [..., C S] -> [..., C].

    >>> merge_subclass_logits(torch.zeros(1, 4), 2)
    tensor([[0.6931, 0.6931]])
    """
    check_int("n_subclasses", n_subclasses, low=1)
    if logits.shape[-1] % n_subclasses:
        raise ValueError(f"logits: expected a multiple of {n_subclasses} outputs, got {logits.shape[-1]}")
    return logits.unflatten(-1, (-1, n_subclasses)).logsumexp(-1)


def subclass_kd_rows(student: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-T^2 sum_cs q_cs log softmax(u / T)_cs of each row [B]: the divergence from q and q's own entropy."""
    q = targets.detach()
    divergence = divergence_loss(student, temperature * q.log(), temperature=temperature, reduction="none")
    return temperature**2 * (divergence + torch.special.entr(q).sum(-1))


def lelp_loss(
    student: Tensor, targets: Tensor, labels: Tensor | None = None, *, n_subclasses: int, temperature: float = 1.0, alpha: float = 0.9,
    ignore_index: int = -100,
) -> LossOutput:  # fmt: skip
    """mean over the rows of alpha L_kd + (1 - alpha) CE(ell, y), or of L_kd where there is no label.

    Args:
        student: u [B, C S]. targets: q [B, C S], `subclass_targets`; constants. labels: [B] integers in [0, C), `ignore_index` for
            a row without a label, or None: no labels at all.
    Returns:
        LossOutput(loss, {"kd", "ce"}): means over all rows and over the labelled ones.

    >>> loss, parts = lelp_loss(student(x), q, labels, n_subclasses=5)
    """
    check_float_tensor("student", student)
    check_number("alpha", alpha, low=0.0, high=1.0)
    check_number("temperature", temperature, low=0.0, open_low=True)
    if student.dim() != 2 or student.shape != targets.shape:
        raise ValueError(f"student: expected [B, C S] as targets {tuple(targets.shape)}, got {tuple(student.shape)}")
    kd = subclass_kd_rows(student, targets, temperature=temperature)  # [B]
    if labels is None:
        return LossOutput(kd.mean(), {"kd": kd.mean().detach(), "ce": kd.new_zeros(())})
    ell = merge_subclass_logits(student.to(compute_dtype(student)), n_subclasses)
    ce = cross_entropy_loss(ell, labels, ignore_index=ignore_index, reduction="none")  # 0 where there is no label
    known = labels.long() != ignore_index
    rows = torch.where(known, alpha * kd + (1 - alpha) * ce, kd)
    parts = {"kd": kd.mean().detach(), "ce": ce.sum().detach() / known.sum().clamp_min(1)}
    return LossOutput(rows.mean(), parts)


# ---------------------------------------------------------------- by name
class SubclassHead(nn.Linear):
    """Linear(D, C S): all outputs [B, C S] while training, class logits [B, C] in evaluation."""

    def __init__(self, in_features: int, classes: int, n_subclasses: int) -> None:
        super().__init__(in_features, classes * n_subclasses)
        self.n_subclasses = n_subclasses

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        return logits if self.training else merge_subclass_logits(logits, self.n_subclasses)


class Method(MethodBase):
    """Gives the student a `SubclassHead` in the place of its last linear layer, fits the directions before the first step, trains.

    Reads the feature "embedding" of the teacher: the input of its last linear layer, or a map whose mean that is.

    Args:
        widths: {"embedding": (student, teacher)}. membership: "label", or "teacher": the class of a row in the fit is the teacher's
            prediction, which rows without a label need to take part. student_head, teacher_head: paths of the last layers, None:
            found. seed: of `rotate` and `random_directions`. Others: `fit_subclasses`, `subclass_targets`, `lelp_loss`.
    """

    captures = ("embedding",)

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, n_subclasses: int = 10, temperature: float = 1.0,
        subclass_temperature: float = 1.0, alpha: float = 0.9, project_null_space: bool = True, rotate: bool = False,
        random_directions: bool = False, membership: str = "label", student_head: str | None = None,
        teacher_head: str | None = None, seed: int = 0, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_subclasses = check_int("n_subclasses", n_subclasses, low=1)
        self.membership = check_choice("membership", membership, ("label", "teacher"))
        check_number("subclass_temperature", subclass_temperature, low=0.0, open_low=True)
        check_number("temperature", temperature, low=0.0, open_low=True)
        check_number("alpha", alpha, low=0.0, high=1.0)
        self.temperatures = {"temperature": temperature, "subclass_temperature": subclass_temperature}
        self.alpha, self.ignore_index, self.seed = alpha, ignore_index, check_int("seed", seed)
        self.fit_options = {
            "project_null_space": project_null_space,
            "rotate": rotate,
            "random_directions": random_directions,
        }
        self.heads, self.width = (student_head, teacher_head), widths["embedding"][1]
        for name in SubclassProjection._fields:  # their sizes are those of the data
            self.register_buffer(name, torch.empty(0))

    @property
    def projection(self) -> SubclassProjection:
        return SubclassProjection(*(getattr(self, name) for name in SubclassProjection._fields))

    def adapt(self, student: nn.Module) -> nn.Module:
        def make(head: nn.Linear) -> nn.Module:
            return SubclassHead(head.in_features, head.out_features, self.n_subclasses)

        return replace_head(student, make, self.heads[0])

    def start(self, setup: Setup) -> None:
        if setup.resumed:
            return
        assert setup.teacher is not None
        weight = find_head(setup.teacher, self.heads[1])[1].weight
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for context in setup.sweep("train"):
            assert context.labels is not None
            found = context.teacher.argmax(-1) if self.membership == "teacher" else context.labels.long()
            known = found != self.ignore_index
            rows.append(self.embedding(context)[known])
            labels.append(found[known])
        fitted = fit_subclasses(
            torch.cat(rows), torch.cat(labels), weight, n_subclasses=self.n_subclasses,
            generator=torch.Generator().manual_seed(self.seed), **self.fit_options,
        )  # fmt: skip
        for name, value in fitted._asdict().items():
            setattr(self, name, value)

    def embedding(self, context: Context) -> Tensor:
        h = context.teacher_features["embedding"]
        return h.mean((2, 3)) if h.dim() == 4 else h

    def targets(self, context: Context) -> Tensor:
        return subclass_targets(self.projection, self.embedding(context), context.teacher, **self.temperatures)

    def forward(self, context: Context) -> LossOutput:
        return lelp_loss(
            context.student, self.targets(context), context.labels, n_subclasses=self.n_subclasses, alpha=self.alpha,
            temperature=self.temperatures["temperature"], ignore_index=self.ignore_index,
        )  # fmt: skip
