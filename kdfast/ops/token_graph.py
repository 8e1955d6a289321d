"""Token graphs: k nearest neighbours with Gaussian weights, and the KL between the graphs of two models.

    d2_ij = |x_i - x_j|^2          A_ij = exp(-d2_ij / (2 sigma)) on the edges of the graph, else 0     (sigma is not squared)
    N_k(i): the k nearest other tokens, ties: lower index. "row": j in N_k(i) is an edge (i, j); "column": i in N_k(j) is.
    P_i = softmax_j(A_ij) over ALL n columns: an absent edge counts as exp(0) = 1, and so does j = i
    rows_i = KL(P_i || Q_i), P of the student, Q of the teacher ("student_teacher"), or KL(Q_i || P_i)

Neighbours are chosen without derivative; A is differentiated at both ends:

    dA_ij/dx_i = -(x_i - x_j) A_ij / sigma = -dA_ij/dx_j

No n x n matrix is needed: with U_i the union of both models' edges of row i, off U_i both weights
are 0, so the softmaxes there are 1/Z and 1/Z'. csrc/sparse_kl.cpp has the sums, all of non-negative terms.

Fused selection: centred tokens, Gram matrix by torch.mm on blocks of rows, upper half only (it is symmetric), 2k candidates
per token; their distances are then computed directly, and the choice is proved row by row with the error bound of the
product. A row without proof looks at all tokens. So the neighbours are those of exact distances, always. On a GPU one kernel
makes the products and keeps the candidates (kdfast/triton/token_graph.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_float_tensor, check_int, check_number, check_pair
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import address, applied, compute_dtype, direct, first_derivative_only, lib, readable
from kdfast.ops.pairwise import NORM_FLOOR, row_blocks
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

ORIENTATIONS = ("row", "column")
DIRECTIONS = ("student_teacher", "teacher_student")
# Up to so many tokens all distances are computed directly: the product and its bookkeeping cost more.
DIRECT_TOKENS = 128
REFERENCE_BYTES = 8 << 20  # of differences that the reference holds at a time
LARGEST_INVERSE = (1 - 1e-5) / NORM_FLOOR  # factors above belong to tokens shorter than the floor


# ---------------------------------------------------------------- references: the definitions, with every option
def knn_graph_reference(tokens: Tensor, k: int, *, sigma: float = 1.0) -> tuple[Tensor, Tensor]:
    """`knn_graph` in plain torch: exact distances, a stable sort per row."""
    x = tokens.to(compute_dtype(tokens))
    n = len(x)
    with torch.no_grad():
        chosen = []
        step = max(1, REFERENCE_BYTES // (n * x.shape[1] * x.element_size() + 1))
        for start in range(0, n, step):  # [rows, n, D] at a time
            stop = min(start + step, n)
            d2 = (x[start:stop].unsqueeze(1) - x.unsqueeze(0)).square_().sum(-1)
            order = (
                d2.nan_to_num(nan=torch.inf, posinf=torch.inf).sort(dim=-1, stable=True).indices
            )  # NaN ranks with infinity
            others = order != torch.arange(start, stop, device=x.device).unsqueeze(1)
            chosen.append(order[others].reshape(stop - start, n - 1)[:, :k])
        neighbours = torch.cat(chosen)
    d2 = (x.unsqueeze(1) - x[neighbours]).square().sum(-1)  # [n, k]
    return neighbours.to(torch.int32), (-d2 / (2 * sigma)).exp()


def token_graph_kl_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int | None = None,
    sigma: float = 1.0,
    orientation: str = "row",
    direction: str = "student_teacher",
    normalize: bool = False,
    edges: Tensor | None = None,
) -> Tensor:
    """`token_graph_kl` in plain torch, from both dense n x n weight matrices."""
    dtype = compute_dtype(student, teacher)
    log_softmaxes = []
    for tokens in (student, teacher):
        x = F.normalize(tokens.to(dtype), dim=-1, eps=NORM_FLOOR) if normalize else tokens.to(dtype)
        sources, targets, weights = _reference_edges(x, k, sigma, edges)
        rows, columns = (sources, targets) if orientation == "row" else (targets, sources)
        dense = x.new_zeros(len(x), len(x)).index_put((rows.long(), columns.long()), weights)
        log_softmaxes.append(dense.log_softmax(-1))
    log_p, log_q = log_softmaxes if direction == "student_teacher" else log_softmaxes[::-1]
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _reference_edges(x: Tensor, k: int | None, sigma: float, edges: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if edges is None:
        assert k is not None
        neighbours, weights = knn_graph_reference(x, k, sigma=sigma)
        return _sources(neighbours), neighbours.reshape(-1), weights.reshape(-1)
    d2 = (x[edges[0].long()] - x[edges[1].long()]).square().sum(-1)
    return edges[0], edges[1], (-d2 / (2 * sigma)).exp()


def _sources(neighbours: Tensor) -> Tensor:
    """The token each entry of neighbours [n, k] belongs to, [n k]."""
    n, k = neighbours.shape
    return torch.arange(n, dtype=torch.int32, device=neighbours.device).repeat_interleave(k)


# ---------------------------------------------------------------- registration
# inverse [n]: factors of the tokens that normalise them; the backward knows that they depend on the tokens.
lib.define("knn_graph(Tensor tokens, Tensor? inverse, int k, float sigma) -> (Tensor, Tensor)")
lib.define("edge_weights(Tensor tokens, Tensor? inverse, Tensor sources, Tensor targets, float sigma) -> Tensor")
lib.define(
    "edge_weights_backward(Tensor grad_weights, Tensor weights, Tensor tokens, Tensor? inverse, Tensor sources, "
    "Tensor targets, float sigma) -> Tensor"
)
_KL_EDGES = (
    "Tensor student_rows, Tensor student_columns, Tensor student_weights, "
    "Tensor teacher_rows, Tensor teacher_columns, Tensor teacher_weights, int nodes, bool teacher_first"
)
lib.define(f"sparse_softmax_kl({_KL_EDGES}) -> Tensor")
lib.define(
    f"sparse_softmax_kl_backward(Tensor grad_rows, {_KL_EDGES}, bool need_student, bool need_teacher) -> (Tensor, Tensor)"
)


@torch.library.register_fake("kdfast::knn_graph")
def _(tokens, inverse, k, sigma):
    shape = (tokens.shape[0], k)
    return tokens.new_empty(shape, dtype=torch.int32), tokens.new_empty(shape, dtype=compute_dtype(tokens))


@torch.library.register_fake("kdfast::edge_weights")
def _(tokens, inverse, sources, targets, sigma):
    return tokens.new_empty(sources.shape, dtype=compute_dtype(tokens))


@torch.library.register_fake("kdfast::edge_weights_backward")
def _(grad_weights, weights, tokens, inverse, sources, targets, sigma):
    return tokens.new_empty(tokens.shape)


@torch.library.register_fake("kdfast::sparse_softmax_kl")
def _(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first):
    return sweights.new_empty(nodes)


@torch.library.register_fake("kdfast::sparse_softmax_kl_backward")
def _(grad_rows, srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first, need_student, need_teacher):
    return (
        sweights.new_empty(sweights.shape if need_student else (0,)),
        tweights.new_empty(tweights.shape if need_teacher else (0,)),
    )


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one product in torch.mm: it may be told to round float32 operands to bfloat16."""
    if dtype == torch.float64:
        return 2.0**-53
    return 2.0**-24 if torch.get_float32_matmul_precision() == "highest" else 2.0**-8


