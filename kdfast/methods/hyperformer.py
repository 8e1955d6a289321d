"""HyperFormer: completes statements of a hyper-relational graph with a Transformer whose feed-forward part is a mixture of experts.

Paper: HyperFormer: Enhancing Entity and Relation Interaction for Hyper-Relational Knowledge Graph Completion. Hu et al.;
CIKM 2023; https://arxiv.org/abs/2308.06512
Based on: the authors' code (zhiweihu1103/HKGC-HyperFormer at 2e8225b) with the gate of FastMoE 1.0 or later.
In the code as here: smoothing 0.9 literally (0.1 stays on the answer); neighbour and second passes attend to padding
(`mask_padding=True` masks it); the gate bias-free of noise and balancing (both are options of SparseMoE); two relations fused and
thrown away are not computed. Differs from the code: `combine="logits"` gives the raw gate logits of FastMoE 0.2 and 0.3, which
the readme names; the interaction's permutation is saved with the model; ties of the gate go to the lower expert id.

B batch, L tokens, V vocabulary (7 special tokens, entities, relations, reversed relations), H width. A statement is
[head, relation, MASK, qualifier relation, qualifier entity, ..., PAD, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_labels, check_number
from kdfast._library import compute_dtype
from kdfast.data.statements import MASK, PAD, SPECIALS
from kdfast.losses import LossOutput
from kdfast.losses.divergence import reduce_rows
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn.sparse_moe import SparseMoE

COMBINATIONS = ("dismult", "sum", "complex", "rotate", "encoder")


# ---------------------------------------------------------------- losses
def label_smoothing_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.9, *, reduction: str = "mean"
) -> Tensor:
    """-(1-s) log p_t - s/(V-1) sum_{v != t} log p_v, without the dense target: lse - (1 - s - s/(V-1)) z_t - s/(V-1) sum z.

    F.cross_entropy spreads s over all V tokens, the target included; here the target gets exactly 1 - s, for any s < 1.

    Args:
        logits: [B, V], V >= 2. target: [B]. smoothing: s in [0, 1). reduction: "mean", "sum" or "none".
    Source: LabelSmoothCrossEntropyLoss in the code.
    """
    check_float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected [B, V] with V >= 2, got {tuple(logits.shape)}")
    check_labels(target, logits.shape[:1], logits.device, "target")
    if check_number("smoothing", smoothing, low=0.0) >= 1:
        raise ValueError(f"smoothing: expected a number in [0, 1), got {smoothing}")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    z = logits.to(compute_dtype(logits))
    share = smoothing / (logits.shape[1] - 1)
    own = z.gather(1, target.long().unsqueeze(1)).squeeze(1)
    rows = z.logsumexp(1) - (1 - smoothing - share) * own - share * z.sum(1)
    return reduce_rows(rows, None, None, reduction)


# ---------------------------------------------------------------- bidirectional interaction
def chequer_permutation(
    width: int, kernel_width: int, kernel_height: int, count: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """P [count, 2 kw kh]: entries of two vectors of `width` set on a grid in turn, first and second swapped in odd rows."""
    if kernel_width * kernel_height > width:
        raise ValueError(
            f"kernel_width, kernel_height: expected a product of at most {width}, got {kernel_width} x {kernel_height}"
        )
    grids = []
    for r in range(count):
        first, second = (torch.randperm(width, generator=generator) for _ in range(2))
        entries: list[Tensor] = []
        for i in range(kernel_height):
            for j in range(kernel_width):
                pair = first[i * kernel_width + j], width + second[i * kernel_width + j]
                entries += pair if (i + r) % 2 == 0 else pair[::-1]
        grids.append(torch.stack(entries))
    return torch.stack(grids)


class PairInteraction(nn.Module):
    """(a, b) -> (a', b'): both vectors on one chequered grid, a circular convolution, and back to two vectors.

    Args:
        width: H. kernel_width, kernel_height: kw, kh, of the grid 2 kw x kh. channels: C filters, shared by all
            `permutations`; kernel_size odd. dropouts: on the grid, on its channels, on the vectors. permutation: P, given.
    """

    permutation: Tensor

    def __init__(
        self, width: int, *, kernel_width: int = 20, kernel_height: int = 20, channels: int = 96, kernel_size: int = 9,
        permutations: int = 1, dropouts: tuple[float, float, float] = (0.2, 0.5, 0.5), bn_eps: float = 1e-5,
        permutation: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.grid = (2 * kernel_width, kernel_height)
        self.width, self.padding, self.dropouts = width, kernel_size // 2, dropouts
        if permutation is None:
            permutation = chequer_permutation(width, kernel_width, kernel_height, permutations)
        self.register_buffer("permutation", permutation)
        self.conv_filt = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        nn.init.xavier_normal_(self.conv_filt)
        self.bn0 = nn.BatchNorm2d(permutations, eps=bn_eps)
        self.bn1 = nn.BatchNorm2d(channels * permutations, eps=bn_eps)
        self.bn3 = nn.BatchNorm1d(2 * width, eps=bn_eps)
        self.fc2 = nn.Linear(2 * kernel_width * kernel_height * channels * permutations, 2 * width)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """a, b: [B, H]."""
        if self.training and a.shape[0] < 2:
            raise ValueError("a, b: batch statistics need at least 2 rows in training, got 1")
        p = self.permutation.shape[0]
        grid = torch.cat((a, b), -1)[:, self.permutation].unflatten(-1, self.grid)  # [B, p, 2 kw, kh]
        h = F.dropout(self.bn0(grid), self.dropouts[0], self.training)
        h = F.conv2d(F.pad(h, (self.padding,) * 4, mode="circular"), self.conv_filt.repeat(p, 1, 1, 1), groups=p)
        h = F.dropout2d(F.relu(self.bn1(h)), self.dropouts[1], self.training)
        h = self.bn3(F.dropout(self.fc2(h.flatten(1)), self.dropouts[2], self.training))
        return h[:, : self.width], h[:, self.width :]


class FuseNet(nn.Module):
    """g p + (1 - g) q with g = sigmoid(L p + L q), one affine map L for both (its bias enters twice)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        g = torch.sigmoid(self.linear(p) + self.linear(q))
        return g * p + (1 - g) * q


