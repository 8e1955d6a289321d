"""TransKD: stage maps after a gated top-down fusion and patch embeddings after a linear map follow those of a larger transformer.

Paper: TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation. Liu et al.; 2022; IEEE T-ITS 2024;
https://arxiv.org/abs/2202.13393
Based on: the authors' code, github.com/RuipingL/TransKD at 39ab795: CSF, PEA and hcl in train/CSF.py, CSF_GLMixer.py, CSF_EA.py.
    The feature loss (hcl) and the fusion come from ReviewKD, the gate from selective-kernel networks.
Differs from the code: the two scalars of the GL mixer start at 1, there they are memory that nobody wrote; the teacher runs without
    a graph; any number of stages. A quirk kept as an option: a batch of one goes through a gate layer of its own, which no larger
    batch trains, because batch norm cannot normalise one value (gate_norm="batch"; "layer" and "none" are the same for any batch).
Symbols: stages i = 1..n (n = 4 in the paper) of student S and teacher T: F_i [B, C_i, h_i, w_i] normed outputs, E_i [B, N_i, C_i]
    patch embeddings that enter them, N_i = h_i w_i; z [B, K, h, w] logits, y labels, resized to z by nearest.

    CSF   a_i = BN(conv1x1 F^S_i),  r_n = a_n,  r_i = g_a a_i + g_b b_i,  b_i = nearest(r_{i+1}),  out_i = BN(conv3x3 r_i)
          s = mean over h, w of a_i + b_i;  v = relu(BN(W s));  (g_a, g_b) = softmax over the two of (U_a v, U_b v), per channel
    hcl   sum over stages of the mean squared error of (out_i, F^T_i) and, halving in weight, of both pooled to 4x4, 2x2, 1x1
    PEA   sum_i w_i mean (Ehat_i - E^T_i)^2,  Ehat_i = Linear_i(E^S_i)
    GL    stage n: E' = w_att attention(E) + w_conv conv(E) sigmoid(conv(E)) in front of Linear_n
    EA    Ehat_i = w_p Linear_i(E^S_i) + w_a PE_i(what enters stage i), PE_i a patch embedding of the teacher's width
    L = CE(z, y) + w_f hcl + PEA

Student and the modules above learn together, the teacher is frozen; no logits are distilled and the student needs no earlier training.
The paper: AdamW 6e-5, weight decay 0.01, rate linear to 0 over 1500 epochs of which 1000 are run (never 0), the best epoch on
validation data kept. Inference: the student alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, channel_wise_kd_loss, cross_entropy_loss
from kdfast.methods._best import SegmentationMethod
from kdfast.methods._protocol import Context
from kdfast.nn import OverlapPatchEmbedding, conv_block, query_attention

VARIANTS = ("base", "gl", "ea", "none")
FUSIONS = ("selective", "projected")
GATE_NORMS = ("batch", "layer", "none")
FEATURE_LOSSES = ("hcl", "cwd")
Maps = Sequence[Tensor]
PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride of SegFormer's patch embeddings


# ---------------------------------------------------------------- CSF
class SelectiveFusion(nn.Module):
    """One stage of CSF: (F_i [B, Cs, h, w], r_{i+1} or None) -> out_i [B, Ct, h, w] and r_i [B, mid, h, w], which goes on downward.

    Args: fuse: False for the last stage, which has nothing above and no gate. hidden: width of v, max(mid / 16, 32).
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, mid_channels: int = 64, *, fuse: bool = True, hidden: int | None = None,
        gate_norm: str = "batch",
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate_norm = check_choice("gate_norm", gate_norm, GATE_NORMS)
        self.reduce = _conv_norm(student_channels, mid_channels, 1)
        self.expand = _conv_norm(mid_channels, teacher_channels, 3)
        if fuse:
            hidden = max(mid_channels // 16, 32) if hidden is None else hidden
            if gate_norm != "none":
                self.gate = conv_block(mid_channels, hidden, kernel=1)
                if gate_norm == "layer":
                    self.gate[1] = nn.GroupNorm(1, hidden)  # of one position: a LayerNorm over the channels
            if gate_norm != "layer":  # under "batch" for batches of one
                self.gate_single = nn.Sequential(nn.Conv2d(mid_channels, hidden, 1, bias=False), nn.ReLU())
            self.heads = nn.ModuleList(nn.Conv2d(hidden, mid_channels, 1) for _ in range(2))

    def gates(self, both: Tensor) -> Tensor:
        """(g_a, g_b) [2, B, mid, 1, 1] of a + b; they add up to 1."""
        s = both.mean((2, 3), keepdim=True)
        single = self.gate_norm == "none" or (self.gate_norm == "batch" and len(s) == 1)
        v = (self.gate_single if single else self.gate)(s)
        return torch.softmax(torch.stack([head(v) for head in self.heads]), 0)

    def forward(self, maps: Tensor, above: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r = self.reduce(maps)
        if above is not None:
            b = F.interpolate(above, size=r.shape[2:], mode="nearest")
            g_a, g_b = self.gates(r + b)
            r = g_a * r + g_b * b
        return self.expand(r), r


def _conv_norm(before: int, after: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))


class CrossSelectiveFusion(nn.Module):
    """CSF over all stages: maps F^S_1..F^S_n -> out_1..out_n, of the teacher's widths."""

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], mid_channels: int = 64, *, gate_norm: str = "batch"
    ) -> None:  # fmt: skip
        super().__init__()
        pairs = _channel_pairs(student_channels, teacher_channels)
        self.stages = nn.ModuleList(
            SelectiveFusion(s, t, mid_channels, fuse=i + 1 < len(pairs), gate_norm=gate_norm) for i, (s, t) in enumerate(pairs)
        )  # fmt: skip

    def forward(self, maps: Maps) -> list[Tensor]:
        _check_stages("maps", maps, len(self.stages))
        outs: list[Tensor] = []
        above = None
        for stage, one in zip(reversed(self.stages), reversed(maps)):
            out, above = stage(one, above)
            outs.insert(0, out)
        return outs


