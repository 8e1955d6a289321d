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
from kdfast.losses.sinkhorn import SinkhornDivergence, SinkhornKDLoss, sinkhorn_divergence, sinkhorn_kd_loss

__all__ = [
    "DKDLoss", "DistillationLoss", "DivergenceLoss", "KDLoss", "LossModule", "LossOutput", "SinkhornDivergence", "SinkhornKDLoss",
    "distillation_loss", "divergence_loss", "dkd_loss", "kd_loss",
    "sinkhorn_divergence", "sinkhorn_kd_loss",
]  # fmt: skip
