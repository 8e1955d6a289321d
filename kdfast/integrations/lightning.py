"""A LightningModule with a student, a teacher and a method of kdfast.

    module = KDModule(student, teacher, "kd", options={"temperature": 4.0})
    lightning.Trainer(max_epochs=10).fit(module, train_loader, val_loader)

For a LightningModule of your own, call a loss in its `training_step`; for two language models that is `CausalLMLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from kdfast._extras import needs
from kdfast.losses import LossOutput
from kdfast.methods import Context, Method
from kdfast.methods._protocol import call_model
from kdfast.train.distiller import Forward, make_net

LightningModule: Any = needs("lightning.pytorch", "trainers").LightningModule


class KDModule(LightningModule):
    """Trains a student with a teacher and a method; logs train_loss, val_loss and their parts (train_kd, ...).

    The teacher is frozen, in eval mode, and in neither the checkpoint nor the optimizer, unless the method trains it.

    Args:
        student, teacher, method, options, widths, capture, student_forward, teacher_forward: as in `kdfast.train.Distiller`.
        optimizer: parameters -> Optimizer, or what else `configure_optimizers` returns. Default AdamW(lr=1e-3).
    Raises:
        ValueError: a method that looks at the data before it starts or combines heads after: `Distiller` runs those.

    >>> module = KDModule(student, teacher, "kd", options={"temperature": 4.0})
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | Callable[[Context], LossOutput],
        *,
        options: Mapping[str, Any] | None = None,
        widths: Mapping[str, tuple[int, int]] | None = None,
        capture: Mapping[str, str | tuple[str | None, str | None]] | None = None,
        student_forward: Forward = call_model,
        teacher_forward: Forward | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer | Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = make_net(
            student, teacher, method, options=options, widths=widths, capture=capture, student_forward=student_forward,
            teacher_forward=teacher_forward,
        )  # fmt: skip
        self.optimizer, self._stepped = optimizer, 0
        for name in ("start", "after_epoch", "deploy"):
            none = getattr(Method, name, None)
            if getattr(type(self.net.used_method), name, none) is not none:
                raise ValueError(
                    f"method: {method!r} needs {name}(), which kdfast.train.Distiller runs and this module does not"
                )

    @property
    def student(self) -> nn.Module:
        """The model that is trained and used afterwards."""
        return self.net.student

    @property
    def teacher(self) -> nn.Module | None:
        return self.net.teacher if self.net.trains_teacher else self.net.hidden[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.student(*inputs, **named)

    def on_fit_start(self) -> None:
        self._place_teacher()

    def on_validation_start(self) -> None:
        self._place_teacher()

    def _place_teacher(self) -> None:
        if self.teacher is not None and not self.net.trains_teacher:  # no submodule, so Lightning does not see it
            self.teacher.eval().to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        steps = self.trainer.estimated_stepping_batches
        return self._step("train", batch, int(steps) if steps != float("inf") and steps > 0 else 0)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step("val", batch, 0)

    def _step(self, stage: str, batch: Any, total_steps: int) -> Any:
        loss, parts = self.net(batch, self.global_step, total_steps)
        self.log_dict(
            {f"{stage}_loss": loss.detach(), **{f"{stage}_{name}": value for name, value in parts.items()}},
            batch_size=_batch_size(batch), sync_dist=stage == "val",
        )  # fmt: skip
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > self._stepped:  # not after a batch that was only accumulated
            self._stepped = self.global_step
            after = getattr(self.net.used_method, "after_step", None)
            if after is not None:
                after(self.student, self.teacher, self.global_step)

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return AdamW(parameters, lr=1e-3) if self.optimizer is None else self.optimizer(parameters)


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return len(next(iter(values)))
