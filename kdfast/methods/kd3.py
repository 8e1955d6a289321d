"""KD^3: distillation from images found on the web: only those both models are sure of, and features that shifted statistics do not move.

Paper: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images. Tang, Chen, Niu, Sugiyama, Gong; ICCV 2023;
https://arxiv.org/abs/2307.11469
Based on: the authors' code, github.com/tangjialiang97/KD3 at 91e2d4c: KDDD/train_student.py, helper/loops.py, helper/util.py,
    dataset/I32.py, dataset/augmentation.py, distiller_zoo.
Differs from the code: selection looks at the images as they are, there at a random view of each (view="augmented"); rows that were not selected are masked out
    of their batch, where the code builds a new loader, so that batches are smaller instead of fewer; the contrastive term is a
    log-sum-exp (the code's exponentials overflow at small t); both normalisations have an eps.
Symbols: F_s, F_t [B, C, H, W] last maps, p_s, p_t their means over space; R the transfer module, h_t the teacher's classifier, frozen;
    z_s = h_t(mean R(F_s)), z_t [B, C] logits; x' mixed images; E_s, E_t: Linear(D, 128), then length 1.

    selection   q = softmax(a z_t + (1 - a) z_s), kept where max q > th of its class; a(epoch) falls from 0.99 to 0.27, then 0
    L_fa        mean over all elements of w_i (R(F_s)_i - F_t,i)^2,   w_i = sigmoid(|| z_s,i - z_t,i + 1e-6 ||), a constant
    L_con       NT-Xent of E(p(x)) and E(p(x')) at t = 0.3, over the 2B rows, each against all others
    L           L_fa + lambda (L_con(student) + L_con(teacher)),   lambda = 0.001; in the second only E_t learns

No labels, cross-entropy or KL. Inference: h_t(mean R(F_s)); the student's own classifier is never trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.data.confidence import adaptive_confidence, teacher_share
from kdfast.data.mixing import draw_mix_distribution, mix_distribution
from kdfast.losses import LossOutput
from kdfast.methods._protocol import Context, Setup, epoch_at
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn.heads import find_head
from kdfast.nn.transfer import ReusedClassifier, TransferModule, match_height
from kdfast.ops import pairwise_infonce


def feature_weights(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """w_i = sigmoid(|| z_s,i - z_t,i + 1e-6 ||_2) in [0.5, 1): [B], constants. Images on which the student disagrees weigh more."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: expected {tuple(student_logits.shape)}, got {tuple(teacher_logits.shape)}")
    dtype = compute_dtype(student_logits, teacher_logits)
    return torch.sigmoid((student_logits.detach().to(dtype) - teacher_logits.detach().to(dtype) + 1e-6).norm(dim=1))


