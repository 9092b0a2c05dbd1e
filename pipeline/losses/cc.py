"""Correlation congruence, Peng et al., ICCV 2019, arXiv:1904.01802, in the form of CRD's benchmark.

Student and teacher each have a linear layer that embeds their features. δ is the distance between the two embeddings
of a row, entry by entry. The loss is Σ_d δ_i·δ_j, averaged over pairs of rows.

Published code pairs every row with its neighbour in the batch, so that the value depends on the order. Here all pairs
count. That is the expectation over all orders:

    L = (‖Σ_i δ_i‖² − Σ_i ‖δ_i‖²) / (N·(N − 1))

Both layers learn, so embeddings of zero are a minimum of this loss.

B batch, D embedding, N rows of all ranks.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import gather_rows, global_sum, world_size
from pipeline.losses._base import Facts, Loss
from pipeline.losses._rows import in_global_order
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair, vector_width


def all_pairs(distance_BD: Tensor) -> Tensor:
    """Return Σ_d δ_i·δ_j, averaged over all pairs of different rows of all ranks. This is a collective."""
    rows = len(distance_BD) * world_size()
    # The sum of squares is one number more in the same all-reduce.
    sums = global_sum(torch.cat([distance_BD.sum(0), distance_BD.square().sum().view(1)]))
    return (sums[:-1].square().sum() - sums[-1]) / (rows * (rows - 1))


def neighbours(distance_BD: Tensor) -> Tensor:
    """Return Σ_d δ_i·δ_{i+1}, averaged over the neighbours in the global batch, as published. This is a collective."""
    distance_ND = in_global_order(gather_rows(distance_BD, equal=True))
    return (distance_ND[:-1] * distance_ND[1:]).sum(1).mean()


class CC(Loss):
    """The product of two rows' distances between student and teacher, in an embedding that both learn."""

    scope = "statistics"
    reads_labels = False

    class Config(StageConfig):
        """The config of CC, such as ``{weight: 0.02, dim: 128, pairs: all}``."""

        stage: StageChoice = "embedding"
        """Stage of both networks whose features are embedded."""
        dim: PositiveInt
        """Dimension D of the embeddings."""
        pairs: Literal["all", "neighbours"]
        """Pairs of rows: ``all``, or ``neighbours`` in the global batch, as published."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.student_tap, self.teacher_tap = stage_pair(config.stage, facts)
        self.student_head = nn.Linear(vector_width("cc", facts.student_shapes, self.student_tap), config.dim)
        self.teacher_head = nn.Linear(vector_width("cc", facts.teacher_shapes, self.teacher_tap), config.dim)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``cc``. Raises ValueError if the global batch has one row."""
        if len(batch.ids_B) * world_size() == 1:
            raise ValueError("cc: a batch of one row has no pairs; raise batch")
        student_BD = self.autocast_call(self.student_head, student.features[self.student_tap])
        teacher_BD = self.autocast_call(self.teacher_head, teacher.features[self.teacher_tap].detach())
        average = all_pairs if self.config.pairs == "all" else neighbours
        return {"cc": average((student_BD - teacher_BD).abs())}
