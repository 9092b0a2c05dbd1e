"""Variational information distillation, Ahn et al., CVPR 2019, arXiv:1904.05835, with the Gaussian model.

A network predicts the teacher's map from the student's, and a variance is learned for every channel. The loss is the
negative log-likelihood of the teacher's map, without its constant term. It may be negative.

B batch, C channels, H W space.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import StageChoices, channels, pair_stages, stage_taps


def vid_loss(mean_BCHW: Tensor, teacher_BCHW: Tensor, variance_C: Tensor) -> Tensor:
    """Return ½·((t − μ)²/σ² + log σ²), averaged over all elements. No gradient reaches the teacher."""
    variance_CHW = variance_C[:, None, None]
    return 0.5 * ((teacher_BCHW.detach() - mean_BCHW).square() / variance_CHW + variance_CHW.log()).mean()


class VID(Loss):
    """Negative log-likelihood of the teacher's maps given the student's, summed over the stages."""

    reads_labels = False

    class Config(Loss.Config):
        """The config of VID, such as ``{stages: all, initial_variance: 5.0, eps: 1.0e-5}``."""

        stages: StageChoices
        """Stages of both networks. Maps of different size are average-pooled to the smaller one."""
        initial_variance: PositiveFloat
        """Variance of every channel at the start."""
        eps: PositiveFloat
        """Lower bound of every variance."""

        @model_validator(mode="after")
        def _variance_is_reachable(self) -> "VID.Config":
            if self.initial_variance <= self.eps:
                raise ValueError(f"initial_variance must be above eps: {self.eps}, got {self.initial_variance}")
            return self

        def taps(self) -> Taps:
            """Return the stages' taps."""
            return stage_taps(self.stages)

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.pairs = pair_stages(config.stages, facts)
        widths = [(channels(facts.student_shapes, s), channels(facts.teacher_shapes, t)) for s, t in self.pairs]
        self.means = nn.ModuleList(mean_network(student_C, teacher_C) for student_C, teacher_C in widths)
        self.variances = nn.ModuleList(Variance(teacher_C, config) for _, teacher_C in widths)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``vid``."""
        losses = []
        for (of_student, of_teacher), network, variance in zip(self.pairs, self.means, self.variances, strict=True):
            maps = pool_to_smaller(student.features[of_student], teacher.features[of_teacher])
            losses.append(vid_loss(self.autocast_call(network, maps[0]), maps[1], variance()))
        return {"vid": torch.stack(losses).sum()}


class Variance(nn.Module):
    """A learned variance σ² = softplus(θ) + ε for every channel."""

    undecayed: ClassVar[tuple[str, ...]] = ("theta_C",)
    """Parameters without weight decay, which would pull every variance towards log 2 whatever the maps are."""

    def __init__(self, channels: int, config: VID.Config) -> None:
        super().__init__()
        self.eps = config.eps
        target = config.initial_variance - config.eps
        # The inverse of softplus, log(exp(x) − 1), in a form that does not overflow.
        self.theta_C = nn.Parameter(torch.full((channels,), target + math.log(-math.expm1(-target))))

    def forward(self) -> Tensor:
        """Return σ² [C]."""
        return F.softplus(self.theta_C) + self.eps


def mean_network(student_C: int, teacher_C: int) -> nn.Sequential:
    """Return the network that predicts μ: three 1×1 convolutions without bias, as wide as the teacher's map."""
    first, *more = (nn.Conv2d(width, teacher_C, 1, bias=False) for width in (student_C, teacher_C, teacher_C))
    return nn.Sequential(first, nn.ReLU(), more[0], nn.ReLU(), more[1])
