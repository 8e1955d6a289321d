"""Data pruning: scores of how hard samples are, and the choice of a part of the data by them, or at random.

Scores, higher is harder:
    EL2N         mean over R short trainings of || softmax(z_i) - onehot(y_i) ||                    Paul et al. 2021
    GraNd        mean of || gradient of CE_i by the parameters ||; last layer: the error norm times sqrt(||h_i||^2 + 1)
    forgetting   epochs in which a sample is wrong after it was right; never right ranks above all   Toneva et al. 2019
    memorisation mean correctness in the trainings that had sample i, minus that in those that had not   Feldman and Zhang 2020
    prototypes   distance of an embedding to its nearest k-means centre, without labels               Sorscher et al. 2022
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number

MODES = ("random", "hard", "easy")


# ---------------------------------------------------------------- scores
def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over R trainings of || softmax(z_i) - onehot(y_i) ||_2: [n] float64 of logits [R, n, C] (or [n, C]), labels [n].

    >>> el2n(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.7071], dtype=torch.float64)
    """
    return _error_norms(logits, labels).mean(0)


def grand_last_layer(features: Tensor, logits: Tensor, labels: Tensor, *, bias: bool = True) -> Tensor:
    """GraNd of the last layer: ||softmax(z_i) - onehot(y_i)|| sqrt(||h_i||^2 + 1), without the 1 if it has no bias; [n] float64.

    Args: features: h [R, n, D] (or [n, D]), inputs of the last layer. logits: [R, n, C] alike. labels: [n].
    """
    check_float_tensor("features", features)
    errors = _error_norms(logits, labels)
    if features.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"features: expected {tuple(logits.shape[:-1])} rows as logits, got {tuple(features.shape)}")
    h = features.detach().double().square().sum(-1) + (1.0 if bias else 0.0)
    return (errors * h.sqrt().reshape(errors.shape)).mean(0)


