"""Perception reconstruction, Zhu and Zhu, 计算机系统应用 34(2), 2025, eq. 5; as LumiNet, arXiv:2310.03669.

Every class's column of the logits is standardised over the batch, for student and teacher apart, and another loss of
logits is taken of what comes out: RTKD and RNKD of the paper are the two terms of DKD on it.   B batch, K classes.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.distributed.collectives import standardize_both, standardize_columns
from pipeline.losses._rows import StatScope, group_size
from pipeline.losses._transform import LogitTransform


def perceive(logits_BK: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the perception matrix h = (z − μ)·(v + ε)^(−1/2), μ and v of a class over the global batch (eq. 5, 6).

    Collective: every rank calls it. The variance is the biased one; both statistics are differentiated through.
    """
    return standardize_columns(logits_BK, eps)


class Perception(LogitTransform):
    """Another loss of the logits, taken of both networks' perception matrices.

    Under gradient accumulation the batch it standardises over is the micro-batch of all ranks.
    """

    scope = "statistics"

    class Config(LogitTransform.Config):
        """``{inner: {dkd: {…}}}``."""

        eps: PositiveFloat = 1e-5
        """Added to the variance; the paper has none and would divide by zero."""
        stat_scope: StatScope = "global"

    def transform(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return both perception matrices; one all-reduce serves both, and the backward's is the student's alone."""
        c = self.config
        size = group_size(c.stat_scope, len(student_BK))
        if size is None:
            return standardize_both(student_BK, teacher_BK, c.eps)
        groups = zip(student_BK.split(size), teacher_BK.split(size), strict=True)
        found = [standardize_both(*both, c.eps, across_ranks=False) for both in groups]
        student_BK, teacher_BK = (torch.cat(parts) for parts in zip(*found, strict=True))
        return student_BK, teacher_BK