def weighted_feature_loss(
    student: Tensor, teacher: Tensor, student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """L_fa of maps [B, C, H, W] (the student's after R); mask [B] bool: rows that count, none gives exact 0."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected maps {tuple(student.shape)} as the student's after R, got {tuple(teacher.shape)}"
        )
    weights = feature_weights(student_logits, teacher_logits)
    dtype = compute_dtype(student, teacher)
    rows = weights * (student.to(dtype) - teacher.detach().to(dtype)).square().flatten(1).mean(1)  # [B]
    return rows.mean() if mask is None else torch.where(mask, rows, 0.0).sum() / mask.sum().clamp_min(1)


def nt_xent_loss(z: Tensor, other: Tensor, *, temperature: float = 0.3, keep: Tensor | None = None) -> Tensor:
    """l_k = -S_kk' + log sum_{j != k} exp(S_kj), S the cosines of all 2B rows over t; the mean over the rows.

    Args: z, other: [B, D], two views. keep: rows [K] (indices) that take part. One row gives exactly 0, with a warning where it is
        the whole batch: there is nothing to contrast it with.
    """
    if z.shape != other.shape or z.dim() != 2:
        raise ValueError(f"other: expected [B, D] as z {tuple(z.shape)}, got {tuple(other.shape)}")
    if keep is None and len(z) == 1:
        warnings.warn("z: one row has nothing to be contrasted with, the loss is 0", stacklevel=2)
    z, other = (z, other) if keep is None else (z[keep], other[keep])
    if not len(z):
        return (z.sum() + other.sum()) * 0.0
    both, rows = torch.cat((z, other)), len(z)
    positive = torch.arange(2 * rows, device=z.device).roll(rows)
    return pairwise_infonce(
        both, both, tau=temperature, similarity="cosine", positive=positive, exclude_self=True
    ).mean()


class Embedding(nn.Module):
    """Linear(D, 128), then length 1 (floored at 1e-12)."""

    def __init__(self, in_features: int, width: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.linear(pooled), dim=-1, eps=1e-12)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The whole epoch: selection over the pool at its start, then both terms on the kept rows of each batch (inputs, labels, index).

    Reads the last map "tokens" of both models. The labels of the batch are not used; index [B] is the row of the pool, for the selection.

    Args:
        widths: {"tokens": (student, teacher)}. epochs: of the whole run, to turn steps into epochs (selection at the start of each);
            max_epoch, scale of `teacher_share` are in the same epochs, the paper's 120 and 160 of 240. cutoff: None keeps all.
        view: of the images in the selection, "plain" or "augmented", as the training loader makes them. mix_weight: lambda. temperature: t. alpha: of the Beta. teacher_head: path of h_t, None: the last linear layer.
    """

    captures = ("tokens",)
    columns = ("index",)

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, epochs: int = 240, max_epoch: int = 120, scale: int = 160,
        cutoff: float | None = 0.95, mix_weight: float = 0.001, temperature: float = 0.3, alpha: float = 0.1, factor: int = 2,
        embedding: int = 128, view: str = "plain", teacher_head: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        student, teacher = widths["tokens"]
        self.transfer = TransferModule(student, teacher, factor)
        self.embed_student, self.embed_teacher = Embedding(student, embedding), Embedding(teacher, embedding)
        self.epochs, self.max_epoch, self.scale = check_int("epochs", epochs, low=1), max_epoch, scale
        self.cutoff = None if cutoff is None else check_number("cutoff", cutoff, low=0.0, high=1.0, open_low=True)
        self.mix_weight, self.alpha = (
            check_number("mix_weight", mix_weight, low=0.0),
            check_number("alpha", alpha, low=0.0, open_low=True),
        )
        self.temperature = check_number("temperature", temperature, low=0.0, open_low=True)
        self.teacher_head, self.view = teacher_head, check_choice("view", view, ("plain", "augmented"))
        self.classifier: tuple[nn.Module, ...] = ()
        self.sweep: Callable[..., Any] | None = None
        self.selected: Tensor
        self.epoch: Tensor
        self.height: Tensor
        self.register_buffer("selected", torch.ones(0, dtype=torch.bool))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.register_buffer("height", torch.zeros((), dtype=torch.long))  # of the teacher's map, 0 until one was seen

    def start(self, setup: Setup) -> None:
        assert setup.teacher is not None
        self.classifier, self.sweep = (find_head(setup.teacher, self.teacher_head)[1],), setup.sweep

    def logits(self, maps: Tensor) -> Tensor:
        """z_s of maps after R: the teacher's classifier as a constant."""
        head: Any = self.classifier[0]
        bias = None if head.bias is None else head.bias.detach()
        return F.linear(maps.mean((2, 3)), head.weight.detach(), bias)

    @torch.no_grad()
    def select(self, epoch: int) -> None:
        """Fills `selected` for an epoch counted from 1."""
        assert self.sweep is not None and self.cutoff is not None
        teacher, student, index = [], [], []
        training = self.transfer.training
        self.transfer.eval()
        for context in self.sweep("train", plain=self.view == "plain"):
            s, _ = match_height(context.student_features["tokens"], context.teacher_features["tokens"])
            teacher.append(context.teacher)
            student.append(self.logits(self.transfer(s)))
            index.append(context.batch[2])
        self.transfer.train(training)
        share = teacher_share(epoch, max_epoch=self.max_epoch, scale=self.scale)
        found = adaptive_confidence(torch.cat(teacher), torch.cat(student), share, cutoff=self.cutoff)
        if not len(found.rows):
            raise ValueError(f"cutoff: no image of the pool exceeds its threshold at {self.cutoff}")
        rows = torch.cat(index)
        self.selected = torch.zeros(int(rows.max()) + 1, dtype=torch.bool, device=rows.device)
        self.selected[rows[found.rows]] = True
        self.epoch.fill_(epoch)

    def prepare(self, batch: Any) -> Any:
        images, *rest = batch
        lam, perm = draw_mix_distribution(len(images), alpha=self.alpha)
        mixed = mix_distribution(images, lam.to(images.device), perm.to(images.device))
        return torch.cat((images, mixed)), *rest

    def forward(self, context: Context) -> LossOutput:
        if self.cutoff is not None:
            epoch = 1 + epoch_at(context.step, context.total_steps, self.epochs)
            if epoch > int(self.epoch):
                self.select(epoch)
        rows = len(context.batch[0]) // 2
        self.height.fill_(context.teacher_features["tokens"].shape[2])
        maps = context.student_features["tokens"], context.teacher_features["tokens"]
        keep = torch.ones(rows, dtype=torch.bool, device=maps[0].device)
        if self.cutoff is not None:
            keep = self.selected[context.batch[2]]
        s, t = match_height(maps[0][:rows], maps[1][:rows])
        after = self.transfer(s)
        feature = weighted_feature_loss(after, t, self.logits(after), context.teacher[:rows], mask=keep)
        index, contrast = keep.nonzero().flatten(), []
        for embed, pooled in (
            (self.embed_student, maps[0].mean((2, 3))),
            (self.embed_teacher, maps[1].detach().mean((2, 3))),
        ):
            z, other = embed(pooled).chunk(2)
            contrast.append(nt_xent_loss(z, other, temperature=self.temperature, keep=index))
        loss = feature + self.mix_weight * (contrast[0] + contrast[1])
        parts = {"feature": feature, "contrast_student": contrast[0], "contrast_teacher": contrast[1]}
        return LossOutput(
            loss, {name: part.detach() for name, part in parts.items()} | {"num_kept": keep.sum().float()}
        )

    def deploy(self, setup: Setup) -> nn.Module:
        height = int(self.height) or None
        return ReusedClassifier(setup.student, setup.capture["tokens"], self.transfer, self.classifier[0], height)
