"""Modules that own parameters and are shared by several methods."""

from kdfast.nn.capture import capture_outputs
from kdfast.nn.heads import replace_head
from kdfast.nn.sparse_moe import SparseMoE, moe_losses
from kdfast.nn.tokens import align_maps, tokenize_feature_map, tokens_to_map

__all__ = [
    "SparseMoE", "align_maps", "capture_outputs", "moe_losses", "replace_head", "tokenize_feature_map", "tokens_to_map",
]  # fmt: skip
