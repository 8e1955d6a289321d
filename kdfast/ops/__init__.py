"""The ops. Each file holds the equation, the plain-torch reference, the registration and the public function."""

from kdfast.ops.divergence import divergence, divergence_reference
from kdfast.ops.linear_divergence import linear_divergence
from kdfast.ops.mmd import mmd_bandwidths, pairwise_mmd, pairwise_mmd_reference
from kdfast.ops.pairwise import pairwise_cost, pairwise_cost_reference, pairwise_infonce, pairwise_infonce_reference
from kdfast.ops.relation import relation_kl, relation_kl_reference, relation_mse, relation_mse_reference, relation_table
from kdfast.ops.routing import Routing, dense_weights, route_topk, route_topk_reference
from kdfast.ops.routing_experts import grouped_linear, grouped_mlp
from kdfast.ops.routing_noise import drop_second_choice, jitter, noisy_logits
from kdfast.ops.routing_plan import Plan, combine, dispatch, expert_capacity, make_plan
from kdfast.ops.selective import SelectiveKL, selective_kl, selective_kl_reference
from kdfast.ops.sinkhorn import SinkhornOutput, sinkhorn, sinkhorn_cost, sinkhorn_cost_reference, sinkhorn_reference
from kdfast.ops.sinkhorn_points import sinkhorn_cost_points, sinkhorn_cost_points_reference
from kdfast.ops.softmin import pairwise_softmin, pairwise_softmin_reference
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher, sparse_divergence
from kdfast.ops.token_graph import knn_graph, knn_graph_reference, token_graph_kl, token_graph_kl_reference

__all__ = [
    "Plan",
    "Routing",
    "SampledTeacher",
    "SelectiveKL",
    "SinkhornOutput",
    "TopKTeacher",
    "combine",
    "dense_weights",
    "dispatch",
    "divergence",
    "divergence_reference",
    "drop_second_choice",
    "expert_capacity",
    "grouped_linear",
    "grouped_mlp",
    "jitter",
    "knn_graph",
    "knn_graph_reference",
    "linear_divergence",
    "make_plan",
    "mmd_bandwidths",
    "noisy_logits",
    "pairwise_cost",
    "pairwise_cost_reference",
    "pairwise_infonce",
    "pairwise_infonce_reference",
    "pairwise_mmd",
    "pairwise_mmd_reference",
    "pairwise_softmin",
    "pairwise_softmin_reference",
    "relation_kl",
    "relation_kl_reference",
    "relation_mse",
    "relation_mse_reference",
    "relation_table",
    "route_topk",
    "route_topk_reference",
    "selective_kl",
    "selective_kl_reference",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_cost_points",
    "sinkhorn_cost_points_reference",
    "sinkhorn_cost_reference",
    "sinkhorn_reference",
    "sparse_divergence",
    "token_graph_kl",
    "token_graph_kl_reference",
]
