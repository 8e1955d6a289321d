"""Modules that own parameters and are shared by several methods."""

from kdfast.nn.sparse_moe import SparseMoE, moe_losses

__all__ = ["SparseMoE", "moe_losses"]
