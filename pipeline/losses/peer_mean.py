"""The averaged weights of the other peers as teachers.   M peers, B batch, K classes.

Sources: peer collaborative learning, Wu and Gong, AAAI 2021, arXiv:2006.04147, eq. 9, and mutual mean-teaching, Ge et
al., ICLR 2020, arXiv:2001.01526, eq. 7.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._peers import PeersLoss, mean_over_others
from pipeline.losses.kd import kd_loss
from pipeline.losses.soft_ce import soft_ce_loss


class PeerMean(PeersLoss):
    """Divergence of each peer from the moving averages of all others, which ``teacher.average`` keeps."""

    reads_labels = False

    class Config(PeersLoss.Config):
        """The config of averaged peers, such as ``{temperature: 3.0, form: kl}``."""

        temperature: PositiveFloat
        """Temperature T by which the logits are divided; T² multiplies the loss."""
        form: Literal["kl", "ce"]
        """The KL divergence of PCL, or the cross-entropy of MMT. Both have the same gradient."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``peer0``, ``peer1`` and so on."""
        logits, averaged = ([peer.logits_BK for peer in outputs.peers] for outputs in (student, teacher))
        losses = mean_over_others(logits, averaged, self._distance)
        return {f"peer{number}": value for number, value in enumerate(losses)}

    def _distance(self, student_BK: Tensor, averaged_BK: Tensor) -> Tensor:
        t = self.config.temperature
        if self.config.form == "kl":
            return kd_loss(student_BK, averaged_BK, temperature=t)
        return t**2 * soft_ce_loss(student_BK, averaged_BK, teacher_temperature=t, temperature=t)
