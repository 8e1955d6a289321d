"""TRG: tokens of all images of a batch are nodes of one graph, and the student copies who is near whom.

Paper: Knowledge Distillation via Token-level Relationship Graph. Zhang, Liu, He; 2023;
https://arxiv.org/abs/2306.12442
Based on: a published digest of the paper that prints the graph and the four losses; no public code was found.
Printed there: the k-nearest-neighbour Gaussian graph, KL of its row softmaxes with the student first, InfoNCE over a linear
    projection of the student's tokens, mean squared error of within-image softmax similarities, the weighted total, uniform
    random token sampling, a temperature that starts high and falls.
Reconstructed, and therefore arguments: `orientation` of the graph, self excluded, ties to the lower index; `direction` and
    `reduction`; `similarity` (cosine); the token layer; the form, start and end of the temperature schedule; k, r, sigma and
    the weights, whose values were not known.
Differs from the paper: the logit term is teacher-first KL, the customary form (the paper prints student first: kd_kind=
    "reverse_kl"); local-graph tokens are L2-normalised, since raw distances underflow the graph (normalize=False: as printed);
    sampler="score" is an extra.
Symbols: F^S [B, M, Ds], F^T [B, M, Dt] tokens in one order; index [B, r] sampled positions; n = B r nodes; W [Dt, Ds], b [Dt].

    loss = L_logit + alpha L_inner + beta L_local + gamma L_global
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int, check_number
from kdfast._library import readable
from kdfast.losses import LossOutput, distillation_loss, token_context_loss, token_contrast_loss, token_graph_loss
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn.tokens import align_maps, tokenize_feature_map, tokens_to_map

SCHEDULES = ("cosine", "linear")
SAMPLERS = ("uniform", "score", "top")


# ---------------------------------------------------------------- sampling and schedule
def tau_at(
    step: int | None, total_steps: int, *, start: float = 0.5, end: float = 0.1, schedule: str = "cosine"
) -> float:
    """tau(e) = end + (start - end) (1 + cos(pi e / E)) / 2, or linear; e is kept in [0, E]. step=None or E=0 mean the end.

    >>> [round(tau_at(step, 4), 3) for step in (0, 2, 4, 9)]
    [0.5, 0.3, 0.1, 0.1]
    """
    check_choice("schedule", schedule, SCHEDULES)
    if step is None or total_steps <= 0:
        return end
    share = min(max(step / total_steps, 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - share
    return end + (start - end) * left


def sample_tokens(
    tokens: Tensor,
    count: int,
    *,
    sampler: str = "uniform",
    score: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions [B, count] drawn without replacement for each image of tokens [B, M, D].

    Args:
        sampler: "uniform" (the paper), "score" (drawn in proportion to the score) or "top" (the highest scores).
        score: [B, M] >= 0, for instance attention of the class token; default the tokens' norms.

    >>> index = sample_tokens(torch.randn(4, 49, 64), 16)
    """
    check_choice("sampler", sampler, SAMPLERS)
    images, per_image = tokens.shape[:2]
    if not 1 <= check_int("count", count) <= per_image:
        raise ValueError(f"count: expected 1 to {per_image} tokens per image, got {count}")
    if sampler == "uniform":
        keys = torch.rand(images, per_image, device=tokens.device, generator=generator)
        return keys.topk(count, dim=1).indices
    score = tokens.detach().float().norm(dim=-1) if score is None else score.detach().float()
    if score.shape != tokens.shape[:2]:
        raise ValueError(f"score: expected shape {tuple(tokens.shape[:2])}, got {tuple(score.shape)}")
    if sampler == "top":
        return score.topk(count, dim=1).indices
    return torch.multinomial(score.clamp_min(1e-12), count, generator=generator)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, M, D], index [B, r] -> nodes [B r, D], image-major. Positions are checked on the CPU."""
    if index.dim() != 2 or index.shape[0] != tokens.shape[0]:
        raise ValueError(f"index: expected [B, r] with B = {tokens.shape[0]}, got {tuple(index.shape)}")
    if readable(index) and index.numel():
        ordered = index.sort(1).values
        if ordered[:, 0].min() < 0 or ordered[:, -1].max() >= tokens.shape[1]:
            raise ValueError(
                f"index: expected positions in [0, {tokens.shape[1]}), got {int(index.min())} to {int(index.max())}"
            )
        if bool((ordered.diff(dim=1) == 0).any()):
            raise ValueError("index: expected each position once per image, got a repeated one")
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2])).flatten(0, 1)


# ---------------------------------------------------------------- the three relation terms, and the total
def trg_relations(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    index: Tensor,
    k: int = 8,
    sigma: float = 1.0,
    tau: float = 0.1,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    orientation: str = "row",
    direction: str = "student_teacher",
    normalize: bool = True,
    similarity: str = "cosine",
    reduction: str = "mean",
    backend: str | None = None,
) -> LossOutput:
    """alpha L_inner + beta L_local + gamma L_global: the total without logits.

    Args:
        student_tokens: [B, M, Ds], teacher_tokens: [B, M, Dt], the same positions; the teacher's are constants.
        project: Ds -> Dt, the learned linear projection of the global term.
        index: [B, r], the sampled positions of the local and global terms; the contextual term takes all tokens.
        reduction: of the local and global terms over the B r nodes: "mean" or "sum" (as printed).
        Others: `kdfast.losses.token_graph_loss`, `token_contrast_loss`, `token_context_loss`. A term of weight 0 is left out.
    Returns:
        LossOutput(loss, {"inner", "local", "global"}), the parts unweighted.

    >>> out = trg_relations(s, t, nn.Linear(64, 128), index=sample_tokens(t, 16))
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_number(name, value)
    if student_tokens.dim() != 3 or student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            f"teacher_tokens: expected [B, M, D] with the B and M of the student, got {tuple(student_tokens.shape)} and {tuple(teacher_tokens.shape)}"
        )
    terms: dict[str, tuple[float, Tensor]] = {}
    if alpha != 0:
        terms["inner"] = alpha, token_context_loss(student_tokens, teacher_tokens, backend=backend)
    if beta != 0 or gamma != 0:
        s, t = gather_tokens(student_tokens, index), gather_tokens(teacher_tokens, index)
        if beta != 0:
            terms["local"] = beta, token_graph_loss(
                s, t, k=k, sigma=sigma, orientation=orientation, direction=direction, normalize=normalize,
                reduction=reduction, backend=backend,
            )  # fmt: skip
        if gamma != 0:
            terms["global"] = (
                gamma,
                token_contrast_loss(
                    project(s), t, tau=tau, similarity=similarity, reduction=reduction, backend=backend
                ),
            )
    loss = sum((weight * term for weight, term in terms.values()), start=student_tokens.new_zeros(()))
    return LossOutput(loss, {name: term.detach() for name, (_, term) in terms.items()})


