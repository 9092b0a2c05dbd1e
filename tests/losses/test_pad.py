"""The learned variance of prime-aware adaptive distillation."""

from __future__ import annotations

import pytest
import torch
from loss_cases import TEACHER_SHAPES, config_of, example
from weight_decay import decay_alone

from pipeline.losses._registry import load_spec
from pipeline.losses.pad import pad_loss
from pipeline.optim.optimizer import Config


def test_the_loss_is_least_where_the_variance_is_the_squared_error():
    student_BD, teacher_BD = torch.randn(2, 4, 6, dtype=torch.float64)
    log_variance_BD = (teacher_BD - student_BD).square().log().requires_grad_()
    pad_loss(student_BD, teacher_BD, log_variance_BD, eps=1e-300).backward()
    torch.testing.assert_close(log_variance_BD.grad, torch.zeros_like(log_variance_BD), rtol=0, atol=1e-14)


def test_a_row_with_a_large_error_learns_to_count_less():
    errors_BD = torch.tensor([[1e-3], [3.0]], dtype=torch.float64).expand(2, 6)
    log_variance_BD = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    pad_loss(torch.zeros_like(errors_BD), errors_BD, log_variance_BD, eps=1e-6).backward()
    assert log_variance_BD.grad is not None
    # Downhill, the variance of the row with the small error shrinks, and that of the other grows.
    assert (log_variance_BD.grad[0] > 0).all()
    assert (log_variance_BD.grad[1] < 0).all()


def test_a_good_guess_with_a_small_variance_has_a_negative_loss():
    x_BD = torch.randn(2, 3)
    assert pad_loss(x_BD, x_BD, torch.full((2, 3), -4.0), eps=1e-6).item() == pytest.approx(-4)


def test_the_variance_of_an_image_is_the_mean_of_those_of_its_numbers():
    torch.manual_seed(0)
    own = example("pad", load_spec("pad", {**config_of("pad"), "per": "sample"}))
    student_BD = own.loss.connector(own.student.features["embedding"])  # type: ignore[operator]
    variance_B1 = own.loss.variance(student_BD).exp().mean(1, keepdim=True)  # type: ignore[operator]
    squares_BD = (own.teacher.features["embedding"] - student_BD).square()
    expected = (squares_BD / (1e-6 + variance_B1) + variance_B1.log()).mean()
    assert own.total().item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_widths_need_no_connector():
    case = example("pad", student=TEACHER_SHAPES)
    assert not list(case.loss.connector.parameters())  # type: ignore[union-attr]


def test_weight_decay_leaves_the_norm_of_the_variance():
    case = example("pad")
    before = decay_alone(case.loss, Config(momentum=0.0, weight_decay=0.5))
    for name, parameter in case.loss.named_parameters():
        kept = 1.0 if name.startswith("variance.norm.") else 0.95
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)
