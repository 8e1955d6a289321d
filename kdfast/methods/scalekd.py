"""ScaleKD: a pre-trained vision Transformer teaches any student, whose maps it reads as tokens of its own, one stage through its own weights.

Paper: ScaleKD: Strong Vision Transformers Could Be Excellent Teachers. Fan, Li, Liu, Yao; NeurIPS 2024; https://arxiv.org/abs/2411.06786
Based on: the authors' code, github.com/deep-optimization/ScaleKD at 478a7db: mmcls/models/dis_losses (fmd.py, fmdv2.py, attention.py,
    kd.py), mmcls/models/classifiers/distiller.py.
Differs from the code: the alternating view subtracts the spatial mean, which is what its DCT, mask and inverse DCT do, so a view that
    is constant over space is exactly 0; L_kd takes a log-softmax (the code's log of a softmax is NaN for extreme logits); positions are on
    the student's grid (fmd.py; fmdv2.py has them on the query's); the teacher stays in eval mode and its weights are
    constants, trainable ones too. As in the code: outputs of windows are not put back into the grid's order (`restore_order` does it).
Symbols: F_s3, F_s4 [B, C, h, w] the student's maps, F_t [B, D, H, W] the teacher's last map after its final norm; S4 the teacher's last
    stage; Q a query [B, H W, D]; z_s, z_t [B, C] logits; a_dir, a_alt, a_kd weights.

    CAP(x; Q)   k = relu(bn(conv3x3(x))) + pos,  q = relu(W Q),  o = W_o Attn(W_q q, W_k k, W_v k),  n = LN(o),  Y = n + FFN(n)
                the softmax is of 5 / sqrt(d_head) times the products; no residual from x or Q
    L_dir       a_dir (1/B) sum_bhw || Y/|Y| - F_t/|F_t| ||^2         both as 2 (1 - cos) where no norm is 0
    L_alt       a_alt, the same of Y - mean_hw Y and F_t - mean_hw F_t
    stage 3     Y' = S4(CAP(F_s3; own query)) against F_t, for each view its own CAP          (teacher parameter perception)
    stage 4     CAP(F_s4; Y' of the view) against F_t
    L           (1 - a_kd) CE + a_kd T^2 CE(softmax(z_t/T), z_s/T) + L_dir3 + L_alt3 + L_dir4 + L_alt4

A plain ViT has no stages: some blocks are S4, the last ones with the norm come after the stage-4 projections as well (`last_stage`).
Inference: the student alone; the four projectors go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number, check_pair
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss, entropy_rows, kd_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import call_frozen, query_attention, tokens_to_map
from kdfast.nn.capture import find_module

VIEWS, STAGES = ("direct", "alternating"), (3, 4)
PROJECTORS, LAYOUTS = ("attention", "conv"), ("map", "tokens", "grid")
NORM_FLOOR = 1e-12
Grid = tuple[int, int]


# ---------------------------------------------------------------- the cross-attention projector
class CrossAttention(nn.Module):
    """W_o softmax(scale / sqrt(d_head) (W_q q)(W_k k)^T) W_v k: tokens [B, M, C] and a query [B or 1, N, D] -> [B, N, D].

    Args:
        windows: number of windows along each side of both grids, which then are square; window i of q sees window i of k and v.
        restore_order: put the outputs back where their queries were; else they stay window after window, as in the release.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, *, num_heads: int, softmax_scale: float = 5.0, windows: Grid = (1, 1),
        restore_order: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if teacher_dim % check_int("num_heads", num_heads, low=1):
            raise ValueError(f"num_heads: expected a divisor of the teacher's width {teacher_dim}, got {num_heads}")
        for count in windows:
            check_int("windows", count, low=1)
        self.num_heads, self.windows, self.restore_order = num_heads, (windows[0], windows[1]), restore_order
        head = teacher_dim // num_heads
        self.scale = check_number("softmax_scale", softmax_scale, low=0.0, open_low=True) * head**-0.5
        self.q, self.proj = nn.Linear(teacher_dim, teacher_dim), nn.Linear(teacher_dim, teacher_dim)
        self.k, self.v = nn.Linear(student_dim, teacher_dim), nn.Linear(student_dim, teacher_dim)

    def forward(self, tokens: Tensor, query: Tensor) -> Tensor:
        q = self.q(query).expand(len(tokens), -1, -1)  # a query of its own is projected once, not for each sample
        parts = [cut_windows(x, self.windows, name) for name, x in
                 (("query", q), ("tokens", self.k(tokens)), ("tokens", self.v(tokens)))]  # fmt: skip
        out = query_attention(*parts, num_heads=self.num_heads, scale=self.scale).reshape(q.shape)
        if self.restore_order and self.windows != (1, 1):
            index = torch.arange(q.shape[1], device=q.device).reshape(1, -1, 1)
            out = out[:, cut_windows(index, self.windows, "query").flatten().argsort()]
        return self.proj(out)


