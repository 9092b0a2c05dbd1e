"""Overhaul of feature distillation, Heo et al., ICCV 2019, arXiv:1904.01866: margin ReLU and partial L2 distance.

Maps are compared before the ReLU. The teacher's negative values are raised to a margin, the mean of the channel's
negative values. Where the target is negative and the student is already below it, there is no loss.

B batch, C channels, H W space.
"""

import math

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import NormParameters
from pipeline.losses._base import Facts
from pipeline.losses._connectors import PreactLoss, convolution_norm, sum_halving
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import channels

RARE = 1e-3
"""Probability of a negative value below which a channel's margin is three standard deviations below zero."""


def partial_l2(student_BCHW: Tensor, teacher_BCHW: Tensor, margin_C: Tensor) -> Tensor:
    """Return (s − t')² if s > t' or t' > 0, otherwise 0, with t' = max(t, margin).

    It is summed over a row's elements and averaged over the rows. No gradient reaches the teacher.
    """
    target_BCHW = torch.maximum(teacher_BCHW.detach(), margin_C[:, None, None])
    counts_BCHW = (student_BCHW > target_BCHW) | (target_BCHW > 0)
    return ((student_BCHW - target_BCHW).square() * counts_BCHW).flatten(1).sum(1).mean()


def margins(norm: NormParameters) -> Tensor:
    """Return E[x | x < 0] of x ~ N(β, γ²) for each channel [C], with β and γ of the BatchNorm before the ReLU.

    It is β − |γ|·φ(β/γ)/Φ(−β/|γ|), with Φ and φ the standard normal distribution and density. For a channel that is
    hardly ever negative it is −3·|γ|.
    """
    # In float64, because Φ is small where its quotient matters. A pruned channel has scale zero and is always β; the
    # clamp keeps it from dividing by zero.
    scale_C, shift_C = norm.weight_C.double().abs().clamp(min=1e-12), norm.bias_C.double()
    z_C = shift_C / scale_C
    negative_C = torch.special.ndtr(-z_C)
    density_C = (-z_C.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(negative_C > RARE, shift_C - scale_C * density_C / negative_C, -3 * scale_C)


class OFD(PreactLoss):
    """Partial L2 distance of every stage. The deepest has weight 1, each other one half of the next deeper one.

    The margins are computed once, from the teacher's BatchNorms. The teacher is no part of the loss and stays in
    evaluation mode.
    """

    reads_labels = False

    class Config(PreactLoss.Config):
        """The config of OFD, such as ``{stages: all}``. Maps of different size are average-pooled to the smaller."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        for level, (_, teacher) in enumerate(self.pairs):
            # Not saved in checkpoints: it can be computed again from the teacher.
            self.register_buffer(f"margin{level}_C", margins(norm_of(teacher, facts)).float(), persistent=False)

    def connector(self, student: str, teacher: str) -> nn.Sequential:
        """Return a 1×1 convolution with the authors' initialisation, followed by a norm."""
        width = channels(self.facts.teacher_shapes, teacher)
        network = convolution_norm(channels(self.facts.student_shapes, student), width, 1, self.norm)
        nn.init.normal_(network[0].weight, std=math.sqrt(2 / width))  # type: ignore[arg-type]
        return network

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ofd``."""
        losses = []
        for level, (of_student, of_teacher) in enumerate(self.pairs):
            connected_BCHW = self.autocast_call(self.connectors[level], student.features[of_student])
            maps = pool_to_smaller(connected_BCHW, teacher.features[of_teacher])
            losses.append(partial_l2(*maps, self.get_buffer(f"margin{level}_C").to(connected_BCHW.dtype)))
        return {"ofd": sum_halving(losses)}


def norm_of(tap: str, facts: Facts) -> NormParameters:
    """Return the parameters of the BatchNorm that ends the teacher's tap. Raises ValueError if none is known."""
    if tap not in facts.teacher_norms:
        stage = tap.removesuffix(".preact")
        raise ValueError(
            f"ofd: the teacher's {tap!r} has no known BatchNorm to take the margin from; "
            f"name it under teacher.stages: {{{stage}.norm: <module path>}} (impossible with moving teachers)"
        )
    return facts.teacher_norms[tap]
