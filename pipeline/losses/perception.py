"""Perception reconstruction, Zhu and Zhu, 计算机系统应用 34(2), 2025, eq. 5; as LumiNet, arXiv:2310.03669.

Every class's column of the logits is standardised over the batch, for student and teacher apart, and another loss of
logits is taken of what comes out: RTKD and RNKD of the paper are the two terms of DKD on it.   B batch, K classes.
"""

from typing import Annotated

import torch
from pydantic import AfterValidator, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, InnerLoss, Loss, Taps, promoted
from pipeline.parallel import standardize


def perceive(logits_BK: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the perception matrix h = (z − μ)·(v + ε)^(−1/2), μ and v of a class over the global batch (eq. 5, 6).

    Collective: every rank calls it. The variance is the biased one; both statistics are differentiated through.
    """
    return standardize(logits_BK, eps)


def _checked_scope(scope: str) -> str:
    kind, _, rows = scope.partition(":")
    if scope in ("global", "rank") or (kind == "ghost" and rows.isdecimal() and int(rows) > 1):
        return scope
    raise ValueError(f"expected global, rank or ghost:N with N > 1 consecutive rows of a rank, got {scope!r}")


class Perception(Loss):
    """Another loss of the logits, taken of both networks' perception matrices.

    Under gradient accumulation the batch it standardises over is the micro-batch of all ranks.
    """

    scope = "statistics"

    class Config(Loss.Config):
        """``{inner: {dkd: {…}}}``; weight and ramp multiply the inner loss's own."""

        inner: InnerLoss
        eps: PositiveFloat = 1e-5
        """Added to the variance; the paper has none and would divide by zero."""
        stat_scope: Annotated[str, AfterValidator(_checked_scope)] = "global"
        """Rows that a statistic covers: all ranks', this rank's, or with ``ghost:N`` each N consecutive ones of it."""

        def taps(self) -> Taps:
            """Return the inner loss's taps."""
            return self.inner.config.taps()

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.inner = config.inner.build(facts)

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the inner loss's parts on the perception matrices, × weight × ramp."""
        with torch.autocast(student.logits_BK.device.type, enabled=False):
            student, teacher = self.perceived(promoted(student), promoted(teacher))
            return self.scaled(self.inner.parts(student, teacher, batch, progress), progress)

    def perceived(self, student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """Return both outputs with perception matrices for logits; stacked, so that one all-reduce serves both."""
        stacked_BJ = torch.cat([student.logits_BK, teacher.logits_BK.detach()], 1)
        kind, _, rows = self.config.stat_scope.partition(":")
        if kind == "global":
            h_BJ = perceive(stacked_BJ, eps=self.config.eps)
        else:
            groups = stacked_BJ.split(int(rows) if rows else max(len(stacked_BJ), 1))
            h_BJ = torch.cat([standardize(group, self.config.eps, across_ranks=False) for group in groups])
        student_BK, teacher_BK = h_BJ.chunk(2, 1)
        return student._replace(logits_BK=student_BK), teacher._replace(logits_BK=teacher_BK.detach())
