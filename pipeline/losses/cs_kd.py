"""Class-wise self-knowledge distillation, Yun et al., CVPR 2020, arXiv:2003.13964.

Two images of one class teach each other: the student's probabilities for one are the target of the other. No teacher is
needed. An image's partner is the next of its class in the global batch, in the order of the ids. After the last comes
the first. Images without another of their class are left out.

With ``data.pairs`` every image has a partner. In a shuffled batch of N images of C equal classes an image has one with
probability 1 − (1 − 1/C)^(N−1).

B batch, K classes.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._rows import BatchLoss


def cs_kd_rows(logits_BK: Tensor, partners_BK: Tensor, *, temperature: float) -> Tensor:
    """Return T²·KL(p_partner ‖ p) of every row [B], of logits divided by T. No gradient reaches the partners."""
    log_q_BK = (logits_BK / temperature).log_softmax(1)
    log_p_BK = (partners_BK.detach() / temperature).log_softmax(1)
    return temperature**2 * (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(1)


def find_partners(labels_B: Tensor, ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of each row's partner, and whether it is another row.

    It is the next of the class in the order of the ids, and the first after the last.
    """
    by_id_B = ids_B.argsort(stable=True)
    order_B = by_id_B[labels_B[by_id_B].argsort(stable=True)]
    sorted_B = labels_B[order_B]
    first_B, end_B = (torch.searchsorted(sorted_B, sorted_B, right=right) for right in (False, True))
    next_B = torch.arange(1, len(order_B) + 1, device=order_B.device)
    next_B = torch.where(next_B < end_B, next_B, first_B)
    partner_B = torch.empty_like(order_B).scatter_(0, order_B, order_B[next_B])
    paired_B = torch.empty_like(order_B, dtype=torch.bool).scatter_(0, order_B, end_B - first_B > 1)
    return partner_B, paired_B


class CSKD(BatchLoss):
    """KL divergence from the probabilities of another image of the class, averaged over the rows that have one."""

    needs_teacher = False

    class Config(BatchLoss.Config):
        """The config of CS-KD, such as ``{temperature: 4.0}``."""

        temperature: PositiveFloat
        """Temperature T by which the logits are divided."""
        stat_scope: Literal["global"] = "global"  # type: ignore[assignment]
        """Partners are found among the rows of all ranks."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``cs_kd``; zero if no row has a partner."""
        logits_BK = student.logits_BK
        partner_B, paired_B = find_partners(batch.labels_B, batch.ids_B)
        rows_B = cs_kd_rows(logits_BK, logits_BK[partner_B], temperature=self.config.temperature)
        return {"cs_kd": (rows_B * paired_B).sum() / paired_B.sum().clamp(min=1)}
