"""Modules that own parameters and are shared by several methods."""

from kdfast.nn.attention import query_attention
from kdfast.nn.blocks import MapTransformer, conv_block
from kdfast.nn.buffers import ResizedBuffers
from kdfast.nn.capture import capture_outputs
from kdfast.nn.compression import GDN1, EntropyBottleneck, lower_bound
from kdfast.nn.expert_parallel import expert_parallel, expert_parameter_names
from kdfast.nn.frozen import call_frozen
from kdfast.nn.heads import DualHead, DualOutput, dual_heads, remove_dual_heads, replace_head
from kdfast.nn.masks import FeatureMask, attach_mask
from kdfast.nn.modes import evaluating
from kdfast.nn.patches import OverlapPatchEmbedding, Pyramid
from kdfast.nn.prototypes import PrototypeAugment, PrototypeLearner, prototype_attention, soft_vlad
from kdfast.nn.sparse_moe import SparseMoE, moe_losses
from kdfast.nn.tokens import align_maps, tokenize_feature_map, tokens_to_map

__all__ = [
    "GDN1", "DualHead", "DualOutput", "EntropyBottleneck", "FeatureMask", "MapTransformer", "OverlapPatchEmbedding", "PrototypeAugment", "PrototypeLearner", "Pyramid", "ResizedBuffers", "SparseMoE", "align_maps",
    "attach_mask", "call_frozen", "capture_outputs", "conv_block", "dual_heads", "evaluating", "expert_parallel", "expert_parameter_names", "lower_bound", "moe_losses",
    "prototype_attention", "query_attention", "remove_dual_heads", "replace_head", "soft_vlad", "tokenize_feature_map", "tokens_to_map",
]  # fmt: skip
