"""General knowledge transfer: a trained student learns from any other trained model what that one knows better, and forgets nothing.

Paper: Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer between Any Pretrained
Model. Roth, Thede, Koepke, Vinyals, Henaff, Akata; ICLR 2024; https://arxiv.org/abs/2310.17653
Based on: the authors' code, github.com/ExplainableML/FantasticGains at f756c18: main_distillation.py, main_multidist.py,
    distillation/contrastive, distillation/dist_utils.py.
Differs from the code: its cross-entropy takes softmax outputs for logits (`double_softmax=True` does so; with lambda = 1 it never
    matters); its slow weights begin as an alias of the live ones, so their true start is after the first step, here a real copy; the
    current student in flip_average is detached.
Symbols: z_s [B, C] student, trained before; z_t [B, C] teacher, perhaps weaker; z_0 [B, C] frozen copy of the student as it was;
    p = softmax at temperature 1; m_i whether the teacher teaches row i.

    most_confident               m_i = p_t[i, y_i] > p_0[i, y_i]                   a tie keeps the student
    most_confident_unsupervised  m_i = max_c p_t[i, c] > max_c p_0[i, c]
    flip_student, flip_teacher   m_i = positive, m_i = not negative                positive: teacher right, current student wrong
    flip_average                 positive z_t, negative z_0, neutral (z_t + z_s) / 2;  m = positive
    self, none                   m = 0, m = 1 (plain distillation, KL-Dist)

    z*_i = z_t[i] if m_i else z_0[i];   KL = T^2 / B sum_i KL(softmax(z*_i/T) || softmax(z_s,i/T))
    L = lambda KL + (1 - lambda) XE           lambda: 1 for KL-Dist and with partitioning (DP), 0.5 XE-KL, 0.68 XE-KL + MCL
    MCL: every N steps theta_slow <- tau theta_slow + (1 - tau) theta; theta_slow is the result

Several teachers: the most confident of [student, teachers...] teaches, the first of equals. One after the other: one run per
teacher; a soup: `kdfast.weights.average` of students taught by one each (`kdfast.train.transfer` does all three).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss, kd_loss
from kdfast.methods._protocol import Context, Setup, call_model
from kdfast.methods._protocol import Method as MethodBase
from kdfast.ops import relation_kl
from kdfast.weights import interpolate_

UNSUPERVISED = ("most_confident_unsupervised", "self", "none")
STRATEGIES = ("most_confident", "flip_student", "flip_teacher", "flip_average", *UNSUPERVISED)
FLIPS = ("positive", "negative", "neutral")


# ---------------------------------------------------------------- who teaches
class Flips(NamedTuple):
    """Where teacher and student disagree on the truth, bool [B]: teacher right alone, student right alone, the rest."""

    positive: Tensor
    negative: Tensor
    neutral: Tensor


def flip_masks(student: Tensor, teacher: Tensor, labels: Tensor) -> Flips:
    """Of logits [B, C] and labels [B]; the prediction is the first greatest logit."""
    right_s, right_t = (logits.argmax(-1) == labels for logits in (student, teacher))
    positive, negative = right_t & ~right_s, right_s & ~right_t
    return Flips(positive, negative, ~(positive | negative))


def select_teacher(teachers: Tensor, frozen: Tensor, labels: Tensor | None = None) -> Tensor:
    """The most confident of several: index into teachers [n, B, C], or -1 for the frozen student [B, C]; [B].

    Confidence is p[y] with labels [B], else max_c p. The first of equals wins, so the frozen student wins a tie.
    """
    every = torch.cat((frozen.unsqueeze(0), teachers))
    p = torch.softmax(every.to(compute_dtype(teachers, frozen)), -1)  # [1 + n, B, C]
    if labels is None:
        confidence = p.amax(-1)
    else:
        confidence = p.gather(-1, labels.long().expand(len(every), -1).unsqueeze(-1)).squeeze(-1)
    return confidence.argmax(0) - 1


def teacher_mask(
    student: Tensor, teacher: Tensor, frozen: Tensor, labels: Tensor | None = None, *, strategy: str = "most_confident"
) -> Tensor:
    """m [B] bool of the module docstring for one teacher; over all classes, whatever top_k the loss takes."""
    check_choice("strategy", strategy, STRATEGIES)
    if strategy in ("self", "none"):
        return torch.full(student.shape[:1], strategy == "none", device=student.device)
    if strategy.startswith("most_confident"):
        return select_teacher(teacher.unsqueeze(0), frozen, None if strategy in UNSUPERVISED else labels) >= 0
    assert labels is not None
    flips = flip_masks(student, teacher, labels)
    return ~flips.negative if strategy == "flip_teacher" else flips.positive


# ---------------------------------------------------------------- the loss
def data_partition_loss(
    student: Tensor, teacher: Tensor | Sequence[Tensor], frozen: Tensor, labels: Tensor | None = None, *,
    strategy: str = "most_confident", temperature: float = 1.0, top_k: int | None = None, ce_weight: float = 0.0,
    keep_flips: Sequence[str] = FLIPS, double_softmax: bool = False,
) -> LossOutput:  # fmt: skip
    """lambda KL + (1 - lambda) XE with lambda = 1 - ce_weight.

    Args:
        student, frozen: logits [B, C]. teacher: [B, C], or several teachers [n, B, C] or a list, for the two most_confident rules.
        labels: [B] integers in [0, C); needed by every rule but most_confident_unsupervised, self and none.
        top_k: the KL sees only the teacher's k greatest classes of each row, renormalised (C: all).
        keep_flips: rows of which kinds are distilled; the KL is a mean over them, 0 without any.
    Returns:
        LossOutput(loss, {"kd", "ce", "teacher_share"}): parts without weights, the share of rows that a teacher teaches.
    Raises:
        ValueError: other class counts, labels missing or outside [0, C), an empty batch, no teacher, T <= 0, k outside [1, C],
            ce_weight outside [0, 1], an unknown strategy; several teachers with another rule or top_k.

    >>> loss, parts = data_partition_loss(student(x), teacher(x), frozen(x), labels)
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_number("ce_weight", ce_weight, low=0.0, high=1.0)
    check_number("temperature", temperature, low=0.0, open_low=True)
    for flip in keep_flips:
        check_choice("keep_flips", flip, FLIPS)
    if not isinstance(teacher, Tensor):
        if not teacher:
            raise ValueError("teacher: expected at least one teacher, got none")
        teacher = torch.stack(list(teacher))
    _check(student, teacher, frozen, labels, strategy, ce_weight, tuple(keep_flips))
    teacher, frozen, current = teacher.detach(), frozen.detach(), student.detach()
    classes, valid = student.shape[1], None
    if labels is not None and not readable(labels):  # a wrong label must not address memory outside; the loss says NaN
        valid = ((labels >= 0) & (labels < classes)).all()
        labels = labels.clamp(0, classes - 1)
    if top_k is not None and not 1 <= check_int("top_k", top_k) <= classes:
        raise ValueError(f"top_k: expected 1 to {classes}, got {top_k}")
    keep = None
    if teacher.dim() == 3:
        if not strategy.startswith("most_confident") or top_k not in (None, classes) or len(keep_flips) < 3:
            raise ValueError("teacher: several teachers are for the most_confident rules on all rows and classes")
        chosen = select_teacher(teacher, frozen, None if strategy in UNSUPERVISED else labels)
        taught = chosen >= 0
        target = torch.cat((frozen.unsqueeze(0), teacher))[chosen + 1, torch.arange(len(chosen), device=chosen.device)]
    else:
        taught = teacher_mask(current, teacher, frozen, labels, strategy=strategy)
        target = torch.where(taught.unsqueeze(1), teacher, frozen)
        if strategy == "flip_average" or len(set(keep_flips)) < 3:
            assert labels is not None
            flips = flip_masks(current, teacher, labels)
            if strategy == "flip_average":
                target = torch.where(flips.neutral.unsqueeze(1), (teacher + current) / 2, target)
            if len(set(keep_flips)) < 3:
                keep = torch.stack([getattr(flips, flip) for flip in keep_flips] or [flips.neutral & False]).any(0)
        if top_k not in (None, classes):
            index = teacher.topk(top_k, -1).indices  # type: ignore[arg-type]
            target, student_k = target.gather(1, index), student.gather(1, index)
    narrow = student if teacher.dim() == 3 or top_k in (None, classes) else student_k
    kd = kd_loss(narrow, target, temperature=temperature, mask=keep)
    kd = kd if valid is None else torch.where(valid, kd, float("nan"))
    parts = {"kd": kd.detach(), "ce": torch.zeros_like(kd), "teacher_share": taught.to(kd.dtype).mean()}
    if ce_weight == 0:
        return LossOutput(kd, parts)
    assert labels is not None
    ce = cross_entropy_loss(torch.softmax(student, -1) if double_softmax else student, labels, ignore_index=None)
    return LossOutput((1 - ce_weight) * kd + ce_weight * ce, parts | {"ce": ce.detach()})