class ProjectedMaps(nn.Module):
    """The plain form in place of CSF: a 1x1 convolution for each stage."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in _channel_pairs(student_channels, teacher_channels))

    def forward(self, maps: Maps) -> list[Tensor]:
        _check_stages("maps", maps, len(self.stages))
        return [stage(one) for stage, one in zip(self.stages, maps)]


def hierarchical_context_loss(student: Maps, teacher: Maps, *, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """hcl, the sum over stages of [m_0 + sum_k 2^-k m_{l_k}] / [1 + sum_k 2^-k], m_l = mean (pool_l(out) - pool_l(F^T))^2.

    m_0 is without pooling; k = 1, 2, .. counts the levels l that are below the map's height, the others are left out.

    Args: student: out_i [B, C, h, w] of each stage. teacher: F^T_i, the same shapes, constants. levels: heights to pool to.

    >>> loss = hierarchical_context_loss(fusion(student_maps), teacher_maps)
    """
    _check_stages("teacher", teacher, len(student))
    for level in levels:
        check_int("levels", level, low=1)
    return torch.stack([_stage_context(s, t, i, levels) for i, (s, t) in enumerate(zip(student, teacher))]).sum()


def _stage_context(student: Tensor, teacher: Tensor, stage: int, levels: Sequence[int]) -> Tensor:
    d = _difference(student, teacher, f"teacher[{stage}]")  # pooling is linear: the difference is pooled, once
    total, weight, weights, source = d.square().mean(), 1.0, 1.0, d
    for level in levels:
        if level >= d.shape[2]:
            continue
        weight /= 2
        # Bins that divide the ones before are means of them; others may overlap, and are cut from the map.
        nested = source.shape[2] % level == 0 == source.shape[3] % level
        pooled = F.adaptive_avg_pool2d(source if nested else d, level)
        source = pooled if nested else source
        total, weights = total + weight * pooled.square().mean(), weights + weight
    return total / weights


def _difference(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(student.shape)} as the student's after its module, got {tuple(teacher.shape)}"
        )
    dtype = compute_dtype(student, teacher)
    return student.to(dtype) - teacher.detach().to(dtype)


# ---------------------------------------------------------------- PEA, GL, EA
def embedding_errors(student: Maps, teacher: Maps) -> Tensor:
    """mean (Ehat_i - E^T_i)^2 of each stage [n]. Args: student: Ehat_i [B, N, C]. teacher: E^T_i, the same shapes, constants."""
    _check_stages("teacher", teacher, len(student))
    errors = (_difference(s, t, f"teacher[{i}]").square().mean() for i, (s, t) in enumerate(zip(student, teacher)))
    return torch.stack(list(errors))


def patch_embedding_loss(student: Maps, teacher: Maps, *, weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0)) -> Tensor:
    """sum_i w_i mean (Ehat_i - E^T_i)^2: `embedding_errors` weighted, one weight >= 0 for each stage."""
    errors = embedding_errors(student, teacher)
    return (errors * errors.new_tensor(_check_weights(weights, len(errors)))).sum()


class GlobalLocalMixer(nn.Module):
    """E' = w_att attention(E) + w_conv conv_a(E) sigmoid(conv_b(E)) (+ E with `add`): tokens [B, N, C] -> [B, N, C].

    The convolutions have kernel 3 and run along the tokens in row-major order. Heads are contiguous slices; qkv has no bias.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, add: bool = False) -> None:
        super().__init__()
        if dim % check_int("num_heads", num_heads, low=1):
            raise ValueError(f"num_heads: expected a divisor of the {dim} channels, got {num_heads}")
        self.num_heads, self.add = num_heads, add
        self.qkv, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.value, self.gate = nn.Conv1d(dim, dim, 3, padding=1), nn.Conv1d(dim, dim, 3, padding=1)
        self.weights = nn.Parameter(torch.ones(2))  # (w_att, w_conv)

    def forward(self, tokens: Tensor) -> Tensor:
        if readable(self.weights.detach()) and bool(self.weights.isnan().any()):
            raise ValueError(f"weights: expected numbers for w_att and w_conv, got {self.weights.tolist()}")
        attended = self.output(query_attention(*self.qkv(tokens).chunk(3, -1), num_heads=self.num_heads))
        local = (self.value(tokens.mT) * torch.sigmoid(self.gate(tokens.mT))).mT
        mixed = self.weights[0] * attended + self.weights[1] * local
        return mixed + tokens if self.add else mixed


