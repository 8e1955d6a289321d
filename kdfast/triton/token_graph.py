"""`kdfast.ops.token_graph` on a GPU. Neighbours, by the number asked for:

k <= 64    candidates_kernel: tiles of products with the lists of the 2k best so far (a power of two), no n x n scores; then rank_kernel,
           exact distances to the candidates and the proof, a token that has none looks at all
more       exact distances of a block of rows and a stable sort
up to DIRECT_TOKENS tokens    rank_kernel alone, which looks at all

So the neighbours are those of exact distances, always. The products are taken without TF32 ("ieee"): the proof lives on their
error bound, and with 10 bits near neighbours could seldom be told apart. Gradients are gathered over the edges of both ends, ordered by a
stable sort on the device: no atomics, and nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype
from kdfast.ops import token_graph as op
from kdfast.triton import token_graph_kernels as kernels
from kdfast.triton.launch import DTYPES, MAX_32, launch, multiprocessors, power_of_two, warps
from kdfast.triton.pairwise import BLOCK_BYTES, cost

MOST_TILED = 64  # neighbours: the lists of more would not stay in registers
TOKENS = 32  # of a program that looks for candidates
OTHERS = 64  # it looks at in one tile; half as many in float64
CANDIDATES = 256  # at most, of all splits of a token
TILE = 2048  # coordinates of a program that takes distances


def _tokens(tokens: Tensor, inverse: Tensor | None, lanes: int) -> dict[str, Any]:
    """What every kernel over tokens needs; lanes: tokens of its tiles."""
    n, width = tokens.shape
    columns = min(power_of_two(width), max(TILE // lanes, 16))
    return {
        "tokens": tokens, "inverse": inverse, "n": n, "width": width, "row_stride": tokens.stride(0),
        "column_stride": tokens.stride(1), "DTYPE": DTYPES[compute_dtype(tokens)], "B": columns,
        "WIDE": abs(tokens.stride(1)) * (width + columns) > MAX_32,
    }  # fmt: skip


def knn_graph(tokens: Tensor, inverse: Tensor | None, k: int, sigma: float) -> tuple[Tensor, Tensor]:
    """kdfast::knn_graph: neighbours int32 [n, k], nearest first, and their weights."""
    n, width = tokens.shape
    if k > MOST_TILED:
        return _by_sorting(tokens, inverse, k, sigma)
    dtype = compute_dtype(tokens)
    neighbours = torch.empty((n, k), dtype=torch.int32, device=tokens.device)
    weights = torch.empty((n, k), dtype=dtype, device=tokens.device)
    size = max(power_of_two(k), 32)
    norms = candidates = bounds = None
    if n > op.DIRECT_TOKENS and n - 1 > 2 * k:
        norms, candidates, bounds = _candidates(tokens, inverse, power_of_two(2 * k))
        size = candidates.shape[1] * candidates.shape[2]
    launch(
        kernels.rank_kernel, n, 4, tokens.device, norms=norms, candidates=candidates, bounds=bounds, neighbours=neighbours,
        weights=weights, k=k, slack=(width + 32) * 2.0 ** (-53 if dtype == torch.float64 else -24), sigma=float(sigma),
        SPLITS=1 if bounds is None else bounds.shape[1], L=size, **_tokens(tokens, inverse, size),
    )  # fmt: skip
    return neighbours, weights


def _candidates(tokens: Tensor, inverse: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(shrunk squared norms of the centred tokens, candidates [n, splits, count], bounds [n, splits])."""
    dtype, device = compute_dtype(tokens), tokens.device
    centred, norms = op.centred_tokens(
        tokens.to(dtype).contiguous(), inverse, 2.0 ** (-53 if dtype == torch.float64 else -24)
    )
    n, width = centred.shape
    others = OTHERS if dtype == torch.float32 else OTHERS // 2
    blocks, tiles = -(-n // TOKENS), -(-n // others)
    n_splits = 1
    while blocks * n_splits < multiprocessors(device) and 2 * n_splits * count <= CANDIDATES and 2 * n_splits <= tiles:
        n_splits *= 2
    candidates = torch.empty((n, n_splits, count), dtype=torch.int32, device=device)
    bounds = torch.empty((n, n_splits), dtype=dtype, device=device)
    launch(
        kernels.candidates_kernel, blocks * n_splits, 8, device, centred=centred, norms=norms, ids_out=candidates, bounds=bounds, n=n,
        width=width, n_splits=n_splits, per_split=-(-tiles // n_splits) * others, DTYPE=DTYPES[dtype], R=TOKENS, S=others, B=16, C=count,
    )  # fmt: skip
    return norms, candidates, bounds


def _by_sorting(tokens: Tensor, inverse: Tensor | None, k: int, sigma: float) -> tuple[Tensor, Tensor]:
    n, dtype = len(tokens), compute_dtype(tokens)
    x = tokens if inverse is None else tokens.to(dtype) * inverse.unsqueeze(1)
    neighbours = torch.empty((n, k), dtype=torch.int32, device=tokens.device)
    for start, stop in op.row_blocks(n, n, dtype.itemsize, BLOCK_BYTES):
        d2 = cost(x[None, start:stop], x[None], 2)[0].nan_to_num_(nan=torch.inf, posinf=torch.inf)
        d2[:, start:].diagonal().fill_(-1.0)  # the token itself comes first
        neighbours[start:stop] = d2.sort(dim=1, stable=True).indices[:, 1 : k + 1]
    weights = edge_weights(tokens, inverse, op._sources(neighbours), neighbours.view(-1), sigma)
    return neighbours, weights.view(n, k)


def edge_weights(tokens: Tensor, inverse: Tensor | None, sources: Tensor, targets: Tensor, sigma: float) -> Tensor:
    """kdfast::edge_weights: exp(-d2 / (2 sigma)) of given edges."""
    edges = len(sources)
    weights = torch.empty((edges,), dtype=compute_dtype(tokens), device=tokens.device)
    launch(
        kernels.weights_kernel, -(-edges // 16), 4, tokens.device, sources=sources, targets=targets, weights=weights, edges=edges,
        sigma=float(sigma), T=16, **_tokens(tokens, inverse, 16),
    )  # fmt: skip
    return weights


def edge_weights_backward(
    grad_weights: Tensor,
    weights: Tensor,
    tokens: Tensor,
    inverse: Tensor | None,
    sources: Tensor,
    targets: Tensor,
    sigma: float,
) -> Tensor:
    """kdfast::edge_weights_backward: each token's gradient from the edges of both its ends."""
    n, edges, dtype = len(tokens), len(sources), compute_dtype(tokens)
    ends = torch.cat((sources, targets))
    ordered, order = ends.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(n + 1, dtype=ordered.dtype, device=ends.device))
    grad = torch.empty(tokens.shape, dtype=tokens.dtype if inverse is None else dtype, device=tokens.device)
    shared = _tokens(tokens, inverse, 8)
    tiles = -(-tokens.shape[1] // shared["B"])
    launch(
        kernels.edge_gradient_kernel, n * tiles, warps(8 * shared["B"]), tokens.device, grad_weights=grad_weights.contiguous(),
        weights=weights.contiguous(), ends=ends, order=order, starts=starts, grad=grad, edges=edges, tiles=tiles, sigma=float(sigma), T=8,
        **shared,
    )  # fmt: skip
    if inverse is None:
        return grad
    # of x = r t, r = 1/|t|: r (g - x <x, g>), or r g where r is the constant of a token shorter than the floor
    x = tokens.to(dtype) * inverse.unsqueeze(1)
    along = torch.where(inverse < op.LARGEST_INVERSE, torch.linalg.vecdot(x, grad), 0.0)
    return ((grad - along.unsqueeze(1) * x) * inverse.unsqueeze(1)).to(tokens.dtype)


# ---------------------------------------------------------------- KL
_Edges = tuple[Tensor, Tensor, Tensor]  # rows, columns, weights


def _lists(name: str, rows: Tensor, columns: Tensor, weights: Tensor, nodes: int) -> dict[str, Tensor]:
    """Edges by row and column: keys row * nodes + column in ascending order, their edges, where each row begins."""
    keys, order = (rows.long() * nodes + columns).sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(nodes + 1, device=keys.device) * nodes)
    return {
        f"keys_{name}": keys,
        f"order_{name}": order,
        f"starts_{name}": starts,
        f"weights_{name}": weights.contiguous(),
    }


def _kl(student: _Edges, teacher: _Edges, nodes: int, teacher_first: bool, rows: Tensor | None = None,
        grad_rows: Tensor | None = None, grads: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:  # fmt: skip
    sides = [_lists(name, *edges, nodes) for name, edges in zip("ba" if teacher_first else "ab", (student, teacher))]
    first, second = reversed(grads) if teacher_first else grads
    launch(
        kernels.sparse_kl_kernel, -(-nodes // 16), 2, student[2].device, **sides[0], **sides[1], rows=rows, grad_rows=grad_rows,
        grad_a=first, grad_b=second, nodes=nodes, R=16, T=16,
    )  # fmt: skip


def sparse_softmax_kl(
    student_rows: Tensor, student_columns: Tensor, student_weights: Tensor, teacher_rows: Tensor, teacher_columns: Tensor,
    teacher_weights: Tensor, nodes: int, teacher_first: bool,
) -> Tensor:  # fmt: skip
    """kdfast::sparse_softmax_kl: rows [nodes]."""
    rows = torch.empty((nodes,), dtype=student_weights.dtype, device=student_weights.device)
    student, teacher = (
        (student_rows, student_columns, student_weights),
        (teacher_rows, teacher_columns, teacher_weights),
    )
    _kl(student, teacher, nodes, teacher_first, rows)
    return rows


def sparse_softmax_kl_backward(
    grad_rows: Tensor, student_rows: Tensor, student_columns: Tensor, student_weights: Tensor, teacher_rows: Tensor,
    teacher_columns: Tensor, teacher_weights: Tensor, nodes: int, teacher_first: bool, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kdfast::sparse_softmax_kl_backward: gradients of the weights; 0 for edges of rows that do not exist."""
    student, teacher = (
        (student_rows, student_columns, student_weights),
        (teacher_rows, teacher_columns, teacher_weights),
    )
    grads = [
        w.new_zeros(w.shape if need else (0,))
        for w, need in ((student_weights, need_student), (teacher_weights, need_teacher))
    ]
    wanted = (grads[0] if need_student else None, grads[1] if need_teacher else None)
    _kl(student, teacher, nodes, teacher_first, grad_rows=grad_rows.contiguous(), grads=wanted)
    return grads[0], grads[1]
