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
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import StageChoice, channels, stage_names, stage_taps


class FitNet(ConnectorLoss):
    """Mean squared error between the teacher's map and the student's map after a regressor and a ReLU.

    With ``linear``, a larger map is average-pooled to the smaller one first.
    """

    reads_labels = False

    class Config(ConnectorLoss.Config):
        """The config of FitNets, such as ``{stage: stage2}``."""

        stage: StageChoice
        """Stage of both networks, tapped after its activation, because the regressor's ReLU has no negative outputs."""

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
        self.student_tap, self.teacher_tap = taps = stage_names(config.stage)
        if config.linear:
            widths = channels(facts.student_shapes, taps[0]), channels(facts.teacher_shapes, taps[1])
            self.regressor: nn.Module = nn.Conv2d(*widths, 1, bias=False)
        else:
            self.regressor = nn.Sequential(*regressor(facts, *taps, self.norm), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``fitnet``."""
        student_BCHW, hint_BDHW = student.features[self.student_tap], teacher.features[self.teacher_tap].detach()
        if self.config.linear:  # it does not resize
            student_BCHW, hint_BDHW = pool_to_smaller(student_BCHW, hint_BDHW)
        return {"fitnet": F.mse_loss(self.autocast_call(self.regressor, student_BCHW), hint_BDHW)}