class EmbeddingAssistant(nn.Module):
    """Ehat = w_p Linear(E^S) + w_a PE(what enters the stage), both weights learned; stage i = 1.. starts at 0.1 i and 0.1 (i + 4)."""

    def __init__(
        self, channels: int, student_channels: int, teacher_channels: int, *, stage: int = 1, kernel: int = 3, stride: int = 2
    ) -> None:  # fmt: skip
        super().__init__()
        self.linear = nn.Linear(student_channels, teacher_channels)
        self.embed = OverlapPatchEmbedding(channels, teacher_channels, kernel=kernel, stride=stride)
        self.weights = nn.Parameter(torch.tensor([0.1 * stage, 0.1 * (stage + 4)]))  # (w_p, w_a)

    def forward(self, tokens: Tensor, entering: Tensor) -> Tensor:
        projected, assisted = self.linear(tokens), self.embed(entering)[0]
        if projected.shape != assisted.shape:
            raise ValueError(
                f"patches: expected {tokens.shape[1]} tokens from the assistant as the student has, got {assisted.shape[1]}"
            )
        return self.weights[0] * projected + self.weights[1] * assisted


class TransKD(nn.Module):
    """What learns beside the student and is dropped after training: (F^S, E^S, image) -> (out_1..n, Ehat_1..n).

    Args:
        student_channels, teacher_channels: of each stage. variant: of the embeddings, "base" (PEA), "gl", "ea", or "none": Ehat is empty.
        fusion: "selective" (CSF) or "projected", a 1x1 convolution for each stage. mid_channels, gate_norm: `SelectiveFusion`.
        num_heads, add: `GlobalLocalMixer`. image_channels, patches: of "ea", (kernel, stride) for each stage as in the student.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, variant: str = "base", fusion: str = "selective",
        mid_channels: int = 64, gate_norm: str = "batch", num_heads: int = 8, add: bool = False, image_channels: int = 3,
        patches: Sequence[tuple[int, int]] = PATCHES,
    ) -> None:  # fmt: skip
        super().__init__()
        self.variant = check_choice("variant", variant, VARIANTS)
        pairs = _channel_pairs(student_channels, teacher_channels)
        if check_choice("fusion", fusion, FUSIONS) == "selective":
            self.fusion: nn.Module = CrossSelectiveFusion(
                student_channels, teacher_channels, mid_channels, gate_norm=gate_norm
            )
        else:
            self.fusion = ProjectedMaps(student_channels, teacher_channels)
        self.align = nn.ModuleList()
        if variant == "ea":
            if len(patches) != len(pairs):
                raise ValueError(f"patches: expected (kernel, stride) for each of {len(pairs)} stages, got {patches}")
            entering = (image_channels, *student_channels)
            self.align.extend(
                EmbeddingAssistant(channels, s, t, stage=i, kernel=kernel, stride=stride)
                for i, (channels, (s, t), (kernel, stride)) in enumerate(zip(entering, pairs, patches), 1)
            )
        elif variant != "none":
            self.align.extend(nn.Linear(s, t) for s, t in pairs)
        self.mixer = GlobalLocalMixer(student_channels[-1], num_heads, add=add) if variant == "gl" else None

    def forward(self, maps: Maps, embeddings: Maps, image: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        outs = self.fusion(maps)
        if not self.align:
            return outs, []
        _check_stages("embeddings", embeddings, len(self.align))
        if self.variant == "ea":
            if image is None:
                raise ValueError('image: expected the images [B, C, H, W] with variant="ea", got None')
            triples = zip(self.align, embeddings, (image, *maps))
            return outs, [align(tokens, entering) for align, tokens, entering in triples]
        tokens = list(embeddings)
        if self.mixer is not None:
            tokens[-1] = self.mixer(tokens[-1])
        return outs, [align(one) for align, one in zip(self.align, tokens)]


def _channel_pairs(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            f"teacher_channels: expected one for each stage as student_channels has ({len(student)}), got {len(teacher)}"
        )
    return list(zip(student, teacher))


def _check_stages(name: str, values: Sequence[Any], stages: int) -> None:
    if len(values) != stages or not stages:
        raise ValueError(f"{name}: expected {stages} stages, got {len(values)}")


def _check_weights(weights: Sequence[float], stages: int) -> list[float]:
    if len(weights) != stages:
        raise ValueError(f"embedding weights: expected one for each of {stages} stages, got {len(weights)}")
    return [check_number("embedding weights", weight, low=0.0) for weight in weights]


# ---------------------------------------------------------------- total
def nearest_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels [B, H, W] at another size: of row p the source is floor(p H / h), of columns alike."""
    rows, columns = (
        torch.arange(new, device=labels.device) * old // new for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]


def transkd_loss(
    student: Tensor, labels: Tensor, maps: tuple[Maps, Maps], embeddings: tuple[Maps, Maps] = ((), ()), *,
    feature_weight: float = 1.0, embedding_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0), feature_loss: str = "hcl",
    levels: Sequence[int] = (4, 2, 1), temperature: float = 1.0, class_weights: Tensor | None = None, ignore_index: int = 255,
) -> LossOutput:  # fmt: skip
    """CE(z, y) + w_f hcl + sum_i w_i mean (Ehat_i - E^T_i)^2.

    Args:
        student: z [B, K, h, w]. labels: [B, H, W] integers in [0, K) or `ignore_index`, resized to z by nearest.
        maps: (out_1..n, F^T_1..n). embeddings: (Ehat_1..n, E^T_1..n); two empty sequences leave the term out.
        feature_loss: "hcl", or "cwd": `kdfast.losses.channel_wise_kd_loss` at `temperature`, summed over stages.
        class_weights: [K]; CE is then the mean weighted by them, as in F.cross_entropy. The paper's ignored class K - 1 has weight 0.
    Returns:
        LossOutput(loss, {"ce", "feature", "embedding"}), without the weight w_f, with the weights w_i.
    """
    check_number("feature_weight", feature_weight, low=0.0)
    labels = nearest_labels(labels, student.shape[2:])
    if check_choice("feature_loss", feature_loss, FEATURE_LOSSES) == "hcl":
        feature = hierarchical_context_loss(*maps, levels=levels)
    else:
        _check_stages("teacher", maps[1], len(maps[0]))
        feature = torch.stack([channel_wise_kd_loss(s, t, temperature=temperature) for s, t in zip(*maps)]).sum()
    terms = {
        "ce": (1.0, _weighted_ce(student, labels, class_weights, ignore_index)),
        "feature": (feature_weight, feature),
    }
    if len(embeddings[0]) or len(embeddings[1]):
        terms["embedding"] = (1.0, patch_embedding_loss(*embeddings, weights=embedding_weights))
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return LossOutput(loss, {name: term.detach() for name, (_, term) in terms.items()})