@torch.library.impl(lib, "knn_graph", "CPU")
def _knn_graph_cpu(tokens, inverse, k, sigma):
    x = tokens.to(compute_dtype(tokens)).contiguous()
    n, width = x.shape
    f64 = x.dtype == torch.float64
    candidates = min(2 * k, n - 1) if n > DIRECT_TOKENS and n - 1 > 2 * k else 0
    norms = keys = ids = counts = None
    if candidates:
        norms, keys, ids, counts = _candidates(x, inverse, candidates)
    neighbours = torch.empty(n, k, dtype=torch.int32)
    weights = x.new_empty(n, k)
    slack = (width + 32) * 2.0 ** (-53 if f64 else -24)
    _core.core.graph_rank(
        f64, address(x), address(inverse), n, width, k, candidates, address(norms), address(keys), address(ids), address(counts), slack, sigma,
        address(neighbours), address(weights),
    )  # fmt: skip
    return neighbours, weights


def centred_tokens(x: Tensor, inverse: Tensor | None, rounding: float) -> tuple[Tensor, Tensor]:
    """Scaled tokens around their mean, and their squared norms N less the error bound of what is computed from them.

    With u the rounding of the products, a computed <x_i, x_j> is off by at most D u |x_i| |x_j|, a squared norm by D u |x|^2,
    and scaling and centring move each token by a few u |x|. Shrinking the norms by (2 D + 32) u covers all of it, since
    2 |x_i| |x_j| <= |x_i|^2 + |x_j|^2: with key_ij = N_j - 2 <x_i, x_j>, key_ij + N_i is never above the true squared distance.
    """
    if inverse is None:
        centred = x - x.mean(0)
    else:
        centred = x * inverse.unsqueeze(1)
        centred.sub_(centred.mean(0))
    norms = torch.linalg.vector_norm(centred, dim=1).square_()
    return centred, norms.mul_(max(0.0, 1 - (2 * x.shape[1] + 32) * rounding))


