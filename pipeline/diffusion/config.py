"""The ``diffusion`` section of DiffKD and DDKD."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.distributed.norms import batch_norm
from pipeline.frozen_model import FrozenModel

Mixing = Literal["linear", "sqrt"]


class Diffusion(FrozenModel):
    """The forward process's noise, the time steps the sampler visits, and how the student comes in."""

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
    def _steps_fit(self) -> Diffusion:
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
