"""Entropic Student: a light encoder pays for the bits it sends, and its decoder must give what the teacher's own later stages can use.

Paper: Supervised Compression for Resource-Constrained Edge Computing Systems. Matsubara, Yang, Levorato, Mandt; WACV 2022;
https://arxiv.org/abs/2108.11898
Based on: the authors' code, github.com/yoshitomo-matsubara/supervised-compression at 4c21566 and sc2-benchmark at 1c43242; the prior of
    CompressAI at 869a9f5; the KD of torchdistill.
Differs from the paper: it averages the rate-distortion objective over data; the code, and `reduction="sum"` here, sums over the batch, so
    learning rate and beta belong to a batch of 64.
Differs from the code: in the first repository stage 2 rounds without medians (`use_medians=False`); its frozen stages run batch
    norm in training mode (`frozen_bn="train"`). "mean" divides the bits by the pixels of the latent, not of the image.
Ours: `quantiles="solved"` sets them by bisection when the tables are made, for runs too short to learn them; the bytes' format.
Symbols: y = encoder(x) [B, C, h, w], y_hat noisy or rounded, p its likelihoods (`kdfast.nn.EntropyBottleneck`); h_l [B, C_l, H_l, W_l] at
    depths 1..4, h_1^S = decoder(y_hat), h_2..4^S by the student's copies of the teacher's stages; z logits.

    stage 1   L1 = sum_l |h_l^S - sg h_l^T|^2 + beta R + A,     R = -sum log2 p over the whole batch, A learns the quantiles
              trains encoder, decoder and prior; the copied stages are constants that the gradient passes through
    between   the tables are made, once: encoder and prior are done, the bits stay as they are
    stage 2   L2 = alpha CE(z_S, y) + (1 - alpha) T^2 KL( softmax(z_T / T) || softmax(z_S / T) ),    y_hat rounded, a constant
              trains decoder, copied stages and classifier
    inference the device runs encoder and rANS (`EntropicStudent.compress`), the server the rest (`decompress`)
For detection or segmentation: the student of stage 1 under any head and its task loss; the encoder gets no gradient any more.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss, kd_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import GDN1, EntropyBottleneck, call_frozen

REDUCTIONS, MODES, QUANTILES = ("sum", "batchmean", "mean"), ("eval", "train"), ("learned", "solved")


# ---------------------------------------------------------------- the losses
def rate_loss(likelihood: Tensor, *, reduction: str = "sum") -> Tensor:
    """R = -sum log2 p in bits of likelihoods [B, C, ...]; "batchmean": R / B; "mean": R / (B h w), h and w of the latent.

    >>> rate_loss(torch.full((2, 3, 4, 4), 0.25), reduction="mean").item()
    6.0
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_float_tensor("likelihood", likelihood)
    if likelihood.dim() < 2 or likelihood.numel() == 0:
        raise ValueError(f"likelihood: expected [B, C, ...], not empty, got {tuple(likelihood.shape)}")
    if readable(likelihood) and not bool((likelihood > 0).all()):
        raise ValueError("likelihood: expected probabilities above 0, got 0, less or NaN")
    bits = -likelihood.to(compute_dtype(likelihood)).log2().sum()
    channels = likelihood.shape[1]
    return bits / {"sum": 1, "batchmean": len(likelihood), "mean": likelihood.numel() // channels}[reduction]


def rate_distortion_loss(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], likelihood: Tensor, *, beta: float = 0.08,
    reduction: str = "sum",
) -> LossOutput:  # fmt: skip
    """Stage 1 without A: sum_l |h_l^S - sg h_l^T|^2 + beta R.

    Args: reduction: "sum", the released one; "batchmean", both terms divided by B; "mean", each depth's mean and R / (B h w).
    Returns: LossOutput(loss, {"distortion", "rate"}), reduced alike, without beta.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("beta", beta, low=0.0)
    if len(student_features) != len(teacher_features):
        raise ValueError(
            f"teacher_features: expected {len(student_features)}, one per depth of the student, got {len(teacher_features)}"
        )
    rate = rate_loss(likelihood, reduction=reduction)
    terms = [rate.new_zeros(())]
    for depth, (s, t) in enumerate(zip(student_features, teacher_features), 1):
        if s.shape != t.shape:
            raise ValueError(
                f"teacher_features: expected {tuple(s.shape)} as the student's at depth {depth}, got {tuple(t.shape)}"
            )
        dtype = compute_dtype(s, t)
        square = (s.to(dtype) - t.detach().to(dtype)).square()
        terms.append(square.mean() if reduction == "mean" else square.sum() / (len(s) if reduction != "sum" else 1))
    distortion = torch.stack(terms).sum()
    return LossOutput(distortion + beta * rate, {"distortion": distortion.detach(), "rate": rate.detach()})


def fine_tuning_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float = 0.5, temperature: float = 1.0, ignore_index: int = -100
) -> LossOutput:  # fmt: skip
    """Stage 2: alpha CE + (1 - alpha) T^2 KL; as in the code an ignored label leaves the CE only, the KL is a mean over all rows.

    Args: student, teacher: logits [B, C]. labels: [B] integers or `ignore_index`.
    """
    check_number("alpha", alpha, low=0.0, high=1.0)
    ce = cross_entropy_loss(student, labels, ignore_index=ignore_index)
    kd = kd_loss(student, teacher, temperature=temperature)
    # a term of weight 0 is left out: 0 times an infinite divergence is not 0
    terms = [weight * term for weight, term in ((alpha, ce), (1 - alpha, kd)) if weight > 0]
    return LossOutput(torch.stack(terms).sum(), {"ce": ce.detach(), "kd": kd.detach()})


def learning_rate_factor(
    step: int, total_steps: int, *, epochs: Sequence[int] = (10, 10), milestones: Sequence[Sequence[int]] = ((5, 8), (5,))
) -> float:  # fmt: skip
    """0.1 to the power of the milestones passed in the present stage: of 10 and 10 epochs at 5 and 8, then at 5 again.

    >>> [learning_rate_factor(epoch, 20) for epoch in (4, 5, 8, 10, 15)]
    [1.0, 0.1, 0.01, 1.0, 0.1]
    """
    epoch = step * sum(epochs) / max(total_steps, 1)
    stage = min(bisect_right(list(accumulate(epochs)), epoch), len(epochs) - 1)
    return round(0.1 ** sum(epoch - sum(epochs[:stage]) >= m for m in milestones[stage]), 12)


# ---------------------------------------------------------------- the networks
def light_encoder(in_channels: int, channels: int) -> nn.Sequential:
    """To a quarter of the resolution less one pixel, [B, C, H/4 - 1, W/4 - 1]; no biases."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4 * channels, 5, 2, 2, bias=False), GDN1(4 * channels),
        nn.Conv2d(4 * channels, 2 * channels, 5, 2, 2, bias=False), GDN1(2 * channels),
        nn.Conv2d(2 * channels, channels, 2, bias=False),
    )  # fmt: skip


