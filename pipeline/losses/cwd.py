"""Channel-wise distillation, Shu et al., ICCV 2021, arXiv:2011.13256.   B batch, C channels, H W space."""

from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.norms import batch_norm
from pipeline.losses._base import Facts
from pipeline.losses._connectors import AlignedMapLoss
from pipeline.losses._functional import kl_divergence
from pipeline.losses._stages import pair_stages


def cwd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, *, temperature: float) -> Tensor:
    """Return τ²·KL(teacher ‖ student) of every channel's softmax over the pixels, averaged over rows and channels.

    Both maps have one shape. No gradient reaches the teacher.
    """
    maps = student_BCHW, teacher_BCHW.detach()
    log_q, log_p = ((x / temperature).flatten(2).log_softmax(2).flatten(0, 1) for x in maps)
    return temperature**2 * kl_divergence(log_p, log_q)


class CWD(AlignedMapLoss):
    """A loss that matches where in the image each channel is active, on maps of features or of logits."""

    scope = "statistics"
    reads_labels = False
    takes_pixels = True

    class Config(AlignedMapLoss.Config):
        """The config of CWD, such as ``{stages: [stage4, logits], weights: [50.0, 3.0], temperature: 4.0}``."""

        weights: tuple[NonNegativeFloat, ...] | None = None
        """Weight of each of ``stages``, in their order; null is 1 for each. A group's is each level's."""
        temperature: PositiveFloat
        """Temperature τ by which the maps are divided before the softmax."""
        norm: bool = False
        """Whether a BatchNorm follows the 1×1 convolution of a stage whose numbers of channels differ."""
        stat_scope: Literal["rank", "global"] = "rank"
        """Rows that the BatchNorms' statistics cover: this rank's or all ranks'."""

        @model_validator(mode="after")
        def _weights_fit(self) -> Self:
            if self.weights is None:
                return self
            if self.stages == "all":
                raise ValueError("weights are those of named stages, and stages is all; name them, or remove weights")
            if len(self.weights) != len(self.stages):
                raise ValueError(f"{len(self.weights)} weights for {len(self.stages)} stages; give each stage one")
            return self

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        weighted = zip(config.weights or (), config.stages, strict=False)
        self.level_weights = [weight for weight, stage in weighted for _ in pair_stages(stage, facts)]

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's channels."""
        convolution = super().connector(student, teacher)
        if not self.config.norm or isinstance(convolution, nn.Identity):
            return convolution
        return nn.Sequential(convolution, batch_norm(self.facts.teacher_shapes[teacher][0], self.config.stat_scope))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``cwd``, the weighted sum of the stages."""
        c, pairs = self.config, self.aligned_maps(student, teacher)
        weights = self.level_weights or [1.0] * len(pairs)
        levels = [w * cwd_loss(*pair, temperature=c.temperature) for w, pair in zip(weights, pairs, strict=True)]
        return {"cwd": torch.stack(levels).sum()}
