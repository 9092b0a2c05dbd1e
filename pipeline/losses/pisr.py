"""PISR, the features of a teacher that is given the large image, for super-resolution: the second of two stages.

Lee et al., "Learning with privileged information for efficient image super-resolution", ECCV 2020. Two networks predict
the location μ and the scale b of a Laplace distribution from the student's map. The loss is the negative log-likelihood
of the teacher's map, without the constant that published code adds. It may be negative.

B batch, C D channels, H W space.
"""

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import StageChoice, StageConfig, channels, stage_pair


def laplace_loss(location_BDHW: Tensor, scale_BDHW: Tensor, teacher_BDHW: Tensor) -> Tensor:
    """Return log 2b + |t − μ| / b, averaged over all elements. No gradient reaches the teacher."""
    return ((2 * scale_BDHW).log() + (teacher_BDHW.detach() - location_BDHW).abs() / scale_BDHW).mean()


class PISR(Loss):
    """Negative log-likelihood of the teacher's map, of a Laplace distribution that is predicted from the student's.

    Widths may differ. Maps of different height and width are average-pooled to the smaller one.
    """

    reads_labels = False

    class Config(StageConfig):
        """The config of PISR, such as ``{weight: 1.0e-6, scale: 0.1, eps: 1.0e-8}``."""

        stage: StageChoice = "expanding"
        """Stage of both networks whose maps are compared."""
        scale: PositiveFloat
        """Factor of the softplus that makes b."""
        eps: PositiveFloat
        """Lower bound of b."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.student_tap, self.teacher_tap = stage_pair(config.stage, facts)
        widths = (
            channels(facts.student_shapes, self.student_tap),
            channels(facts.teacher_shapes, self.teacher_tap),
        )
        self.location, self.scale = predictor(*widths), predictor(*widths)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``pisr``."""
        maps = student.features[self.student_tap], teacher.features[self.teacher_tap]
        student_BCHW, teacher_BDHW = pool_to_smaller(*maps)
        location_BDHW, raw_BDHW = (self.autocast_call(network, student_BCHW) for network in (self.location, self.scale))
        scale_BDHW = self.config.scale * F.softplus(raw_BDHW) + self.config.eps
        return {"pisr": laplace_loss(location_BDHW, scale_BDHW, teacher_BDHW)}


def predictor(student_C: int, teacher_D: int) -> nn.Sequential:
    """Return the network that predicts a parameter of the distribution: two 1×1 convolutions with a PReLU between."""
    return nn.Sequential(nn.Conv2d(student_C, teacher_D, 1), nn.PReLU(), nn.Conv2d(teacher_D, teacher_D, 1))
