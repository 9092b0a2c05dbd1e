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
    """The noise schedule, the sampler's time steps, and how the student's tensor is mixed with noise."""

    time_steps: PositiveInt
    """Number of time steps of the noise schedule."""
    beta_start: PositiveFloat
    """Noise variance β of the first time step; β grows linearly."""
    beta_end: PositiveFloat
    """Noise variance β of the last time step."""
    sampler_steps: PositiveInt
    """Number of denoising steps; each one evaluates the noise predictor once."""
    sampler_stride: PositiveInt
    """Time steps between two denoising steps: 5 steps of stride 100 visit 400, 300, 200, 100, 0."""
    time_rows: PositiveInt
    """Rows of the time embedding. The published table has more rows than the schedule has time steps."""
    t_max: PositiveInt | None = None
    """Upper bound (exclusive) of the uniform draw of t in training; null is ``time_steps``.

    The sampler visits only a few values of t: those in ``sampled``.
    """
    mixing: Mixing = "linear"
    """Weights of student and noise at the sampler's start: (γ, 1 − γ), or their square roots."""
    detach_predictor: bool = False
    """Whether only the diffusion loss trains the noise predictor; as published, the distance trains it too."""
    checkpoint: bool = False
    """Whether backward recomputes the sampler's passes of Φ, to save the memory of their activations."""
    compile: bool = False
    """Whether torch compiles Φ and the adapter, which fuses norms and ReLUs.

    The last bits of the results change, and the first step is slow.
    """
    stat_scope: Literal["rank", "global"] = "rank"
    """Rows that the BatchNorms' statistics cover: this rank's, as published, or all ranks'."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Diffusion:
        if self.sampled[0] >= self.time_steps:
            raise ValueError(
                f"the sampler would start at t = {self.sampled[0]}, past time_steps: {self.time_steps}; "
                "lower sampler_steps or sampler_stride"
            )
        if self.time_rows < self.time_steps:
            raise ValueError(f"time_rows must be at least time_steps: {self.time_steps}, got {self.time_rows}")
        if self.t_max is not None and self.t_max > self.time_steps:
            raise ValueError(f"t_max must be at most time_steps: {self.time_steps}, got {self.t_max}")
        if self.compile and self.stat_scope == "global":
            raise ValueError("compile: true needs stat_scope: rank; communication between ranks cannot be compiled")
        return self

    @property
    def sampled(self) -> list[int]:
        """The sampler's time steps in the order it visits them, ending at 0."""
        return [step * self.sampler_stride for step in reversed(range(self.sampler_steps))]

    def alpha_bars(self) -> Tensor:
        """Return ᾱ_t = Π (1 − β_s) over s ≤ t, for a linear schedule of β (under eq. 2); float64 [T]."""
        # The CPU is named because modules may be built on the meta device. These are constants, whose values are
        # needed.
        betas_T = torch.linspace(self.beta_start, self.beta_end, self.time_steps, dtype=torch.float64, device="cpu")
        return (1 - betas_T).cumprod(0)

    def norm(self, channels: int) -> nn.Module:
        """Return a BatchNorm that always normalises with the statistics of its batch.

        Running statistics would mix passes whose inputs are distributed differently.
        """
        return batch_norm(channels, self.stat_scope)
