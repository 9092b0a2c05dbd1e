"""DIST: knowledge distillation from a stronger teacher, Huang et al., NeurIPS 2022, arXiv:2205.10536.

The student learns probabilities that correlate with the teacher's, not the probabilities themselves. The correlation is
taken within each row (inter-class), and within each column over the batch (intra-class). A detector's maps of class
logits have a sigmoid for the softmax. Their rows are cells, and their columns are the classes of all anchors.

B batch, K classes, J columns of both networks.
"""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import global_sum
from pipeline.losses._base import Facts
from pipeline.losses._class_maps import ClassMapLoss
from pipeline.losses._functional import rounding, sum_levels
from pipeline.losses._rows import StatScope, check_groups, group_size, mean_by_rows

_EPS = 1e-8
"""ε in the denominator of the published code's cosine."""


def dist_loss(student_BK: Tensor, teacher_BK: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Return T²·(β·inter + γ·intra) of the probabilities softened by T. No gradient reaches the teacher.

    T² is in the published code, but not in the paper's equations. This is a collective: every rank must call it.
    """
    p_BK, q_BK = softened(student_BK, teacher_BK, temperature)
    return temperature**2 * (beta * inter_class(p_BK, q_BK) + gamma * intra_class(p_BK, q_BK))


def softened(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the class probabilities of student and teacher at this temperature."""
    return (student_BK / temperature).softmax(1), (teacher_BK.detach() / temperature).softmax(1)


def inter_class(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """Return 1 − the correlation of p and q over the classes, averaged over the rows."""
    means_B1 = p_BK.mean(1, keepdim=True), q_BK.mean(1, keepdim=True)
    noise = [rounding(p_BK.shape[1], mean_B1[:, 0]) for mean_B1 in means_B1]
    p_BK, q_BK = p_BK - means_B1[0], q_BK - means_B1[1]
    return 1 - cosine((p_BK * q_BK).sum(1), (p_BK.square().sum(1), q_BK.square().sum(1)), noise).mean()


def intra_class(p_BK: Tensor, q_BK: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Return 1 − the correlation of p and q over the rows, averaged over the classes.

    The rows are those of all ranks, or with ``across_ranks=False`` those of this rank.
    """
    all_reduce = global_sum if across_ranks else torch.clone
    both_BJ = torch.cat([p_BK, q_BK], 1)
    sums = all_reduce(torch.cat([both_BJ.new_full((1,), len(both_BJ)), both_BJ.sum(0)]))
    mean_J = sums[1:] / sums[0]
    # Centred before multiplying, which costs a second all-reduce. Subtracting sums of products instead would lose
    # digits.
    p_BK, q_BK = (both_BJ - mean_J).chunk(2, 1)
    product_K, *squares = all_reduce(torch.stack([p_BK * q_BK, p_BK.square(), q_BK.square()]).sum(1))
    return 1 - cosine(product_K, squares, rounding(sums[0], mean_J).chunk(2)).mean()


def cosine(product: Tensor, squares: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
    """Return a·b / (‖a‖·‖b‖ + 1e-8) from a·b and ``squares``, which are ‖a‖² and ‖b‖².

    It is zero, without gradient, if ‖a‖² or ‖b‖² is no larger than its rounding error ``noise``. That is the case for a
    row of equal logits, and for a class with the same probability in all rows. They have no correlation.
    """
    # A division by 1e-8 would multiply the gradient of such a row or column by a hundred million.
    equal = (squares[0] <= noise[0]) | (squares[1] <= noise[1])
    lengths = squares[0].clamp(min=noise[0]).sqrt() * squares[1].clamp(min=noise[1]).sqrt()
    return product / (lengths + _EPS).masked_fill(equal, float("inf"))


class DIST(ClassMapLoss):
    """Correlation between the class probabilities of both networks, within rows and within columns.

    Terms of several maps are summed. Under gradient accumulation the columns are those of the micro-batch of all ranks.
    """

    scope = "statistics"
    reads_labels = False
    takes_pixels = True

    class Config(ClassMapLoss.Config):
        """The config of DIST, such as ``{beta: 1.0, gamma: 1.0, temperature: 4.0}``."""

        beta: NonNegativeFloat
        """Weight of the inter-class term."""
        gamma: NonNegativeFloat
        """Weight of the intra-class term."""
        temperature: PositiveFloat
        """Temperature T by which both networks' logits are divided."""
        stat_scope: StatScope = "global"
        """Rows of the intra-class term: ``global`` (all ranks'), ``rank`` (as published) or ``ghost:N``."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        check_groups("dist", config.stat_scope, facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``inter`` and ``intra``."""
        c = self.config
        pairs = self.probabilities(student, teacher)
        inter = sum_levels([c.beta * inter_class(*pair) for pair in pairs])
        intra = sum_levels([c.gamma * self.grouped_intra_class(*pair) for pair in pairs])
        return {"inter": c.temperature**2 * inter, "intra": c.temperature**2 * intra}

    def probabilities(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return the softened probabilities of student and teacher: of the logits, or of each map."""
        temperature = self.config.temperature
        if not self.levels:
            return [softened(student.logits_BK, teacher.logits_BK, temperature)]
        rows = self.map_logits(student, teacher)
        return [((ours / temperature).sigmoid(), (theirs / temperature).sigmoid()) for ours, theirs in rows]

    def grouped_intra_class(self, p_BK: Tensor, q_BK: Tensor) -> Tensor:
        """Return the intra-class term over all rows, or its mean over this rank's groups of rows."""
        size = group_size(self.config.stat_scope, len(p_BK))
        if size is None:
            return intra_class(p_BK, q_BK)
        groups = list(zip(p_BK.split(size), q_BK.split(size), strict=True))
        return mean_by_rows([intra_class(*both, across_ranks=False) for both in groups], [len(p) for p, _ in groups])
