"""What a report shows of a denoiser: its noise level γ, and the maps of one image before and after denoising.

B batch, C channels, H W space.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser, Draws

LARGEST_MAP = 16
"""Side of the largest map that is kept; larger ones are average-pooled."""


class Observed(NamedTuple):
    """A denoiser's answers to a few images."""

    gamma: dict[str, float]
    """Mean, least and most of γ, the share of the student's tensor at the sampler's start."""
    maps: dict[str, list[list[float]]]
    """Mean square over the channels of the first image, by ``teacher``, ``student`` and ``denoised``."""


@torch.no_grad()
def observe_denoiser(denoiser: Denoiser, student_BCHW: Tensor, teacher_BCHW: Tensor, seed: int) -> Observed:
    """Return γ and the first image's maps. The noise is drawn by ``seed``, and not by torch's default generators."""
    generator = torch.Generator().manual_seed(seed)
    like = denoiser.encode(teacher_BCHW)[0]
    noise = torch.randn(like.shape, generator=generator).to(like)
    first_t_B = torch.zeros(len(like), dtype=torch.int64, device=like.device)
    denoised = denoiser(student_BCHW, teacher_BCHW, Draws(noise, noise, first_t_B))
    gamma_B = denoised.gamma_B.float()
    gamma = {"mean": gamma_B.mean(), "least": gamma_B.min(), "most": gamma_B.max()}
    maps = {"teacher": denoised.target_BCHW, "student": student_BCHW, "denoised": denoised.student_BCHW}
    return Observed(
        {name: round(value.item(), 6) for name, value in gamma.items()},
        {name: _energy(x_BCHW[0]) for name, x_BCHW in maps.items()},
    )


def _energy(map_CHW: Tensor) -> list[list[float]]:
    """Return the mean square over the channels, at most ``LARGEST_MAP`` rows and columns, with four digits."""
    energy_1HW = map_CHW.float().square().mean(0, keepdim=True)
    height, width = (min(side, LARGEST_MAP) for side in energy_1HW.shape[1:])
    rows: list[list[Any]] = F.adaptive_avg_pool2d(energy_1HW, (height, width))[0].tolist()
    return [[float(f"{value:.4g}") for value in row] for row in rows]
