"""Instance relationship graphs, Liu et al., CVPR 2019, pages 7096–7104.

The graph of a level has the batch's images as vertices and their squared distances as edges. From one level of a
network to the next, every vertex moves. The student learns the teacher's vertices, edges and moves.

B batch, C channels, D E embeddings, H W space.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Taps
from pipeline.losses._functional import distances, safe_divide
from pipeline.losses._rows import BatchLoss
from pipeline.losses._stages import StageChoices, pair_stages, stage_taps


def edges(x_BD: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² divided by their maximum [B, B]. The networks' embeddings may differ in width.

    The gradient passes through the maximum, too, so that it ignores the scale of ``x`` as the value does. The authors'
    code treats the maximum as a constant.
    """
    squares_BB = distances(x_BD).square()
    return safe_divide(squares_BB, squares_BB.amax())


def transformation(shallow_BD: Tensor, deep_BE: Tensor) -> Tensor:
    """Return ‖deep_i − shallow_i‖² divided by their maximum [B].

    In the paper both levels have the same width. Here neighbouring channels of the wider one are averaged to the width
    of the narrower one.
    """
    width = min(shallow_BD.shape[1], deep_BE.shape[1])
    shallow_BD, deep_BE = (F.adaptive_avg_pool1d(x, width) for x in (shallow_BD, deep_BE))
    squares_B = (deep_BE - shallow_BD).square().sum(1)
    return safe_divide(squares_B, squares_B.amax())


class IRG(BatchLoss):
    """A loss that matches logits, distances among rows at several stages, and moves of rows between stages.

    Stages are averaged over their pixels. With one stage there is no transformation part.
    """

    reads_labels = False

    class Config(BatchLoss.Config):
        """The config of IRG, such as ``{vertex_weight: 0.1, edge_weight: 5.0, transformation_weight: 5.0}``."""

        vertex_weight: NonNegativeFloat
        """Weight of the logits' mean squared error. Logits are the one feature with equal width in both networks."""
        edge_weight: NonNegativeFloat
        """Weight of the edges' mean squared error, which is averaged over the levels."""
        transformation_weight: NonNegativeFloat
        """Weight of the mean squared error of ``transformation``, averaged over the pairs of neighbouring levels."""
        stages: StageChoices = "all"
        """Stages of both networks whose maps are the levels of the graph."""

        def taps(self) -> Taps:
            """Return the stages' taps."""
            return stage_taps(self.stages)

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.stages, facts)

    def reduce(self, outputs: Outputs) -> Outputs:
        """Return the outputs with maps averaged over their pixels, so that ranks gather vectors, not maps."""
        return outputs._replace(features={name: pooled(x) for name, x in outputs.features.items()})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``vertices``, ``edges`` and, with several levels, ``transformation``.

        The outputs are those that ``reduce`` returned: vectors.
        """
        c = self.config
        students = [student.features[name] for name, _ in self.levels]
        teachers = [teacher.features[name].detach() for _, name in self.levels]
        parts = {
            "vertices": c.vertex_weight * F.mse_loss(student.logits_BK, teacher.logits_BK.detach()),
            "edges": c.edge_weight * mean_error(map(edges, students), map(edges, teachers)),
        }
        if len(self.levels) > 1:
            moves = (map(transformation, levels, levels[1:]) for levels in (students, teachers))
            parts["transformation"] = c.transformation_weight * mean_error(*moves)
        return parts


def pooled(x: Tensor) -> Tensor:
    """Return a map [B, C, H, W] averaged over its pixels; return a vector [B, D] unchanged."""
    return x.flatten(2).mean(2) if x.ndim > 2 else x


def mean_error(students: Iterable[Tensor], teachers: Iterable[Tensor]) -> Tensor:
    """Return the mean squared error between student and teacher, averaged over the levels."""
    return torch.stack([F.mse_loss(*both) for both in zip(students, teachers, strict=True)]).mean()
