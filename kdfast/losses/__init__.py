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
from kdfast.losses.routing import (
    ImportanceLoadLoss,
    LoadBalancingLoss,
    RouterZLoss,
    UniformKLLoss,
    UsageCVLoss,
    importance_load_loss,
    load_balancing_loss,
    router_z_loss,
    uniform_kl_loss,
    usage_cv_loss,
)
from kdfast.losses.selective import (
    RegionSelection,
    RegionSelectiveLoss,
    SelectiveKDLoss,
    region_selection,
    region_selective_loss,
    selective_kd_loss,
)
from kdfast.losses.sinkhorn import SinkhornDivergence, SinkhornKDLoss, sinkhorn_divergence, sinkhorn_kd_loss

__all__ = [
    "DKDLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "ImportanceLoadLoss",
    "KDLoss",
    "LoadBalancingLoss",
    "LossModule",
    "LossOutput",
    "RegionSelection",
    "RegionSelectiveLoss",
    "RouterZLoss",
    "SelectiveKDLoss",
    "SinkhornDivergence",
    "SinkhornKDLoss",
    "UniformKLLoss",
    "UsageCVLoss",
    "distillation_loss",
    "divergence_loss",
    "dkd_loss",
    "importance_load_loss",
    "kd_loss",
    "load_balancing_loss",
    "region_selection",
    "region_selective_loss",
    "router_z_loss",
    "selective_kd_loss",
    "sinkhorn_divergence",
    "sinkhorn_kd_loss",
    "uniform_kl_loss",
    "usage_cv_loss",
]
