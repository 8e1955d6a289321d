"""CNN-ViT collaborative learning: two segmentation students teach each other, low features both ways, the rest where one is better.

Paper: A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation.
    Zhu, Luo, Zheng, Wang, Wang; ICCV 2023; https://arxiv.org/abs/2307.12574
Based on: the abstract; no public code was found, and the paper's equations were not at hand. Certain are: a CNN and a ViT trained
    together from scratch, heterogeneous feature distillation (HFD) of low layers in both directions, bidirectional selective
    distillation (BSD) region-wise in the feature space and pixel-wise in the logit space, from the more reliable student.
    Reconstructed in the plainest form that fits, and therefore arguments: (a) `reliability`: label cross-entropy, or entropy;
    (b) `distance` of regions, their shape and their mean; (c) `temperature` and `normalizer` of the pixel term; (d) the weights;
    (e) HFD: 1x1 projection, mean squared error, and `alignment` of sizes.
Symbols: a = CNN, b = ViT; logits [B, K, H, W] at label resolution; low features [B, Ca, ha, wa] and [B, Cb, hb, wb]; high features
    [B, C, h, w] of one shape; V = pixels whose label is not `ignore_index`; sg() = stop-gradient.

    L(a) = CE(a) + w_hfd HFD(a) + w_region REG(a) + w_pixel PIX(a),   L(b) alike,   loss = L(a) + L(b)

One backward of the sum is exact for both students because every teaching side is under sg(). A single student is used alone later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput, cross_entropy_loss, region_selection
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.ops.selective import selective_total

ALIGNMENTS = ("bilinear", "pool")
Projection = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- heterogeneous feature distillation
def hfd_loss(
    low_a: Tensor, low_b: Tensor, project_a: Projection, project_b: Projection, *, alignment: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """HFD(a) = mean (R(project_a(low_a)) - sg(low_b))^2 and HFD(b) mirrored: each mimics the other's architecture.

    Args:
        low_a [B, Ca, ha, wa], low_b [B, Cb, hb, wb]: first-stage features. project_a: Ca -> Cb, project_b: Cb -> Ca, 1x1
            convolutions in the paper's place.
        alignment: of sizes that differ. "bilinear": R resizes the projection to the target's size (align_corners=False);
            "pool": R averages both to the smaller height and width.

    >>> to_a, to_b = hfd_loss(low_a, low_b, nn.Conv2d(24, 64, 1), nn.Conv2d(64, 24, 1))
    """
    check_choice("alignment", alignment, ALIGNMENTS)
    return _mimic(project_a(low_a), low_b, alignment), _mimic(project_b(low_b), low_a, alignment)


def _mimic(student: Tensor, teacher: Tensor, alignment: str) -> Tensor:
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"project: expected {teacher.shape[1]} channels as the other student has, got {student.shape[1]}"
        )
    if student.shape[2:] != teacher.shape[2:]:
        if alignment == "bilinear":
            student = _resize(student, teacher.shape[2:])
        else:
            size: Any = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:])]
            student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return F.mse_loss(student, teacher)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if maps.shape[2:] == torch.Size(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- totals
def cnn_vit_bsd_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    low: tuple[Tensor, Tensor] | None = None,
    high: tuple[Tensor, Tensor] | None = None,
    projections: tuple[Projection, Projection] | None = None,
    w_hfd: float = 1.0,
    w_region: float = 1.0,
    w_pixel: float = 1.0,
    temperature: float = 1.0,
    normalizer: str = "valid",
    reliability: str = "label",
    grid: Sequence[int] = (4, 4),
    distance: str = "cosine",
    alignment: str = "bilinear",
    ignore_index: int = 255,
    backend: str | None = None,
) -> LossOutput:
    """L(a) + L(b) of the module docstring.

    Args:
        logits_a, logits_b: [B, K, H, W]. labels: [B, H, W] integers in [0, K) or `ignore_index`.
        low: (low_a, low_b) with projections (project_a, project_b) for HFD; None leaves HFD out. high: (high_a, high_b) of one
            shape for the region term; None leaves it out.
        Others: `hfd_loss`, `kdfast.losses.region_selective_loss`, `kdfast.losses.selective_kd_loss` (T^2 included).
    Returns:
        LossOutput(loss, parts): loss_a, loss_b (the totals per student), ce_a, ce_b, pixel_a, pixel_b, region_a, region_b, hfd_a,
        hfd_b where present, and the pixel counts num_valid, num_to_a, num_to_b.

    >>> loss, parts = cnn_vit_bsd_loss(za, zb, labels, high=(fa, fb), grid=(2, 2))
    """
    for name, value in (("w_hfd", w_hfd), ("w_region", w_region), ("w_pixel", w_pixel)):
        check_number(name, value)
    check_number("temperature", temperature, low=0.0, open_low=True)
    if low is not None and projections is None:
        raise ValueError("projections: expected (project_a, project_b) with low features, got None")
    # One pass gives the pixel term and the reliability maps that the region term pools.
    pixel = selective_total(
        logits_a, logits_b, labels, temperature=temperature, ignore_index=ignore_index, normalizer=normalizer,
        reliability=reliability, factor=temperature**2, backend=backend,
    )  # fmt: skip
    terms = {
        "ce": (
            1.0,
            [
                cross_entropy_loss(z, labels, mask=pixel.valid, ignore_index=ignore_index, dim=1)
                for z in (logits_a, logits_b)
            ],
        ),
        "pixel": (w_pixel, [pixel.loss_to_a, pixel.loss_to_b]),
    }
    if high is not None:
        region = region_selection(
            *high, pixel.reliability_a, pixel.reliability_b, pixel.valid, grid=grid, distance=distance
        )
        terms["region"] = (w_region, [region.loss_to_a, region.loss_to_b])
    if low is not None and projections is not None:
        terms["hfd"] = (w_hfd, list(hfd_loss(*low, *projections, alignment=alignment)))
    loss_a, loss_b = (torch.stack([weight * pair[side] for weight, pair in terms.values()]).sum() for side in (0, 1))
    parts = {f"{name}_{side}": value for name, (_, pair) in terms.items() for side, value in zip("ab", pair)}
    parts |= {"loss_a": loss_a, "loss_b": loss_b}
    counts = {"num_valid": pixel.num_valid, "num_to_a": pixel.num_to_a, "num_to_b": pixel.num_to_b}
    return LossOutput(loss_a + loss_b, {name: part.detach() for name, part in parts.items()} | counts)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Both students in one step: the student is a (the CNN), the second network b (the ViT), and both learn.

    Reads the features "low" and "high" [B, C, h, w] of both. Owns the 1x1 projections of HFD and, where the two high widths
    differ, one 1x1 projection per student to the smaller width; b's high map is resized to a's. Logits of another size than
    the labels are resized bilinearly.

    Args:
        widths: {"low": (Ca, Cb), "high": (Ca, Cb)}. warmup_steps: steps in which the three weights grow from 0 (not in the
            paper). Others: `cnn_vit_bsd_loss`.
    """

    captures = ("low", "high")
    trains_teacher = True

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        w_hfd: float = 1.0,
        w_region: float = 1.0,
        w_pixel: float = 1.0,
        temperature: float = 1.0,
        normalizer: str = "valid",
        reliability: str = "label",
        grid: Sequence[int] = (4, 4),
        distance: str = "cosine",
        alignment: str = "bilinear",
        ignore_index: int = 255,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.weights: dict[str, Any] = {"w_hfd": w_hfd, "w_region": w_region, "w_pixel": w_pixel}
        self.options: dict[str, Any] = {
            "temperature": temperature, "normalizer": normalizer, "reliability": reliability, "grid": tuple(grid),
            "distance": distance, "alignment": alignment, "ignore_index": ignore_index,
        }  # fmt: skip
        self.warmup_steps = check_int("warmup_steps", warmup_steps)
        low_a, low_b = widths["low"]
        self.low_projections = nn.ModuleList([nn.Conv2d(low_a, low_b, 1), nn.Conv2d(low_b, low_a, 1)])
        high = widths["high"]
        same = high[0] == high[1]
        self.high_projections = nn.ModuleList(nn.Identity() if same else nn.Conv2d(c, min(high), 1) for c in high)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        size = context.labels.shape[1:]
        features = context.student_features, context.teacher_features
        high_a, high_b = (project(f["high"]) for project, f in zip(self.high_projections, features))
        ramp = min(1.0, context.step / self.warmup_steps) if self.warmup_steps else 1.0
        scaled: dict[str, Any] = {name: ramp * weight for name, weight in self.weights.items()}
        return cnn_vit_bsd_loss(
            _resize(context.student, size), _resize(context.teacher, size), context.labels,
            low=(features[0]["low"], features[1]["low"]), high=(high_a, _resize(high_b, high_a.shape[2:])),
            projections=(self.low_projections[0], self.low_projections[1]),
            **scaled, **self.options,
        )  # fmt: skip
