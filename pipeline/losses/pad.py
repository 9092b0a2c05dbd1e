"""Prime-aware adaptive distillation, Zhang et al., ECCV 2020, arXiv:2008.01458.

The student learns, for each number of its embedding, how uncertain it is of the teacher's. A large variance makes the
error count less, and costs its logarithm. The loss may be negative.

B batch, D embedding.
"""

from math import log
from typing import ClassVar, Literal

from pydantic import PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.norms import batch_norm
from pipeline.losses._base import Facts
from pipeline.losses._connectors import ConnectorLoss, width_connector
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair


def pad_loss(student_BD: Tensor, teacher_BD: Tensor, log_variance: Tensor, *, eps: float) -> Tensor:
    """Return the mean of (t − s)²/(ε + exp v) + v over all elements.

    v is the logarithm of the variance, [B, D], or [B, 1] with one for each row. No gradient reaches the teacher.
    """
    squares_BD = (teacher_BD.detach() - student_BD).square()
    return (squares_BD / (eps + log_variance.exp()) + log_variance).mean()


class PAD(ConnectorLoss):
    """Squared error of the embeddings, divided by a variance that is learned from the student's.

    A linear layer brings the student's embedding to the teacher's width where they differ.
    """

    reads_labels = False

    class Config(StageConfig, ConnectorLoss.Config):
        """The config of PAD, such as ``{eps: 1.0e-6, per: element}``."""

        stage: StageChoice = "embedding"
        """Stage of both networks, a vector."""
        eps: PositiveFloat
        """Term ε added to the variance."""
        per: Literal["element", "sample"] = "element"
        """What has a variance: each number of the embedding, as published, or each image, the mean of those."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.student_tap, self.teacher_tap = taps = stage_pair(config.stage, facts)
        if len(facts.teacher_shapes[taps[1]]) != 1:
            shape = list(facts.teacher_shapes[taps[1]])
            raise ValueError(
                f"pad: the teacher's {taps[1]!r} is shaped {shape}, but a vector such as embedding is needed"
            )
        self.connector = width_connector(facts, *taps)
        self.variance = LogVariance(facts.teacher_shapes[taps[1]][0], config.stat_scope)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``pad``."""
        student_BD = self.autocast_call(self.connector, student.features[self.student_tap])
        log_variance = self.autocast_call(self.variance, student_BD)
        if self.config.per == "sample":
            log_variance = log_variance.logsumexp(1, keepdim=True) - log(log_variance.shape[1])
        teacher_BD = teacher.features[self.teacher_tap]
        return {"pad": pad_loss(student_BD, teacher_BD, log_variance, eps=self.config.eps)}


class LogVariance(nn.Module):
    """A linear layer and a BatchNorm that give the logarithm of the variance of every number of an embedding."""

    undecayed: ClassVar[tuple[str, ...]] = ("norm.weight", "norm.bias")
    """Parameters without weight decay, which would pull every variance towards one whatever the error is."""

    def __init__(self, width: int, stat_scope: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = batch_norm(width, stat_scope)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return v [B, D]."""
        return self.norm(self.linear(x_BD)[..., None, None]).flatten(1)
