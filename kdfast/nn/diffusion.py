"""The forward process of a diffusion model, its loss per sample and its ancestral sampler.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,   abar_t = prod_{s<=t} (1 - beta_s)
q(x_{t-1} | x_t, x_0) = N(a_t x_0 + b_t x_t, v_t),   a_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t),
                                                      b_t = sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int


class DiffusionSchedule(nn.Module):
    """Tables of one noise schedule: "linear" (Ho et al. 2020) or "cosine" (Nichol and Dhariwal 2021), T timesteps."""

    betas: Tensor
    alpha_bar: Tensor
    from_start: Tensor
    from_noisy: Tensor
    log_variance: Tensor

    def __init__(self, num_timesteps: int = 1000, schedule: str = "cosine") -> None:
        super().__init__()
        check_int("num_timesteps", num_timesteps, low=2)
        check_choice("schedule", schedule, ("linear", "cosine"))
        self.num_timesteps = num_timesteps
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        if schedule == "linear":  # 1e-4 to 0.02 for T = 1000, scaled so that fewer steps end at the same noise
            betas = torch.linspace(
                0.1 / num_timesteps, min(20.0 / num_timesteps, 0.999), num_timesteps, dtype=torch.float64
            )
        else:
            bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        alpha_bar = torch.cumprod(1 - betas, 0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
        variance = betas * (1 - before) / (1 - alpha_bar)
        tables = {
            "betas": betas,
            "alpha_bar": alpha_bar,
            "from_start": before.sqrt() * betas / (1 - alpha_bar),
            "from_noisy": (1 - betas).sqrt() * (1 - before) / (1 - alpha_bar),
            # v_0 = 0: its logarithm is that of the next step, as in the published code
            "log_variance": torch.cat((variance[1:2], variance[1:])).log(),
        }
        for name, values in tables.items():
            self.register_buffer(name, values.to(torch.float32), persistent=False)

    def add_noise(self, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        bar = self._at(self.alpha_bar, timesteps, x0)
        return bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def predict_start(self, x_t: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        bar = self._at(self.alpha_bar, timesteps, x_t)
        return (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()

    def loss(
        self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, noise: Tensor, *, min_snr: float | None = None,
        learned_variance: bool = False,
    ) -> Tensor:  # fmt: skip
        """Per sample [B]: mean squared error of the predicted noise, plus the variational bound of a learned variance.

        min_snr: gamma, weights the error by min(SNR, gamma) / SNR (Hang et al. 2023). learned_variance: prediction has 2 C
        channels; the second half places log variance between log v_t (-1) and log beta_t (+1), and the bound, in bits per
        dimension, is computed with the mean detached.
        """
        channels = noise.shape[1]
        if prediction.shape[1] != (2 if learned_variance else 1) * channels:
            raise ValueError(
                f"prediction: expected {2 if learned_variance else 1} x {channels} channels, got {tuple(prediction.shape)}"
            )
        error = (prediction[:, :channels] - noise).square().flatten(1).mean(1)
        if min_snr is not None:
            bar = self.alpha_bar[timesteps]
            snr = bar / (1 - bar)
            error = error * snr.clamp(max=min_snr) / snr
        if learned_variance:
            error = error + self._bound(prediction, x_t, timesteps, noise)
        return error

    def _bound(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        predicted, fraction = prediction.chunk(2, 1)
        x0 = self.predict_start(x_t, timesteps, noise)
        mean = self._posterior_mean(self.predict_start(x_t, timesteps, predicted.detach()), x_t, timesteps)
        true_mean, true_log = self._posterior_mean(x0, x_t, timesteps), self._at(self.log_variance, timesteps, x_t)
        log_variance = self._log_variance(fraction, timesteps)
        squared = (true_mean - mean).square()
        kl = 0.5 * (log_variance - true_log + (true_log - log_variance).exp() + squared * (-log_variance).exp() - 1)
        first = -_discrete_log_likelihood(x0, mean, log_variance)
        bits = torch.where(timesteps.view(-1, 1, 1, 1) == 0, first, kl) / math.log(2.0)
        return bits.flatten(1).mean(1)

    def _log_variance(self, fraction: Tensor, timesteps: Tensor) -> Tensor:
        low, high = self._at(self.log_variance, timesteps, fraction), self._at(self.betas, timesteps, fraction).log()
        share = (fraction + 1) / 2
        return share * high + (1 - share) * low

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self._at(self.from_start, timesteps, x0) * x0 + self._at(self.from_noisy, timesteps, x_t) * x_t

    @torch.no_grad()
    def sample(
        self, predict: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], *, generator: torch.Generator,
        clip: float | None = 1.0,
    ) -> Tensor:  # fmt: skip
        """Ancestral sampling from noise: predict(x_t, timesteps) -> noise (or noise and variance, 2 C channels).

        clip: bound of the predicted x_0, None for latents.

        >>> images = schedule.sample(lambda x, t: model(x, t, classes).prediction, (16, 1, 8, 8), generator=generator)
        """
        device = self.betas.device
        x = torch.randn(shape, generator=generator, device=device)
        for t in range(self.num_timesteps - 1, -1, -1):
            steps = torch.full(shape[:1], t, device=device)
            prediction = predict(x, steps)
            noise = prediction[:, : shape[1]]
            x0 = self.predict_start(x, steps, noise)
            x0 = x0 if clip is None else x0.clamp(-clip, clip)
            learned = prediction.shape[1] == 2 * shape[1]
            log_variance = (
                self._log_variance(prediction[:, shape[1] :], steps)
                if learned
                else self._at(self.log_variance, steps, x)
            )
            x = self._posterior_mean(x0, x, steps)
            if t > 0:
                x = x + (0.5 * log_variance).exp() * torch.randn(shape, generator=generator, device=device)
        return x

    @staticmethod
    def _at(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        return table[timesteps].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def guided(
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor], classes: Tensor, scale: float, channels: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance on the noise channels only: n = n_none + scale (n_class - n_none); variance as with the class."""

    def both(x: Tensor, timesteps: Tensor) -> Tensor:
        with_class, without = predict(x, timesteps, classes), predict(x, timesteps, None)
        noise = without[:, :channels] + scale * (with_class[:, :channels] - without[:, :channels])
        return torch.cat((noise, with_class[:, channels:]), 1)

    return both


def _discrete_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the normal's mass in the bin of width 2/255 around x in [-1, 1]; the outermost bins reach to infinity."""
    scale = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * scale)
    lower = torch.special.ndtr((x - mean - 1 / 255) * scale)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()
