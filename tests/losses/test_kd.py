"""KD's scale, which published code has got wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.kd import kd_loss


def taught(classes: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, classes, dtype=torch.float64, generator=g) for _ in range(2))
    return student.requires_grad_(), teacher


def takd(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return KD as the published teacher-assistant code has it, with the reduction that KLDivLoss has by default."""
    log_p, q = (student_BK / temperature).log_softmax(1), (teacher_BK / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_p, q, reduction="none").mean()


@pytest.mark.parametrize("classes", [10, 100])
def test_the_published_teacher_assistants_divide_kd_by_the_number_of_classes(classes: int):
    """Its mean is over rows and classes: a λ of that code is worth λ/C here, and differs with the data set."""
    student, teacher = taught(classes)
    torch.testing.assert_close(kd_loss(student, teacher, temperature=5.0), classes * takd(student, teacher, 5.0))


def test_the_gradient_is_that_of_the_rows_mean_whatever_the_temperature():
    """∂/∂z = T·(p − q)/B, p and q softened."""
    student, teacher = taught(10)
    for temperature in (1.0, 4.0, 20.0):
        (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature=temperature), student)
        p, q = ((z / temperature).softmax(1) for z in (student.detach(), teacher))
        torch.testing.assert_close(gradient, temperature * (p - q) / 6)