def trg_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    index: Tensor,
    kd_temperature: float = 4.0,
    kd_weight: float = 1.0,
    kd_kind: str = "forward_kl",
    ignore_index: int = -100,
    **relations,
) -> LossOutput:
    """L_logit + alpha L_inner + beta L_local + gamma L_global, L_logit = CE + kd_weight T^2 KL, batch means.

    Args:
        student, teacher: logits [B, C]. labels: [B] integers or `ignore_index`.
        kd_kind: "forward_kl" is KL(teacher || student); "reverse_kl" is the printed student-first form.
        student_tokens, teacher_tokens, project, index, relations: as in `trg_relations`.
    Returns:
        LossOutput(loss, {"ce", "kd", "inner", "local", "global"}); kd carries T^2.

    >>> loss, parts = trg_loss(zs, zt, labels, s, t, nn.Linear(64, 128), index=sample_tokens(t, 16))
    """
    logit = distillation_loss(
        student, teacher, labels, kind=kd_kind, temperature=kd_temperature, ce_weight=1.0, kd_weight=kd_weight,
        ignore_index=ignore_index,
    )  # fmt: skip
    tokens = trg_relations(student_tokens, teacher_tokens, project, index=index, **relations)
    return LossOutput(logit.loss + tokens.loss, logit.parts | tokens.parts)


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """All four terms with the learned projection, sampling and schedule; reads one feature of both models, "tokens".

    The feature is a CNN's map [B, C, h, w] or a ViT's sequence [B, L, D]. Both are brought to one grid (the larger is
    average-pooled), then cut into patches of `patch` x `patch`. Positions are drawn anew in each step, the same for both.

    Args:
        widths: {"tokens": (student channels, teacher channels)}.
        grid: average-pool both maps to grid x grid first; 1 leaves one node per image, relations between instances.
        samples: tokens per image, at most all of them. class_tokens: (student, teacher) leading tokens of a ViT to drop.
        tau_start, tau_end, schedule, total_steps: `tau_at`; total_steps=None takes the run's length.
        Others: `trg_loss`.
    """

    captures = ("tokens",)

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        k: int = 8,
        samples: int = 16,
        sigma: float = 1.0,
        tau_start: float = 0.5,
        tau_end: float = 0.1,
        schedule: str = "cosine",
        total_steps: int | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        kd_temperature: float = 4.0,
        kd_weight: float = 1.0,
        kd_kind: str = "forward_kl",
        orientation: str = "row",
        direction: str = "student_teacher",
        normalize: bool = True,
        similarity: str = "cosine",
        reduction: str = "mean",
        sampler: str = "uniform",
        patch: int = 1,
        grid: int | None = None,
        class_tokens: tuple[int, int] = (1, 1),
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("schedule", schedule, SCHEDULES)
        self.samples = check_int("samples", samples, low=1)
        self.patch = check_int("patch", patch, low=1)
        self.grid = grid if grid is None else check_int("grid", grid, low=1)
        self.sampler, self.class_tokens = sampler, class_tokens
        self.tau: dict[str, Any] = {"start": tau_start, "end": tau_end, "schedule": schedule}
        for name in ("start", "end"):
            check_number(f"tau_{name}", self.tau[name], low=0.0, open_low=True)
        self.total_steps = total_steps
        self.options: dict[str, Any] = {
            "k": k, "sigma": sigma, "alpha": alpha, "beta": beta, "gamma": gamma, "orientation": orientation,
            "direction": direction, "normalize": normalize, "similarity": similarity, "reduction": reduction,
            "kd_temperature": kd_temperature, "kd_weight": kd_weight, "kd_kind": kd_kind, "ignore_index": ignore_index,
        }  # fmt: skip
        student_width, teacher_width = (width * patch * patch for width in widths["tokens"])
        self.project = nn.Linear(student_width, teacher_width)

    def tokens(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features as tokens [B, M, D] of one grid."""
        maps = (
            feature if feature.dim() == 4 else tokens_to_map(feature, dropped)
            for feature, dropped in zip((student, teacher), self.class_tokens)
        )
        s, t = align_maps(*maps)
        if self.grid is not None:
            s, t = F.adaptive_avg_pool2d(s, self.grid), F.adaptive_avg_pool2d(t, self.grid)
        return tokenize_feature_map(s, self.patch), tokenize_feature_map(t, self.patch)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        s, t = self.tokens(context.student_features["tokens"], context.teacher_features["tokens"])
        index = sample_tokens(t, min(self.samples, t.shape[1]), sampler=self.sampler)
        tau = tau_at(context.step, self.total_steps or context.total_steps, **self.tau)
        return trg_loss(
            context.student, context.teacher, context.labels, s, t, self.project, index=index, tau=tau, **self.options
        )
