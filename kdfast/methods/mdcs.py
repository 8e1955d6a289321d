"""MDCS: three experts with different class priors, each its own teacher from a weak view to a strong one, for long-tailed data.

Paper: MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed Recognition. Zhao et al.; ICCV 2023;
https://arxiv.org/abs/2308.09922
Based on: the authors' code, github.com/fistyee/MDCS at 1a1d54e: model/loss.py, trainer/trainer.py, the experts and their cosine
    classifier in model/ldam_drw_resnets.
Differs from the code: the powers are an argument (literals there, and `tau` is accepted but unused); n^a is never formed (n^2.5
    overflows half precision at n = 84): log(n^a + eps) = a log n + log1p(eps n^-a), the same values.
As in the code, though a reader of the paper may expect otherwise: n are raw counts, not shares; target and prediction of the
    consistency term both carry the prior (`consistency_on="raw"`: neither does).
Symbols: v [M, 2B, C] logits of M experts, rows 0..B-1 weak and B..2B-1 strong views of the same images in one order; y [B]; n [C]
    class counts; a [M] powers; u = v + log(n^a + eps) adjusted logits; P, Q softmax(u) of the weak and the strong rows; K_m the
    rows with argmax P_m = y.

    DL   = sum_m CE(u_m, [y; y])                                    each a mean over the 2B rows
    CS_m = 1/|K_m| sum_{i in K_m} KL(P_mi || Q_mi)                   P detached; 0 when K_m is empty
    loss = DL + w min(epoch / E, 1) sum_m CS_m                       epoch counts from 1

a = -0.5 makes an expert that favours frequent classes at test time, 2.5 one that favours rare ones. Inference: the mean of v over
the experts, without priors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss
from kdfast.methods._protocol import Context, Setup, epoch_at
from kdfast.methods._protocol import Method as MethodBase

POWERS = (-0.5, 1.0, 2.5)


# ---------------------------------------------------------------- the two terms
def prior_offsets(class_counts: Tensor, powers: Sequence[float] = POWERS, *, eps: float = 1e-9) -> Tensor:
    """log(n^a + eps) as a log n + log1p(eps n^-a): [M, C] float64 for counts n [C] > 0 and M powers a.

    >>> prior_offsets(torch.tensor([100, 1]), [1.0])
    tensor([[4.6052e+00, 1.0000e-09]], dtype=torch.float64)
    """
    check_number("eps", eps, low=0.0)
    if class_counts.dim() != 1 or not class_counts.numel():
        raise ValueError(f"class_counts: expected [C], got shape {tuple(class_counts.shape)}")
    if readable(class_counts) and not bool((class_counts > 0).all()):
        raise ValueError(f"class_counts: expected counts > 0 of every class, got {class_counts.tolist()}")
    log_n = class_counts.double().log()
    a = torch.tensor([float(power) for power in powers], dtype=torch.float64, device=log_n.device).unsqueeze(1)
    return a * log_n + torch.log1p(eps * torch.exp(-a * log_n))


def diversity_loss(adjusted: Tensor, labels: Tensor) -> Tensor:
    """DL = sum over the experts of the mean cross-entropy; adjusted logits u [M, 2B, C], labels [B] (used for both views)."""
    experts = adjusted.shape[0]
    rows = labels.repeat(2 * experts)
    return experts * cross_entropy_loss(adjusted.flatten(0, 1), rows, ignore_index=None)


def consistency_loss(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """sum_m CS_m, and |K_m| [M]: each expert's weak view teaches its strong view where the weak one is right.

    Args: logits: [M, 2B, C], adjusted or raw. labels: [B]. temperature: softens both sides, times T^2 (the paper: 1).
    """
    weak, strong = logits.chunk(2, dim=1)  # [M, B, C]
    right = weak.argmax(-1) == labels  # ties: the first class
    count = right.sum(1)  # [M]
    weight = right / count.clamp_min(1).unsqueeze(1).to(compute_dtype(logits))
    loss = divergence_loss(
        strong, weak, temperature=temperature, scale_t2=True, mask=right, weight=weight, reduction="sum"
    )  # fmt: skip
    return loss, count


def consistency_weight(epoch: float, *, kd_weight: float = 0.6, ramp_epochs: float = 20) -> float:
    """w min(epoch / E, 1); epoch 0 gives 0, training starts with epoch 1.

    >>> [consistency_weight(epoch) for epoch in (0, 10, 400)]
    [0.0, 0.3, 0.6]
    """
    check_number("epoch", epoch, low=0.0)
    check_number("ramp_epochs", ramp_epochs, low=0.0, open_low=True)
    return kd_weight * min(epoch / ramp_epochs, 1.0)


def mdcs_loss(
    expert_logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    class_counts: Tensor,
    epoch: float,
    powers: Sequence[float] = POWERS,
    kd_weight: float = 0.6,
    ramp_epochs: float = 20,
    temperature: float = 1.0,
    eps: float = 1e-9,
    consistency_on: str = "adjusted",
) -> LossOutput:
    """DL + w min(epoch / E, 1) sum_m CS_m, the total of the module docstring.

    Args:
        expert_logits: [M, 2B, C], or a list of M tensors [2B, C]: weak views, then the strong views of the same images.
        labels: [B] integers in [0, C). class_counts: [C], the number of training images of each class, all > 0.
        epoch: from 1. powers: a, one for each expert. kd_weight: w. ramp_epochs: E.
    Returns:
        LossOutput(loss, {"diversity", "consistency", "num_confident_0", ...}): DL, sum CS_m without its weight, |K_m|.
    Raises:
        ValueError: an odd number of rows, or not twice the labels; counts of another length or not positive; a label outside
            [0, C); another number of powers than experts.

    >>> loss, parts = mdcs_loss(torch.stack(experts(both_views)), labels, class_counts=counts, epoch=1)
    """
    check_choice("consistency_on", consistency_on, ("adjusted", "raw"))
    check_number("kd_weight", kd_weight)
    v = expert_logits if isinstance(expert_logits, Tensor) else torch.stack(list(expert_logits))
    check_float_tensor("expert_logits", v)
    if v.dim() != 3 or v.shape[1] % 2:
        raise ValueError(f"expert_logits: expected [M, 2B, C], weak and strong views, got shape {tuple(v.shape)}")
    check_labels(labels, torch.Size((v.shape[1] // 2,)), v.device)
    if len(powers) != v.shape[0]:
        raise ValueError(f"powers: expected one for each of {v.shape[0]} experts, got {len(powers)}")
    offsets = prior_offsets(class_counts, powers, eps=eps)
    if offsets.shape[1] != v.shape[2]:
        raise ValueError(f"class_counts: expected {v.shape[2]} counts, one per class, got {offsets.shape[1]}")
    v = v.to(compute_dtype(v))
    u = v + offsets.to(v).unsqueeze(1)
    diversity = diversity_loss(u, labels)
    consistency, confident = consistency_loss(u if consistency_on == "adjusted" else v, labels, temperature=temperature)
    weight = consistency_weight(epoch, kd_weight=kd_weight, ramp_epochs=ramp_epochs)
    parts = {"diversity": diversity.detach(), "consistency": consistency.detach()}
    parts |= {f"num_confident_{m}": number for m, number in enumerate(confident.unbind())}
    return LossOutput(diversity + weight * consistency, parts)


# ---------------------------------------------------------------- the experts
class CosineClassifier(nn.Module):
    """logits_c = scale cos(feature, weight_c): no class wins by the length of its weights. features [..., D] -> [..., C]."""

    def __init__(self, in_features: int, classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(classes, in_features)), scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class MultiExpert(nn.Module):
    """M experts on a shared stem: [M, N, C] while training, their mean [N, C] in evaluation.

    Args: stem: maps the images to what all experts read. make_expert: called once for each expert.
    """

    def __init__(self, stem: nn.Module, make_expert: Callable[[], nn.Module], experts: int = 3) -> None:
        super().__init__()
        check_int("experts", experts, low=1)
        self.stem, self.experts = stem, nn.ModuleList(make_expert() for _ in range(experts))

    def forward(self, images: Tensor) -> Tensor:
        shared = self.stem(images)
        logits = torch.stack([expert(shared) for expert in self.experts])
        return logits if self.training else logits.mean(0)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The whole loss for a student that gives [M, 2B, C] while training, on batches {inputs [2B, ...], "labels" [B]}.

    The batch holds the weak views, then the strong ones (`kdfast.data.digit_tail.TwoViews`). No teacher. Class counts are taken from the
    training data before the first step and saved.

    Args:
        epochs: of the whole run, to turn steps into epochs: epoch = 1 + floor(step epochs / total_steps). Without a known number
            of steps (your own loop) the ramp is over. class_counts: [C] where the data should not be counted.
        Others: `mdcs_loss`.
    """

    uses_teacher = False

    def __init__(
        self, *, powers: Sequence[float] = POWERS, kd_weight: float = 0.6, epochs: int = 400, ramp_epochs: float = 20,
        temperature: float = 1.0, eps: float = 1e-9, consistency_on: str = "adjusted", class_counts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("consistency_on", consistency_on, ("adjusted", "raw"))
        consistency_weight(1, kd_weight=check_number("kd_weight", kd_weight), ramp_epochs=ramp_epochs)
        self.epochs = check_int("epochs", epochs, low=1)
        self.options: dict[str, Any] = {
            "powers": tuple(powers), "kd_weight": kd_weight, "ramp_epochs": ramp_epochs, "temperature": temperature, "eps": eps,
            "consistency_on": consistency_on,
        }  # fmt: skip
        self.class_counts: Tensor
        self.register_buffer("class_counts", torch.tensor(list(class_counts or []), dtype=torch.long))

    @staticmethod
    def students(
        *, classes: int, channels: int, epochs: int
    ) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
        """What to compare on small images: plain cross-entropy, one adjusted expert, three experts without and with consistency.

        All see both views of every image.
        """

        def small(powers: Sequence[float], **options: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
            return lambda: small_experts(channels, classes, len(powers)), {
                "powers": powers,
                "epochs": epochs,
                **options,
            }

        return {
            "ce": small((0.0,), kd_weight=0.0), "adjusted": small((1.0,), kd_weight=0.0),
            "diversity": small(POWERS, kd_weight=0.0), "mdcs": small(POWERS),
        }  # fmt: skip

    def start(self, setup: Setup) -> None:
        if setup.resumed or self.class_counts.numel():
            return
        counts: Any = 0
        for context in setup.sweep("train"):
            assert context.labels is not None
            counts = counts + context.labels.bincount(minlength=context.student.shape[-1])
        prior_offsets(counts, self.options["powers"])  # a class without an image is refused here
        self.class_counts = counts

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        epoch = 1 + epoch_at(context.step, context.total_steps, self.epochs, unknown=self.epochs)
        return mdcs_loss(context.student, context.labels, class_counts=self.class_counts, epoch=epoch, **self.options)


def small_experts(channels: int, classes: int, experts: int, width: int = 32) -> MultiExpert:
    """For images of some 8x8 pixels: a shared 3x3 convolution and pooling, experts of one more convolution and a classifier."""

    def expert() -> nn.Module:
        maps = (nn.Conv2d(16, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*maps, CosineClassifier(width, classes))

    return MultiExpert(
        nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), expert, experts
    )
