"""DIST: knowledge distillation from a stronger teacher, Huang et al., NeurIPS 2022, arXiv:2205.10536.

Not the class probabilities but how they correlate is matched: in every row (inter-class) and in every column, over the
batch (intra-class).   B batch, K classes, J columns of both networks.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss, StatScope
from pipeline.parallel import global_sum

EPS = 1e-8


def dist_loss(student_BK: Tensor, teacher_BK: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Return T²·(β·inter + γ·intra) of the probabilities softened by T. No gradient reaches the teacher.

    T² is that of the published code; the paper's equations have none. Collective: every rank calls it.
    """
    p_BK, q_BK = softened(student_BK, teacher_BK, temperature)
    return temperature**2 * (beta * inter_class(p_BK, q_BK) + gamma * intra_class(p_BK, q_BK))


def softened(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the class probabilities of both."""
    return (student_BK / temperature).softmax(1), (teacher_BK.detach() / temperature).softmax(1)


def inter_class(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """Return 1 − the correlation of p and q over the classes, averaged over the rows."""
    p_BK, q_BK = (x - x.mean(1, keepdim=True) for x in (p_BK, q_BK))
    return 1 - cosine((p_BK * q_BK).sum(1), p_BK.square().sum(1), q_BK.square().sum(1)).mean()


def intra_class(p_BK: Tensor, q_BK: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Return 1 − the correlation of p and q over the rows of all ranks, or of this one, averaged over the classes.

    The columns are centred before they are multiplied, which costs a second all-reduce and saves their digits.
    """
    add_up = global_sum if across_ranks else torch.clone
    both_BJ = torch.cat([p_BK, q_BK], 1)
    sums = add_up(torch.cat([both_BJ.new_full((1,), len(both_BJ)), both_BJ.sum(0)]))
    p_BK, q_BK = (both_BJ - sums[1:] / sums[0]).chunk(2, 1)
    products_3K = torch.stack([p_BK * q_BK, p_BK.square(), q_BK.square()]).sum(1)
    return 1 - cosine(*add_up(products_3K)).mean()


def cosine(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """Return a·b / (‖a‖·‖b‖ + 1e-8) from a·b, ‖a‖² and ‖b‖².

    The column of a class that no row gives any probability is zero once it is centred. Its correlation is 0, and no
    gradient passes through its length, a root without a slope there.
    """
    smallest = torch.finfo(product.dtype).tiny
    lengths = square_a.clamp(min=smallest).sqrt() * square_b.clamp(min=smallest).sqrt()
    return product / (lengths + EPS)


class DIST(Loss):
    """Correlations between both networks' class probabilities, within rows and within columns.

    Under gradient accumulation the columns are those of the micro-batch of all ranks.
    """

    scope = "statistics"

    class Config(Loss.Config):
        """``{beta: 1.0, gamma: 1.0, temperature: 4.0}``."""

        beta: NonNegativeFloat
        """Weight of the inter-class term."""
        gamma: NonNegativeFloat
        """Weight of the intra-class term."""
        temperature: PositiveFloat
        stat_scope: StatScope = "global"
        """Rows of the intra-class term; published code took a rank's."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``inter`` and ``intra``."""
        c = self.config
        p_BK, q_BK = softened(student.logits_BK, teacher.logits_BK, c.temperature)
        inter, intra = c.beta * inter_class(p_BK, q_BK), c.gamma * self.intra_class(p_BK, q_BK)
        return {"inter": c.temperature**2 * inter, "intra": c.temperature**2 * intra}

    def intra_class(self, p_BK: Tensor, q_BK: Tensor) -> Tensor:
        """Return the intra-class term of all rows, or the mean of those of this rank's groups of rows."""
        kind, _, rows = self.config.stat_scope.partition(":")
        if kind == "global":
            return intra_class(p_BK, q_BK)
        size = int(rows) if rows else max(len(p_BK), 1)
        groups = zip(p_BK.split(size), q_BK.split(size), strict=True)
        return torch.stack([intra_class(p, q, across_ranks=False) for p, q in groups]).mean()
