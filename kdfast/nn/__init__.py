"""Modules that own parameters and are shared by several methods."""

from kdfast.nn.sparse_moe import SparseMoE, moe_losses
from kdfast.nn.tokens import align_maps, tokenize_feature_map, tokens_to_map

__all__ = ["SparseMoE", "align_maps", "moe_losses", "tokenize_feature_map", "tokens_to_map"]