def cut_windows(tokens: Tensor, windows: Grid, name: str = "tokens") -> Tensor:
    """[B, s s, D] -> [B nh nw, (s / nh)(s / nw), D], windows row-major, tokens row-major inside; (1, 1) is no cut."""
    nh, nw = windows
    if (nh, nw) == (1, 1):
        return tokens
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1] or side % nh or side % nw:
        raise ValueError(
            f"windows: expected a square grid of {name} with sides divisible by {nh} and {nw}, got {tokens.shape[1]} tokens"
        )
    cut = tokens.reshape(len(tokens), nh, side // nh, nw, side // nw, -1)
    return cut.transpose(2, 3).reshape(len(tokens) * nh * nw, -1, tokens.shape[2])


class CrossAttentionProjector(nn.Module):
    """CAP of the module docstring: a student's map [B, Cs, h, w] as tokens [B, H W, Dt] in the teacher's layout.

    Args:
        query_grid: (H, W) of the tokens. kv_grid: (h, w) of the map. own_query: it has one, the same for every sample, used when none
            is passed. Others: `CrossAttention`.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, query_grid: Grid, kv_grid: Grid, num_heads: int, *, softmax_scale: float = 5.0,
        own_query: bool = True, windows: Grid = (1, 1), restore_order: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query_grid = (check_int("query_grid", query_grid[0], low=1), check_int("query_grid", query_grid[1], low=1))
        self.student = nn.Sequential(
            nn.Conv2d(student_dim, student_dim, 3, padding=1), nn.BatchNorm2d(student_dim), nn.ReLU()
        )
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, student_dim, *kv_grid), std=0.02))
        number = query_grid[0] * query_grid[1]
        self.query = nn.Parameter(torch.randn(number, teacher_dim)) if own_query else None
        self.query_map = nn.Sequential(nn.Linear(teacher_dim, teacher_dim), nn.ReLU())
        self.attention = CrossAttention(
            student_dim, teacher_dim, num_heads=num_heads, softmax_scale=softmax_scale, windows=windows, restore_order=restore_order
        )  # fmt: skip
        self.norm = nn.LayerNorm(teacher_dim)
        self.ffn = nn.Sequential(
            nn.Linear(teacher_dim, 4 * teacher_dim), nn.ReLU(), nn.Linear(4 * teacher_dim, teacher_dim)
        )

    def forward(self, maps: Tensor, query: Tensor | None = None) -> Tensor:
        """query: [B, H W, Dt], in place of its own."""
        check_float_tensor("maps", maps)
        if maps.shape[1:] != self.positions.shape[1:] or len(maps) == 0:
            wanted = ", ".join(map(str, self.positions.shape[1:]))
            raise ValueError(f"maps: expected [B, {wanted}] with B > 0, got {tuple(maps.shape)}")
        if query is None:
            if self.query is None:
                raise ValueError("query: this projector has none of its own (own_query=False), so pass one")
            query = self.query.unsqueeze(0)
        elif query.shape != (len(maps), self.query_grid[0] * self.query_grid[1], self.norm.normalized_shape[0]):
            height, width = self.query_grid
            raise ValueError(
                f"query: expected [{len(maps)}, {height * width}, {self.norm.normalized_shape[0]}] for a grid of {height} x {width}, got {tuple(query.shape)}"
            )
        k = (self.student(maps) + self.positions).flatten(2).mT
        n = self.norm(self.attention(k, self.query_map(query)))
        return n + self.ffn(n)


class ConvProjector(nn.Module):
    """The plain projector to compare with: a 1x1 convolution, averaged to the query's grid; a query that is passed is not read."""

    def __init__(self, student_dim: int, teacher_dim: int, query_grid: Grid) -> None:
        super().__init__()
        self.conv, self.query_grid = nn.Conv2d(student_dim, teacher_dim, 1), query_grid

    def forward(self, maps: Tensor, query: Tensor | None = None) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(maps), self.query_grid).flatten(2).mT


