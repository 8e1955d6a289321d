"""Switch-DiT: every diffusion timestep routes its tokens through a few linear experts, and a prior ties the routes of all layers.

Paper: Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts. Park et al.; ECCV 2024;
https://arxiv.org/abs/2403.09176
Based on: the authors' code (byeongjun-park/Switch-DiT at 12fa9a5): models/MoE.py, models/DiT/models.py.
Differs from the code: ties in the column matching are broken by a fixed order, not by random shuffles (`generator` gives the
shuffles back); one matrix sum_j g_j W_ej per sample is formed first, since the experts are linear: the same sum, fewer products.
In the code as here, though not in the paper: eps inside the logarithms of the prior loss. Under autocast the gate runs in float32.

B batch, L tokens, H width, T timesteps, D layers, E experts, k chosen. Gates see nothing but the timestep embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_int, check_number
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn.diffusion import DiffusionSchedule
from kdfast.nn.dit import DiTBlock, DiTHead, TimestepTable, grid_positions, patchify, unpatchify
from kdfast.ops import Routing, dense_weights, route_topk


# ---------------------------------------------------------------- the mixture: one route for all tokens of a sample
def timestep_route(probs: Tensor, k: int) -> Routing:
    """The k largest gate probabilities of each row, weights not renormalised; slots of weight exactly 0 get id -1.

    probs: [B, E], softmax over all E. Ties, also among zeros, go to the lower id.
    """
    routing = route_topk(probs, k, score="logits", validate=False)
    return routing._replace(ids=torch.where(routing.weights > 0, routing.ids, -1))


def timestep_moe_mask(x: Tensor, gate_probs: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """m = 1 + sum_{j: g_j > 0} g_j (x W_{e_j} + b_{e_j}), g and e the k largest gate probabilities of the sample; [B, L, H].

    Args:
        x: [B, L, H]. gate_probs: [B, E], the probabilities at each sample's timestep. weight: [E, H, H] as (expert, in,
            out), bias: [E, H]; the products run in the dtype of x.
    Differentiable in all four. Source: section 3.2; TaskMoE in the code.
    """
    if x.dim() != 3 or x.shape[0] != gate_probs.shape[0]:
        raise ValueError(f"x: expected [B, L, H] with B = {gate_probs.shape[0]}, got {tuple(x.shape)}")
    experts, width = weight.shape[0], x.shape[2]
    if weight.shape != (experts, width, width) or gate_probs.shape[1] != experts or bias.shape != (experts, width):
        raise ValueError(
            f"weight, bias: expected [E, {width}, {width}] and [E, {width}] with E = {gate_probs.shape[1]}, got {tuple(weight.shape)} "
            f"and {tuple(bias.shape)}"
        )
    g = dense_weights(timestep_route(gate_probs, k)).to(x.dtype)  # [B, E], zeros where not chosen
    mixed = (g @ weight.to(x.dtype).flatten(1)).unflatten(1, (width, width))  # [B, H, H]
    return 1 + torch.baddbmm((g @ bias.to(x.dtype)).unsqueeze(1), x, mixed)


class TimestepMoE(nn.Module):
    """The mixture with its gate, Linear(SiLU(embedding)); experts start at zero, so the mask starts at 1.

    >>> mask, probs, assignment = TimestepMoE(64, num_experts=3, top_k=2)(x, table, timesteps)
    """

    def __init__(self, dim: int, num_experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= check_int("top_k", top_k) <= num_experts:
            raise ValueError(f"top_k: expected 1 to num_experts ({num_experts}), got {top_k}")
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts)
        self.weight = nn.Parameter(torch.zeros(num_experts, dim, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, dim))

    def probs(self, embedding: Tensor) -> Tensor:
        """softmax over the experts, float32 whatever comes in; embedding [..., H] -> [..., E]."""
        with torch.autocast(embedding.device.type, enabled=False):
            h = F.silu(embedding.to(compute_dtype(embedding, self.gate.weight)))
            return F.linear(h, self.gate.weight.to(h.dtype), self.gate.bias.to(h.dtype)).softmax(-1)

    def forward(self, x: Tensor, table: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H], table [T, H], timesteps [B] -> mask [B, L, H], gate probabilities [T, E], chosen experts [T, E] 0/1."""
        check_timesteps(timesteps, table.shape[0])
        if table.shape[1] != x.shape[-1]:
            raise ValueError(f"table: expected width {x.shape[-1]} as x has, got {tuple(table.shape)}")
        probs = self.probs(table)
        return (
            timestep_moe_mask(x, probs[timesteps], self.weight, self.bias, self.top_k),
            probs,
            assignment_table(probs, self.top_k),
        )


