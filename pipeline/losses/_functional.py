"""Formulas that several losses share.

B batch, C channels, D embedding, H W space, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(log_p_BK: Tensor, log_q_BK: Tensor) -> Tensor:
    """Return KL(p ‖ q) from log-probabilities, summed over the classes and averaged over the rows.

    A mean over all elements would be K times too small.
    """
    return (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(1).mean()


def pool_to_smaller(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps at the smaller of their heights and widths.

    The larger map is average-pooled; no map is ever enlarged.
    """
    size = (min(a_BCHW.shape[2], b_BCHW.shape[2]), min(a_BCHW.shape[3], b_BCHW.shape[3]))
    a_BCHW, b_BCHW = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a_BCHW, b_BCHW))
    return a_BCHW, b_BCHW


def sum_levels(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of the levels' losses; of one level, its own tensor."""
    return reduce(torch.add, losses)


TINY = 1e-12
"""Size below which ``safe_divide`` treats a divisor as zero."""


def safe_divide(x: Tensor, size: Tensor, eps: float = 0.0) -> Tensor:
    """Return x / (size + eps), but zero without gradient where ``size`` is below ``TINY``."""
    # Dividing by infinity gives an exact zero and a zero gradient. With torch.where, the gradient of the branch that is
    # not taken would be 0 · inf = NaN.
    return x / (size + eps).masked_fill(size < TINY, float("inf"))


def l2_normalize(x: Tensor, dim: int) -> Tensor:
    """Return the vectors along ``dim``, scaled to length one. A zero vector stays zero and gets no gradient.

    Dividing by max(length, 1e-12), as ``F.normalize`` does, would multiply the gradient of a zero vector by 1e12.
    """
    return safe_divide(x, torch.linalg.vector_norm(x, dim=dim, keepdim=True))


def distances(x_BD: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖ [B, B]. Between duplicates it is exactly zero, without gradient."""
    # Computed from differences. Expanding to ‖x‖² + ‖y‖² − 2x·y would lose every digit in float32, if vectors of length
    # 1000 are close to each other.
    return torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")


def rounding(count: Tensor | int, mean: Tensor) -> Tensor:
    """Return a bound of the rounding error in ‖x − mean‖² for ``count`` equal numbers, where it should be zero."""
    limits = torch.finfo(mean.dtype)
    return (count * (16 * limits.eps * mean.detach()).square()).clamp(min=limits.tiny)
