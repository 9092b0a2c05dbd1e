"""Neuron selectivity transfer, Huang and Wang, 2017, arXiv:1707.01219, with the polynomial kernel k(a, b) = (a·b)².

B batch, C D channels, H W space, N pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import l2_normalize, pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss


def nst_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the squared maximum mean discrepancy of the channels, averaged over the rows and summed over the levels.

    Each channel's map, scaled to length one, is a sample. Maps [B, C, H, W] of different size are average-pooled to the
    smaller one. Numbers of channels may differ. No gradient reaches the teacher.
    """
    levels = [pool_to_smaller(student, teacher.detach()) for student, teacher in zip(students, teachers, strict=True)]
    return torch.stack([discrepancy(student, teacher) for student, teacher in levels]).sum()


def discrepancy(student_BCHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """Return the mean of k(t, t') + k(s, s') − 2·k(s, t) over the rows and all pairs of channels."""
    s_BCN, t_BDN = l2_normalize(student_BCHW.flatten(2), 2), l2_normalize(teacher_BDHW.flatten(2), 2)
    return mean_kernel(t_BDN, t_BDN) + mean_kernel(s_BCN, s_BCN) - 2 * mean_kernel(s_BCN, t_BDN)


def mean_kernel(a_BCN: Tensor, b_BDN: Tensor) -> Tensor:
    """Return the mean of (a·b)² over the rows and the pairs of channels.

    Σ_cd (a_c·b_d)² is ‖A·Bᵀ‖² and also ⟨AᵀA, BᵀB⟩. The first needs a C × D matrix, the second N × N; the smaller is
    computed. Shallow maps have few channels, deep ones few pixels.
    """
    # Both forms are matrix products. Elementwise products, summed over the pixels afterwards, would need C × D × N.
    (_, channels_a, pixels), channels_b = a_BCN.shape, b_BDN.shape[1]
    if channels_a * channels_b <= pixels**2:
        return torch.bmm(a_BCN, b_BDN.mT).square().mean()
    pairs_BNN = torch.bmm(a_BCN.mT, a_BCN) * torch.bmm(b_BDN.mT, b_BDN)
    return pairs_BNN.sum((1, 2)).mean() / (channels_a * channels_b)


class NST(FeatureMapLoss):
    """A loss that matches the distribution of the channels' maps of both networks."""

    reads_labels = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``nst``."""
        return {"nst": nst_loss(*self.maps(student, teacher))}