def assignment_table(gate_probs: Tensor, k: int) -> Tensor:
    """0/1 in the dtype of gate_probs [..., E]: which experts are among the k largest (zeros included)."""
    flat = gate_probs.detach().flatten(0, -2)
    ids = route_topk(flat, k, score="logits", validate=False).ids.long()
    return torch.zeros_like(flat).scatter(1, ids, 1.0).view_as(gate_probs)


def check_timesteps(timesteps: Tensor, num_timesteps: int) -> None:
    if timesteps.is_floating_point() or timesteps.dim() != 1:
        raise ValueError(f"timesteps: expected integers [B], got {timesteps.dtype} {tuple(timesteps.shape)}")
    on_cpu = timesteps.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and timesteps.numel() and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < num_timesteps:
        raise ValueError(
            f"timesteps: expected values in [0, {num_timesteps}), got {int(timesteps.min())} to {int(timesteps.max())}"
        )


# ---------------------------------------------------------------- the prior
def diffusion_prior_table(
    num_timesteps: int, depth: int, num_experts: int, top_k: int, *, alpha: float = 4.0
) -> Tensor:
    """U [T, D E] of 0/1: D k ones per row, starting at round((t / (T-1))^alpha (D E - D k)): near timesteps share experts."""
    check_int("num_timesteps", num_timesteps, low=2)
    columns, ones = depth * num_experts, depth * top_k
    if not 1 <= top_k <= num_experts or depth < 1:
        raise ValueError(
            f"depth, top_k: expected depth >= 1 and top_k from 1 to {num_experts}, got {depth} and {top_k}"
        )
    time = torch.arange(num_timesteps, dtype=torch.float64) / (num_timesteps - 1)
    start = torch.round(time**alpha * (columns - ones)).unsqueeze(1)  # half to even
    column = torch.arange(columns)
    return ((column >= start) & (column < start + ones)).to(torch.float32)


def matching_cost(assignment: Tensor, prior: Tensor) -> Tensor:
    """C[a, b] = sum_t |Q[t, a] - U[t, b]| for 0/1 tables [T, n], as two products; [n, n] float64."""
    q, u = assignment.to(torch.float64), prior.to(torch.float64)
    return q.t() @ (1 - u) + (1 - q).t() @ u


def match_columns(cost: Tensor) -> Tensor:
    """The assignment pi of rows to columns with the least total cost: shortest augmenting paths, O(n^3), on the CPU.

    cost: [n, n], finite. Returns int64 [n]; the same cost gives the same pi, ties to the lower column.
    """
    if cost.dim() != 2 or cost.shape[0] != cost.shape[1] or not bool(torch.isfinite(cost).all()):
        raise ValueError(f"cost: expected a finite square matrix, got {tuple(cost.shape)}")
    c = cost.detach().to("cpu", torch.float64)
    n = c.shape[0]
    inf = float("inf")
    u, v = torch.zeros(n, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)  # column n: the virtual start
    row_of = [-1] * (n + 1)
    for row in range(n):
        row_of[n], column = row, n
        shortest = torch.full((n,), inf, dtype=torch.float64)
        previous = torch.full((n,), n, dtype=torch.int64)
        done = torch.zeros(n, dtype=torch.bool)
        visited = [n]
        while row_of[column] >= 0:
            here = row_of[column]
            reduced = c[here] - u[here] - v[:n]
            closer = ~done & (reduced < shortest)
            shortest = torch.where(closer, reduced, shortest)
            previous[closer] = column
            open_ = shortest.masked_fill(done, inf)
            step, column = float(open_.min()), int(open_.argmin())
            for seen in visited:  # dual variables of the tree grown so far
                u[row_of[seen]] += step
            v[visited] -= step
            shortest = torch.where(done, shortest, shortest - step)
            done[column] = True
            visited.append(column)
        while column != n:
            before = int(previous[column])
            row_of[column] = row_of[before]
            column = before
    pi = torch.empty(n, dtype=torch.int64)
    pi[torch.tensor(row_of[:n], dtype=torch.int64)] = torch.arange(n)
    return pi.to(cost.device)


def jensen_shannon(p: Tensor, r: Tensor, *, eps: float = 1e-6) -> Tensor:
    """1/2 sum [p (log(p + eps) - log(m + eps)) + r (log(r + eps) - log(m + eps))], m = (p + r) / 2; rows over the last axis."""
    log_m = ((p + r) / 2 + eps).log()
    return 0.5 * (p * ((p + eps).log() - log_m) + r * ((r + eps).log() - log_m)).sum(-1)


