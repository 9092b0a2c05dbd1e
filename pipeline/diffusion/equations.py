"""The equations that denoise a student's tensor, written to be read beside the paper.

Equation numbers are those of DDKD (Wang and Zhu, 计算机系统应用 33(9), 2024); the sampler is DDIM's (Song et al., 2020,
arXiv:2010.02502) with η = 0.

B batch, C channels, H W space, T time steps of the schedule. The equations take tensors of any shape [B, …].
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.diffusion.config import Mixing

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noise predictor Φ(y, t_B), which returns an estimate of the noise in y."""


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return y_t = √ᾱ·y₀ + √(1 − ᾱ)·ε, for one ᾱ or one per row (eq. 4)."""
    alpha_bar = _per_row(alpha_bar, clean)
    # The roots are taken in float64 and then cast: near t = 0, 1 − ᾱ would be zero in half precision.
    return alpha_bar.sqrt().to(clean.dtype) * clean + (1 - alpha_bar).sqrt().to(clean.dtype) * noise


def denoise_step(noisy: Tensor, noise: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """Return y at noise level ``next_alpha_bar``, from y at ``alpha_bar`` and its noise (eq. 6 with σ = 0).

    No noise is drawn. The equations are multiplied out into one factor for y and one for ε:

        y' = √ᾱ'·y₀ + √(1 − ᾱ')·ε   with   y₀ = (y − √(1 − ᾱ)·ε)/√ᾱ
    """
    keep = math.sqrt(next_alpha_bar / alpha_bar)
    return torch.add(keep * noisy, noise, alpha=math.sqrt(1 - next_alpha_bar) - keep * math.sqrt(1 - alpha_bar))


def diffusion_loss(predict: Predict, clean: Tensor, noise: Tensor, t_B: Tensor, alpha_bars_T: Tensor) -> Tensor:
    """Return ‖ε − Φ(y_t, t)‖², averaged over all elements (eq. 5)."""
    return F.mse_loss(predict(add_noise(clean, noise, alpha_bars_T[t_B]), t_B), noise)


def denoise(
    predict: Callable[[Tensor, int], Tensor], start: Tensor, time_steps: Sequence[int], alpha_bars: Sequence[float]
) -> Tensor:
    """Return y₀ from the noisy ``start`` by one deterministic DDIM step for each of ``time_steps``.

    The last step goes to the noise-free level ᾱ = 1. ``alpha_bars`` holds ᾱ by time step, as floats on the host.
    """
    y = start
    levels = [float(alpha_bars[t]) for t in time_steps]
    for t, alpha_bar, next_alpha_bar in zip(time_steps, levels, [*levels[1:], 1.0], strict=True):
        y = denoise_step(y, predict(y, t), alpha_bar, next_alpha_bar)
    return y


def reconstruction_loss(rebuilt: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖F̃ − F‖² of the autoencoder, averaged over all elements (eq. 7)."""
    return F.mse_loss(rebuilt, teacher)


def match_noise(feature: Tensor, noise: Tensor, gamma_B: Tensor, mixing: Mixing) -> Tensor:
    """Return Z_T = γ·Z + (1 − γ)·ε, the tensor at the sampler's start (eq. 9).

    ``sqrt`` takes the square roots of both weights, which keeps a unit variance. The linear weights of the papers do
    not.
    """
    gamma = _per_row(gamma_B, feature)
    if mixing == "sqrt":
        return gamma.sqrt() * feature + (1 - gamma).sqrt() * noise
    return gamma * feature + (1 - gamma) * noise


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return the values shaped [B, 1, …], or [1, 1, …] for a single one, so that they broadcast over ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))
