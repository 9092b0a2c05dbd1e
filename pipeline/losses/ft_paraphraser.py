"""The first of factor transfer's two stages, Kim et al., NeurIPS 2018, arXiv:1802.04977, eq. 1: the paraphraser.

It is an autoencoder of the teacher's map, without labels. The narrow map in its middle is the teacher's factor, which
the second stage (``ft.py``) compares with the student's. The student learns nothing in this stage.

B batch, C channels, M channels of a factor, H W space.
"""

from itertools import pairwise

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import channels

SLOPE = 0.1
"""Slope of the leaky ReLUs below zero."""


def factor_width(width: int, share: float) -> int:
    """Return the number of channels of the factor of a map: that share of the map's, but at least one."""
    return max(int(width * share), 1)


class Paraphraser(nn.Module):
    """An autoencoder of maps: three 3×3 convolutions each way, without BatchNorms.

    Its last layer is a leaky ReLU, too, which fits maps before an activation badly.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        narrow = factor_width(width, share)
        self.encoder = _layers(nn.Conv2d, (width, width, narrow, narrow))
        self.decoder = _layers(nn.ConvTranspose2d, (narrow, narrow, width, width))

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Return the reconstructed map."""
        return self.decoder(self.encoder(map_BCHW))


def _layers(kind: type[nn.Conv2d | nn.ConvTranspose2d], widths: tuple[int, ...]) -> nn.Sequential:
    """Return a convolution from each width to the next, each followed by a leaky ReLU."""
    pairs = pairwise(widths)
    return nn.Sequential(*(layer for pair in pairs for layer in (kind(*pair, 3, padding=1), nn.LeakyReLU(SLOPE))))


class FTParaphraser(Loss):
    """Mean squared error of the teacher's map after the paraphraser. A finished run leaves the paraphraser."""

    reads_labels = False
    exported = ("paraphraser",)

    class Config(Loss.Config):
        """The config of the paraphraser, such as ``{stage: last, share: 0.5}``."""

        stage: str = "last"
        """Stage of the teacher whose map is paraphrased, tapped after its activation."""
        share: float = Field(gt=0, le=1)
        """Channels of the factor, as a share of the map's."""

        def taps(self) -> Taps:
            """Return the teacher's tap."""
            return Taps(teacher=frozenset({self.stage}))

        def reads_head(self) -> bool:
            """Return False: only a map is read."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.paraphraser = Paraphraser(channels(facts.teacher_shapes, config.stage), config.share)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ft_paraphraser``."""
        map_BCHW = teacher.features[self.config.stage].detach()
        return {"ft_paraphraser": F.mse_loss(self.autocast_call(self.paraphraser, map_BCHW), map_BCHW)}
