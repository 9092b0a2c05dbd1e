"""Class attention transfer, Guo et al., CVPR 2023, arXiv:2304.12777.

A class activation map shows which pixels a class's logit comes from. The maps of student and teacher are compared at a
low resolution. They leave out the head's bias, which belongs to no pixel.

B batch, K classes, H W space.
"""

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import CAM
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._functional import l2_normalize


def cat_loss(student_BKHW: Tensor, teacher_BKHW: Tensor, *, resolution: int, normalize: bool) -> Tensor:
    """Return the mean squared error of class activation maps, average-pooled to ``resolution`` × ``resolution``.

    With ``normalize``, each class's pooled map is scaled to unit length: the student then learns where a class is seen,
    but not how strongly. The networks' maps may differ in size. No gradient reaches the teacher.
    """
    student, teacher = (F.adaptive_avg_pool2d(x, resolution) for x in (student_BKHW, teacher_BKHW.detach()))
    if normalize:
        student, teacher = (l2_normalize(x.flatten(2), 2) for x in (student, teacher))
    return F.mse_loss(student, teacher)


class CatKD(Loss):
    """Mean squared error of the class activation maps."""

    reads_labels = False

    class Config(Loss.Config):
        """The config of CAT-KD, such as ``{resolution: 2, normalize: false}``."""

        resolution: PositiveInt
        """Height and width to which both maps are average-pooled."""
        normalize: bool
        """Whether each class's map is scaled to unit length, as the authors do if the architectures differ."""

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
        """Return the loss part ``cat_kd``."""
        c = self.config
        loss = cat_loss(student.features[CAM], teacher.features[CAM], resolution=c.resolution, normalize=c.normalize)
        return {"cat_kd": loss}
