"""PKD: Pearson correlation of feature maps, Cao et al., NeurIPS 2022, arXiv:2207.02039.

B batch, C channels, J channels of both networks, H W space.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import global_sum
from pipeline.losses._connectors import AlignedMapLoss
from pipeline.losses._functional import rounding
from pipeline.losses._rows import StatScope, group_size, mean_by_rows

_EPS = 1e-6
"""Term that the published code adds to the standard deviation."""
_FLAT = 1e-9
"""Deviation up to which a channel counts as one without contrast; beside ε, its values would be below a thousandth."""


def pkd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Return half the mean squared difference of the maps, whose channels are standardised for each network.

    That is one minus the correlation, but for the ε and the unbiased variance. Both maps have one shape. No gradient
    reaches the teacher. This is a collective: every rank must call it, unless ``across_ranks`` is False.
    """
    both_BJHW = torch.cat([student_BCHW, teacher_BCHW.detach()], 1)
    student_BCHW, teacher_BCHW = standardize_channels(both_BJHW, across_ranks=across_ranks).chunk(2, 1)
    return (student_BCHW - teacher_BCHW).square().mean() / 2


def standardize_channels(map_BCHW: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Return (x − mean)/(deviation + 1e-6) of every channel, over the pixels of the rows of all ranks or of this one.

    The variance is unbiased, and gradients flow through both statistics. A channel without contrast becomes zero and
    gets no gradient.
    """
    all_reduce = global_sum if across_ranks else torch.clone
    pixels = map_BCHW[:, 0].numel()
    sums = all_reduce(torch.cat([map_BCHW.new_full((1,), pixels), map_BCHW.sum((0, 2, 3))]))
    count, mean_C = sums[0], sums[1:] / sums[0]
    # Centred before squaring, which costs a second all-reduce. A difference of sums of squares would lose digits.
    map_BCHW = map_BCHW - mean_C[:, None, None]
    squares_C = all_reduce(map_BCHW.square().sum((0, 2, 3)))
    # A 1×1 convolution of a map without contrast leaves more rounding than the mean alone would.
    noise_C = torch.maximum(rounding(count, mean_C), count * _FLAT**2)
    deviation_C = (squares_C.clamp(min=noise_C) / (count - 1).clamp(min=1)).sqrt()
    # A division by 1e-6 would multiply the gradient of such a channel by a million.
    return map_BCHW / (deviation_C + _EPS).masked_fill(squares_C <= noise_C, float("inf"))[:, None, None]


class PKD(AlignedMapLoss):
    """A loss that matches the pattern of every channel over the pixels of the batch, but not its mean and size.

    Under gradient accumulation the pixels are those of the micro-batch of all ranks.
    """

    scope = "statistics"
    reads_labels = False
    takes_pixels = True

    class Config(AlignedMapLoss.Config):
        """The config of PKD, such as ``{weight: 6.0, stages: [last]}``."""

        stat_scope: StatScope = "global"
        """Rows of the statistics: ``global`` (all ranks'), ``rank`` (as published), ``ghost:N`` (each N of a rank)."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``pkd``."""
        levels = [self.grouped_distance(*pair) for pair in self.aligned_maps(student, teacher)]
        return {"pkd": torch.stack(levels).sum()}

    def grouped_distance(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return a level's loss over all rows, or its mean over this rank's groups of rows."""
        size = group_size(self.config.stat_scope, len(student_BCHW))
        if size is None:
            return pkd_loss(student_BCHW, teacher_BCHW)
        groups = list(zip(student_BCHW.split(size), teacher_BCHW.split(size), strict=True))
        found = [pkd_loss(*group, across_ranks=False) for group in groups]
        return mean_by_rows(found, [len(rows) for rows, _ in groups])