def _candidates(x: Tensor, inverse: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` tokens that may be nearest to each token, judged by lower bounds of the distances."""
    n = len(x)
    centred, norms = centred_tokens(x, inverse, _rounding(x.dtype))
    keys, ids = x.new_empty(n, count), torch.empty(n, count, dtype=torch.int32)
    counts = torch.zeros(n, dtype=torch.int32)
    blocks = row_blocks(n, n, x.element_size())
    buffer = x.new_empty(max((stop - start) * (n - start) for start, stop in blocks))
    for start, stop in blocks:
        rows, columns = stop - start, n - start  # the upper half: columns before `start` were rows of earlier blocks
        gram = buffer[: rows * columns].view(rows, columns)
        torch.mm(centred[start:stop], centred[start:].T, out=gram)
        _core.core.graph_select(
            x.dtype == torch.float64, address(gram), start, rows, columns, address(norms), count, address(keys),
            address(ids), address(counts),
        )  # fmt: skip
    return norms, keys, ids, counts


@torch.library.impl(lib, "edge_weights", "CPU")
def _edge_weights_cpu(tokens, inverse, sources, targets, sigma):
    x = tokens.to(compute_dtype(tokens)).contiguous()
    weights = x.new_empty(len(sources))
    if len(sources):
        _core.core.edge_weights(
            x.dtype == torch.float64, address(x), address(inverse), x.shape[1], len(sources), address(sources), address(targets), sigma,
            address(weights),
        )  # fmt: skip
    return weights


@torch.library.impl(lib, "edge_weights_backward", "CPU")
def _edge_weights_backward_cpu(grad_weights, weights, tokens, inverse, sources, targets, sigma):
    x = tokens.to(compute_dtype(tokens)).contiguous()
    grad = torch.empty_like(x)
    _core.core.edge_gradient(
        x.dtype == torch.float64, address(x), address(inverse), LARGEST_INVERSE, *x.shape, len(sources), address(sources), address(targets), address(weights),
        address(grad_weights.contiguous()), sigma, address(grad),
    )  # fmt: skip
    return grad.to(tokens.dtype)


def _kl_call(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first, outputs) -> None:
    _core.core.sparse_softmax_kl(
        sweights.dtype == torch.float64, teacher_first, nodes,
        len(srows), address(srows), address(scols), address(sweights),
        len(trows), address(trows), address(tcols), address(tweights),
        *(address(tensor) for tensor in outputs),
    )  # fmt: skip


@torch.library.impl(lib, "sparse_softmax_kl", "CPU")
def _sparse_softmax_kl_cpu(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first):
    rows = sweights.new_empty(nodes)
    _kl_call(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first, (rows, None, None, None))
    return rows


@torch.library.impl(lib, "sparse_softmax_kl_backward", "CPU")
def _sparse_softmax_kl_backward_cpu(grad_rows, srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first,
                                    need_student, need_teacher):  # fmt: skip
    grads = [w.new_empty(w.shape if need else (0,)) for w, need in ((sweights, need_student), (tweights, need_teacher))]
    outputs = (None, grad_rows.contiguous(), *grads)
    _kl_call(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first, outputs)
    return grads[0], grads[1]


for _name in ("knn_graph", "edge_weights", "edge_weights_backward", "sparse_softmax_kl", "sparse_softmax_kl_backward"):
    register(_name, "token_graph", _name)


# ---------------------------------------------------------------- autograd
_knn_op = direct(torch.ops.kdfast.knn_graph.default, _knn_graph_cpu)
_weights_op = direct(torch.ops.kdfast.edge_weights.default, _edge_weights_cpu)
_weights_backward_op = direct(torch.ops.kdfast.edge_weights_backward.default, _edge_weights_backward_cpu)
_kl_op = direct(torch.ops.kdfast.sparse_softmax_kl.default, _sparse_softmax_kl_cpu)
_kl_backward_op = direct(torch.ops.kdfast.sparse_softmax_kl_backward.default, _sparse_softmax_kl_backward_cpu)


class _KnnGraph(torch.autograd.Function):
    """Neighbours (not differentiable) and their weights."""

    @staticmethod
    def forward(tokens, inverse, k, sigma):
        return _knn_op(tokens, inverse, k, sigma)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, inverse, _, ctx.sigma = inputs
        ctx.save_for_backward(tokens, inverse, *output)
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    @first_derivative_only
    def backward(ctx, _, grad_weights):
        tokens, inverse, neighbours, weights = ctx.saved_tensors
        flat = (grad_weights.reshape(-1), weights.reshape(-1))
        ends = (_sources(neighbours), neighbours.reshape(-1))
        grad = _weights_backward_op(*flat, tokens, inverse, *ends, ctx.sigma)
        return grad, None, None, None


class _EdgeWeights(torch.autograd.Function):
    @staticmethod
    def forward(tokens, inverse, sources, targets, sigma):
        return _weights_op(tokens, inverse, sources, targets, sigma)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.sigma = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_weights):
        return _weights_backward_op(grad_weights, *ctx.saved_tensors, ctx.sigma), None, None, None, None


class _SparseKL(torch.autograd.Function):
    @staticmethod
    def forward(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first):
        return _kl_op(srows, scols, sweights, trows, tcols, tweights, nodes, teacher_first)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows):
        needs = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
        backward = _kl_backward_op
        student, teacher = backward(grad_rows, *ctx.saved_tensors, *ctx.options, *needs)
        return None, None, student if needs[0] else None, None, None, teacher if needs[1] else None, None, None


_apply_knn, _apply_weights, _apply_kl = applied(_KnnGraph), applied(_EdgeWeights), applied(_SparseKL)


# ---------------------------------------------------------------- public
def knn_graph(tokens: Tensor, k: int, *, sigma: float = 1.0, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest other tokens of every token, and the weights of the edges to them.

        weights_ij = exp(-|x_i - x_j|^2 / (2 sigma))

    Args:
        tokens: [n, D], n >= 2; float16, bfloat16, float32 or float64, any strides.
        k: neighbours per token, 1 <= k <= n - 1. sigma > 0, not squared.
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        neighbours int32 [n, k], nearest first, equal distances: lower index first; NaN distances rank with infinite ones.
        weights [n, k], float32 (float64 for float64 input).
    Differentiable: the weights in the tokens, at both ends of an edge, once; the choice of neighbours is not.
    Raises:
        ValueError: k out of range (both numbers are named), n < 2, D = 0, sigma <= 0.

    >>> neighbours, weights = knn_graph(torch.randn(100, 16), 8)
    """
    _check_tokens("tokens", tokens)
    _check_k(k, len(tokens))
    check_number("sigma", sigma, low=0.0, open_low=True)
    if _choose("knn_graph", (tokens,), backend) == "reference":
        return knn_graph_reference(tokens, k, sigma=sigma)
    return _apply_knn(tokens, None, k, float(sigma))


def token_graph_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int | None = None,
    sigma: float = 1.0,
    orientation: str = "row",
    direction: str = "student_teacher",
    normalize: bool = False,
    edges: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL between the token graphs of two models, one row per token; the equations stand at the top of this module.

    Args:
        student: [n, Ds], teacher: [n, Dt]: the same n >= 2 tokens in the same order; widths may differ.
        k: each model's own k nearest neighbours make its graph; 1 <= k <= n - 1.
        edges: instead of k, one graph for both models: [2, M] integers, row 0 the row of A, row 1 the column, each edge once.
        sigma: > 0, not squared. orientation: "row" (k entries in every row) or "column" (the transposed graph).
        direction: "student_teacher", KL(P || Q), as printed in the paper; or "teacher_student", KL(Q || P).
        normalize: L2-normalise the tokens first (norms floored at 1e-12). Raw tokens are often so far apart that all weights
            underflow to 0, and the loss with them.
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        rows [n], float32 (float64 for float64 input), never negative.
    Differentiable in student and teacher, once; `backend="reference"` gives every derivative. Memory O(n (k + D)) and one
    block of scores.
    Raises:
        ValueError: different n, k out of range, neither or both of k and edges, node numbers out of range or edges listed
            twice (on the CPU).
    Source: the local term of TRG (arXiv 2306.12442).

    >>> rows = token_graph_kl(student, teacher.detach(), k=8, normalize=True)
    """
    check_pair(student, teacher)
    _check_tokens("student", student)
    _check_tokens("teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(f"teacher: expected the {len(student)} tokens of student, got {len(teacher)}")
    if (k is None) == (edges is None):
        raise ValueError(f"k: expected k or edges, got {'neither' if k is None else 'both'}")
    if edges is None:
        _check_k(k, len(student))
    else:
        edges = check_edges(edges, len(student), student.device).to(torch.int32).contiguous()
    check_number("sigma", sigma, low=0.0, open_low=True)
    check_choice("orientation", orientation, ORIENTATIONS)
    check_choice("direction", direction, DIRECTIONS)
    chosen = _choose("token_graph_kl", (student, teacher), backend)
    if chosen == "reference":
        return token_graph_kl_reference(
            student, teacher, k=k, sigma=sigma, orientation=orientation, direction=direction, normalize=normalize, edges=edges
        )  # fmt: skip
    dtype = compute_dtype(student, teacher)
    graphs: list[Tensor] = []
    for tokens in (student, teacher):
        tokens = tokens.to(dtype) if dtype == torch.float64 else tokens
        inverse = None
        if normalize:
            inverse = torch.linalg.vector_norm(tokens.detach(), dim=1, dtype=dtype).clamp_min(NORM_FLOOR).reciprocal()
        if edges is None:
            neighbours, weights = _apply_knn(tokens, inverse, k, float(sigma))
            ends = [_sources(neighbours), neighbours.reshape(-1)]
        else:
            ends = [edges[0], edges[1]]
            weights = _apply_weights(tokens, inverse, *ends, float(sigma))
        graphs += [*(ends if orientation == "row" else ends[::-1]), weights.reshape(-1)]
    return _apply_kl(*graphs, len(student), direction == "teacher_student")


def _check_tokens(name: str, tokens: Tensor) -> None:
    check_float_tensor(name, tokens)
    if tokens.dim() != 2 or tokens.shape[0] < 2 or tokens.shape[1] < 1:
        raise ValueError(f"{name}: expected [n, D] with n >= 2 and D >= 1, got {tuple(tokens.shape)}")


def _check_k(k: int | None, n: int) -> None:
    if not 1 <= check_int("k", k) <= n - 1:
        raise ValueError(f"k: expected 1 to {n - 1} neighbours among {n} tokens, got {k}")


def check_edges(edges: Tensor, n: int, device: torch.device, name: str = "edges") -> Tensor:
    """`edges` as they are: [2, M] numbers of n nodes, looked at on the CPU only; the repeats by the core."""
    if not isinstance(edges, Tensor) or edges.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name}: expected an int64 or int32 Tensor, got {getattr(edges, 'dtype', type(edges).__name__)}"
        )
    if edges.dim() != 2 or edges.shape[0] != 2:
        raise ValueError(f"{name}: expected [2, M], got {tuple(edges.shape)}")
    if edges.device != device:
        raise ValueError(f"{name}: expected the device of the tokens ({device}), got {edges.device}")
    if edges.numel() and (readable(edges) or debugging()):
        low, high = edges.aminmax()
        if low < 0 or high >= n:
            raise ValueError(f"{name}: expected node numbers in [0, {n}), got {int(low)} to {int(high)}")
    return edges


def _choose(op: str, tensors: tuple[Tensor, ...], backend: str | None) -> str:
    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        device = tensors[0].device
        return None if device.type in ("cpu", "meta") else f"the tensors are on {device}"

    return choose(op, backend, {"cpu": cpu, "triton": lambda: triton_reason(op, *tensors)}, tensors)
