"""FF-G2M: an MLP learns from a graph network over the edges: agreement with neighbours, and the profile of differences along each edge.

Paper: Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs: An Effective GNN-to-MLP
Distillation Framework. Wu, Lin, Huang, Fan, Li; AAAI 2023; https://arxiv.org/abs/2305.10758
Based on: the authors' code, github.com/LirongWu/FF-G2M at 2e07b1e: src/models.py (edge_distribution_low, edge_distribution_high),
    src/train_and_eval.py, src/train.py.
Differs from the paper: it writes a temperature in both terms; as in the code the low-frequency one has none, `tau_low` gives it one. In
    the code's best_parameters.json `dropout_t` feeds the MLP and `dropout_s` the graph network.
Differs from the code: edges are (i, j) with the student at i and the teacher at j, said here and not left to the graph library's transposed
    adjacency; `normalise="node"` is an option beside the code's mean over edges, in which nodes with many edges weigh more.
Symbols: s, t [N, C] logits of student and teacher, t a constant; E1 [2, M1] edges with one loop (i, i) per node, E0 [2, M0] without
    loops; an edge counts as often as it is listed; I_L labelled nodes; lambda, tau.

    LFD   (1/M1) sum_{(i,j) in E1} KL( softmax(t_j) || softmax(s_i) )                           each neighbour's, and its own
    HFD   (1/M0) sum_{(i,j) in E0} KL( softmax(|t_i - t_j| / tau) || softmax(|s_i - s_j| / tau) )          no tau^2
    loss  lambda NLL(I_L) + (1 - lambda) (LFD + HFD)

What does not change is made once (`prepare_edges`). With w_e the weight of an edge, W_i = sum w_e and m_i = sum w_e softmax(t_j) / W_i over the
edges of i,    LFD = sum_i W_i KL(m_i || softmax(s_i)) + sum_e w_e KL(softmax(t_j) || m_i),    of which the last sum is a constant: a step costs
O(N C), whatever the number of edges. D_ij = D_ji, so HFD runs over pairs of nodes, each once, with the weights of its edges added up.
Inference: the MLP on features alone.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_number, check_pair
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss, divergence_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn.graph import with_loops
from kdfast.ops.token_graph import check_edges

NORMALISE, FORMS = ("edge", "node"), ("full", "low", "high", "node")
CHUNK = 1 << 16  # edges whose rows are held at a time while they are prepared


# ---------------------------------------------------------------- edges
def remove_loops(edge_index: Tensor, *, warn: bool = False) -> Tensor:
    """E0: the edges whose ends differ. warn: say so when there were others, where values can be read."""
    keep = edge_index[0] != edge_index[1]
    if warn and readable(keep) and not bool(keep.all()):
        warnings.warn("edge_index: loops (i, i) differ in nothing, they are left out", stacklevel=3)
    return edge_index[:, keep]


def add_loops(edge_index: Tensor, num_nodes: int) -> Tensor:
    """E1: the edges without their loops, then one loop per node."""
    return with_loops(remove_loops(edge_index), num_nodes)


def edge_weights(edge_index: Tensor, num_nodes: int, normalise: str = "edge") -> Tensor:
    """w_e [M], float64, adding up to 1: "edge", all equal; "node", equal for the nodes with an edge of their own, and for the edges of each."""
    number = edge_index.shape[1]
    if check_choice("normalise", normalise, NORMALISE) == "edge":
        return torch.full((number,), 1 / max(number, 1), dtype=torch.float64, device=edge_index.device)
    degree = torch.bincount(edge_index[0], minlength=num_nodes).double()
    return 1 / (degree[edge_index[0]] * (degree > 0).sum())


class NeighbourTargets(NamedTuple):
    """What LFD needs of teacher and edges: log m [N, C], W [N], and the constant [] that the student cannot reach."""

    log_mean: Tensor
    weight: Tensor
    spread: Tensor


class PairTargets(NamedTuple):
    """What HFD needs: pairs of nodes [2, P], their weights [P], |t_i - t_j| [P, C], and N."""

    pairs: Tensor
    weight: Tensor
    gaps: Tensor
    nodes: int


def prepare_low(
    teacher: Tensor, edge_index: Tensor, *, tau_low: float = 1.0, normalise: str = "edge"
) -> NeighbourTargets:
    """m, W and the constant of LFD over `edge_index` (E1, as it is), in float64 inside. Where a node has no edge W is 0."""
    check_number("tau_low", tau_low, low=0.0, open_low=True)
    n, dtype = _logits("teacher", teacher).shape[0], compute_dtype(teacher)
    _values(teacher, teacher < torch.inf, "finite logits (or -inf for a masked class)")
    i, j = check_edges(edge_index, n, teacher.device, "edge_index").long()
    if len(i) == 0:
        raise ValueError("edge_index: expected at least one edge for the low-frequency term, got none")
    q = torch.softmax(teacher.detach().double() / tau_low, -1)  # [N, C]
    w = edge_weights(torch.stack((i, j)), n, normalise)
    weight, sums = torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for a, b, part in zip(i.split(CHUNK), j.split(CHUNK), w.split(CHUNK)):
        weight = weight.index_add(0, a, part)
        sums = sums.index_add(0, a, part.unsqueeze(1) * q[b])
    mean = torch.where(weight.unsqueeze(1) > 0, sums / weight.unsqueeze(1), 1 / q.shape[1])
    entropy, of_mean = (torch.special.entr(p).sum(-1) for p in (q, mean))
    spread = (weight * of_mean).sum() - (w * entropy[j]).sum()
    return NeighbourTargets(mean.log().to(dtype), weight.to(dtype), spread.clamp_min(0).to(dtype))


def prepare_high(teacher: Tensor, edge_index: Tensor, *, normalise: str = "edge") -> PairTargets:
    """Pairs, weights and the teacher's differences of HFD over `edge_index` without its loops (a warning says so)."""
    n, dtype = _logits("teacher", teacher).shape[0], compute_dtype(teacher)
    _values(teacher, teacher.isfinite(), "finite logits, whose differences are compared")
    edges = remove_loops(check_edges(edge_index, n, teacher.device, "edge_index").long(), warn=True)
    if edges.shape[1] == 0:
        raise ValueError(
            "edge_index: expected at least one edge between two nodes for the high-frequency term, got none"
        )
    w = edge_weights(edges, n, normalise)
    low, high = edges.aminmax(dim=0)
    key, place = torch.unique(low * n + high, return_inverse=True)
    pairs = torch.stack((key // n, key % n))
    weight = torch.zeros(len(key), dtype=w.dtype, device=w.device).index_add(0, place, w)
    return PairTargets(pairs, weight.to(dtype), _gaps(teacher.detach().to(dtype), pairs), n)


def _gaps(logits: Tensor, pairs: Tensor) -> Tensor:
    return (logits[pairs[0]] - logits[pairs[1]]).abs()


def _logits(name: str, logits: Tensor) -> Tensor:
    check_pair(logits, logits, (name, name))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"{name}: expected logits [N, C] of at least two classes, got {tuple(logits.shape)}")
    return logits


def _values(teacher: Tensor, good: Tensor, expected: str) -> None:
    if readable(good) and not bool(good.all()):
        raise ValueError(f"teacher: expected {expected}, got {float(teacher[~good][0]):g}")


# ---------------------------------------------------------------- the terms
def low_frequency_term(student: Tensor, targets: NeighbourTargets, *, tau_low: float = 1.0) -> Tensor:
    """LFD from what `prepare_low` made at the same tau_low."""
    _same(student, targets.log_mean)
    kl = divergence_loss(
        student, tau_low * targets.log_mean, temperature=tau_low, weight=targets.weight, reduction="sum"
    )  # fmt: skip
    return kl + targets.spread


def high_frequency_term(student: Tensor, targets: PairTargets, *, tau: float = 1.5) -> Tensor:
    """HFD from what `prepare_high` made."""
    check_number("tau", tau, low=0.0, open_low=True)
    wanted = targets.nodes, targets.gaps.shape[1]
    if _logits("student", student).shape != wanted:
        raise ValueError(f"student: expected the teacher's logits' shape {wanted}, got {tuple(student.shape)}")
    gaps = _gaps(student.to(compute_dtype(student)), targets.pairs)
    return divergence_loss(gaps, targets.gaps, temperature=tau, weight=targets.weight, reduction="sum")


def low_frequency_kd(
    student: Tensor, teacher: Tensor, edge_index: Tensor, *, tau_low: float = 1.0, normalise: str = "edge"
) -> Tensor:
    """LFD over `edge_index` [2, M] as it is (E1: `add_loops`). For one step; in training call `prepare_low` once.

    Args: student, teacher: logits [N, C]; the teacher is a constant. tau_low: divides both logits, without tau^2.

    >>> loss = low_frequency_kd(s, t, add_loops(edge_index, len(s)))
    """
    _same(student, teacher)
    return low_frequency_term(
        student, prepare_low(teacher, edge_index, tau_low=tau_low, normalise=normalise), tau_low=tau_low
    )


def high_frequency_kd(
    student: Tensor, teacher: Tensor, edge_index: Tensor, *, tau: float = 1.5, normalise: str = "edge"
) -> Tensor:
    """HFD over `edge_index` [2, M] without its loops, of which a warning tells."""
    _same(student, teacher)
    return high_frequency_term(student, prepare_high(teacher, edge_index, normalise=normalise), tau=tau)


def _same(student: Tensor, teacher: Tensor) -> None:
    if _logits("student", student).shape != teacher.shape:
        raise ValueError(f"teacher: expected the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")


# ---------------------------------------------------------------- the total
class EdgeTargets(NamedTuple):
    """Both terms' targets; None leaves a term out."""

    low: NeighbourTargets | None
    high: PairTargets | None


def prepare_edges(
    teacher: Tensor, edge_index: Tensor, *, form: str = "full", tau_low: float = 1.0, normalise: str = "edge", no_edges: str = "raise"
) -> EdgeTargets:  # fmt: skip
    """E0 and E1 of `edge_index` (its loops are left out, one per node is added), and what both terms need of them.

    Args:
        form: "full"; "low" or "high", one term alone; "node": LFD of the loops alone, which is node-wise KD, the code's ablation.
        no_edges: "skip" leaves HFD out of a graph without edges; "raise".
    """
    check_choice("form", form, FORMS)
    check_choice("no_edges", no_edges, ("raise", "skip"))
    n = _logits("teacher", teacher).shape[0]
    edges = remove_loops(check_edges(edge_index, n, teacher.device, "edge_index").long())
    low = high = None
    if form != "high":
        low_edges = add_loops(edges[:, :0] if form == "node" else edges, n)
        low = prepare_low(teacher, low_edges, tau_low=tau_low, normalise=normalise)
    if form in ("full", "high") and (edges.shape[1] > 0 or no_edges == "raise"):
        high = prepare_high(teacher, edges, normalise=normalise)
    return EdgeTargets(low, high)


def ff_g2m_loss(
    student: Tensor,
    targets: EdgeTargets,
    labels: Tensor,
    labelled: Tensor | None = None,
    *,
    tau: float = 1.5,
    tau_low: float = 1.0,
    lam: float = 0.1,
    ignore_index: int = -100,
) -> LossOutput:
    """lambda NLL + (1 - lambda) (LFD + HFD).

    Args:
        student: logits [N, C]. targets: `prepare_edges`, at the same tau_low. labels: [N] integers in [0, C) or `ignore_index`.
        labelled: I_L, numbers of nodes [K]; None: all nodes that have a label.
    Returns:
        LossOutput(loss, {"label_nll", "low_frequency", "high_frequency"}), unweighted; a term that is left out is 0.

    >>> targets = prepare_edges(teacher_logits, edge_index)
    >>> loss, parts = ff_g2m_loss(mlp(x), targets, labels, labelled)
    """
    lam = check_number("lam", lam, low=0.0, high=1.0)
    check_number("tau", tau, low=0.0, open_low=True)
    _logits("student", student)
    chosen = (student, labels) if labelled is None else (student[labelled], labels[labelled])
    has_label = chosen[1] != ignore_index
    if has_label.numel() == 0 or (readable(has_label) and not bool(has_label.any())):
        raise ValueError("labelled: expected at least one labelled node, got none")
    zero = student.new_zeros((), dtype=compute_dtype(student))
    nll = cross_entropy_loss(*chosen, ignore_index=ignore_index)
    low = zero if targets.low is None else low_frequency_term(student, targets.low, tau_low=tau_low)
    high = zero if targets.high is None else high_frequency_term(student, targets.high, tau=tau)
    parts = {"label_nll": nll, "low_frequency": low, "high_frequency": high}
    # a term of weight 0 is left out: 0 times an infinite divergence is not 0
    terms = [weight * term for weight, term in ((lam, nll), (1 - lam, low), (1 - lam, high)) if weight > 0]
    return LossOutput(torch.stack(terms).sum(), {name: part.detach() for name, part in parts.items()})


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Full batches of one graph, {"features" [N, D], "edges" [2, M], "labels" [N]}; the teacher is asked once, before the first step.

    Both models are called with features and edges; the student leaves the edges alone. A node without a label has `ignore_index`. The
    stopping rule (50 epochs without a gain on the validation nodes, the best epoch counts) is `Distiller.fit(patience=)`.
    Published: Adam, weight decay 5e-4, at most 500 epochs; teacher at 0.01. By data set and teacher: hidden width 128 to 2048, tau 1.0 to
    1.5, lambda 0.0 (all of Pubmed) to 0.5, 3 layers on Cora and Amazon-Photo, rate 0.01 (Amazon-Photo 0.001).

    Args: those of `prepare_edges` and `ff_g2m_loss`.

    >>> teacher = GCN(in_features, classes)     # kdfast.nn.graph, trained on its labels with the same `fit`
    >>> run = Distiller(NodeMLP(in_features, classes), teacher, "ff_g2m")
    >>> run.fit(DataLoader(graph, 1, collate_fn=as_read), 500, eval_loader=validation, patience=50)
    """

    columns = ("edges",)
    teacher_each_step = False

    def __init__(
        self, *, tau: float = 1.5, tau_low: float = 1.0, lam: float = 0.1, form: str = "full", normalise: str = "edge",
        no_edges: str = "raise", ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("tau", tau), ("tau_low", tau_low)):
            check_number(name, value, low=0.0, open_low=True)
        check_choice("form", form, FORMS)
        check_choice("normalise", normalise, NORMALISE)
        check_choice("no_edges", no_edges, ("raise", "skip"))
        self.edges: dict[str, Any] = {"form": form, "tau_low": tau_low, "normalise": normalise, "no_edges": no_edges}
        self.options: dict[str, Any] = {
            "tau": tau, "tau_low": tau_low, "lam": check_number("lam", lam, low=0.0, high=1.0), "ignore_index": ignore_index,
        }  # fmt: skip
        # not saved: they follow from the teacher and the graph, which are there again when a run goes on
        self.targets: EdgeTargets | None = None

    def start(self, setup: Setup) -> None:
        context = next(setup.sweep("train"))
        assert context.labels is not None
        if not bool((context.labels != self.options["ignore_index"]).any()):
            raise ValueError("labels: expected at least one labelled node, got none")
        self.prepare_targets(context.teacher, context.batch["edges"])

    def prepare_targets(self, teacher: Tensor, edges: Tensor) -> None:
        """For your own loop: the teacher's logits [N, C] of all nodes and the edges [2, M]."""
        self.targets = prepare_edges(teacher, edges, **self.edges)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        if self.targets is None:
            raise ValueError(
                "targets: not there yet; Distiller.fit makes them, in your own loop call method.prepare_targets(logits, edges)"
            )
        return ff_g2m_loss(context.student, self.targets, context.labels, **self.options)
