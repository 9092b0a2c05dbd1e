"""Deep mutual learning, Zhang et al., CVPR 2018, arXiv:1706.00384, eq. 6 and 10.   M peers, B batch, K classes.

The paper updates the peers in turn. Here all are updated at once, each from the others' answers before the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._peers import PeersLoss, mean_over_others
from pipeline.losses.kd import kd_loss


def mutual_loss(logits: Sequence[Tensor], *, temperature: float) -> list[Tensor]:
    """Return 1/(M − 1)·Σ_{j≠m} T²·KL(p_j ‖ p_m) of each peer m, from the logits [B, K] of all.

    No gradient reaches the others' p_j.
    """
    return mean_over_others(logits, logits, partial(kd_loss, temperature=temperature))


class Mutual(PeersLoss):
    """KL divergence of each peer from every other one."""

    needs_teacher = False
    reads_labels = False

    class Config(PeersLoss.Config):
        """The config of deep mutual learning, such as ``{temperature: 1.0}``."""

        temperature: PositiveFloat
        """Temperature T by which the logits are divided."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``peer0``, ``peer1`` and so on."""
        losses = mutual_loss([peer.logits_BK for peer in student.peers], temperature=self.config.temperature)
        return {f"peer{number}": value for number, value in enumerate(losses)}
