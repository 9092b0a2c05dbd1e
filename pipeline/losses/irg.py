"""Instance relationship graphs, Liu et al., CVPR 2019, pages 7096–7104.

A level's graph has the images of the batch as its vertices and their squared distances as its edges; between two levels
of a network every vertex moves. Vertices, edges and moves of the student are held to the teacher's.

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
    """Return ‖x_i − x_j‖² over the largest of them [B, B]; widths of student and teacher need not agree.

    The largest is differentiated too, so that the gradient, like the value, ignores the scale of ``x``; the authors'
    code takes it for a constant.
    """
    squares_BB = distances(x_BD).square()
    return safe_divide(squares_BB, squares_BB.amax())


def transformation(shallow_BD: Tensor, deep_BE: Tensor) -> Tensor:
    """Return ‖deep_i − shallow_i‖² over the largest of them [B].

    The paper's levels are equally wide. Here neighbouring channels of the wider one are averaged down to the width of
    the narrower.
    """
    width = min(shallow_BD.shape[1], deep_BE.shape[1])
    shallow_BD, deep_BE = (F.adaptive_avg_pool1d(x, width) for x in (shallow_BD, deep_BE))
    squares_B = (deep_BE - shallow_BD).square().sum(1)
    return safe_divide(squares_B, squares_B.amax())


class IRG(BatchLoss):
    """Logits, distances among rows at several stages, and how rows move from each stage to the next.

    Stages are averaged over their pixels. With one stage there is no transformation.
    """

    class Config(BatchLoss.Config):
        """``{vertex_weight: 0.1, edge_weight: 5.0, transformation_weight: 5.0}``."""

        vertex_weight: NonNegativeFloat
        """Of the logits' mean squared error; logits are the one feature that is equally wide in both networks."""
        edge_weight: NonNegativeFloat
        """Of the edges' mean squared error, averaged over the levels."""
        transformation_weight: NonNegativeFloat
        """Of the mean squared error of the moves, averaged over the steps from level to level."""
        stages: StageChoices = "all"

        def taps(self) -> Taps:
            """Return the stages."""
            return stage_taps(self.stages)

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.levels = pair_stages(config.stages, facts)

    def reduce(self, outputs: Outputs) -> Outputs:
        """Return the maps averaged over their pixels: ranks send each other vectors."""
        return outputs._replace(features={name: pooled(x) for name, x in outputs.features.items()})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``vertices``, ``edges`` and, with several levels, ``transformation``, of outputs that are averaged."""
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
    """Return a map [B, C, H, W] averaged over its pixels; a vector [B, D] as it is."""
    return x.flatten(2).mean(2) if x.ndim > 2 else x


def mean_error(students: Iterable[Tensor], teachers: Iterable[Tensor]) -> Tensor:
    """Return the mean squared errors, averaged over the levels."""
    return torch.stack([F.mse_loss(*both) for both in zip(students, teachers, strict=True)]).mean()
