"""Self-supervised distillation by singular values, Lee et al., ECCV 2018, arXiv:1807.06819, as in CRD's benchmark.

A map is a matrix of pixels × channels. Its k leading right singular vectors are compared from level to level: each of
their entries with each entry of the next level. The student learns the teacher's comparisons. Of its k + 3 vectors, the
ones that are most alike to the teacher's count, with the teacher's sign.

A singular vector has no sign of its own. Here the sum of each of the teacher's is positive. Published code leaves the
sign to the library, and the value depends on it.

The vectors are those of the smaller of MᵀM and M·Mᵀ, which is faster than a singular value decomposition of M.

B batch, C D channels, H W space, N pixels, M side of a symmetric matrix, J vectors of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._functional import l2_normalize
from pipeline.losses._stages import FeatureMapLoss, check_equal_widths

MORE = 3
"""Number of vectors of the student beyond the teacher's k."""
EQUAL = 1e-6
"""Difference of two eigenvalues, as a share of the largest, below which their vectors count as undefined."""


def kdsvd_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], *, k: int) -> Tensor:
    """Return the squared errors of the comparisons, summed over them and averaged over the rows.

    Maps are [B, C, H, W], with equal channels in both networks. The value grows with the square of the width. A row
    counts as zero between two levels where a map has too few singular values. No gradient reaches the teacher.
    """
    pairs = zip(students, teachers, strict=True)
    levels = [aligned_vectors(student, teacher.detach(), k) for student, teacher in pairs]
    return torch.stack([_step_loss(*step) for step in pairwise(levels)]).sum()


Vectors = tuple[Tensor, Tensor, Tensor]
"""A level's vectors of the student and of the teacher [B, C, k], and which rows have both [B]."""


def _step_loss(shallow: Vectors, deep: Vectors) -> Tensor:
    """Return the loss from one level to the next."""
    of_student, of_teacher = (comparisons(*both) for both in zip(shallow[:2], deep[:2], strict=True))
    squares_B = (of_student - of_teacher).square().flatten(1).sum(1)
    return (squares_B * (shallow[2] & deep[2])).mean()


def comparisons(shallow_BCJ: Tensor, deep_BDJ: Tensor) -> Tensor:
    """Return exp(−(deep − shallow)²/8) of every two entries [B, D, C, J]."""
    return (-(deep_BDJ.unsqueeze(2) - shallow_BCJ.unsqueeze(1)).square() / 8).exp()


def aligned_vectors(student_BCHW: Tensor, teacher_BCHW: Tensor, k: int) -> Vectors:
    """Return both networks' vectors, each times the teacher's share of that singular value."""
    student_BCJ, _, student_B = leading_vectors(student_BCHW, k + MORE)
    teacher_BCJ, values_BJ, teacher_B = leading_vectors(teacher_BCHW, k)
    teacher_BCJ = teacher_BCJ * signs(teacher_BCJ.sum(1, keepdim=True))
    cosines_BJJ = student_BCJ.detach().mT @ teacher_BCJ
    nearest_B1J = cosines_BJJ.abs().argmax(1, keepdim=True)
    chosen_BCJ = student_BCJ.gather(2, nearest_B1J.expand(-1, student_BCJ.shape[1], -1))
    chosen_BCJ = chosen_BCJ * signs(cosines_BJJ.gather(1, nearest_B1J))
    scale_B1J = F.normalize(values_BJ, dim=1).unsqueeze(1)
    return chosen_BCJ * scale_B1J, teacher_BCJ * scale_B1J, student_B & teacher_B


def signs(x: Tensor) -> Tensor:
    """Return 1 where ``x`` is at least zero, −1 elsewhere."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def leading_vectors(map_BCHW: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading right singular vectors [B, C, number] of a map's pixels × channels, and their values.

    Values are without gradient. The third result says of each row whether its map has so many singular values.
    """
    matrix_BNC = map_BCHW.flatten(2).mT
    by_channels = matrix_BNC.shape[2] <= matrix_BNC.shape[1]
    gram_BMM = matrix_BNC.mT @ matrix_BNC if by_channels else matrix_BNC @ matrix_BNC.mT
    vectors_BMJ, squares_BJ = _LeadingVectors.apply(gram_BMM, number)
    if not by_channels:
        vectors_BMJ = l2_normalize(matrix_BNC.mT @ vectors_BMJ, 1)
    enough_B = squares_BJ[:, -1] > EQUAL * squares_BJ[:, 0]
    return vectors_BMJ, squares_BJ.clamp(min=0).sqrt(), enough_B


class _LeadingVectors(torch.autograd.Function):
    """The eigenvectors of the largest eigenvalues of symmetric matrices, largest first, and these eigenvalues.

    The gradient of a vector has a part along every other one, divided by the difference of their eigenvalues. Where
    that is rounding alone, the part is left out.
    """

    @staticmethod
    def forward(ctx: Any, gram_BMM: Tensor, number: int) -> tuple[Tensor, Tensor]:
        # A matrix that is not finite would be an error. Its gradient is still not finite, so the step is skipped.
        values_BM, vectors_BMM = torch.linalg.eigh(gram_BMM.nan_to_num(0.0, 0.0, 0.0))
        values_BM, vectors_BMM = values_BM.flip(1), vectors_BMM.flip(2)
        ctx.save_for_backward(values_BM, vectors_BMM)
        values_BJ = values_BM[:, :number].clone()
        ctx.mark_non_differentiable(values_BJ)
        return vectors_BMM[:, :, :number].clone(), values_BJ

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_BMJ: Tensor, _: Tensor
    ) -> tuple[Tensor, None]:
        values_BM, vectors_BMM = ctx.saved_tensors
        number = grad_BMJ.shape[2]
        gaps_BMJ = values_BM[:, None, :number] - values_BM[:, :, None]
        tied_BMJ = gaps_BMJ.abs() <= EQUAL * values_BM[:, :1, None].abs()
        along_BMJ = (vectors_BMM.mT @ grad_BMJ) / gaps_BMJ.masked_fill(tied_BMJ, float("inf"))
        grad_BMM = vectors_BMM @ along_BMJ @ vectors_BMM[:, :, :number].mT
        return (grad_BMM + grad_BMM.mT) / 2, None


class KDSVD(FeatureMapLoss):
    """A loss that matches the leading singular vectors of maps, level by level. The maps must have equal widths."""

    reads_labels = False
    capturable = False

    class Config(FeatureMapLoss.Config):
        """The config of KDSVD, such as ``{k: 1}``."""

        k: PositiveInt
        """Number of singular vectors of the teacher that are compared."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        check_equal_widths("kdsvd", self.levels, facts)
        if len(self.levels) < 2:
            raise ValueError("kdsvd: maps are compared with those of the next level; name two stages or more")
        for student, teacher in self.levels:
            self.check_values(student, facts.student_shapes[student], "student", config.k + MORE)
            self.check_values(teacher, facts.teacher_shapes[teacher], "teacher", config.k)

    def check_values(self, tap: str, shape: tuple[int, ...], network: str, needed: int) -> None:
        """Raise ValueError if a map of that shape has fewer singular values than are needed."""
        width, height, columns = shape
        if min(width, height * columns) < needed:
            raise ValueError(
                f"kdsvd: {tap} has {width} channels of {height} × {columns} pixels in the {network}, and {needed} "
                "singular values are needed; name other stages"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``kdsvd``."""
        return {"kdsvd": kdsvd_loss(*self.maps(student, teacher), k=self.config.k)}
