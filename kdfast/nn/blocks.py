"""What small networks are made of: a convolution, and Transformer blocks on a map."""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.nn.tokens import tokenize_feature_map, tokens_to_map


def conv_block(before: int, after: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; at stride 1 and an odd kernel the map keeps its size."""
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class MapTransformer(nn.Module):
    """Transformer blocks (norm first, GELU, hidden width twice the width) on the positions of a square map: [B, D, s, s] -> the same."""

    def __init__(self, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )

    def forward(self, maps: Tensor) -> Tensor:
        return tokens_to_map(self.blocks(tokenize_feature_map(maps)), class_tokens=0)
