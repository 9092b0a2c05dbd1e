"""Complementary relation contrastive distillation, Zhu et al., CVPR 2021, arXiv:2103.16367, in the authors' form.

As in CRD, both networks' embeddings e are contrasted with banks. What is compared are relations: directions from an
anchor to a row. The anchors are the bank's rows of the batch's own samples. For the student's rows i, the anchors j of
the teacher's bank M, and row i's own sample (k = 0) or a negative n_ik:

    r_ij = u(e_i − M[y_j] + ε),   w_ijk = u(M[n_ik] − M[y_j] + ε),   P_ijk = exp(r_ij·w_ijk/τ)/Z

u scales to length one. The loss is CRD's of these P, averaged over the pairs ij. The teacher's rows swap the networks.

A second term compares how the cross-entropy would move both networks' embeddings f, with g = ∂CE/∂f = (p − y)·W:

    1 − mean cos(g_student, g_teacher)

W are the weights of a network's last layer, which must be one linear layer, of equal width in both networks.

Where j is the sample of row i, w of the own sample is ε alone, and says nothing. Such pairs are left out, unless
``own_anchor`` is true, as published.

Differences of rows are never formed, which would take A·J·D numbers for each row: 1 GB for CIFAR. Their products and
lengths follow from products of rows, in float64. In float32 that would lose its digits where rows lie close, as those
of a class do late in training.

B batch, A anchors of all ranks, D embedding, J = 1 + K candidates of a row, N rows of a bank, K classes.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import gather_rows, world_size
from pipeline.losses._banks import LARGEST_GATHER, BankLoss, contrast
from pipeline.losses._base import Facts
from pipeline.losses._functional import l2_normalize, safe_divide
from pipeline.precision import checkpointed

OFFSET = 1e-6
"""ε of the published relations."""


def relation_scores(embedding_BD: Tensor, bank_ND: Tensor, anchor_A: Tensor, index_BJ: Tensor) -> Tensor:
    """Return r·w of every row, anchor and candidate [B, A, J]. Anchors and candidates are ids.

    Rows are taken in chunks of at most LARGEST_GATHER numbers or one row, and again in backward.
    """
    rows = max(LARGEST_GATHER // (index_BJ.shape[1] * (bank_ND.shape[1] + len(anchor_A))), 1)
    chunks = zip(embedding_BD.split(rows), index_BJ.split(rows), strict=True)
    return torch.cat([checkpointed(_relations, chunk, bank_ND, anchor_A, index) for chunk, index in chunks])


def _relations(embedding_BD: Tensor, bank_ND: Tensor, anchor_A: Tensor, index_BJ: Tensor) -> Tensor:
    start_AD, of_bank_BJD = bank_ND[anchor_A].double() - OFFSET, bank_ND[index_BJ].double()
    of_row_BAD = l2_normalize(embedding_BD.double().unsqueeze(1) - start_AD, 2)
    products_BAJ = of_row_BAD @ of_bank_BJD.mT - (of_row_BAD * start_AD).sum(2, keepdim=True)
    squares_BAJ = of_bank_BJD.square().sum(2).unsqueeze(1) + start_AD.square().sum(1, keepdim=True)
    squares_BAJ = squares_BAJ - 2 * (start_AD @ of_bank_BJD.mT)
    scores_BAJ = safe_divide(products_BAJ, squares_BAJ.clamp(min=0).sqrt())
    # Where the anchor is the candidate itself, w is ε alone, of which a difference of products knows few digits.
    same_BAJ = index_BJ.unsqueeze(1) == anchor_A.unsqueeze(1)
    constant_BA1 = of_row_BAD.mean(2, keepdim=True) * of_row_BAD.shape[2] ** 0.5
    return torch.where(same_BAJ, constant_BA1, scores_BAJ).to(embedding_BD.dtype)


def pair_weights(ids_B: Tensor, anchor_A: Tensor, own_anchor: bool, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row and anchor [B, A]. Over the rows of all ranks they sum to the number of ranks.

    Without ``own_anchor``, an anchor of the row's own sample has none. With ``data.repeat``, it may be there twice.
    """
    counts_BA, counts_AA = ((ids.unsqueeze(1) != anchor_A) | own_anchor for ids in (ids_B, anchor_A))
    return counts_BA.to(dtype) * world_size() / counts_AA.sum().clamp(min=1)