def _check(student, teacher, frozen, labels, strategy, ce_weight, keep_flips) -> None:
    check_float_tensor("student", student)
    if student.dim() != 2 or not student.shape[0]:
        raise ValueError(f"student: expected logits [B, C] of at least one row, got shape {tuple(student.shape)}")
    for name, tensor in (("teacher", teacher), ("frozen", frozen)):
        check_float_tensor(name, tensor)
        several = name == "teacher" and tensor.dim() == 3
        if tensor.shape != ((len(tensor), *student.shape) if several else student.shape):
            raise ValueError(f"{name}: expected the shape of student {tuple(student.shape)}, got {tuple(tensor.shape)}")
    if teacher.dim() == 3 and not len(teacher):
        raise ValueError("teacher: expected at least one teacher, got none")
    if labels is None:
        if strategy not in UNSUPERVISED or ce_weight != 0 or len(set(keep_flips)) < 3:
            raise ValueError(
                f"labels: needed with strategy={strategy!r}, ce_weight={ce_weight}, keep_flips={keep_flips}"
            )
        return
    check_labels(labels, student.shape[:1], student.device)
    low, high = (int(labels.min()), int(labels.max())) if readable(labels) else (0, 0)
    if not 0 <= low <= high < student.shape[1]:
        raise ValueError(f"labels: expected integers in [0, {student.shape[1]}), got {low} to {high}")


