"""Masked generative distillation, Yang et al., ECCV 2022, arXiv:2205.01529.

A part of the student's map is hidden, and two convolutions generate the teacher's whole map from the rest.

B batch, C channels, H W space.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._connectors import AlignedMapLoss, channel_connector
from pipeline.losses._stages import channels


def mgd_loss(generated_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the squared distance of the maps, summed over a row's elements and averaged over the rows.

    No gradient reaches the teacher.
    """
    return F.mse_loss(generated_BCHW, teacher_BCHW.detach(), reduction="sum") / len(teacher_BCHW)


def hide(map_BCHW: Tensor, part: Literal["pixels", "channels"], share: float) -> Tensor:
    """Return the map with a drawn part of every row's pixels or channels set to zero, each with probability ``share``.

    The draws are from torch's default generator of the map's device.
    """
    rows, width, *size = map_BCHW.shape
    shape = (rows, 1, *size) if part == "pixels" else (rows, width, 1, 1)
    return map_BCHW * (torch.rand(shape, device=map_BCHW.device) >= share)


class MGD(AlignedMapLoss):
    """A loss between the teacher's map and what is generated from a masked map of the student.

    Under several ranks each draws its own masks.
    """

    reads_labels = False
    takes_pixels = True

    class Config(AlignedMapLoss.Config):
        """The config of MGD, such as ``{weight: 2.0e-5, stages: [stage4], hidden: pixels, share: 0.75}``."""

        hidden: Literal["pixels", "channels"]
        """What is hidden of the student's map: pixels, in all channels, or whole channels."""
        share: float = Field(ge=0, lt=1)
        """Probability λ of being hidden."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        widths = [channels(facts.teacher_shapes, teacher) for _, teacher in self.levels]
        self.generators = nn.ModuleList(generator(width) for width in widths)

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's channels; its convolution has a bias."""
        return channel_connector(self.facts, student, teacher, bias=True)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``mgd``."""
        c, levels = self.config, []
        for network, pair in zip(self.generators, self.aligned_maps(student, teacher), strict=True):
            generated_BCHW = self.autocast_call(network, hide(pair[0], c.hidden, c.share))
            levels.append(mgd_loss(generated_BCHW, pair[1]))
        return {"mgd": torch.stack(levels).sum()}


def generator(width: int) -> nn.Sequential:
    """Return the network that generates a map of ``width`` channels: two 3×3 convolutions with a ReLU between them."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
