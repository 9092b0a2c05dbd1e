"""Perception reconstruction, Zhu and Zhu, 计算机系统应用 34(2), 2025, eq. 5; as LumiNet, arXiv:2310.03669.

Each class's column of the logits is standardised over the batch, separately for student and teacher. Another loss of
logits is then computed on the result. The paper's RTKD and RNKD are the two terms of DKD on it.

B batch, K classes.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.distributed.collectives import standardize_both, standardize_columns
from pipeline.losses._base import Facts
from pipeline.losses._rows import StatScope, check_groups, group_size
from pipeline.losses._transform import LogitTransform


def perceive(logits_BK: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the perception matrix h = (z − μ)·(v + ε)^(−1/2) (eq. 5, 6).

    μ and v are a class's mean and biased variance over the global batch; the gradient passes through both. This is a
    collective: every rank must call it.
    """
    return standardize_columns(logits_BK, eps)


class Perception(LogitTransform):
    """A loss that computes its inner loss on the perception matrices of both networks.

    Under gradient accumulation it standardises over the micro-batch of all ranks.
    """

    scope = "statistics"
    reads_labels = False
    takes_pixels = True

    class Config(LogitTransform.Config):
        """The config of perception reconstruction, such as ``{inner: {dkd: {…}}}``."""

        eps: PositiveFloat = 1e-5
        """Term added to the variance. The paper has none, and would divide by zero."""
        stat_scope: StatScope = "global"
        """Rows of the statistics: ``global`` (all ranks'), ``rank`` (this rank's) or ``ghost:N`` (each N of a rank)."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        check_groups("perception", config.stat_scope, facts)

    def transform(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return both perception matrices.

        One all-reduce in forward serves both networks; the one in backward is for the student only.
        """
        c = self.config
        size = group_size(c.stat_scope, len(student_BK))
        if size is None:
            return standardize_both(student_BK, teacher_BK, c.eps)
        groups = zip(student_BK.split(size), teacher_BK.split(size), strict=True)
        found = [standardize_both(*both, c.eps, across_ranks=False) for both in groups]
        student_BK, teacher_BK = (torch.cat(parts) for parts in zip(*found, strict=True))
        return student_BK, teacher_BK