def match_prior(gate_probs: Tensor, prior: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """pi [D E]: the prior column each gate column is matched with; gate_probs [D, T, E], prior [T, D E]. No gradient.

    generator: shuffles both sides' columns first, as the authors do; it only changes which of several optima is found.
    """
    assignment = assignment_table(gate_probs, k).movedim(0, 1).flatten(1)  # Q [T, D E]
    if assignment.shape != prior.shape:
        raise ValueError(f"prior: expected [T, D E] = {tuple(assignment.shape)}, got {tuple(prior.shape)}")
    cost = matching_cost(assignment, prior)
    if generator is None:
        return match_columns(cost)
    n = cost.shape[0]
    rows, columns = (torch.randperm(n, generator=generator, device=generator.device).to(cost.device) for _ in range(2))
    pi = torch.empty_like(rows)
    pi[rows] = columns[match_columns(cost[rows][:, columns])]
    return pi


def diffusion_prior_loss(
    gate_probs: Tensor, timesteps: Tensor, prior: Tensor, k: int, *, columns: Tensor | None = None, eps: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """L_prior = mean_b JSD(P_b, R_b): P = the gates of all layers side by side over D, R = the matched prior row over D k.

    Args:
        gate_probs: [D, T, E] of all timesteps; gradient flows through P, also inside the mixture. timesteps: [B].
        prior: [T, D E] from `diffusion_prior_table`. columns: pi, to reuse one; else `match_prior` (which waits for a GPU).
    Source: equations 6-8; DiffusionPrior in the code.

    >>> loss = diffusion_prior_loss(probs, timesteps, diffusion_prior_table(1000, 12, 3, 2), k=2)
    """
    if gate_probs.dim() != 3 or prior.shape != (gate_probs.shape[1], gate_probs.shape[0] * gate_probs.shape[2]):
        raise ValueError(
            f"gate_probs, prior: expected [D, T, E] and [T, D E], got {tuple(gate_probs.shape)} and {tuple(prior.shape)}"
        )
    check_timesteps(timesteps, prior.shape[0])
    depth = gate_probs.shape[0]
    if columns is None:
        columns = match_prior(gate_probs, prior, k, generator=generator)
    p = gate_probs[:, timesteps].movedim(0, 1).flatten(1) / depth  # [B, D E]
    r = prior.to(p.dtype)[timesteps][:, columns]
    ones = r.sum(-1, keepdim=True)  # D k
    if ones.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((ones > 0).all()):
        raise ValueError("prior: expected a one in every row, got a row without")
    return jensen_shannon(p, r / ones, eps=eps).mean()


# ---------------------------------------------------------------- the model
class DiffusionOutput(NamedTuple):
    prediction: Tensor  # [B, C, S, S], the noise (then, with learned variance, as many channels of variance)
    gate_probs: Tensor | None  # [D, T, E] in training, None for a plain DiT or in eval


class SwitchDiT(nn.Module):
    """DiT whose blocks are preceded by a TimestepMoE: z = x m; z <- block(z); x <- z + (1 - m) x. num_experts=0: plain DiT.

    Args:
        image: S, channels: C, patch, width: H, depth: D, heads, classes (0: unconditional), num_timesteps: T, num_experts: E
        top_k: k, class_dropout: probability of training a sample without its class, learned_variance: 2 C output channels.

    >>> model = SwitchDiT(image=8, channels=1, width=64, depth=4, heads=4, classes=10, num_timesteps=100)
    >>> prediction, gate_probs = model(x, timesteps, classes)
    """

    def __init__(
        self, *, image: int = 32, channels: int = 4, patch: int = 2, width: int = 384, depth: int = 12, heads: int = 6,
        classes: int = 1000, num_timesteps: int = 1000, num_experts: int = 3, top_k: int = 2, class_dropout: float = 0.1,
        learned_variance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(f"width: expected a multiple of 4 and of heads ({heads}), got {width}")
        if image % patch:
            raise ValueError(f"image: expected a multiple of the patch ({patch}), got {image}")
        self.patch, self.classes = patch, classes
        self.class_dropout = check_number("class_dropout", class_dropout, low=0.0, high=1.0)
        self.embed = nn.Linear(channels * patch * patch, width)
        self.register_buffer("positions", grid_positions(image // patch, width), persistent=False)
        self.table = TimestepTable(num_timesteps, width)
        self.class_table = nn.Embedding(classes + 1, width) if classes else None  # the last row: no class
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.experts = nn.ModuleList(TimestepMoE(width, num_experts, top_k) for _ in range(depth if num_experts else 0))
        self.head = DiTHead(width, (2 if learned_variance else 1) * channels * patch * patch)

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor | None = None) -> DiffusionOutput:
        """x [B, C, S, S], timesteps [B], classes [B] integers (-1 = none) or None -> DiffusionOutput."""
        table = self.table()  # Tau [T, H]
        check_timesteps(timesteps, table.shape[0])
        c = table[timesteps]
        if self.class_table is not None:
            c = c + self.class_table(self._classes(x, classes))
        x = self.embed(patchify(x, self.patch)) + self.positions
        probs = []
        for layer, block in enumerate(self.blocks):
            if not self.experts:
                x = block(x, c)
                continue
            moe = cast(TimestepMoE, self.experts[layer])
            p = moe.probs(table if self.training else table[timesteps])
            m = timestep_moe_mask(x, p[timesteps] if self.training else p, moe.weight, moe.bias, moe.top_k)
            x = block(x * m, c) + (1 - m) * x
            probs.append(p)
        prediction = unpatchify(self.head(x, c), self.patch)
        return DiffusionOutput(prediction, torch.stack(probs) if probs and self.training else None)

    def _classes(self, x: Tensor, classes: Tensor | None) -> Tensor:
        if classes is None:
            return torch.full((x.shape[0],), self.classes, device=x.device)
        absent = classes < 0
        if self.training and self.class_dropout:
            absent = absent | (torch.rand(classes.shape, device=classes.device) < self.class_dropout)
        return torch.where(absent, self.classes, classes)

    @torch.no_grad()
    def expert_paths(self) -> Tensor:
        """[T, D, k] expert ids by descending weight: the route depends on the timestep alone, so it can be tabulated."""
        table = self.table()
        layers = [cast(TimestepMoE, moe) for moe in self.experts]
        return torch.stack([route_topk(moe.probs(table), moe.top_k, score="logits").ids for moe in layers], 1)


# ---------------------------------------------------------------- training
class Method(MethodBase):
    """Total = diffusion loss + prior_weight L_prior, for a SwitchDiT student without a teacher.

    Batches {"images": [B, C, S, S] in [-1, 1], "classes": [B] or absent}; `prepare` draws timesteps and noise, which become
    the labels. The prior loss is formed in training only; parts "diffusion" and "prior". A plain DiT has no prior loss.

    Args:
        top_k: the student's. prior_weight: marked by the authors as needing tuning. alpha, eps: of the prior. reuse_columns:
            solve the matching every so many steps only (1: every step). min_snr, learned_variance, schedule: of the
            diffusion (`DiffusionSchedule`).
    """

    def __init__(
        self, *, prior_weight: float = 1.0, top_k: int = 2, reuse_columns: int = 1, num_timesteps: int = 1000, schedule: str = "cosine", alpha: float = 4.0,
        eps: float = 1e-6, min_snr: float | None = None, learned_variance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prior_weight = check_number("prior_weight", prior_weight, low=0.0)
        self.schedule = DiffusionSchedule(num_timesteps, schedule)
        self.alpha, self.eps, self.min_snr, self.learned_variance = alpha, eps, min_snr, learned_variance
        self.top_k, self.reuse_columns = top_k, check_int("reuse_columns", reuse_columns, low=1)
        self._columns: Tensor | None = None

    @staticmethod
    def students(*, num_timesteps: int, **sizes: int) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
        """What to compare on small images: plain DiT, experts without the prior loss, whole; with the method's options."""

        def small(experts: int, **options: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
            shape: dict[str, Any] = dict(
                patch=2, width=64, depth=4, heads=4, num_timesteps=num_timesteps, num_experts=experts, **sizes
            )
            return lambda: SwitchDiT(**shape), {"num_timesteps": num_timesteps, **options}

        return {"dit": small(0), "no_prior": small(3, prior_weight=0.0), "whole": small(3)}

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        timesteps = torch.randint(self.schedule.num_timesteps, images.shape[:1], device=images.device)
        noise = torch.randn_like(images)
        ready = {"x": self.schedule.add_noise(images, timesteps, noise), "timesteps": timesteps, "labels": noise}
        return ready | ({"classes": batch["classes"]} if "classes" in batch else {})

    def forward(self, context: Context) -> LossOutput:
        prediction, gate_probs = context.student
        batch = context.batch
        loss = self.schedule.loss(
            prediction, batch["x"], batch["timesteps"], batch["labels"], min_snr=self.min_snr, learned_variance=self.learned_variance
        ).mean()  # fmt: skip
        parts = {"diffusion": loss.detach()}
        if gate_probs is None:
            return LossOutput(loss, parts)
        depth, num_timesteps, experts = gate_probs.shape
        prior = diffusion_prior_table(num_timesteps, depth, experts, self.top_k, alpha=self.alpha).to(gate_probs.device)
        if self._columns is None or context.step % self.reuse_columns == 0:
            self._columns = match_prior(gate_probs, prior, self.top_k)
        prior_loss = diffusion_prior_loss(
            gate_probs, batch["timesteps"], prior, self.top_k, columns=self._columns, eps=self.eps
        )
        return LossOutput(loss + self.prior_weight * prior_loss, parts | {"prior": prior_loss.detach()})
