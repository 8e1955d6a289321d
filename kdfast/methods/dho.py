"""DHO: one head for the few labels, one for the teacher's predictions on all data, one backbone; both heads vote in the end.

Paper: Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization. Kang, Lee, Jeong, Lee,
Hwang; 2025; https://arxiv.org/abs/2505.07675
Based on: the authors' code, github.com/erjui/DHO at 846de75: train_others.py, train_imgnet.py, train_imgnet_semi.py.
Differs from the paper: it weighs lambda L_ce + (1 - lambda) L_kd, lambda = 0.5, as the few-shot scripts and the defaults here do; the
    low-shot ImageNet script adds the plain terms (ce_weight = kd_weight = 1).
Differs from the code: train_imgnet.py searches (alpha, beta) on the test set; here it is done on validation data. Labelled and
    unlabelled images go through the student in one batch, as in the low-shot script (with batch norm that is not two passes).
Symbols: f [B, D] feature; ce, kd [B, C] logits of the two heads; t [B, C] the teacher's; l, u labelled and unlabelled rows; y labels.

    KD(s, t) = T^2 mean_i KL( softmax(t/T) || softmax(s/T) )
    loss = w_ce CE(ce_l, y) + w_kd ( KD(kd_l, t_l) + KD(kd_u, t_u) )          the KD terms are added, each a mean over its own rows
    P = alpha softmax(ce) + (1 - alpha) softmax(kd / beta)                    inference: probabilities are mixed, not logits

The head of the labels never sees an unlabelled image: ce_u is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_labels, check_number, check_pair
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput, cross_entropy_loss, kd_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import DualHead, DualOutput, dual_heads, replace_head
from kdfast.weights import BestWeights

ALPHAS = tuple(i / 20 for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
SEARCHES = ("epoch", "end", "none")


# ---------------------------------------------------------------- the loss
def dho_loss(
    ce: Tensor,
    kd: Tensor,
    labels: Tensor,
    teacher: Tensor,
    kd_unlabeled: Tensor | None = None,
    teacher_unlabeled: Tensor | None = None,
    *,
    temperature: float = 2.0,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    ignore_index: int = -100,
) -> LossOutput:
    """The loss of the module docstring on a labelled and an unlabelled batch.

    Args:
        ce, kd: logits [B_l, C] of the two heads on labelled images, B_l > 0. labels: [B_l] integers in [0, C). teacher: [B_l, C].
        kd_unlabeled, teacher_unlabeled: [B_u, C], or None; with no rows their term is 0.
        One stacked batch: rows of `labels` equal to `ignore_index` are the unlabelled ones, and the last two stay None.
    Returns:
        LossOutput(loss, {"ce", "kd_labeled", "kd_unlabeled"}), the parts unweighted, with T^2.

    >>> loss, parts = dho_loss(ce_l, kd_l, labels, t_l, kd_u, t_u)
    """
    check_number("ce_weight", ce_weight, low=0.0)
    check_number("kd_weight", kd_weight, low=0.0)
    _same(ce, kd, "kd")
    _same(kd, teacher, "teacher")
    if ce.shape[0] == 0:
        raise ValueError("ce: expected at least one labelled row, got an empty batch: its cross-entropy is undefined")
    labelled = labels.long() != ignore_index
    if (kd_unlabeled is None) != (teacher_unlabeled is None):
        raise ValueError("kd_unlabeled, teacher_unlabeled: expected both or neither")
    if kd_unlabeled is None or teacher_unlabeled is None:
        unlabelled = kd_loss(kd, teacher, temperature=temperature, mask=~labelled)
    else:
        _same(kd_unlabeled, teacher_unlabeled, "teacher_unlabeled")
        unlabelled = kd_loss(kd_unlabeled, teacher_unlabeled, temperature=temperature)
    first = cross_entropy_loss(ce, labels, ignore_index=ignore_index)
    second = kd_loss(kd, teacher, temperature=temperature, mask=labelled)
    loss = ce_weight * first + kd_weight * (second + unlabelled)
    parts = {"ce": first, "kd_labeled": second, "kd_unlabeled": unlabelled}
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()})


def _same(one: Tensor, other: Tensor, name: str) -> None:
    check_pair(one, other, ("ce", name))
    if one.dim() != 2 or one.shape != other.shape:
        raise ValueError(f"{name}: expected logits of shape {tuple(one.shape)}, [B, C], got {tuple(other.shape)}")


# ---------------------------------------------------------------- inference
def dual_head_probs(ce: Tensor, kd: Tensor, *, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """P = alpha softmax(ce) + (1 - alpha) softmax(kd / beta), [..., C]; predict the argmax, the first class on a tie.

    alpha in [0, 1], beta > 0. The low-shot ImageNet script fixes both at 0.5.
    """
    check_number("alpha", alpha, low=0.0, high=1.0)
    check_number("beta", beta, low=0.0, open_low=True)
    _same(ce.flatten(0, -2), kd.flatten(0, -2), "kd")
    dtype = compute_dtype(ce, kd)
    return alpha * torch.softmax(ce.to(dtype), -1) + (1 - alpha) * torch.softmax(kd.to(dtype) / beta, -1)


@torch.no_grad()
def dual_head_search(
    ce: Tensor, kd: Tensor, labels: Tensor, *, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS,
    ignore_index: int = -100, chunk: int = 8192,
) -> tuple[float, float, float]:  # fmt: skip
    """(alpha, beta, accuracy in percent) of the pair with the most right rows; the first on a tie, betas in the outer loop.

    If no pair has a right row: (0, 1, 0). Rows are read in chunks: for each beta both softmaxes are made once.

    Args: ce, kd: [N, C]. labels: [N] integers, N > 0; rows of `ignore_index` are left out.
    """
    if not alphas or not betas:
        raise ValueError("alphas, betas: expected at least one of each, got an empty grid")
    _same(ce, kd, "kd")
    check_labels(labels, ce.shape[:1], ce.device)
    keep = labels.long() != ignore_index
    if not bool(keep.any()):
        raise ValueError("labels: expected at least one labelled row to search on, got none")
    for name, values in (("alpha", alphas), ("beta", betas)):
        for value in values:
            check_number(name, value, low=0.0, high=1.0 if name == "alpha" else float("inf"), open_low=name == "beta")
    dtype = compute_dtype(ce, kd)
    right = torch.zeros(len(betas), len(alphas), dtype=torch.int64, device=ce.device)
    for z, s, y, k in zip(*(rows.split(chunk) for rows in (ce, kd, labels, keep))):
        p = torch.softmax(z.to(dtype), -1)
        for i, beta in enumerate(betas):
            q = torch.softmax(s.to(dtype) / beta, -1)
            for j, alpha in enumerate(alphas):
                right[i, j] += (((alpha * p + (1 - alpha) * q).argmax(-1) == y) & k).sum()
    best = int(right.argmax())  # the first of equal ones
    count = int(right.flatten()[best])
    if count == 0:
        return 0.0, 1.0, 0.0
    i, j = divmod(best, len(alphas))
    return float(alphas[j]), float(betas[i]), 100 * count / int(keep.sum())


class VotingHeads(DualHead):
    """The two heads of DHO: `DualOutput(ce, kd)` while training, log P in evaluation, with alpha and beta as buffers.

    Args:
        main: the student's head, which takes the labels. normalize: the second head is scale (W f / |f| + b), as for CLIP-style
            students, the norm at least 1e-12. scale: of that.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, main: nn.Linear, *, alpha: float = 0.5, beta: float = 0.5, normalize: bool = False, scale: float = 100.0
    ) -> None:
        super().__init__(main)
        self.normalize, self.scale = normalize, check_number("scale", scale)
        self.register_buffer("alpha", torch.tensor(check_number("alpha", alpha, low=0.0, high=1.0)))
        self.register_buffer("beta", torch.tensor(check_number("beta", beta, low=0.0, open_low=True)))

    @torch.no_grad()
    def init_from_text(self, embeddings: Tensor) -> None:
        """Both heads start from the student's own text embeddings [C, P, D]: the mean over P templates, not normalised; no biases."""
        for head in (self.main, self.aux):
            head.weight.copy_(embeddings.mean(1))  # type: ignore[union-attr, operator]
            if head.bias is not None:
                head.bias.zero_()  # type: ignore[union-attr, operator]

    def pair(self, feature: Tensor) -> DualOutput:
        if not self.normalize:
            return super().pair(feature)
        return DualOutput(self.main(feature), self.scale * self.aux(F.normalize(feature, dim=-1, eps=1e-12)))

    def inference(self, feature: Tensor) -> Tensor:
        ce, kd = self.pair(feature)
        return (self.alpha * torch.softmax(ce, -1) + (1 - self.alpha) * torch.softmax(kd / self.beta, -1)).log()


