"""The ops. Each file holds the equation, the plain-torch reference, the registration and the public function."""

from kdfast.ops.divergence import divergence, divergence_reference
from kdfast.ops.pairwise import pairwise_cost, pairwise_cost_reference

__all__ = ["divergence", "divergence_reference", "pairwise_cost", "pairwise_cost_reference"]
