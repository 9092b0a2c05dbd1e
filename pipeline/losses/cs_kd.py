"""Class-wise self-knowledge distillation, Yun et al., CVPR 2020, arXiv:2003.13964.

Two images of one class teach each other: the student's probabilities for one are the target of the other. No teacher is
needed. An image's partner is the next of its class in the global batch, in the order of the ids. After the last comes
the first. Images without another of their class are left out.

With ``data.pairs`` every image has a partner. In a shuffled batch of N images of C equal classes an image has one with
probability 1 − (1 − 1/C)^(N−1).

In the authors' code the first image of a pair alone learns, also from its label, and the second one teaches only. With
``half: true`` this is so, and the cross-entropy is a part of this loss.

B batch, P pairs, K classes.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._rows import BatchLoss, in_global_order
from pipeline.losses.ce import label_cross_entropy


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
        half: bool = False
        """True as published: only the first image of a pair learns, also from its label. The recipe has no ``ce``."""
        kd_weight: NonNegativeFloat = 1.0
        """Factor λ of the KL divergence beside the cross-entropy of ``half: true``; ``weight`` multiplies both."""
        stat_scope: Literal["global"] = "global"  # type: ignore[assignment]
        """Partners are found among the rows of all ranks."""

        @model_validator(mode="after")
        def _weighs_two_parts(self) -> "CSKD.Config":
            if self.kd_weight != 1 and not self.half:
                raise ValueError("kd_weight is for half: true, whose loss has two parts; set weight")
            return self

        def has_label_loss(self) -> bool:
            """Return whether the first images alone learn, so that the cross-entropy must be theirs, too."""
            return self.half

        def needs_pairs(self) -> bool:
            """Return whether the first images alone learn: then the second ones must be of their classes."""
            return self.half

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``cs_kd``; zero if no row has a partner. With ``half`` also ``ce``."""
        c, logits_BK = self.config, student.logits_BK
        if c.half:
            firsts_PK, seconds_PK = in_global_order(logits_BK).unflatten(0, (-1, 2)).unbind(1)
            firsts = batch._replace(labels_B=in_global_order(batch.labels_B)[::2])
            rows_P = cs_kd_rows(firsts_PK, seconds_PK, temperature=c.temperature)
            return {"ce": label_cross_entropy(firsts_PK, firsts, 0.0), "cs_kd": c.kd_weight * rows_P.mean()}
        partner_B, paired_B = find_partners(batch.labels_B, batch.ids_B)
        rows_B = cs_kd_rows(logits_BK, logits_BK[partner_B], temperature=c.temperature)
        return {"cs_kd": (rows_B * paired_B).sum() / paired_B.sum().clamp(min=1)}