# ---------------------------------------------------------------- dual-view feature mimicking
def remove_dc(tokens: Tensor) -> Tensor:
    """X - mean over the positions, [B, N, D]: exactly 0 for a channel that is the same everywhere."""
    shifted = tokens - tokens[:, :1].detach()  # so that the mean of equal values is their value
    return shifted - shifted.mean(1, keepdim=True)


def unit_view(tokens: Tensor, view: str) -> Tensor:
    """[B, N, D], float32 or wider, with each token of length 1 (its norm at least 1e-12), "alternating" after `remove_dc`."""
    if check_choice("view", view, VIEWS) == "alternating":
        if tokens.shape[1] == 1:
            raise ValueError("tokens: expected more than one position, the alternating view of one is 0 everywhere")
        tokens = remove_dc(tokens)
    return F.normalize(tokens, dim=-1, eps=NORM_FLOOR)


def view_loss(tokens: Tensor, teacher_map: Tensor, *, view: str = "direct") -> Tensor:
    """(1/B) sum_bhw || Y/|Y| - F/|F| ||^2, "alternating" of both without their spatial means.

    Args: tokens: Y [B, H W, D]. teacher_map: F [B, D, H, W], a constant.
    Raises:
        ValueError: shapes, B = 0, one position in the alternating view; on the CPU also NaN or infinity.

    >>> loss = 0.08 * view_loss(y, f) + 0.06 * view_loss(y, f, view="alternating")
    """
    check_pair(tokens, teacher_map, ("tokens", "teacher_map"))
    if teacher_map.dim() != 4 or tokens.shape != teacher_map.flatten(2).mT.shape or len(tokens) == 0:
        raise ValueError(
            f"tokens: expected [B, H W, D] of teacher_map [B, D, H, W] {tuple(teacher_map.shape)}, B > 0, got {tuple(tokens.shape)}"
        )
    dtype = compute_dtype(tokens, teacher_map)
    wanted = unit_view(teacher_map.detach().to(dtype).flatten(2).mT, view)
    loss = (unit_view(tokens.to(dtype), view) - wanted).square().sum() / len(tokens)
    if readable(loss) and not bool(loss.isfinite()):
        name = "tokens" if bool(wanted.isfinite().all()) else "teacher_map"
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return loss


