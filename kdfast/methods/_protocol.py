"""How a method plugs into `kdfast.train.Distiller`: it is called with a Context and returns a LossOutput.

Any callable will do. An nn.Module is trained along (its parameters join the optimizer, its state the checkpoint). These
attributes are optional, and the base class `Method` holds their defaults; a plain function has none of them:

    captures        names of the intermediate features the method reads, e.g. ("low", "high")
    columns         what it reads from a batch beside inputs and labels, by the names of `Task.columns`, for runs by name
    trains_teacher  True: the second network learns too (two students that teach each other)
    starts_trained  True: the student has been trained before (a run by name takes the one that learned from labels alone)
    uses_teacher    False: there is no second network (a run by name leaves the teacher out)
    teacher_each_step  False: the teacher is asked in `start` alone; no step runs it, and its output in the Context is None
    own_teacher     options with which the method first trains its teacher, from the student's network (a run by name)
    choose          the part of the training data that a run by name takes, before its first step
    adapt           student -> student, once, when the Distiller is made (another head, several heads)
    start           called before the first step of `fit` with a Setup (class means, subclass directions, scores)
    prepare         batch -> batch, before either model sees it (mixing, views, noise and time step, label codes)
    after_step      called after each optimizer step (weight averaging, queues)
    after_epoch     called after each epoch with a Setup, before the evaluation (a search on validation data, the best epoch kept)
    deploy          after training: the model to use, if it is more than the student (heads combined on validation data)

A file `kdfast/methods/<slug>.py` that defines a class `Method` runs by name: `Distiller(student, teacher, "<slug>")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast.losses.module import LossModule, LossOutput
from kdfast.nn.buffers import ResizedBuffers


def epoch_at(step: int, total_steps: int, epochs: int, unknown: int = 0) -> int:
    """floor(step epochs / total_steps), a run counted as so many epochs from 0; `unknown` without a known number of steps.

    >>> [epoch_at(step, 20, 10) for step in (0, 1, 2, 19)], epoch_at(5, 0, 10)
    ([0, 0, 1, 9], 0)
    """
    return step * epochs // total_steps if total_steps > 0 else unknown


@dataclass
class Context:
    """What a method sees of one batch.

    student: output of the student (whatever its forward returns), with gradient.
    teacher: output of the teacher, without gradient; with gradient when it is trained along; None without a teacher.
    labels: the batch's labels, or None. batch: the whole batch, on the device, after `prepare`.
    student_features, teacher_features: captured outputs of submodules, by the names in `capture`.
    step: optimizer steps done so far. total_steps: of the whole run, 0 when not known (your own loop).
    """

    student: Any
    teacher: Any = None
    labels: Tensor | None = None
    batch: Any = None
    student_features: dict[str, Any] = field(default_factory=dict)
    teacher_features: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    total_steps: int = 0


@dataclass(frozen=True)
class Setup:
    """What a method may look at before and after training.

    student, teacher: the models. sweep: "train" or "val" -> a Context for each batch of it, once through, in order, without
    gradient, both models in eval mode, batches as they come (`prepare` is not called), without the loader's augmentation unless
    plain=False. has_val: whether there is a "val".
    capture: {name: dotted path in the student}. forward: (model, batch) -> its output.
    learning_rate: the present one of the first optimizer, once training runs.
    step: optimizer steps done. resumed: True when training goes on from a checkpoint: buffers hold what was saved, there is nothing
    to compute again.
    """

    student: nn.Module
    teacher: nn.Module | None
    sweep: Callable[..., Iterator[Context]]
    has_val: bool = False
    capture: Mapping[str, str] = field(default_factory=dict)
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch)
    learning_rate: Callable[[], float] = lambda: 0.0
    step: int = 0

    @property
    def resumed(self) -> bool:
        return self.step > 0


def call_model(model: nn.Module, batch: Any) -> Any:
    """Mapping: model(**batch without "labels"); (inputs, labels): model(inputs); else model(batch). `.logits` if it has one."""
    if isinstance(batch, Mapping):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return getattr(output, "logits", output)


class Method(ResizedBuffers):
    """Base of methods that own parameters, read features, change the batch, or train both networks.

    Buffers made by `start` take the saved shape: at construction the data is not known yet.

    A method with `captures` takes `widths` first: channels of each captured feature, {name: (student, teacher)}.

    >>> class Method(kdfast.methods.Method):
    ...     captures = ("feat",)
    ...     def __init__(self, widths, *, weight=1.0):
    ...         super().__init__()
    ...         self.weight, self.project = weight, nn.Conv2d(*widths["feat"], 1)
    ...     def forward(self, context):
    ...         s, t = context.student_features["feat"], context.teacher_features["feat"]
    ...         ce, feat = F.cross_entropy(context.student, context.labels), F.mse_loss(self.project(s), t)
    ...         return LossOutput(ce + self.weight * feat, {"ce": ce.detach(), "feat": feat.detach()})
    """

    captures: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    trains_teacher: ClassVar[bool] = False
    starts_trained: ClassVar[bool] = False
    uses_teacher: bool = True  # an option may decide it
    teacher_each_step: ClassVar[bool] = True
    own_teacher: Mapping[str, Any] | None = None  # an option may decide it

    def forward(self, context: Context) -> LossOutput:
        raise NotImplementedError(f"{type(self).__module__}.Method must define forward(context) -> LossOutput")

    def adapt(self, student: nn.Module) -> nn.Module:
        """The student as this method trains, scores and saves it. May change it in place (`kdfast.nn.replace_head`)."""
        return student

    def choose(self, data: Any, seed: int) -> Any:
        """The training data of a run by name, e.g. a `torch.utils.data.Subset`; the same for the same seed."""
        return data

    def prepare(self, batch: Any) -> Any:
        return batch

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        """After optimizer step number `step` (the first is 1)."""

    def after_epoch(self, setup: Setup) -> None:
        """After each epoch of `fit`, before its evaluation and checkpoint."""

    def start(self, setup: Setup) -> None:
        """Before the first step of `fit`, and again when it goes on from a checkpoint."""

    def deploy(self, setup: Setup) -> nn.Module:
        return setup.student


class LogitMethod(LossModule):
    """A method that needs logits and labels only: `class Method(LogitMethod, function=sinkd_loss): ...`.

    Calls function(student, teacher, labels, **options) with the options bound at construction; a function with a keyword
    `step` or `total_steps` (a schedule) gets it from the context.
    """

    def forward(self, context: Context) -> LossOutput:
        signature: Mapping[str, Any] = inspect.signature(type(self)).parameters
        clock = {name: getattr(context, name) for name in ("step", "total_steps") if name in signature}
        return super().forward(context.student, context.teacher, context.labels, **clock)
