"""The size of a row of logits is taken away, and no gradient changes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CLASSES, config_of, example
from pydantic import ValidationError
from torch import Tensor

from pipeline.batch import Progress
from pipeline.losses._registry import load_spec
from pipeline.losses.spherical_kd import normalize, rescale

quick = settings(max_examples=15, derandomize=True, deadline=None)
SCALES = pytest.mark.parametrize("scale", ["teacher", 2.0])


def case_of(scale: str | float, seed: int = 0):
    return example("spherical_kd", load_spec("spherical_kd", {**config_of("spherical_kd"), "scale": scale}), seed=seed)


@SCALES
@quick
@given(seed=st.integers(0, 1000))
def test_no_gradient_goes_along_a_row_s_radius_or_its_mean(scale: str | float, seed: int):
    case = case_of(scale, seed)
    case.total().backward()
    logits_BK, grad_BK = case.student.logits.detach(), case.student.logits.grad
    assert grad_BK is not None
    # Of the normalised form, ε lets a thousandth of a gradient pass.
    limit = 1e-12 if scale == "teacher" else 1e-4
    assert grad_BK.sum(1).abs().amax() < limit
    assert (grad_BK * logits_BK).sum(1).abs().amax() < limit


@quick
@given(seed=st.integers(0, 1000), factor=st.floats(1e-2, 1e2), shift=st.floats(-50, 50))
def test_the_scale_and_the_shift_of_the_student_s_logits_change_nothing(seed: int, factor: float, shift: float):
    case = case_of("teacher", seed)
    moved = case._replace(student=case.student._replace(logits=factor * case.student.logits + shift))
    assert moved.total().item() == pytest.approx(case.total().item(), rel=1e-9)


@quick
@given(seed=st.integers(0, 1000), factor=st.floats(1e-2, 1e2), shift=st.floats(-50, 50))
def test_a_student_that_is_the_teacher_but_for_scale_and_shift_has_nothing_to_learn_of_it(
    seed: int, factor: float, shift: float
):
    case = case_of("teacher", seed)
    logits = factor * case.teacher.logits.detach() + shift
    same = case._replace(student=case.student._replace(logits=logits))
    assert same.parts()["kd"].item() == pytest.approx(0, abs=1e-10)


def test_the_order_of_the_classes_stays_so_that_plain_weights_decide_equally():
    student_BK, teacher_BK = torch.randn(2, 50, CLASSES)
    for changed_BK in (rescale(student_BK, teacher_BK), normalize(student_BK, scale=2.0, eps=1e-7)):
        assert torch.equal(changed_BK.argsort(1), student_BK.argsort(1))


@pytest.mark.parametrize("deviation", [0.0, 1e-9])
def test_a_row_without_direction_becomes_zero_and_gets_no_gradient(deviation: float):
    student_BK = 0.3 + deviation * torch.randn(2, CLASSES, dtype=torch.float64)
    student_BK.requires_grad_()
    rescaled_BK: Tensor = rescale(student_BK, torch.randn(2, CLASSES, dtype=torch.float64))
    assert rescaled_BK.abs().amax() == 0
    rescaled_BK.square().sum().backward()
    assert student_BK.grad is not None
    assert student_BK.grad.abs().amax() == 0


def test_the_share_of_kd_follows_its_epochs():
    config = {**config_of("spherical_kd"), "alpha": {"steps": [[0, 0.9], [60, 0.5], [80, 0.1]]}}
    case = example("spherical_kd", load_spec("spherical_kd", config))
    whole = case.loss(case.student, case.teacher, case.batch)
    for epoch, alpha in {0: 0.9, 59: 0.9, 60: 0.5, 79: 0.5, 80: 0.1, 99: 0.1}.items():
        parts = case.loss.parts(case.student, case.teacher, case.batch, Progress(10, step=10 * epoch))
        assert parts["ce"].item() == pytest.approx((1 - alpha) * whole["ce"].item(), rel=1e-12)
        assert parts["kd"].item() == pytest.approx(alpha * whole["kd"].item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [1.5, -0.1, {"steps": [[0, 0.9], [60, 1.2]]}])
def test_a_share_outside_of_nought_to_one_is_refused(alpha: object):
    with pytest.raises(ValidationError, match="alpha must be from 0 to 1"):
        load_spec("spherical_kd", {**config_of("spherical_kd"), "alpha": alpha})