# ---------------------------------------------------------------- the total
def soft_target_ce(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-T^2 (1/B) sum_i sum_c softmax(z_t/T)_c log softmax(z_s/T)_c: KD with the teacher's entropy left in."""
    kd = kd_loss(student, teacher, temperature=temperature)
    if len(student) == 0:
        raise ValueError(f"student: expected logits [B, C] with B > 0, got {tuple(student.shape)}")
    return kd + temperature**2 * entropy_rows(teacher.detach(), temperature=temperature).mean()


def view_weights(alpha_direct: float | Sequence[float], alpha_alternating: float | Sequence[float]) -> dict[str, float]:
    """{"direct_3": a, "direct_4": a, "alternating_3": a, ...}; one number for both stages, or (stage 3, stage 4)."""
    weights = {}
    for view, given in zip(VIEWS, (alpha_direct, alpha_alternating)):
        pair = tuple(given) if isinstance(given, Sequence) else (given, given)
        if len(pair) != 2:
            raise ValueError(f"alpha_{view}: expected a number or one for each of stages 3 and 4, got {given}")
        for stage, alpha in zip(STAGES, pair):
            weights[f"{view}_{stage}"] = check_number(f"alpha_{view}", alpha, low=0.0)
    return weights


def scalekd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tokens: Mapping[str, Tensor],
    teacher_map: Tensor,
    *,
    alpha_direct: float | Sequence[float] = 0.08,
    alpha_alternating: float | Sequence[float] = 0.06,
    alpha_kd: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> LossOutput:
    """L of the module docstring.

    Args:
        student, teacher: logits [B, C]. labels: [B] integers or `ignore_index`, left out of the task's cross-entropy alone.
        tokens: {"direct_3", "alternating_3", "direct_4", "alternating_4": [B, H W, D]}, what is absent is left out; those of
            stage 3 have been through S4. teacher_map: F_t [B, D, H, W].
        alpha_direct, alpha_alternating: `view_weights`. A term of weight 0 is not computed.
    Returns:
        LossOutput(loss, {"task", "kd", and the names of `tokens`}), unweighted; kd carries T^2.

    >>> loss, parts = scalekd_loss(zs, zt, labels, {"direct_4": y4}, f4)
    """
    weights = view_weights(alpha_direct, alpha_alternating)
    if unknown := sorted(set(tokens) - set(weights)):
        raise ValueError(f"tokens: expected some of {', '.join(weights)}, got {', '.join(unknown)}")
    alpha_kd = check_number("alpha_kd", alpha_kd, low=0.0, high=1.0)
    terms: dict[str, tuple[float, Tensor]] = {}
    if alpha_kd < 1:
        terms["task"] = 1 - alpha_kd, cross_entropy_loss(student, labels, ignore_index=ignore_index)
    if alpha_kd > 0:
        terms["kd"] = alpha_kd, soft_target_ce(student, teacher, temperature=temperature)
    for name, y in tokens.items():
        if weights[name] > 0:
            terms[name] = weights[name], view_loss(y, teacher_map, view=name.partition("_")[0])
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return LossOutput(loss, {name: term.detach() for name, (_, term) in terms.items()})


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """The projectors, and the teacher's own last stage, which `fit` finds in the teacher (in your own loop: `attach`).

    Reads "stage3" and "stage4" of the student and "stage4" of the teacher, after its final norm; of the teacher's stage 3 the width and
    the grid alone. The student's grids are square where its features are tokens.

    Args:
        widths: {"stage3": (student, teacher), "stage4": ...}. student_grids, teacher_grids: (height, width) of both stages.
        num_heads: of both stages' projectors. teacher_stage: paths in the teacher, called one after another: S4, with patch merging and
            final norm. last_stage: paths, of a plain ViT, whose S4 has no norm. layout: of what they take and give, and of the
            teacher's features: "map" [B, D, H, W], "grid" [B, H, W, D], "tokens" [B, H W, D].
        class_tokens: (student, teacher) leading tokens to drop, where features are sequences.
        tpp: False leaves stage 3 out; stage 4 then has a query of its own. projector: "conv" is `ConvProjector`.
        Others: `scalekd_loss`, `CrossAttentionProjector`. A view of weight 0 has no projector, unless the next stage queries with it.
    """

    captures = ("stage3", "stage4")

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, student_grids: Sequence[Grid] = ((14, 14), (7, 7)),
        teacher_grids: Sequence[Grid] = ((14, 14), (7, 7)), num_heads: Sequence[int] = (16, 24), softmax_scale: float = 5.0,
        windows: Grid = (1, 1), restore_order: bool = False, alpha_direct: float | Sequence[float] = 0.08,
        alpha_alternating: float | Sequence[float] = 0.06, alpha_kd: float = 0.5, temperature: float = 1.0,
        tpp: bool = True, projector: str = "attention", teacher_stage: Sequence[str] = ("stage4",), last_stage: Sequence[str] = (),
        layout: str = "map", class_tokens: tuple[int, int] = (0, 0), ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        check_number("alpha_kd", alpha_kd, low=0.0, high=1.0)
        check_number("temperature", temperature, low=0.0, open_low=True)
        check_choice("projector", projector, PROJECTORS)
        self.layout, self.class_tokens = check_choice("layout", layout, LAYOUTS), class_tokens
        self.teacher_grids, self.paths = tuple(teacher_grids), (tuple(teacher_stage), tuple(last_stage))
        self.options: dict[str, Any] = {
            "alpha_direct": alpha_direct, "alpha_alternating": alpha_alternating, "alpha_kd": alpha_kd,
            "temperature": temperature, "ignore_index": ignore_index,
        }  # fmt: skip
        weights = view_weights(alpha_direct, alpha_alternating)
        stages = STAGES if tpp else STAGES[1:]
        self.views = [view for view in VIEWS if any(weights[f"{view}_{stage}"] for stage in stages)]
        self.projectors = nn.ModuleDict()
        for view in self.views:
            for stage in stages:
                if stage == 4 and not weights[f"{view}_4"]:
                    continue
                i, sizes = STAGES.index(stage), widths[f"stage{stage}"]
                self.projectors[f"{view}_{stage}"] = (
                    ConvProjector(*sizes, teacher_grids[i]) if projector == "conv" else
                    CrossAttentionProjector(
                        *sizes, teacher_grids[i], student_grids[i], num_heads[i], softmax_scale=softmax_scale, windows=windows,
                        restore_order=restore_order, own_query=stage == stages[0],
                    )
                )  # fmt: skip
        self.stages: tuple[tuple[nn.Module, ...], ...] = ()  # in tuples: the teacher's modules are not the method's

    def attach(self, teacher: nn.Module) -> None:
        """Takes `teacher_stage` and `last_stage` from the teacher. Their weights are constants in the loss, trainable or not."""
        self.stages = tuple(
            tuple(find_module(teacher, path, "teacher_stage") for path in paths) for paths in self.paths
        )

    def start(self, setup: Setup) -> None:
        assert setup.teacher is not None
        self.attach(setup.teacher)

    def perceive(self, views: Sequence[Tensor], which: int) -> Sequence[Tensor]:
        """Tokens [B, N, D] of each view through S4 (`which` 0) or the last stage (1), all views in one call."""
        if not views:
            return views
        if not self.stages:
            raise ValueError(
                "teacher_stage: not there yet; Distiller.fit finds it, in your own loop call method.attach(teacher)"
            )
        grid, x = self.teacher_grids[which], torch.cat(list(views))
        if self.layout != "tokens":
            x = x.mT.unflatten(-1, grid) if self.layout == "map" else x.unflatten(1, grid)
        for module in self.stages[which]:
            if module.training:  # a stochastic depth that somebody's .train() has turned on
                module.eval()
            x = call_frozen(module, x)
        return self.teacher_tokens(x).chunk(len(views))

    def teacher_tokens(self, feature: Tensor) -> Tensor:
        if self.layout == "tokens":
            return feature
        return feature.flatten(2).mT if self.layout == "map" else feature.flatten(1, 2)

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's maps as the tokens of `scalekd_loss`."""
        maps = [
            feature if feature.dim() == 4 else tokens_to_map(feature, self.class_tokens[0])
            for feature in (features["stage3"], features["stage4"])
        ]
        third, fourth = ([name for name in self.projectors if name.endswith(f"_{stage}")] for stage in STAGES)
        perceived = self.perceive([self.projectors[name](maps[0]) for name in third], 0)
        found = dict(zip(third, perceived))
        last = [self.projectors[name](maps[1], found.get(f"{name[:-1]}3")) for name in fourth]
        return found | dict(zip(fourth, self.perceive(last, 1) if self.paths[1] else last))

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        wanted = context.teacher_features["stage4"]
        if self.layout == "tokens":
            wanted = wanted[:, self.class_tokens[1] :]
        target = self.teacher_tokens(wanted)
        height, width = self.teacher_grids[1]
        if target.shape[1] != height * width:
            raise ValueError(f"teacher_grids: expected the grid of the teacher's stage 4, {target.shape[1]} tokens, got {height} x {width}")  # fmt: skip
        return scalekd_loss(
            context.student, context.teacher, context.labels, self.project(context.student_features),
            target.mT.unflatten(-1, (height, width)), **self.options,
        )  # fmt: skip
