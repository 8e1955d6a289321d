"""One distillation loss for two causal language models: hidden states and heads instead of logits.

The model runs as it is, in its wrapper (DDP, FSDP); only the call of its output layer is cut to no rows, and the hidden states that
the call was given go to `linear_distillation_loss` with the layer's weight. What the model does to its logits afterwards (Gemma's
soft cap, the factors of Cohere, Granite and others) is taken from its config and confirmed once, on the logits of a few rows that
the model makes itself. A model that cannot be read so is used through its logits, and the reason is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.losses import LossOutput, cross_entropy_loss, distillation_loss, linear_distillation_loss, sparse_kd_loss
from kdfast.nn.causal_lm import Reader, States
from kdfast.ops.divergence import _check_kind
from kdfast.ops.linear_divergence import head_logits
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher

IGNORE = -100
# Inputs of a batch that are not the models'.
TARGETS = ("labels", "shift_labels", "row_id", "on_policy")


# ---------------------------------------------------------------- labels
def next_labels(batch: Mapping[str, Any]) -> Tensor:
    """[B, L]: the label of the token after each one, -100 where nothing is to be predicted.

    That is: at the end of a row, where the next label is -100, after a padding token (on either side), and before the first token
    of a packed document (where `position_ids` start again). A batch with `shift_labels` has them already.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("labels") is None:
        raise ValueError(
            f"batch: expected labels (input_ids, -100 where nothing is learned), got only {', '.join(batch) or 'nothing'}"
        )
    labels = batch["labels"]
    labels = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), 1)
    mask, position = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE)
    if position is not None and position.shape == labels.shape:
        starts = torch.cat((position[:, 1:] == 0, torch.zeros_like(position[:, :1], dtype=torch.bool)), 1)
        labels = labels.masked_fill(starts, IGNORE)
    return labels


# ---------------------------------------------------------------- wrappers
def through(wrapper: nn.Module, model: nn.Module, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """function(forward of the model, inputs), called inside the forward of the model's wrapper.

    There DDP prepares its backward, and FSDP has the root's parameters, so that a loss may use the head's weight.
    """
    if wrapper is model and not _is_fsdp(model):
        return function(model, inputs)
    own, forward = model.__dict__.get("forward"), model.forward  # its own: accelerate puts autocast there

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own

    def redirected(**inputs: Any) -> Any:
        restore()
        return function(forward, inputs)

    model.forward = redirected
    try:
        return wrapper(**inputs)
    finally:
        restore()


def _is_fsdp(model: nn.Module) -> bool:
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(model).__mro__)