def contrastive_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The baseline sum_i KL(S_t[i] || S_s[i]) of features [B, Ds] and [B, Dt]: S = row softmax of all cosines of the batch.

    Total there: 0.1 XE + 10 times this.
    """
    return relation_kl(student, teacher.detach(), similarity="cosine", scale=1.0).sum()


# ---------------------------------------------------------------- what was transferred
def knowledge_gain_loss(before: Tensor, after: Tensor, labels: Tensor) -> tuple[float, float]:
    """Shares of the samples [N] whose prediction turned right, and turned wrong; their difference is the transfer delta.

    >>> knowledge_gain_loss(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]), torch.tensor([1, 1, 1]))
    (0.3333333333333333, 0.3333333333333333)
    """
    was, now = before == labels, after == labels
    total = max(1, labels.numel())
    return int((now & ~was).sum()) / total, int((was & ~now).sum()) / total


def complementary_knowledge(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Share of samples that the teacher predicts right and the student wrong; predictions and labels [N]."""
    return knowledge_gain_loss(student, teacher, labels)[0]


# ---------------------------------------------------------------- by name
class Teachers(nn.Module):
    """Several teachers as one: their logits [n, B, C]. Each model may normalise its input as it was trained to."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: expected at least one teacher, got none")
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return torch.stack([getattr(out, "logits", out) for out in (model(*inputs, **named) for model in self.models)])


class Method(MethodBase):
    """The transfer to a trained student: a frozen copy of it is taken before the first step and saved with the method.

    Args:
        mcl: every `every` steps a slow copy follows the student with `tau`; it is then the model to use (`deploy`).
        Others: `data_partition_loss`. The paper's MCL: tau 0.9999, every 2, top_k 100, ce_weight 0.32, strategy "none", keep_flips
            ("positive", "neutral").
    """

    starts_trained = True

    def __init__(
        self, *, strategy: str = "most_confident", temperature: float = 1.0, top_k: int | None = None, ce_weight: float = 0.0,
        keep_flips: Sequence[str] = FLIPS, double_softmax: bool = False, mcl: bool = False, tau: float = 0.9999, every: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("strategy", strategy, STRATEGIES)
        check_number("ce_weight", ce_weight, low=0.0, high=1.0)
        check_number("temperature", temperature, low=0.0, open_low=True)
        for flip in keep_flips:
            check_choice("keep_flips", flip, FLIPS)
        self.options: dict[str, Any] = {
            "strategy": strategy, "temperature": temperature, "top_k": top_k, "ce_weight": ce_weight, "keep_flips": tuple(keep_flips),
            "double_softmax": double_softmax,
        }  # fmt: skip
        self.mcl, self.tau = mcl, check_number("tau", tau, low=0.0, high=1.0)
        self.every = check_int("every", every, low=1)
        self.frozen: nn.Module
        self.slow: nn.Module | None = None
        self.run_model: Callable[[nn.Module, Any], Any] = call_model

    def adapt(self, student: nn.Module) -> nn.Module:
        self.frozen = copy.deepcopy(student).requires_grad_(False)
        self.slow = copy.deepcopy(student).requires_grad_(False) if self.mcl else None
        return student

    def start(self, setup: Setup) -> None:
        self.run_model = setup.forward
        if not setup.resumed:  # the student may have been loaded after the copy was made
            for copied in (self.frozen, self.slow):
                if copied is not None:
                    copied.load_state_dict(setup.student.state_dict())

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        for child in self.children():
            child.eval()
        return self

    def forward(self, context: Context) -> LossOutput:
        with torch.no_grad():
            frozen = self.run_model(self.frozen, context.batch)
        return data_partition_loss(context.student, context.teacher, frozen, context.labels, **self.options)

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        if self.slow is not None and step % self.every == 0:
            interpolate_(self.slow, student, self.tau)

    def deploy(self, setup: Setup) -> nn.Module:
        if self.slow is None:
            return setup.student
        model = copy.deepcopy(setup.student)  # it trains on with the next teacher; the slow copy takes no gradients
        model.load_state_dict(self.slow.state_dict())
        return model
