"""FitNets: a hint from the teacher's map, Romero et al., ICLR 2015, arXiv:1412.6550, eq. 3.

It is trained together with the cross-entropy, as in CRD's benchmark (Tian et al., ICLR 2020, arXiv:1910.10699). The
paper first trains with the hint alone.

B batch, C D channels, H W space.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Taps
from pipeline.losses._connectors import ConnectorLoss, regressor
from pipeline.losses._functional import pool_to_smaller, sum_levels
from pipeline.losses._stages import (
    StageChoice,
    StageList,
    channels,
    level_networks,
    pair_stages,
    per_level,
    stage_taps,
)


class FitNet(ConnectorLoss):
    """Mean squared error between the teacher's map and the student's map after a regressor and a ReLU.

    With ``linear``, a larger map is average-pooled to the smaller one first. The errors of several maps are summed.
    """

    reads_labels = False

    class Config(ConnectorLoss.Config):
        """The config of FitNets, such as ``{stage: stage2}``."""

        stage: StageChoice | StageList
        """Stage of both networks, or several: a list, or a group such as ``fpn``. Each has its own regressor. Its ReLU
        has no negative outputs, so name stages after their activation, or set ``linear``."""

        linear: bool = False
        """Whether the regressor is a 1×1 convolution alone, without bias, BatchNorm and ReLU, as for segmentation."""

        def taps(self) -> Taps:
            """Return the stage's taps."""
            return stage_taps(self.stage)

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.stage, facts)
        self.regressor = per_level(self.levels, self.level_regressor)

    def level_regressor(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the shape of the teacher's."""
        if not self.config.linear:
            return nn.Sequential(*regressor(self.facts, student, teacher, self.norm), nn.ReLU())
        widths = channels(self.facts.student_shapes, student), channels(self.facts.teacher_shapes, teacher)
        return nn.Conv2d(*widths, 1, bias=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``fitnet``."""
        errors = [
            self.error(network, student.features[ours], teacher.features[theirs].detach())
            for network, (ours, theirs) in zip(level_networks(self.regressor), self.levels, strict=True)
        ]
        return {"fitnet": sum_levels(errors)}

    def error(self, network: nn.Module, student_BCHW: Tensor, hint_BDHW: Tensor) -> Tensor:
        """Return the mean squared error of one map."""
        if self.config.linear:  # it does not resize
            student_BCHW, hint_BDHW = pool_to_smaller(student_BCHW, hint_BDHW)
        return F.mse_loss(self.autocast_call(network, student_BCHW), hint_BDHW)