# ---------------------------------------------------------------- the loss
class CausalLMLoss:
    """ce_weight CE + kd_weight T^2 D of two causal language models on one batch, from hidden states and heads.

    Args:
        kind, beta, temperature, ce_weight, kd_weight, scale_t2, vocab_size, chunk_rows: as in `linear_distillation_loss`.
        use_logits: take the logits of both models (the reference for what is done here, and slower).

    One object serves one student and one teacher: it remembers how their heads are read.

    >>> criterion = CausalLMLoss(kind="js", temperature=2.0)
    >>> loss, parts = criterion(student, teacher, batch)        # a batch of input_ids, attention_mask and labels
    """

    def __init__(
        self,
        *,
        kind: str = "forward_kl",
        beta: float | tuple[float, float] = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        scale_t2: bool = True,
        vocab_size: int | None = None,
        chunk_rows: int | None = None,
        use_logits: bool = False,
    ) -> None:
        _check_kind(kind, beta)  # before models are run
        self.options: dict[str, Any] = {
            "kind": kind, "beta": beta, "temperature": temperature, "scale_t2": scale_t2, "vocab_size": vocab_size,
        }  # fmt: skip
        self.ce_weight, self.kd_weight, self.chunk_rows = ce_weight, kd_weight, chunk_rows
        self.readers = {name: Reader(name, use_logits) for name in ("student", "teacher")}

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module | Tensor | TopKTeacher | SampledTeacher,
        batch: Mapping[str, Any],
        *,
        reduction: str = "mean",
        wrapper: nn.Module | None = None,
    ) -> LossOutput:
        """The loss of a batch: input_ids, labels (not shifted) and what else the models take.

        Args:
            teacher: a model, run in eval mode without gradient; or what is known of it beside each token [B, L]: logits, a
                TopKTeacher or a SampledTeacher.
            reduction: "mean" over the kept tokens (`next_labels`), "sum", or "none": rows [B, L].
            wrapper: the student in DDP or FSDP, if it is.
        Returns:
            LossOutput(loss, {"ce", "kd"}), as `linear_distillation_loss`.
        """
        labels, inputs = next_labels(batch), model_inputs(batch)
        known = self.teach(teacher, inputs) if isinstance(teacher, nn.Module) else teacher

        def run(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> LossOutput:
            return self.compare(self.readers["student"](student, inputs, forward), known, labels, reduction=reduction)

        return through(student if wrapper is None else wrapper, student, run, inputs)

    @torch.no_grad()
    def teach(self, teacher: nn.Module, inputs: Mapping[str, Any], wrapper: nn.Module | None = None) -> States:
        """The teacher's side of a batch."""
        if teacher.training:
            teacher.eval()
        wrapper = teacher if wrapper is None else wrapper

        def run(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> States:
            rows, head, _ = self.readers["teacher"](teacher, inputs, forward)
            if head is not None and (_is_fsdp(wrapper) or _is_fsdp(teacher)):  # freed after this forward
                head = head._replace(weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())
            return States(rows, head)

        return through(wrapper, teacher, run, inputs)

    def compare(
        self,
        student: States,
        teacher: States | Tensor | TopKTeacher | SampledTeacher,
        labels: Tensor,
        *,
        reduction: str = "mean",
        ce_weight: float | None = None,
    ) -> LossOutput:
        """The loss of what the models said. labels: `next_labels`, one for each row. ce_weight: instead of the object's."""
        ce_weight = self.ce_weight if ce_weight is None else ce_weight
        known: Any
        known, other = (teacher.rows, teacher.head) if isinstance(teacher, States) else (teacher, None)
        if (own := student.head) is not None:
            sides: dict[str, Any] = (
                {} if other is None else {"teacher_weight": other.weight, "teacher_bias": other.bias}
            )
            return linear_distillation_loss(
                student.rows, own.weight, known, labels, student_bias=own.bias,
                softcap=(own.softcap, other and other.softcap), logit_scale=(own.scale, other and other.scale),
                ce_weight=ce_weight, kd_weight=self.kd_weight, chunk_rows=self.chunk_rows, reduction=reduction,
                **sides, **self.options,
            )  # fmt: skip
        if other is not None:
            known = head_logits(
                known, other.weight, other.bias, other.scale, other.softcap or 0.0, other.weight.shape[0]
            )
        if isinstance(known, Tensor):
            return distillation_loss(
                student.rows, known, labels, ce_weight=ce_weight, kd_weight=self.kd_weight, reduction=reduction, **self.options
            )  # fmt: skip
        keep, classes = labels != IGNORE, self.options["vocab_size"]
        kd = sparse_kd_loss(student.rows, known, mask=keep, reduction=reduction, **self.options)
        parts = {"kd": kd.detach(), "ce": torch.zeros_like(kd)}
        loss = self.kd_weight * kd if self.kd_weight != 0 else torch.zeros_like(kd)  # 0 times infinity is not 0
        if ce_weight != 0:
            ce = cross_entropy_loss(student.rows[..., :classes], labels, reduction=reduction)
            loss, parts["ce"] = loss + ce_weight * ce, ce.detach()
        return LossOutput(loss, parts)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is for the models."""
    return {name: value for name, value in batch.items() if name not in TARGETS and not name.startswith("teacher_")}
