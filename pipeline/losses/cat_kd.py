"""Class attention transfer, Guo et al., CVPR 2023, arXiv:2304.12777.

The class activation maps of student and teacher, where each class's logit comes from, are compared at a low resolution.
The maps of both networks leave out the head's bias, which has no place.   B batch, K classes, H W space.
"""

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import CAM
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._functional import l2_normalize


def cat_loss(student_BKHW: Tensor, teacher_BKHW: Tensor, *, resolution: int, normalize: bool) -> Tensor:
    """Return the mean squared distance of class activation maps averaged down to ``resolution`` pixels a side.

    ``normalize`` gives every class's map unit length after that, so that only where it looks is learned. The networks'
    maps may differ in size. No gradient reaches the teacher.
    """
    student, teacher = (F.adaptive_avg_pool2d(x, resolution) for x in (student_BKHW, teacher_BKHW.detach()))
    if normalize:
        student, teacher = (l2_normalize(x.flatten(2), 2) for x in (student, teacher))
    return F.mse_loss(student, teacher)


class CatKD(Loss):
    """Mean squared distance of the class activation maps."""

    class Config(Loss.Config):
        """``{resolution: 2, normalize: false}``."""

        resolution: PositiveInt
        """Height and width that both maps are averaged down to."""
        normalize: bool
        """Whether every class's map is brought to unit length; the authors do where the architectures differ."""

        def taps(self) -> Taps:
            """Return the class activation maps."""
            return Taps(frozenset({CAM}), frozenset({CAM}))

    def __init__(self, config: Config, facts: Facts) -> None:
        for owner, shapes in (("student", facts.student_shapes), ("teacher", facts.teacher_shapes)):
            _, height, width = shapes[CAM]
            if config.resolution > min(height, width):
                raise ValueError(
                    f"cat_kd: resolution: the {owner}'s class activation maps are {height}×{width}; "
                    f"give at most {min(height, width)}, got {config.resolution}"
                )
        super().__init__(config, facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``cat_kd``."""
        c = self.config
        loss = cat_loss(student.features[CAM], teacher.features[CAM], resolution=c.resolution, normalize=c.normalize)
        return {"cat_kd": loss}
