"""Drop-in losses: functions first, each with an nn.Module twin of the same options."""

from kdfast.losses.divergence import (
    DistillationLoss,
    DivergenceLoss,
    DKDLoss,
    KDLoss,
    distillation_loss,
    divergence_loss,
    dkd_loss,
    kd_loss,
)
from kdfast.losses.module import LossModule, LossOutput

__all__ = [
    "DKDLoss", "DistillationLoss", "DivergenceLoss", "KDLoss", "LossModule", "LossOutput",
    "distillation_loss", "divergence_loss", "dkd_loss", "kd_loss",
]  # fmt: skip
