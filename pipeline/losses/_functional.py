"""Formulas that several losses share.   B batch, C channels, H W space, K classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(log_p_BK: Tensor, log_q_BK: Tensor) -> Tensor:
    """Return KL(p ‖ q) from log-probabilities, summed over the classes and averaged over the rows.

    The mean over all elements would be K times too small.
    """
    return (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(1).mean()


def pool_to_smaller(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps at the smaller of their heights and widths; the larger is averaged, none is ever enlarged."""
    size = (min(a_BCHW.shape[2], b_BCHW.shape[2]), min(a_BCHW.shape[3], b_BCHW.shape[3]))
    a_BCHW, b_BCHW = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a_BCHW, b_BCHW))
    return a_BCHW, b_BCHW


TINY = 1e-12


def safe_divide(x: Tensor, size: Tensor, eps: float = 0.0) -> Tensor:
    """Return x / (size + eps); where ``size`` is below 1e-12, zero, through which no gradient passes."""
    return x / (size + eps).masked_fill(size < TINY, float("inf"))


def l2_normalize(x: Tensor, dim: int) -> Tensor:
    """Return the directions of the vectors along ``dim``; that of a zero vector is zero and sends it no gradient.

    A division by max(length, 1e-12) has the same value there and would send it 1e12 times the gradient.
    """
    return safe_divide(x, torch.linalg.vector_norm(x, dim=dim, keepdim=True))


def distances(x_BD: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖ [B, B]; between duplicates it is exactly zero and sends no gradient.

    From differences: by ‖x‖² + ‖y‖² − 2x·y, vectors of a thousand that lie close would lose every digit in float32.
    """
    return torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
