"""Mean squared error of stages: stage by stage knowledge distillation, Gao et al., 2018.

The paper trains one stage at a time, and then the head with the labels. PAD's first run has it of the embeddings
(Zhang et al., ECCV 2020).   B batch, C D channels, H W space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._connectors import width_connector
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import StageChoices, StagesConfig, pair_stages


class StageMSE(Loss):
    """Mean squared error between the student's stages, through connectors, and the teacher's, summed over the stages.

    A stage is a map or a vector. A connector is a 1×1 convolution or a linear layer to the teacher's width, and the
    identity where both widths are equal.
    """

    reads_labels = False

    class Config(StagesConfig):
        """The config of the stages' errors, such as ``{stages: [stage2]}``."""

        stages: StageChoices
        """Stages of both networks. Maps of different size are average-pooled to the smaller one."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.pairs = pair_stages(config.stages, facts)
        self.connectors = nn.ModuleList(width_connector(facts, *pair) for pair in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``stage_mse``."""
        errors = []
        for (of_student, of_teacher), connector in zip(self.pairs, self.connectors, strict=True):
            x, target = student.features[of_student], teacher.features[of_teacher].detach()
            if x.ndim == 4:
                x, target = pool_to_smaller(x, target)
            errors.append(F.mse_loss(self.autocast_call(connector, x), target))
        return {"stage_mse": torch.stack(errors).sum()}
