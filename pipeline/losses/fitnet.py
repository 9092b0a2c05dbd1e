"""FitNets: a hint from the teacher's map, Romero et al., ICLR 2015, arXiv:1412.6550, eq. 3.

It is trained together with the cross-entropy, as in CRD's benchmark (Tian et al., ICLR 2020, arXiv:1910.10699). The
paper first trains with the hint alone.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Taps
from pipeline.losses._connectors import ConnectorLoss, regressor
from pipeline.losses._stages import StageChoice, stage_names, stage_taps


class FitNet(ConnectorLoss):
    """Mean squared error between the teacher's map and the student's map after a regressor and a ReLU."""

    reads_labels = False

    class Config(ConnectorLoss.Config):
        """The config of FitNets, such as ``{stage: stage2}``."""

        stage: StageChoice
        """Stage of both networks, tapped after its activation, because the regressor's ReLU has no negative outputs."""

        def taps(self) -> Taps:
            """Return the stage's taps."""
            return stage_taps(self.stage)

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.student_tap, self.teacher_tap = stage_names(config.stage)
        self.regressor = nn.Sequential(*regressor(facts, self.student_tap, self.teacher_tap, self.norm), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``fitnet``."""
        guess_BCHW = self.autocast_call(self.regressor, student.features[self.student_tap])
        return {"fitnet": F.mse_loss(guess_BCHW, teacher.features[self.teacher_tap].detach())}
