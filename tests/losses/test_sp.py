from __future__ import annotations

import pytest
import torch
from loss_cases import PROGRESS, config_of, example, load_spec
from torch import Tensor

from pipeline.losses.sp import sp_loss


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_two_rows_at_a_right_angle_against_two_that_are_alike():
    """G is the identity of the one and 1/√2 everywhere of the other."""
    apart, alike = torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    gap = 2 * (1 - 0.5**0.5) ** 2 + 2 * 0.5
    assert sp_loss(apart, alike).item() == pytest.approx(gap / 4, rel=1e-12)


def test_a_row_without_any_activation_gets_no_huge_gradient():
    """G's row of it is zero, and published code would divide that row's gradient by 1e-12."""
    student = features(0, 5, 4, 3, 3).relu()
    student[2] = 0
    student.requires_grad_()
    sp_loss(student, features(1, 5, 6, 3, 3)).backward()
    assert student.grad is not None
    assert student.grad.abs().amax() < 10


def test_large_maps_of_half_precisions_largest_number_stay_finite():
    student = torch.full((4, 64, 28, 28), 65504.0)
    student[0] = 1.0
    student.requires_grad_()
    loss = sp_loss(student, features(0, 4, 8).float())
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_one_row_is_similar_to_itself_alone():
    assert sp_loss(features(0, 1, 4), features(1, 1, 6)).item() == 0


@pytest.mark.parametrize("scope", ["rank", "ghost:4"])
def test_groups_of_rows_can_be_compared_apart(scope: str):
    spec = load_spec("sp", {**config_of("sp"), "stat_scope": scope})
    case = example("sp", spec, rows=8)
    both = case.student.features["last"], case.teacher.features["last"]
    groups = [slice(0, 8)] if scope == "rank" else [slice(0, 4), slice(4, 8)]
    expected = 3000 * torch.stack([sp_loss(*(x[rows] for x in both)) for rows in groups]).mean()
    torch.testing.assert_close(case.loss.parts(case.student, case.teacher, case.batch, PROGRESS)["sp"], expected)