def _weighted_ce(logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    if weights is None:
        return cross_entropy_loss(logits, labels, ignore_index=ignore_index, dim=1)
    if weights.shape != logits.shape[1:2]:
        raise ValueError(f"class_weights: expected [{logits.shape[1]}], one for each class, got {tuple(weights.shape)}")
    keep = labels.long() != ignore_index
    rows = torch.where(
        keep, weights.to(logits.device, compute_dtype(logits))[torch.where(keep, labels.long(), 0)], 0.0
    )  # [B, h, w]
    total = cross_entropy_loss(logits, labels, ignore_index=ignore_index, weight=rows, reduction="sum", dim=1)
    return total / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)


# ---------------------------------------------------------------- by name
class Method(SegmentationMethod):
    """Reads "pyramid" of both networks: what a submodule returns as (maps F_1..n, embeddings E_1..n), see `kdfast.nn.Pyramid`.

    Variant "ea" reads the images as well: batches are then (images, labels, ...).

    Args:
        widths: {"pyramid": (the student's channels of each stage, the teacher's)}. keep: the best epoch on validation data, or "last".
        Others: `TransKD`, `transkd_loss`.
    """

    captures = ("pyramid",)

    def __init__(
        self, widths: Mapping[str, tuple[Any, Any]], *, num_classes: int, variant: str = "base", fusion: str = "selective",
        mid_channels: int = 64, gate_norm: str = "batch", num_heads: int = 8, add: bool = False, image_channels: int = 3,
        patches: Sequence[tuple[int, int]] = PATCHES, feature_weight: float = 1.0,
        embedding_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0), feature_loss: str = "hcl", levels: Sequence[int] = (4, 2, 1),
        temperature: float = 1.0, class_weights: Sequence[float] | None = None, ignore_index: int = 255, keep: str = "best",
    ) -> None:  # fmt: skip
        super().__init__(num_classes=num_classes, ignore_index=ignore_index, keep=keep)
        self.modules_beside = TransKD(
            *widths["pyramid"], variant=variant, fusion=fusion, mid_channels=mid_channels, gate_norm=gate_norm, num_heads=num_heads,
            add=add, image_channels=image_channels, patches=patches,
        )  # fmt: skip
        if variant != "none":
            _check_weights(embedding_weights, len(widths["pyramid"][0]))
        self.options: dict[str, Any] = {
            "feature_weight": check_number("feature_weight", feature_weight, low=0.0), "embedding_weights": tuple(embedding_weights),
            "feature_loss": check_choice("feature_loss", feature_loss, FEATURE_LOSSES), "levels": tuple(levels),
            "temperature": check_number("temperature", temperature, low=0.0, open_low=True), "ignore_index": ignore_index,
        }  # fmt: skip
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        (maps, embeddings), teacher = context.student_features["pyramid"], context.teacher_features["pyramid"]
        image = context.batch[0] if self.modules_beside.variant == "ea" else None
        outs, aligned = self.modules_beside(maps, embeddings, image)
        return transkd_loss(
            context.student, context.labels, (outs, teacher[0]), (aligned, teacher[1] if aligned else ()),
            class_weights=self.class_weights, **self.options,
        )  # fmt: skip