def grand(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """|| gradient of CE(model(x_i), y_i) by all trainable parameters || of each sample [n], float64; the model in evaluation mode."""
    was, parameters = model.training, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in (*model.named_parameters(), *model.named_buffers()) if name not in parameters}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**rest, **weights}, (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, y.unsqueeze(0))

    model.eval()
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels.long())
    model.train(was)
    return torch.stack([g.double().flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def _error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """|| softmax(z) - onehot(y) || [R, n] float64."""
    check_float_tensor("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: expected [R, n, C] or [n, C], got shape {tuple(logits.shape)}")
    check_labels(labels, logits.shape[-2:-1], logits.device)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels: expected integers in [0, {logits.shape[-1]}), got {int(labels.min())} to {int(labels.max())}"
        )
    p = torch.softmax(logits.detach().double(), -1)
    p = p - torch.nn.functional.one_hot(labels.long(), logits.shape[-1])
    return p.norm(dim=-1).reshape(-1, len(labels))


class ForgettingTracker(nn.Module):
    """Counts, for each of n samples, the epochs in which it is wrong after it was right; buffers, so that a run can go on.

    >>> tracker = ForgettingTracker(2)
    >>> for correct in ([True, False], [False, False]):
    ...     tracker.update(torch.arange(2), torch.tensor(correct))
    >>> tracker.scores().tolist()
    [1.0, inf]
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        check_int("n", n, low=1)
        self.events: Tensor
        self.previous: Tensor
        self.learned: Tensor
        self.seen: Tensor
        self.register_buffer("events", torch.zeros(n, dtype=torch.int32))
        self.register_buffer("previous", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("learned", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(n, dtype=torch.uint8))  # up to 2

    @torch.no_grad()
    def update(self, indices: Tensor, correct: Tensor) -> None:
        """One look at samples `indices` [B], each at most once: `correct` [B] bool (or 0 and 1)."""
        check_indices("indices", indices, len(self.events))
        correct = correct.bool()
        if correct.shape != indices.shape:
            raise ValueError(f"correct: expected shape {tuple(indices.shape)}, got {tuple(correct.shape)}")
        self.events[indices] += (self.previous[indices] & ~correct).int()  # nothing was right before the first look
        self.previous[indices] = correct
        self.learned[indices] |= correct
        self.seen[indices] = (self.seen[indices] + 1).clamp_max(2)

    @property
    def never_learned(self) -> Tensor:
        return ~self.learned

    def scores(self) -> Tensor:
        """[n] float64: the events; +inf for a sample that was never right. ValueError before the second look at every sample."""
        if bool((self.seen < 2).any()):
            raise ValueError("update: expected at least 2 epochs of every sample before the scores")
        return torch.where(self.learned, self.events.double(), math.inf)


def memorisation(included: Tensor, correct: Tensor) -> Tensor:
    """mean of correct over the runs that had sample i, minus the mean over those that had not: [n] float64.

    Args: included, correct: [R, n] bool or 0 and 1. ValueError where all runs, or none, had a sample.
    """
    if included.dim() != 2 or included.shape != correct.shape:
        raise ValueError(f"correct: expected [R, n] as included {tuple(included.shape)}, got {tuple(correct.shape)}")
    inside, right = included.double(), correct.double()
    counts = inside.sum(0), (1 - inside).sum(0)
    empty = ((counts[0] == 0) | (counts[1] == 0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"included: expected runs with and without every sample, not so for {empty[:8]}")
    return (right * inside).sum(0) / counts[0] - (right * (1 - inside)).sum(0) / counts[1]


def prototype_distance(
    embeddings: Tensor, k: int, *, iterations: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Distance of each embedding [n, D] to the nearest of k centres that k-means finds (k-means++ start): [n] float64."""
    check_float_tensor("embeddings", embeddings)
    x = embeddings.detach().double()
    if not 1 <= check_int("k", k) <= len(x):
        raise ValueError(f"k: expected 1 to {len(x)} centres, got {k}")
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < k:
        nearest = torch.cdist(x, centres).amin(1).square()
        far = nearest if bool((nearest > 0).any()) else torch.ones_like(nearest)
        centres = torch.cat((centres, x[torch.multinomial(far, 1, generator=generator)]))
    for _ in range(iterations):
        owner = torch.cdist(x, centres).argmin(1)
        counts = owner.bincount(minlength=k)
        moved = torch.zeros_like(centres).index_add(0, owner, x) / counts.clamp_min(1).unsqueeze(1)
        moved = torch.where((counts > 0).unsqueeze(1), moved, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cdist(x, centres).amin(1)


# ---------------------------------------------------------------- selection
def select(
    scores: Tensor | None = None, n: int | None = None, *, keep: float = 0.2, mode: str = "random", stratify: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """The round(keep n) kept indices, ascending: random ones, or those with the highest ("hard") or lowest ("easy") scores.

    Args:
        scores: [n], +inf allowed; n: the number of samples where there are none. keep: f in (0, 1]; halves are rounded to even.
        mode: "random", "hard", "easy"; of equal scores the lower index is kept first. stratify: labels [n], then round(f n_c) of
            each class. generator: of "random".
    Raises:
        ValueError: f outside (0, 1], nothing kept, a class without a kept sample (named), NaN scores, lengths that differ.

    >>> select(torch.tensor([3.0, 1.0, 2.0, 3.0]), keep=0.5, mode="hard").tolist()
    [0, 3]
    """
    check_choice("mode", mode, MODES)
    check_number("keep", keep, low=0.0, high=1.0, open_low=True)
    if scores is None and (mode != "random" or n is None):
        raise ValueError(f"scores: needed with mode={mode!r}" if mode != "random" else "n: needed without scores")
    if scores is not None:
        if scores.dim() != 1 or (n is not None and len(scores) != n):
            raise ValueError(f"scores: expected shape ({'n' if n is None else n},), got {tuple(scores.shape)}")
        if scores.is_floating_point() and bool(scores.isnan().any()):
            raise ValueError(f"scores: expected no NaN, got one at {int(scores.isnan().int().argmax())}")
        n = len(scores)
    assert n is not None
    if mode == "random" or scores is None:
        order = torch.randperm(n, generator=generator)
    else:
        order = scores.argsort(descending=mode == "hard", stable=True).cpu()
    if stratify is None:
        groups = {"all samples": order}
    else:
        labels = check_labels(stratify, torch.Size((n,)), stratify.device, "stratify").cpu()
        groups = {f"class {int(c)}": order[labels[order] == c] for c in labels.unique()}
    kept = []
    for name, rows in groups.items():
        if (count := round(keep * len(rows))) == 0:
            raise ValueError(f"keep: {keep} of {len(rows)} samples rounds to none ({name})")
        kept.append(rows[:count])
    return torch.cat(kept).sort().values


def check_indices(name: str, indices: Tensor, n: int) -> None:
    """ValueError unless integers [k] in [0, n), each at most once."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers [k], got {indices.dtype} {tuple(indices.shape)}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(f"{name}: expected values in [0, {n}), got {int(indices.min())} to {int(indices.max())}")
    if len(indices.unique()) < len(indices):
        raise ValueError(f"{name}: expected each sample at most once, got one repeated")