# ---------------------------------------------------------------- encoder
class FeedForward(nn.Module):
    """x + Drop(MoE(LN(x))), or a dense MLP of width top_k * d_hidden with num_experts = 0 (equal active width)."""

    def __init__(
        self, width: int, d_hidden: int, num_experts: int, top_k: int, *, combine: str = "softmax", dropout: float = 0.1,
        activation: str = "relu", noise: str | None = None, balance: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("combine", combine, ("softmax", "logits"))
        self.norm, self.dropout = nn.LayerNorm(width), dropout
        self.moe: nn.Module
        if num_experts:
            score = "logits" if combine == "logits" else "softmax_after_topk"
            self.moe = SparseMoE(
                width, d_hidden, num_experts, top_k, score=score, activation=activation, dropout=dropout, noise=noise, balance=balance
            )  # fmt: skip
        else:
            hidden = top_k * d_hidden
            self.moe = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.moe(self.norm(x)), self.dropout, self.training)


class EncoderLayer(nn.Module):
    """x + MHA(LN(x)), then `FeedForward`. Masked keys get score -1e9."""

    def __init__(
        self, width: int, heads: int, feed_forward: FeedForward, *, dropout: float = 0.1, residual: float = 0.0
    ):
        super().__init__()
        self.heads, self.dropout, self.residual = heads, dropout, residual
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (_truncated_linear(width) for _ in range(4))
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x: [B, L, H]. keep: [B, L] bool, the keys to attend to, or None for all."""
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, L, L]
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], -1e9)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        attended = self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.feed_forward(x + F.dropout(attended, self.residual, self.training))


def _truncated_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.trunc_normal_(layer.weight, std=1.0, a=-0.02, b=0.02)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- the model
class HyperFormer(nn.Module):
    """The whole model; defaults are the published settings (width 400, 8 layers, 64 experts of 1024, 2 active).

    Args:
        num_entities, num_relations: without specials and reversed relations. num_experts = 0: dense feed-forward.
        combine: "softmax" over the chosen experts or "logits". qualifiers: one of COMBINATIONS, how a qualifier pair becomes a vector.
        interaction: keyword arguments of PairInteraction. entity_dropout, embedding_dropout: 0.3 on the entity table, 0.7 on embedded
            sequences; context_dropouts: on the two fused vectors. mask_padding: hide PAD from the neighbour and second passes too.
        use_qualifiers=False: triples only, what follows MASK in `ids` is cut off. use_context=False: pass 1 only.

    forward(ids [B, L], neighbours [B, M, L'] = None, qualifiers [B, Q, 3] = None, known = None) -> {"pass1": [B, V], ...}. With
    neighbours and qualifiers (training) also "pass2" [B, V] and "neighbours" [B, M, V], with the encoder on qualifiers
    "qualifiers" [B, Q, V]. Validation and test use pass 1 alone; `known` [B, entities] bool, other right answers: -inf there.
    """

    def __init__(
        self, num_entities: int, num_relations: int, *, width: int = 400, layers: int = 8, heads: int = 2, num_experts: int = 64,
        top_k: int = 2, d_hidden: int = 1024, combine: str = "softmax", qualifiers: str = "dismult", dropout: float = 0.1,
        residual_dropout: float = 0.0, entity_dropout: float = 0.3, embedding_dropout: float = 0.7,
        context_dropouts: tuple[float, float] = (0.1, 0.3), mask_padding: bool = False, use_qualifiers: bool = True, use_context: bool = True, interaction: dict[str, Any] | None = None,
        noise: str | None = None, balance: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads ({heads}), got {width}")
        self.num_entities, self.num_relations = num_entities, num_relations
        self.qualifier_form = check_choice("qualifiers", qualifiers, COMBINATIONS)
        self.entity_dropout, self.embedding_dropout, self.context_dropouts = (
            entity_dropout,
            embedding_dropout,
            context_dropouts,
        )
        self.mask_padding, self.use_qualifiers, self.use_context = mask_padding, use_qualifiers, use_context
        self.table = nn.Parameter(torch.empty(SPECIALS + num_entities + 2 * num_relations, width))
        nn.init.trunc_normal_(self.table, std=1.0, a=-0.02, b=0.02)
        self.table_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            EncoderLayer(
                width, heads,
                FeedForward(width, d_hidden, num_experts, top_k, combine=combine, dropout=dropout, noise=noise, balance=balance),
                dropout=dropout, residual=residual_dropout,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.pair = PairInteraction(width, **(interaction or {}))
        self.fuse = FuseNet(width)

    def entity_slice(self) -> slice:
        """The entities' columns of the logits."""
        return slice(SPECIALS, SPECIALS + self.num_entities)

    def forward(
        self,
        ids: Tensor,
        neighbours: Tensor | None = None,
        qualifiers: Tensor | None = None,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        _check_sequences("ids", ids, self.table.shape[0])
        if not self.use_qualifiers:
            ids = ids[:, :3]
        embeddings = self._embeddings()
        encoded = self._encode(self._drop(embeddings[ids]), ids != PAD)
        logits = {"pass1": encoded[:, 2] @ self.table.t()}
        if known is not None:
            hidden = F.pad(known, (SPECIALS, self.table.shape[0] - SPECIALS - known.shape[1]))
            logits["pass1"] = logits["pass1"].masked_fill(hidden, -math.inf)
        if neighbours is None or qualifiers is None or not self.use_context:
            return logits
        context, logits["neighbours"] = self._neighbours(embeddings, neighbours)
        pairs, relation_logits = self._qualifiers(embeddings, qualifiers)
        if relation_logits is not None:
            logits["qualifiers"] = relation_logits
        head, relation = self._interact(context, encoded[:, 1], pairs)
        x = embeddings[ids]
        first = (x[:, 0] + F.dropout(head, self.context_dropouts[0], self.training)) / 2
        second = (x[:, 1] + F.dropout(relation, self.context_dropouts[1], self.training)) / 2
        x = self._drop(torch.cat((first.unsqueeze(1), second.unsqueeze(1), x[:, 2:]), 1))
        logits["pass2"] = self._encode(x, ids != PAD if self.mask_padding else None)[:, 2] @ self.table.t()
        return logits

    def _embeddings(self) -> Tensor:
        """[V, H]: special rows as they are, entities and relations normalised, dropout on the entities."""
        special, entity, relation = self.table.split((SPECIALS, self.num_entities, 2 * self.num_relations))
        entity = F.dropout(self.table_norm(entity), self.entity_dropout, self.training)
        return torch.cat((special, entity, self.table_norm(relation)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.embedding_dropout, self.training)

    def _encode(self, x: Tensor, keep: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep)
        return self.norm(x)

    def _neighbours(self, embeddings: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Mean vector of the neighbours at MASK [B, H], and what each predicts there [B, M, V]."""
        if neighbours.dim() != 3 or neighbours.shape[1] == 0:
            raise ValueError(f"neighbours: expected [B, M, L] with M >= 1, got {tuple(neighbours.shape)}")
        flat = neighbours.flatten(0, 1)
        _check_sequences("neighbours", flat, self.table.shape[0])
        keep = flat != PAD if self.mask_padding else None
        encoded = self._encode(self._drop(embeddings[flat]), keep)[:, 2].unflatten(0, neighbours.shape[:2])  # [B, M, H]
        return encoded.mean(1), encoded @ self.table.t()

    def _qualifiers(self, embeddings: Tensor, qualifiers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean vector of the qualifier pairs [B, H]; with the encoder also its logits [B, Q, V]."""
        if qualifiers.dim() != 3 or qualifiers.shape[1] == 0 or qualifiers.shape[2] != 3:
            raise ValueError(f"qualifiers: expected [B, Q, 3] with Q >= 1, got {tuple(qualifiers.shape)}")
        if self.qualifier_form == "encoder":
            encoded = self._encode(self._drop(embeddings[qualifiers.flatten(0, 1)]), None)[:, 2]
            encoded = encoded.unflatten(0, qualifiers.shape[:2])
            return encoded.mean(1), encoded @ self.table.t()
        return combine_pair(embeddings[qualifiers[..., 0]], embeddings[qualifiers[..., 1]], self.qualifier_form).mean(
            1
        ), None

    def _interact(self, context: Tensor, relation: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """c* and q*: neighbour context, relation and qualifiers exchange in pairs (shared weights); one fuse for both."""
        context_r, _ = self.pair(context, relation)
        context_q, pairs_c = self.pair(context, pairs)
        _, pairs_r = self.pair(relation, pairs)
        return self.fuse(context_r, context_q), self.fuse(pairs_c, pairs_r)


def combine_pair(relation: Tensor, entity: Tensor, form: str) -> Tensor:
    """A qualifier pair as one vector: "dismult" r * e, "sum" r + e, "complex" product of halves, "rotate" as in the code.

    "rotate" multiplies e by (cos of the first half, sin of the second) of pi r / 0.02, which is no true rotation.
    """
    if form == "dismult":
        return relation * entity
    if form == "sum":
        return relation + entity
    if form == "complex":
        (a, b), (c, d) = relation.chunk(2, -1), entity.chunk(2, -1)
        return torch.cat((a * c - b * d, a * d + b * c), -1)
    first, second = (math.pi * relation / 0.02).chunk(2, -1)
    return entity * torch.cat((first.cos(), second.sin()), -1)


def _check_sequences(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.dim() != 2 or ids.shape[1] < 3 or ids.is_floating_point():
        raise ValueError(f"{name}: expected integers [B, L] with L >= 3, got {ids.dtype} {tuple(ids.shape)}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.shape[0]:
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"{name}: expected tokens in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}")
        if bool((ids[:, 2] != MASK).any()):
            raise ValueError(f"{name}: expected MASK ({MASK}) at position 2")


# ---------------------------------------------------------------- training
def hyperformer_loss(
    logits: dict[str, Tensor], target: Tensor, query: Tensor, relation: Tensor, *, smoothing: float = 0.9, neighbour_weight: float = 0.5,
    qualifier_weight: float = 0.25,
) -> LossOutput:  # fmt: skip
    """LS(pass1, t) + LS(pass2, t) + 0.5 mean_i LS(neighbours_i, query) (+ 0.25 mean_i LS(qualifiers_i, relation)).

    Args:
        logits: of `HyperFormer`; passes that are missing are left out. target, query, relation: [B] tokens.
    """
    parts = {"pass1": label_smoothing_cross_entropy(logits["pass1"], target, smoothing)}
    weights = {"pass1": 1.0, "pass2": 1.0, "neighbours": neighbour_weight, "qualifiers": qualifier_weight}
    if "pass2" in logits:
        parts["pass2"] = label_smoothing_cross_entropy(logits["pass2"], target, smoothing)
    for name, answer in (("neighbours", query), ("qualifiers", relation)):
        if name in logits:
            repeated = answer.unsqueeze(1).expand(logits[name].shape[:2]).flatten()
            parts[name] = label_smoothing_cross_entropy(logits[name].flatten(0, 1), repeated, smoothing)
    loss = sum((weights[name] * part for name, part in parts.items()), torch.zeros((), device=target.device))
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()})


class Method(MethodBase):
    """The training loss of a HyperFormer student without a teacher; batches {"ids", "labels", ...} as its forward takes them."""

    def __init__(
        self, *, smoothing: float = 0.9, neighbour_weight: float = 0.5, qualifier_weight: float = 0.25
    ) -> None:
        super().__init__()
        self.options = dict(smoothing=smoothing, neighbour_weight=neighbour_weight, qualifier_weight=qualifier_weight)

    @staticmethod
    def students(*, num_entities: int, num_relations: int) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
        """What to compare on a small graph: without qualifiers, without context, without experts (equal active width), whole."""

        def small(**options: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
            interaction = dict(kernel_width=4, kernel_height=4, channels=8, kernel_size=3)
            sizes: dict[str, Any] = dict(
                width=32, layers=2, heads=2, num_experts=8, top_k=2, d_hidden=32, interaction=interaction
            )
            return lambda: HyperFormer(num_entities, num_relations, **(sizes | options)), {}

        return {
            "triples": small(use_qualifiers=False, use_context=False),
            "qualifiers": small(use_context=False),
            "dense": small(num_experts=0),
            "whole": small(),
        }

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        ids = context.batch["ids"]
        return hyperformer_loss(context.student, context.labels, ids[:, 0], ids[:, 1], **self.options)
