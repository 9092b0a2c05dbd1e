"""Perception reconstruction, Zhu and Zhu, 计算机系统应用 34(2), 2025, eq. 5; as LumiNet, arXiv:2310.03669.

Every class's column of the logits is standardised over the batch, for student and teacher apart, and another loss of
logits is taken of what comes out: RTKD and RNKD of the paper are the two terms of DKD on it.   B batch, K classes.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.losses._base import StatScope, Wrapping, group_size
from pipeline.parallel import standardize


def perceive(logits_BK: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the perception matrix h = (z − μ)·(v + ε)^(−1/2), μ and v of a class over the global batch (eq. 5, 6).

    Collective: every rank calls it. The variance is the biased one; both statistics are differentiated through.
    """
    return standardize(logits_BK, eps)


class Perception(Wrapping):
    """Another loss of the logits, taken of both networks' perception matrices.

    Under gradient accumulation the batch it standardises over is the micro-batch of all ranks.
    """

    scope = "statistics"

    class Config(Wrapping.Config):
        """``{inner: {dkd: {…}}}``."""

        eps: PositiveFloat = 1e-5
        """Added to the variance; the paper has none and would divide by zero."""
        stat_scope: StatScope = "global"

    def changed(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return both perception matrices; stacked on the way, so that one all-reduce serves both."""
        stacked_BJ = torch.cat([student_BK, teacher_BK], 1)
        size = group_size(self.config.stat_scope, len(stacked_BJ))
        if size is None:
            h_BJ = perceive(stacked_BJ, eps=self.config.eps)
        else:
            groups = stacked_BJ.split(size)
            h_BJ = torch.cat([standardize(group, self.config.eps, across_ranks=False) for group in groups])
        student_BK, teacher_BK = h_BJ.chunk(2, 1)
        return student_BK, teacher_BK.detach()
