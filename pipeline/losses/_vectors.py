"""Lengths, directions and distances of vectors, with gradients that are finite where a vector or a distance is zero.

B batch, D embedding.
"""

import torch
from torch import Tensor

TINY = 1e-12


def ratio(x: Tensor, size: Tensor, eps: float = 0.0) -> Tensor:
    """Return x / (size + eps); where ``size`` is below 1e-12, zero, through which no gradient passes."""
    return x / (size + eps).masked_fill(size < TINY, float("inf"))


def unit(x: Tensor, dim: int) -> Tensor:
    """Return the directions of the vectors along ``dim``; that of a zero vector is zero and sends it no gradient.

    A division by max(length, 1e-12) has the same value there and would send it 1e12 times the gradient.
    """
    return ratio(x, torch.linalg.vector_norm(x, dim=dim, keepdim=True))


def distances(x_BD: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖ [B, B]; between duplicates it is exactly zero and sends no gradient.

    From differences: by ‖x‖² + ‖y‖² − 2x·y, vectors of a thousand that lie close would lose every digit in float32.
    """
    return torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
