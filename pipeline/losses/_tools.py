"""Formulas that several losses share.   B batch, C channels, H W space, K classes."""

from __future__ import annotations

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
