"""The ops. Each file holds the equation, the plain-torch reference, the registration and the public function."""

from kdfast.ops.divergence import divergence, divergence_reference
from kdfast.ops.pairwise import pairwise_cost, pairwise_cost_reference
from kdfast.ops.sinkhorn import SinkhornOutput, sinkhorn, sinkhorn_cost, sinkhorn_cost_reference, sinkhorn_reference

__all__ = [
    "SinkhornOutput",
    "divergence",
    "divergence_reference",
    "pairwise_cost",
    "pairwise_cost_reference",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_cost_reference",
    "sinkhorn_reference",
]