# ---------------------------------------------------------------- a vision-language teacher
def text_classifier(embeddings: Tensor) -> Tensor:
    """Class weights [C, D] of text embeddings [C, P, D]: the mean over P templates of unit vectors, a unit vector again."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)


def vision_language_logits(images: Tensor, classes: Tensor, *, scale: float = 100.0) -> Tensor:
    """t = scale <v / |v|, w_c> of image embeddings [B, D] and class weights [C, D] of unit length."""
    return scale * F.linear(F.normalize(images, dim=-1), classes)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Batches of labelled rows and of unlabelled ones, whose label is `ignore_index`; the teacher predicts on both.

    The student gets a second head. `deploy` gives the student with both heads, whose output is log P.

    Args:
        heads: 2, or 1: both losses on the student's own head, to compare with. normalize: `VotingHeads`.
        search: of (alpha, beta) on the validation data. "epoch": after each epoch (`fit` with `eval_loader`); the student of the first
            epoch with the most right rows is kept, with its pair. "end": once, in `deploy`, and so when `fit` had no validation
            data. "none" keeps the given alpha and beta, which else hold until the first search.
        head: dotted path of the student's head, default its last nn.Linear. Others: `dho_loss`.
    """

    def __init__(
        self, *, temperature: float = 2.0, ce_weight: float = 0.5, kd_weight: float = 0.5, heads: int = 2, normalize: bool = False,
        search: str = "epoch", alpha: float = 0.5, beta: float = 0.5, head: str | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        if check_int("heads", heads, low=1) > 2:
            raise ValueError(f"heads: expected 1 or 2, got {heads}")
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
            check_number(name, value, low=0.0)
        self.heads, self.head, self.search = heads, head, check_choice("search", search, SEARCHES)
        self.best: BestWeights | None = None  # the student of the best epoch
        self.voting: dict[str, Any] = {"alpha": alpha, "beta": beta, "normalize": normalize}
        VotingHeads(nn.Linear(1, 1), **self.voting)  # a wrong number is refused now
        self.options: dict[str, Any] = {
            "temperature": temperature, "ce_weight": ce_weight, "kd_weight": kd_weight, "ignore_index": ignore_index,
        }  # fmt: skip

    def adapt(self, student: nn.Module) -> nn.Module:
        if self.heads == 1:
            return student
        if not dual_heads(student):
            student = replace_head(student, lambda head: VotingHeads(head, **self.voting), self.head)
        if self.search == "epoch":
            self.best = BestWeights(student)
        return student

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        out = context.student
        ce, kd = out if isinstance(out, DualOutput) else (out, out)
        return dho_loss(ce, kd, context.labels, context.teacher, **self.options)

    def after_epoch(self, setup: Setup) -> None:
        if self.best is not None and setup.has_val:
            self.best.offer(setup.student, self._search(setup))

    def deploy(self, setup: Setup) -> nn.Module:
        if self.heads == 1 or self.search == "none":
            return setup.student
        if self.best is not None and self.best.score > 0:
            return self.best.model
        self._search(setup)
        return setup.student

    def _search(self, setup: Setup) -> float:
        """Gives the student's heads the best pair on the validation data; its accuracy in percent."""
        heads: Any = dual_heads(setup.student)[0]
        heads.both = True
        try:
            seen = [(*context.student, context.labels) for context in setup.sweep("val")]
        finally:
            heads.both = False
        alpha, beta, accuracy = dual_head_search(
            *(torch.cat(column) for column in zip(*seen)), ignore_index=self.options["ignore_index"]
        )
        heads.alpha.fill_(alpha)
        heads.beta.fill_(beta)
        return accuracy
