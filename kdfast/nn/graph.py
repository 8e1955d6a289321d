"""Small networks for graphs, as teachers, and the MLP that needs none. An edge (i, j) = (edges[0], edges[1]) brings j's features to i.

Every network is called with features [N, D] and edges [2, M] without loops, both directions of an undirected edge listed, and gives [N, C].
Kipf and Welling 2017 (arXiv 1609.02907), Hamilton et al. 2017 (1706.02216, its "gcn" aggregator), Velickovic et al. 2018 (1710.10903),
Gasteiger et al. 2019 (1810.05997).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_int, check_number


def gather_neighbours(h: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    """out_i = sum over the edges (i, j) of weight_ij h_j: h [N, ...], weight [M], or [M, heads] for h [N, heads, D]."""
    return torch.zeros_like(h).index_add(0, edges[0], weight.unsqueeze(-1) * h[edges[1]])


def with_loops(edges: Tensor, num_nodes: int) -> Tensor:
    """The edges, then one loop (i, i) per node."""
    return torch.cat((edges, torch.arange(num_nodes, dtype=edges.dtype, device=edges.device).expand(2, -1)), 1)


def symmetric_weights(edges: Tensor, num_nodes: int) -> Tensor:
    """1 / sqrt(deg_i deg_j) [M], degrees of these edges (with loops: the GCN's)."""
    degree = torch.bincount(edges[0], minlength=num_nodes).clamp_min(1).to(torch.get_default_dtype())
    return (degree[edges[0]] * degree[edges[1]]).rsqrt()


def edge_softmax(scores: Tensor, edges: Tensor, num_nodes: int) -> Tensor:
    """Softmax of [M, ...] over the edges of each node i."""
    index = edges[0].reshape(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    highest = scores.new_full((num_nodes, *scores.shape[1:]), -torch.inf)
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    powers = (scores - highest[edges[0]]).exp()
    total = torch.zeros_like(highest).index_add(0, edges[0], powers)
    return powers / total[edges[0]]


def _sizes(in_features: int, hidden: int, classes: int, num_layers: int) -> Sequence[tuple[int, int]]:
    widths = (in_features, *[hidden] * (check_int("num_layers", num_layers, low=1) - 1), classes)
    return list(pairwise(widths))


class NodeMLP(nn.Module):
    """Linear layers, ReLU and dropout between them; the edges are not read."""

    def __init__(
        self, in_features: int, classes: int, *, hidden: int = 256, num_layers: int = 2, dropout: float = 0.5
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in _sizes(in_features, hidden, classes, num_layers))
        self.dropout = check_number("dropout", dropout, low=0.0, high=1.0)

    def between(self, h: Tensor) -> Tensor:
        return F.dropout(torch.relu(h), self.dropout, self.training)

    def forward(self, features: Tensor, edges: Tensor | None = None) -> Tensor:
        for layer in self.layers[:-1]:
            features = self.between(layer(features))
        return self.layers[-1](features)


class GCN(NodeMLP):
    """Each layer: D^-1/2 (A + I) D^-1/2 h W + b."""

    def aggregate(self, h: Tensor, edges: Tensor) -> Tensor:
        loops = with_loops(edges, len(h))
        return gather_neighbours(h, loops, symmetric_weights(loops, len(h)).to(h.dtype))

    def forward(self, features: Tensor, edges: Tensor | None = None) -> Tensor:
        assert edges is not None
        h = features
        for i, layer in enumerate(self.layers):
            # the bias comes last, as the sum over neighbours of a bias is not the bias
            h = F.linear(self.aggregate(h, edges), layer.weight, layer.bias)  # type: ignore[arg-type]
            h = h if i == len(self.layers) - 1 else self.between(h)
        return h


class GraphSAGE(GCN):
    """With the "gcn" aggregator: W (h_i + sum_j h_j) / (deg_i + 1) + b."""

    def aggregate(self, h: Tensor, edges: Tensor) -> Tensor:
        loops = with_loops(edges, len(h))
        degree = torch.bincount(loops[0], minlength=len(h)).to(h.dtype)
        return gather_neighbours(h, loops, 1 / degree[loops[0]])


class APPNP(NodeMLP):
    """Z_0 = H = MLP(X), then k times Z <- (1 - alpha) A^ Z + alpha H, A^ the GCN's; while training each edge's weight is dropped out anew."""

    def __init__(
        self, in_features: int, classes: int, *, hidden: int = 256, num_layers: int = 2, dropout: float = 0.5, k: int = 10,
        alpha: float = 0.1, edge_dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(in_features, classes, hidden=hidden, num_layers=num_layers, dropout=dropout)
        self.k, self.alpha, self.edge_dropout = check_int("k", k), alpha, edge_dropout

    def forward(self, features: Tensor, edges: Tensor | None = None) -> Tensor:
        assert edges is not None
        h = super().forward(F.dropout(features, self.dropout, self.training))
        loops = with_loops(edges, len(h))
        weight, z = symmetric_weights(loops, len(h)).to(h.dtype), h
        for _ in range(self.k):
            drawn = F.dropout(weight, self.edge_dropout, self.training)
            z = (1 - self.alpha) * gather_neighbours(z, loops, drawn) + self.alpha * h
        return z


class GATLayer(nn.Module):
    """heads of: sum_j a_ij W h_j + b, a_ij = softmax_j LeakyReLU(u . W h_i + v . W h_j) over the edges with loops; [N, heads, D]."""

    def __init__(
        self, in_features: int, out_features: int, heads: int, *, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, heads * out_features, bias=False)
        self.own, self.other = (nn.Parameter(torch.empty(heads, out_features)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads, out_features))
        for weight in (self.linear.weight, self.own, self.other):
            nn.init.xavier_normal_(weight)
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout

    def forward(self, h: Tensor, loops: Tensor) -> Tensor:
        h = self.linear(F.dropout(h, self.dropout, self.training)).unflatten(-1, (self.heads, -1))  # [N, heads, D]
        own, other = ((h * weight).sum(-1) for weight in (self.own, self.other))
        scores = F.leaky_relu(own[loops[0]] + other[loops[1]], 0.2)  # [M, heads]
        weight = F.dropout(edge_softmax(scores, loops, len(h)), self.attention_dropout, self.training)
        return gather_neighbours(h, loops, weight) + self.bias


class GAT(nn.Module):
    """Layers of `heads` heads side by side, of width hidden / heads each, ReLU between; one head gives the classes."""

    def __init__(
        self, in_features: int, classes: int, *, hidden: int = 256, num_layers: int = 2, dropout: float = 0.5, heads: int = 4,
        attention_dropout: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        if check_int("num_layers", num_layers, low=1) > 1 and hidden % check_int("heads", heads, low=1):
            raise ValueError(f"heads: expected a divisor of the hidden width {hidden}, got {heads}")
        sizes = _sizes(in_features, hidden, classes, num_layers)
        options: dict[str, Any] = {"dropout": dropout, "attention_dropout": attention_dropout}
        self.layers = nn.ModuleList(
            [
                *(GATLayer(a, b // heads, heads, **options) for a, b in sizes[:-1]),
                GATLayer(*sizes[-1], 1, **options),
            ]
        )

    def forward(self, features: Tensor, edges: Tensor | None = None) -> Tensor:
        assert edges is not None
        loops, h = with_loops(edges, len(features)), features
        for layer in self.layers[:-1]:
            h = torch.relu(layer(h, loops)).flatten(1)
        return self.layers[-1](h, loops).squeeze(1)
