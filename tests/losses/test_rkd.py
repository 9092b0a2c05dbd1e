from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.losses.rkd import angle_loss, angles, distance_loss, relative_distances, rkd_loss

WEIGHTS = {"distance_weight": 25.0, "angle_weight": 50.0}


def embeddings(seed: int, rows: int = 6, width: int = 4) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_triangle_of_equal_sides_has_relative_distances_of_one_and_cosines_of_a_half():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64) + 7
    torch.testing.assert_close(relative_distances(corners), 1 - torch.eye(3, dtype=torch.float64))
    found = angles(corners)
    for at in range(3):
        one, other = (corner for corner in range(3) if corner != at)
        assert found[at, one, other].item() == pytest.approx(0.5)
        assert found[at, one, one].item() == pytest.approx(1)
        assert not found[at, at].any()


def test_two_rows_have_a_distance_but_no_proportions():
    student, teacher = embeddings(0, 2), embeddings(1, 2)
    assert rkd_loss(student, teacher, **WEIGHTS).item() == pytest.approx(0, abs=1e-24)


def test_one_row_has_no_relations():
    student = embeddings(0, 1).requires_grad_()
    loss = rkd_loss(student, embeddings(1, 1), **WEIGHTS)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_rows_that_are_one_point_have_no_proportions_and_no_gradient():
    student = torch.full((5, 4), 3.0, dtype=torch.float64, requires_grad=True)
    loss = rkd_loss(student, embeddings(1, 5), **WEIGHTS)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_that_the_teacher_tells_apart_get_no_huge_gradient(dtype: torch.dtype):
    """The direction from one to the other is 0/0; published code divides its gradient by 1e-12."""
    student = embeddings(0).to(dtype)
    student[3] = student[1]
    student.requires_grad_()
    rkd_loss(student, embeddings(1).to(dtype), **WEIGHTS).backward()
    assert student.grad is not None
    assert student.grad.abs().amax() < 1e3


def test_embeddings_of_a_thousand_that_lie_close_keep_their_distances_in_float32():
    """Squares of a thousand leave float32 no digit of a distance of 0.1; published code subtracts them."""
    close = 1000 + 0.1 * embeddings(0, 6, 64)
    seen = close.float()
    squares = seen.square().sum(1)
    published = (squares.unsqueeze(1) + squares - 2 * seen @ seen.mT).clamp(min=1e-12).sqrt()
    exact = torch.cdist(seen.double(), seen.double())
    assert (published - exact).abs().amax() > 0.1
    torch.testing.assert_close(relative_distances(seen).double(), relative_distances(seen.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(angles(seen).double(), angles(seen.double()), rtol=0, atol=1e-5)


def test_each_term_is_weighed_apart():
    student, teacher = embeddings(0), embeddings(1)
    both = rkd_loss(student, teacher, distance_weight=2.0, angle_weight=3.0)
    torch.testing.assert_close(both, 2 * distance_loss(student, teacher) + 3 * angle_loss(student, teacher))