def gradient_loss(
    student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, student_KD: Tensor, teacher_KD: Tensor
) -> Tensor:
    """Return 1 − the mean cosine of both networks' gradients of the cross-entropy by their embeddings.

    ``student_KD`` and ``teacher_KD`` are the weights of the last layers. No gradient reaches the teacher.
    """
    of_student_BD = embedding_gradient(student_BK, labels_B, student_KD)
    of_teacher_BD = embedding_gradient(teacher_BK, labels_B, teacher_KD).detach()
    return 1 - (l2_normalize(of_student_BD, 1) * l2_normalize(of_teacher_BD, 1)).sum(1).mean()


def embedding_gradient(logits_BK: Tensor, labels_B: Tensor, weight_KD: Tensor) -> Tensor:
    """Return (p − y)·W, the gradient of each row's cross-entropy by its embedding."""
    log_p_BK = logits_BK.log_softmax(1)
    # p − 1 would lose its digits where p is almost 1.
    label_B1 = labels_B.unsqueeze(1)
    difference_BK = log_p_BK.exp().scatter(1, label_B1, log_p_BK.gather(1, label_B1).expm1())
    return difference_BK @ weight_KD.to(logits_BK.dtype)


class CRCD(BankLoss):
    """Contrast of relations to anchors, and the direction in which the labels move the embeddings.

    A rank scores its own rows against the anchors of all ranks, of which only the ids are sent.
    """

    class Config(BankLoss.Config):
        """The config of CRCD; ``configs/methods/crcd.yaml`` has the published values."""

        own_anchor: bool = False
        """True to count a row's own sample as an anchor, as published, though it says nothing."""
        gradient_weight: NonNegativeFloat
        """Weight of the gradients' cosine; 0 leaves it out, for heads that are no linear layers of equal width."""

        def reads_head(self) -> bool:
            """Return whether the gradients are compared, which are those of the logits."""
            return self.reads_head_weights()

        def reads_head_weights(self) -> bool:
            """Return whether the gradients are compared."""
            return self.gradient_weight > 0

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if config.gradient_weight:
            last_layers(facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``student`` and ``teacher`` and, if it has a weight, ``gradient``."""
        parts = self.relation_parts(student, teacher, batch)
        if self.config.gradient_weight:
            both = student.logits_BK, teacher.logits_BK
            gradient = gradient_loss(*both, batch.labels_B, *last_layers(self.facts))
            parts["gradient"] = self.config.gradient_weight * gradient
        return parts

    def relation_parts(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the parts ``student`` and ``teacher``. Raises ValueError for one row that is its only anchor."""
        c = self.config
        anchor_A = gather_rows(batch.ids_B, equal=True)
        if len(anchor_A) == 1 and not c.own_anchor:
            raise ValueError("crcd: a batch of one row has no anchor but its own; raise batch")
        student_BD, teacher_BD = self.embeddings(student, teacher)
        index_BJ = self.candidates(batch)
        scores = [
            relation_scores(student_BD, self.teacher_bank, anchor_A, index_BJ).flatten(0, 1) / c.temperature,
            relation_scores(teacher_BD, self.student_bank, anchor_A, index_BJ).flatten(0, 1) / c.temperature,
        ]
        weights_P = pair_weights(batch.ids_B, anchor_A, c.own_anchor, student_BD.dtype).flatten()
        normalizers_2 = self.fixed_normalizers(scores, lambda p_PJ: (p_PJ.mean(1) * weights_P).sum())
        self.note(batch.ids_B, student_BD, teacher_BD, normalizers_2)
        of_student, of_teacher = (
            contrast(scores_PJ, z, samples=self.samples, weights_B=weights_P)
            for scores_PJ, z in zip(scores, normalizers_2, strict=True)
        )
        return {"student": of_student, "teacher": of_teacher}


def last_layers(facts: Facts) -> tuple[Tensor, Tensor]:
    """Return the weights of both networks' last layers.

    Raises ValueError unless they are known linear layers of equal width.
    """
    student_KD = None if facts.student_head is None else facts.student_head.weight
    teacher_KD = facts.teacher_head_KD
    if student_KD is None or teacher_KD is None:
        network = "student" if student_KD is None else "teacher"
        raise ValueError(
            f"crcd: gradient_weight needs the weights of the {network}'s last layer, which is no known linear one; set "
            "gradient_weight: 0"
        )
    widths = student_KD.shape[1], teacher_KD.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"crcd: gradient_weight compares embeddings of equal width, and the student's has {widths[0]} numbers and "
            f"the teacher's {widths[1]}; set gradient_weight: 0"
        )
    return student_KD, teacher_KD