def wide_decoder(channels: int, target: int) -> nn.Sequential:
    """From the latent to h_1 [B, target, H/4, W/4]; no biases."""
    return nn.Sequential(
        nn.Conv2d(channels, 2 * target, 2, padding=1, bias=False), GDN1(2 * target, inverse=True),
        nn.Conv2d(2 * target, target, 2, bias=False), GDN1(target, inverse=True),
        nn.Conv2d(target, target, 2, padding=1, bias=False),
    )  # fmt: skip


class EntropicOutput(NamedTuple):
    """Of a training batch. scores: logits, under a name that `call_model` leaves alone. likelihood, aux (A): of stage 1, else None."""

    scores: Tensor
    likelihood: Tensor | None = None
    aux: Tensor | None = None


class EntropicStudent(nn.Module):
    """Encoder, prior, decoder and the stages that follow, in this order; stage 2 begins where the prior has its tables.

    Training: EntropicOutput. Evaluation: logits of the rounded latent, the same as through the bytes.

    Args:
        tail: {name: module} that h_1 goes through; a submodule of that name. decoder_name: the decoder's, where a model's first stages
            stood, so that their place is still captured by its name. Others: `Method`.
    """

    def __init__(
        self, encoder: nn.Module, entropy: EntropyBottleneck, decoder: nn.Module, tail: Mapping[str, nn.Module], *,
        decoder_name: str = "decoder", use_medians: bool = True, frozen_bn: str = "eval",
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.entropy = encoder, entropy
        self.use_medians, self.frozen_bn = use_medians, check_choice("frozen_bn", frozen_bn, MODES)
        self.names = (decoder_name, *tail)
        for name, module in ((decoder_name, decoder), *tail.items()):
            self.add_module(name, module)

    @classmethod
    def from_sequential(
        cls, model: nn.Sequential, *, after: str = "layer1", in_channels: int = 3, bottleneck_channels: int = 24,
        target_channels: int = 256, init_scale: float = 10.0, **options: Any,
    ) -> EntropicStudent:  # fmt: skip
        """Of a model's copy; its children up to `after`, whose output has `target_channels`, give way to encoder and decoder."""
        children = dict(model.named_children())
        if not isinstance(model, nn.Sequential) or after not in children:
            raise ValueError(
                f"after: expected a child of an nn.Sequential, got {after!r}; {type(model).__name__} has {', '.join(children)}"
            )
        names = list(children)[list(children).index(after) + 1 :]
        return cls(
            light_encoder(in_channels, bottleneck_channels), EntropyBottleneck(bottleneck_channels, init_scale=init_scale),
            wide_decoder(bottleneck_channels, target_channels), {name: copy.deepcopy(children[name]) for name in names},
            decoder_name=after, **options,
        )  # fmt: skip

    @property
    def stage(self) -> int:
        return 2 if self.entropy.updated else 1

    @property
    def tail(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self.names[1:]}

    def train(self, mode: bool = True) -> EntropicStudent:
        super().train(mode)
        if self.stage == 1 and self.frozen_bn == "eval":
            for module in self.tail.values():
                module.eval()
        if self.stage == 2:
            self.encoder.eval()  # nothing may change the bits any more
        return self

    def begin_stage2(self, *, quantiles: str = "learned") -> None:
        """Makes the tables. "solved": after setting the quantiles to where A is 0."""
        if check_choice("quantiles", quantiles, QUANTILES) == "solved":
            self.entropy.solve_quantiles()
        self.entropy.update()
        self.train(self.training)

    def _after_latent(self, y_hat: Tensor) -> Tensor:
        x = y_hat
        for i, name in enumerate(self.names):
            module = self.get_submodule(name)
            frozen = i > 0 and self.training and self.stage == 1
            x = call_frozen(module, x) if frozen else module(x)
        return x

    def forward(self, images: Tensor) -> Any:
        if self.stage == 1 and self.training:
            y_hat, likelihood = self.entropy(self.encoder(images))
            return EntropicOutput(self._after_latent(y_hat), likelihood, self.entropy.aux_loss())
        with torch.no_grad():
            y_hat = self.entropy.quantize(self.encoder(images), use_medians=self.use_medians if self.training else True)
        logits = self._after_latent(y_hat)
        return EntropicOutput(logits) if self.training else logits

    @torch.no_grad()
    def bits(self, images: Tensor) -> Tensor:
        """-sum log2 p of each image's rounded latent, [B]."""
        likelihood = self.entropy.likelihood(self.entropy.quantize(self.encoder(images)))
        return -likelihood.log2().flatten(1).sum(1)

    @torch.no_grad()
    def compress(self, images: Tensor) -> tuple[list[bytes], tuple[int, ...]]:
        """On the device: (the bytes of each image, the latent's height and width)."""
        y = self.encoder(images)
        return self.entropy.compress(y), tuple(y.shape[2:])

    def decompress(self, strings: Sequence[bytes], shape: Sequence[int]) -> Tensor:
        """On the server: logits [B, C]."""
        return self._after_latent(self.entropy.decompress(strings, shape))


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Both stages in one run; reads the maps "stage1" to "stage4" of both networks.

    The student, an nn.Sequential with the teacher's stages under the teacher's names, becomes an EntropicStudent whose later stages
    start as the teacher's; an EntropicStudent of your own is taken as it is. Optimizer and rates are the run's: the published
    ones are Adam 1e-3 at batch 64, then SGD 1e-3 with momentum 0.9, decay 5e-4, batch 128, times `learning_rate_factor`. For two
    optimizers: a run with stage2_epochs=0, then one of its student with stage1_epochs=0.

    Args:
        stage1_epochs, stage2_epochs: parts of the run; the tables are made at the end of the first. beta, reduction:
            `rate_distortion_loss`. alpha, temperature: `fine_tuning_loss`. bottleneck_channels: C. in_channels: of the images. init_scale: of the
            prior, whose width short runs hardly change.
        use_medians, frozen_bn, quantiles: the module docstring; "solved" leaves A out.
    """

    captures = ("stage1", "stage2", "stage3", "stage4")

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], *, beta: float = 0.08, stage1_epochs: int = 10, stage2_epochs: int = 10,
        alpha: float = 0.5, temperature: float = 1.0, reduction: str = "sum", bottleneck_channels: int = 24, in_channels: int = 3,
        init_scale: float = 10.0, use_medians: bool = True, frozen_bn: str = "eval", quantiles: str = "learned", ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__()
        check_int("bottleneck_channels", bottleneck_channels, low=1)
        self.epochs = (check_int("stage1_epochs", stage1_epochs), check_int("stage2_epochs", stage2_epochs))
        if sum(self.epochs) == 0:
            raise ValueError("stage1_epochs, stage2_epochs: expected at least one epoch, got 0 and 0")
        self.beta, self.alpha = check_number("beta", beta, low=0.0), check_number("alpha", alpha, low=0.0, high=1.0)
        self.temperature = check_number("temperature", temperature, low=0.0, open_low=True)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.quantiles = check_choice("quantiles", quantiles, QUANTILES)
        self.ignore_index, self.total_steps, self.copies_tail = ignore_index, 0, True
        self.made: dict[str, Any] = {
            "in_channels": in_channels, "bottleneck_channels": bottleneck_channels, "target_channels": widths["stage1"][1],
            "init_scale": init_scale, "use_medians": use_medians, "frozen_bn": check_choice("frozen_bn", frozen_bn, MODES),
        }  # fmt: skip

    def adapt(self, student: nn.Module) -> nn.Module:
        self.copies_tail = not isinstance(student, EntropicStudent)
        if isinstance(student, EntropicStudent):
            return student
        return EntropicStudent.from_sequential(student, after="stage1", **self.made)  # type: ignore[arg-type]

    def start(self, setup: Setup) -> None:
        student: Any = setup.student
        if setup.resumed:
            return
        if self.epochs[0] == 0:
            if student.stage == 1:
                raise ValueError("stage1_epochs: expected a student with its tables for a run of stage 2 alone; begin_stage2() makes them")  # fmt: skip
            return
        if student.stage == 2:
            raise ValueError("stage1_epochs: expected 0 for a student that has its tables: stage 1 would be left out")
        for name, module in student.tail.items() if self.copies_tail else ():
            assert setup.teacher is not None
            module.load_state_dict(setup.teacher.get_submodule(name).state_dict())

    def forward(self, context: Context) -> LossOutput:
        self.total_steps = context.total_steps
        out: EntropicOutput = context.student
        if out.likelihood is not None:
            return self.first_loss(context, out)
        assert context.labels is not None
        return fine_tuning_loss(
            out.scores, context.teacher, context.labels, alpha=self.alpha, temperature=self.temperature,
            ignore_index=self.ignore_index,
        )  # fmt: skip

    def first_loss(self, context: Context, out: EntropicOutput) -> LossOutput:
        """L1."""
        assert out.likelihood is not None and out.aux is not None
        s, t = ([side[name] for name in self.captures] for side in (context.student_features, context.teacher_features))
        loss, parts = rate_distortion_loss(s, t, out.likelihood, beta=self.beta, reduction=self.reduction)
        if self.quantiles == "learned":
            loss = loss + out.aux
        return LossOutput(loss, parts | {"aux": out.aux.detach()})

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        assert isinstance(student, EntropicStudent)
        first, second = self.epochs
        if student.stage == 1 and self.total_steps and step >= round(self.total_steps * first / (first + second)):
            student.begin_stage2(quantiles=self.quantiles)
