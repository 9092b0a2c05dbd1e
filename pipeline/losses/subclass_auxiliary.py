"""The auxiliary loss of subclass distillation, Müller et al., 2020, arXiv:2002.03936.

It trains the teacher, beside the cross-entropy: the images of a batch are to differ in their subclasses. Otherwise a
class would use one of its subclasses only. The loss is negative, and zero if all images are equal.

B batch, S subclasses of all classes.
"""

from math import log

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Taps
from pipeline.losses._rows import BatchLoss, StatScope

_TAP = "subclasses"


def subclass_auxiliary_loss(subclasses_BS: Tensor, *, temperature: float, eps: float) -> Tensor:
    """Return the mean over i of log Σ_j exp(v_i·v_j/(τ·S)) − 1/τ − log B, in (−log B, 0].

    v is the row, standardised over its S numbers by the biased variance + eps; j takes every row, i included.
    """
    rows, width = subclasses_BS.shape
    v_BS = F.layer_norm(subclasses_BS, (width,), eps=eps)
    similar_BB = v_BS @ v_BS.T / (temperature * width)
    return similar_BB.logsumexp(1).mean() - 1 / temperature - log(rows)


class SubclassAuxiliary(BatchLoss):
    """The similarity between the images of a batch, by their standardised logits of subclasses."""

    needs_teacher = False
    reads_labels = False

    class Config(BatchLoss.Config):
        """The config of the auxiliary loss, such as ``{temperature: 1.0}``."""

        temperature: PositiveFloat
        """Temperature τ of the similarities."""
        eps: PositiveFloat = 1e-9
        """Term added to the variance of a row."""
        stat_scope: StatScope = "rank"
        """Rows that are compared: ``rank`` (this rank's, as published), ``global`` (all ranks') or ``ghost:N``."""

        def taps(self) -> Taps:
            """Return the student's logits of the subclasses."""
            return Taps(student=frozenset({_TAP}))

    def reduce(self, outputs: Outputs) -> Outputs:
        """Return the outputs without logits, which are not compared."""
        return outputs._replace(logits=outputs.logits[:, :0])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``subclass_auxiliary``."""
        c, subclasses_BS = self.config, student.features[_TAP]
        return {"subclass_auxiliary": subclass_auxiliary_loss(subclasses_BS, temperature=c.temperature, eps=c.eps)}
