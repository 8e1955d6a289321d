"""Drop-in losses: functions first, each with an nn.Module twin of the same options."""

from kdfast.losses.channel_wise import ChannelWiseKDLoss, channel_wise_kd_loss
from kdfast.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss, entropy_rows
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
from kdfast.losses.linear import LinearDistillationLoss, linear_distillation_loss
from kdfast.losses.module import LossModule, LossOutput
from kdfast.losses.multi_label import (
    MultiLabelLoss,
    SparseMultiLabelLoss,
    multi_label_loss,
    sparse_multi_label_loss,
)
from kdfast.losses.relations import (
    TokenContextLoss,
    TokenContrastLoss,
    TokenGraphLoss,
    token_context_loss,
    token_contrast_loss,
    token_graph_loss,
)
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
from kdfast.losses.sparse import SparseKDLoss, sparse_kd_loss
from kdfast.losses.uld import ULDLoss, uld_loss
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher

__all__ = [
    "ChannelWiseKDLoss",
    "CrossEntropyLoss",
    "DKDLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "ImportanceLoadLoss",
    "KDLoss",
    "LinearDistillationLoss",
    "LoadBalancingLoss",
    "LossModule",
    "LossOutput",
    "MultiLabelLoss",
    "RegionSelection",
    "RegionSelectiveLoss",
    "RouterZLoss",
    "SampledTeacher",
    "SelectiveKDLoss",
    "SinkhornDivergence",
    "SinkhornKDLoss",
    "SparseKDLoss",
    "SparseMultiLabelLoss",
    "TokenContextLoss",
    "TokenContrastLoss",
    "TokenGraphLoss",
    "TopKTeacher",
    "ULDLoss",
    "UniformKLLoss",
    "UsageCVLoss",
    "channel_wise_kd_loss",
    "cross_entropy_loss",
    "distillation_loss",
    "divergence_loss",
    "dkd_loss",
    "entropy_rows",
    "importance_load_loss",
    "kd_loss",
    "linear_distillation_loss",
    "load_balancing_loss",
    "multi_label_loss",
    "region_selection",
    "region_selective_loss",
    "router_z_loss",
    "selective_kd_loss",
    "sinkhorn_divergence",
    "sinkhorn_kd_loss",
    "sparse_kd_loss",
    "sparse_multi_label_loss",
    "token_context_loss",
    "token_contrast_loss",
    "token_graph_loss",
    "uld_loss",
    "uniform_kl_loss",
    "usage_cv_loss",
]
