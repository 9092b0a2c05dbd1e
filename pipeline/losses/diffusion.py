"""The equations and networks that denoise a student's tensor; to be read beside the paper.

Equation numbers are those of DDKD (Wang and Zhu, 计算机系统应用 33(9), 2024); the networks are DiffKD's (Huang et al.,
NeurIPS 2023, arXiv:2305.15712), the sampler is DDIM's (Song et al., 2020, arXiv:2010.02502) with η = 0.

B batch, C channels, H W space, T time steps of the schedule. The equations take tensors of any shape [B, …].
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.losses._convolution import Convolution
from pipeline.losses._norms import Norm, batch_norm

Predict = Callable[[Tensor, Tensor], Tensor]
"""Φ(y, t_B): the noise in y."""
Mixing = Literal["linear", "sqrt"]


class Diffusion(BaseModel):
    """The forward process's noise, the time steps the sampler visits, and how the student comes in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time_steps: PositiveInt
    beta_start: PositiveFloat
    beta_end: PositiveFloat
    sampler_steps: PositiveInt
    """Evaluations of the noise predictor that denoise the student."""
    sampler_stride: PositiveInt
    """Time steps between two of them: 5 and 100 visit 400, 300, 200, 100, 0."""
    time_rows: PositiveInt
    """Rows of the time embedding; the published table is longer than its schedule."""
    t_max: PositiveInt | None = None
    """Training draws t uniformly below it; null is below time_steps, most of which the sampler never visits."""
    mixing: Mixing = "linear"
    """Weights of student and noise where the sampler starts: (γ, 1 − γ), or their roots."""
    detach_predictor: bool = False
    """Whether the diffusion loss alone trains the noise predictor; as published, the distance does too."""
    checkpoint: bool = False
    """Whether backward computes the sampler's passes of Φ again, in place of keeping what happens inside of them."""
    compile: bool = False
    """Whether torch compiles Φ and the adapter, which joins norms and ReLUs: other last bits, and a slow first step."""
    stat_scope: Literal["rank", "global"] = "rank"
    """Rows that the norms' statistics cover: this rank's, as published, or all ranks'."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "Diffusion":
        if self.sampled[0] >= self.time_steps:
            raise ValueError(f"the sampler would start at t = {self.sampled[0]}, past time_steps: {self.time_steps}")
        if self.time_rows < self.time_steps:
            raise ValueError(f"time_rows must be at least time_steps: {self.time_steps}, got {self.time_rows}")
        if self.t_max is not None and self.t_max > self.time_steps:
            raise ValueError(f"t_max must be at most time_steps: {self.time_steps}, got {self.t_max}")
        if self.compile and self.stat_scope == "global":
            raise ValueError("compile: true needs stat_scope: rank; what ranks ask one another is not compiled")
        return self

    @property
    def sampled(self) -> list[int]:
        """The sampler's time steps, first to last, ending at 0."""
        return [step * self.sampler_stride for step in reversed(range(self.sampler_steps))]

    def alpha_bars(self) -> Tensor:
        """Return ᾱ_t = Π (1 − β_s), s ≤ t, of linearly rising β (under eq. 2); float64 [T]."""
        # On the CPU also where modules are built on the meta device: it holds numbers, not parameters.
        betas_T = torch.linspace(self.beta_start, self.beta_end, self.time_steps, dtype=torch.float64, device="cpu")
        return (1 - betas_T).cumprod(0)

    def norm(self, channels: int) -> nn.Module:
        """Return a BatchNorm that always takes the batch's statistics; running ones would mix unlike passes."""
        return batch_norm(channels, self.stat_scope)


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return y_t = √ᾱ·y₀ + √(1 − ᾱ)·ε for one ᾱ, or one a row (eq. 4)."""
    alpha_bar = _per_row(alpha_bar, clean)
    return alpha_bar.sqrt().to(clean.dtype) * clean + (1 - alpha_bar).sqrt().to(clean.dtype) * noise


def denoise_step(noisy: Tensor, noise: Tensor, alpha_bar: float, following: float) -> Tensor:
    """Return y at the level ``following`` from y at ``alpha_bar`` and the noise in it, drawing none (eq. 6, σ = 0).

    y' = √ᾱ'·y₀ + √(1 − ᾱ')·ε with y₀ = (y − √(1 − ᾱ)·ε)/√ᾱ, its two tensors multiplied out.
    """
    keep = math.sqrt(following / alpha_bar)
    return torch.add(keep * noisy, noise, alpha=math.sqrt(1 - following) - keep * math.sqrt(1 - alpha_bar))


def diffusion_loss(predict: Predict, clean: Tensor, noise: Tensor, t_B: Tensor, alpha_bars_T: Tensor) -> Tensor:
    """Return ‖ε − Φ(y_t, t)‖², averaged over all elements (eq. 5)."""
    return F.mse_loss(predict(add_noise(clean, noise, alpha_bars_T[t_B]), t_B), noise)


def denoise(
    predict: Callable[[Tensor, int], Tensor], start: Tensor, time_steps: Sequence[int], alpha_bars: Sequence[float]
) -> Tensor:
    """Return y₀ from the noisy ``start`` by deterministic DDIM steps through ``time_steps`` and out of all noise.

    ``alpha_bars`` holds ᾱ by time step, on the host.
    """
    y = start
    levels = [float(alpha_bars[t]) for t in time_steps]
    for t, alpha_bar, following in zip(time_steps, levels, [*levels[1:], 1.0], strict=True):
        y = denoise_step(y, predict(y, t), alpha_bar, following)
    return y


def reconstruction_loss(rebuilt: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖F̃ − F‖² of the autoencoder, averaged over all elements (eq. 7)."""
    return F.mse_loss(rebuilt, teacher)


def match_noise(feature: Tensor, noise: Tensor, gamma_B: Tensor, mixing: Mixing) -> Tensor:
    """Return Z_T = γ·Z + (1 − γ)·ε, where the sampler starts (eq. 9).

    ``sqrt`` takes the roots of both weights, which would keep a unit variance; the papers' linear ones do not.
    """
    gamma = _per_row(gamma_B, feature)
    if mixing == "sqrt":
        return gamma.sqrt() * feature + (1 - gamma).sqrt() * noise
    return gamma * feature + (1 - gamma) * noise


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


class Bottleneck(nn.Module):
    """x + block(x): 1×1 to fewer channels, 3×3, 1×1 back; no ReLU after the sum."""

    def __init__(self, channels: int, reduction: int, norm: Norm) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.block = nn.Sequential(
            *(Convolution(channels, inner), norm(inner), nn.ReLU()),
            *(Convolution(inner, inner, 3), norm(inner), nn.ReLU()),
            *(Convolution(inner, channels), norm(channels)),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return x + block(x)."""
        return x_BCHW + self.block(x_BCHW)


class Autoencoder(nn.ModuleDict):
    """Linear autoencoder, a convolution to the latent's width and one back.

    The encoder's norm brings the latent to unit variance, which makes noise of unit variance commensurate with it.
    """

    def __init__(self, channels: int, latent: int, norm: Norm) -> None:
        encoder = nn.Sequential(Convolution(channels, latent), norm(latent))
        super().__init__({"encoder": encoder, "decoder": Convolution(latent, channels)})


class NoisePredictor(nn.Module):
    """Φ(y, t). The time step enters as one learned number a channel, added to y.

    Where all rows have the same one, as in every step of the sampler, that is a constant a channel, and the norm after
    each convolution takes a constant away: there Φ does not depend on t, and does not read it.
    """

    def __init__(self, network: nn.Module, channels: int, time_rows: int) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(time_rows, channels)
        self.network = network

    def forward(self, y_BCHW: Tensor, t_B: Tensor | None = None) -> Tensor:
        """Return the predicted noise, shaped as ``y``; no ``t_B`` is one time step for all rows, whichever."""
        embedded = y_BCHW if t_B is None else y_BCHW + self.time_embedding(t_B)[:, :, None, None]
        return self.network(embedded)


class NoiseAdapter(nn.Module):
    """Weighs a student's tensor against noise: two numbers a sample, whose softmax is (γ, 1 − γ)."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(channels, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the two numbers before the softmax [B, 2]."""
        return self.linear(self.network(x_BCHW).mean((2, 3)))


def map_predictor(channels: int, reduction: int, norm: Norm) -> nn.Sequential:
    """Return Φ's network for maps: two bottlenecks, a convolution, a norm."""
    bottlenecks = (Bottleneck(channels, reduction, norm), Bottleneck(channels, reduction, norm))
    return nn.Sequential(*bottlenecks, Convolution(channels, channels), norm(channels))


def logit_predictor(channels: int, expansion: int, norm: Norm) -> nn.Sequential:
    """Return Φ's network for logits [B, K, 1, 1]: two expanding blocks, the second without a norm at its end."""
    return nn.Sequential(*_expanding(channels, expansion, norm), norm(channels), *_expanding(channels, expansion, norm))


def logit_adapter(channels: int, expansion: int, norm: Norm) -> nn.Sequential:
    """Return the adapter's network for logits [B, K, 1, 1]: one expanding block."""
    return nn.Sequential(*_expanding(channels, expansion, norm), norm(channels))


def _expanding(channels: int, expansion: int, norm: Norm) -> list[nn.Module]:
    wide = channels * expansion
    return [Convolution(channels, wide), norm(wide), nn.ReLU(), Convolution(wide, channels)]
