"""Singular vectors: what they do not depend on, and maps of few ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from pipeline.losses import kdsvd
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.kdsvd import kdsvd_loss, leading_vectors


def levels(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return maps of two levels."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, width, side, side, generator=draw, dtype=dtype) for width, side in ((8, 5), (12, 3))]


def test_the_signs_that_a_library_chooses_change_nothing():
    students, teachers, eigh = levels(0), levels(1), torch.linalg.eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.arange(vectors.shape[2]) % 2 == 0, -1.0, 1.0)

    expected = kdsvd_loss(students, teachers, k=2)
    with mock.patch.object(kdsvd.torch.linalg, "eigh", flipped):
        assert kdsvd_loss(students, teachers, k=2).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_order_of_a_map_s_pixels_changes_nothing():
    students, teachers = levels(0), levels(1)
    expected = kdsvd_loss(students, teachers, k=1)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(2))
    for maps in (students, teachers):
        maps[0] = maps[0].flatten(2)[:, :, order].view_as(maps[0])
    assert kdsvd_loss(students, teachers, k=1).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 5, 5), (25, 2, 4)], ids=["more pixels", "more channels"])
def test_the_vectors_are_those_of_the_decomposition(shape: tuple[int, ...]):
    map_BCHW = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors_BCJ, values_BJ, enough_B = leading_vectors(map_BCHW, 3)
    _, values, rows = torch.linalg.svd(map_BCHW.flatten(2).mT, full_matrices=False)
    torch.testing.assert_close(values_BJ, values[:, :3])
    cosines = (vectors_BCJ * rows[:, :3].mT).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert enough_B.all()


def of_rank(rank: int, dtype: torch.dtype) -> Tensor:
    """Return a map of 8 channels and 25 pixels with that many singular values."""
    draw = torch.Generator().manual_seed(rank)
    pixels, channels = torch.randn(3, 25, rank, generator=draw), torch.randn(3, rank, 8, generator=draw)
    return (pixels @ channels).mT.reshape(3, 8, 5, 5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 8])
def test_a_map_of_few_ranks_gets_no_huge_gradient(rank: int, dtype: torch.dtype):
    student = of_rank(rank, dtype).requires_grad_()
    loss = kdsvd_loss([student, levels(0, dtype)[1]], levels(1, dtype), k=1)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.abs().amax() < 1e3
    assert (loss.item() > 0) == (rank > 3)


def test_a_map_that_is_not_finite_makes_the_gradient_so_and_ends_nothing():
    students = levels(0)
    students[0][0, 0, 0, 0] = torch.nan
    student = students[0].requires_grad_()
    kdsvd_loss(students, levels(1), k=1).backward()
    assert student.grad is not None
    assert not student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((3, 4, 4), (3, 4, 4), "stage1 has 3 channels of 4 × 4 pixels in the student, and 4 singular values are"),
        ((8, 1, 3), (8, 4, 4), "stage1 has 8 channels of 1 × 3 pixels in the student, and 4 singular values are"),
        ((8, 4, 4), (8, 0, 4), "stage1 has 8 channels of 0 × 4 pixels in the teacher, and 1 singular values are"),
    ],
)
def test_maps_of_too_few_singular_values_are_refused(student: tuple, teacher: tuple, message: str):
    shapes = [{"stage1": shape, "stage2": (8, 2, 2)} for shape in (student, teacher)]
    with pytest.raises(ValueError, match=f"^kdsvd: {message} needed; name other stages$"):
        load_spec("kdsvd", {"k": 1, "stages": ["stage1", "stage2"]}).build(Facts(5, *shapes))
