"""Contrastive representation distillation, Tian et al., ICLR 2020, arXiv:1910.10699, eq. 11 to 18.

Student and teacher each have a linear layer that embeds their features on the unit sphere. Each network has a bank with
the embeddings of all training samples. An embedding e of a sample, the anchor, is compared with rows m of the *other*
network's bank. They are the sample's own row (k = 0), and K rows of samples of other classes, the negatives. The loss
classifies which of them is the sample's own:

    L = −mean[ log P₀/(P₀ + κ + ε) + Σ_k log κ/(P_k + κ + ε) ]

    P = exp(e·m/τ)/Z,   κ = K/N,   summed over the student's and the teacher's anchors

Z is N times the mean of exp(e·m/τ) in the first global batch, and stays fixed after it.

Memory: that of the banks (``_banks.py``). Scores are computed against the whole bank, which takes 13 MB for 64 rows of
CIFAR. If that needs more than LARGEST_MATRIX numbers (256 MB; ImageNet from 53 rows on), candidate rows are gathered
instead. They are gathered in chunks of at most LARGEST_GATHER numbers (64 MB) or of one anchor, and again in backward.

Negatives are drawn with replacement. The authors draw without replacement for CIFAR. Each
sample is equally likely either way, so the expected gradient is the same. With replacement, fewer than K samples of
other classes need no special case.

B batch, D embedding, J = 1 + K candidates of a row, N rows of a bank. In suffixes, K alone is the number of classes.
"""

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._banks import LARGEST_GATHER, BankLoss, contrast
from pipeline.precision import checkpointed

LARGEST_MATRIX = 2**26
"""Most similarities that are computed against the whole bank at once."""


def bank_similarities(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return e·m of each anchor and its candidates [B, J], by the fastest way that fits in memory."""
    if len(anchor_BD) * len(bank_ND) <= LARGEST_MATRIX:
        return by_matrix(anchor_BD, bank_ND, index_BJ)
    return by_rows(anchor_BD, bank_ND, index_BJ)


def by_matrix(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return the candidates' similarities, picked from those with the whole bank.

    For CIFAR this is at least twelve times as fast as gathering rows.
    """
    # A candidate that was drawn twice sends two equal gradients, so a GPU may add them in any order: still
    # reproducible.
    return (anchor_BD @ bank_ND.T).gather(1, index_BJ)


def by_rows(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Return the candidates' similarities from gathered rows of the bank, one chunk of anchors at a time.

    Backward gathers the rows again, so that they are not kept in memory until then.
    """
    rows = max(LARGEST_GATHER // (index_BJ.shape[1] * bank_ND.shape[1]), 1)
    chunks = zip(anchor_BD.split(rows), index_BJ.split(rows), strict=True)
    return torch.cat([checkpointed(_gathered, anchor, bank_ND, index) for anchor, index in chunks])


def _gathered(anchor_BD: Tensor, bank_ND: Tensor, index_BJ: Tensor) -> Tensor:
    return torch.einsum("bd,bjd->bj", anchor_BD, bank_ND[index_BJ])


class CRD(BankLoss):
    """The contrastive loss of both networks' anchors. A rank scores its own rows."""

    class Config(BankLoss.Config):
        """The config of CRD; ``configs/methods/crd.yaml`` has the published values."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``student`` and ``teacher``: the losses of the two networks' anchors."""
        c = self.config
        student_BD, teacher_BD = self.embeddings(student, teacher)
        index_BJ = self.candidates(batch)
        scores = [
            bank_similarities(student_BD, self.teacher_bank, index_BJ) / c.temperature,
            bank_similarities(teacher_BD, self.student_bank, index_BJ) / c.temperature,
        ]
        normalizers_2 = self.fixed_normalizers(scores)
        self.note(batch.ids_B, student_BD, teacher_BD, normalizers_2)
        of_student, of_teacher = (
            contrast(scores_BJ, z, samples=self.samples) for scores_BJ, z in zip(scores, normalizers_2, strict=True)
        )
        return {"student": of_student, "teacher": of_teacher}
