"""The learned variance of variational information distillation."""

from __future__ import annotations

from math import log

import pytest
import torch
from loss_cases import Example, config_of, example
from pydantic import ValidationError
from torch import Tensor
from weight_decay import decay_alone

from pipeline.losses._registry import load_spec
from pipeline.losses.vid import vid_loss
from pipeline.optim.optimizer import Config, create_optimizer, set_learning_rate


def thetas(case: Example) -> list[Tensor]:
    return [parameter for name, parameter in case.loss.named_parameters() if name.endswith("theta_C")]


def test_a_right_guess_costs_half_the_logarithm_of_the_variance():
    case = example("vid")
    variance_C = case.loss.variances[0]().double()  # type: ignore[index]
    teacher_BCHW = torch.randn(2, len(variance_C), 3, 3, dtype=torch.float64)
    assert vid_loss(teacher_BCHW, teacher_BCHW, variance_C).item() == pytest.approx(log(5.0) / 2, rel=1e-6)


def test_the_loss_is_least_where_the_variance_is_the_mean_squared_error_of_its_channel():
    mean_BCHW, teacher_BCHW = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    variance_C = (mean_BCHW - teacher_BCHW).square().mean((0, 2, 3)).requires_grad_()
    vid_loss(mean_BCHW, teacher_BCHW, variance_C).backward()
    torch.testing.assert_close(variance_C.grad, torch.zeros_like(variance_C), rtol=0, atol=1e-15)


def test_a_good_guess_with_a_small_variance_has_a_negative_loss():
    x_BCHW = torch.randn(2, 3, 4, 4)
    assert vid_loss(x_BCHW, x_BCHW, torch.full((3,), 0.01)).item() < 0


def test_published_code_hides_the_variances_in_a_list_and_here_a_step_moves_each_of_them():
    case = example("vid")
    optimizer = create_optimizer(Config(), case.loss)
    before = [theta.detach().clone() for theta in thetas(case)]
    assert len(before) == 2
    set_learning_rate(optimizer, 0.1)
    case.total().backward()
    optimizer.step()
    for theta, old in zip(thetas(case), before, strict=True):
        assert (theta != old).all()
    assert sum(key.endswith("theta_C") for key in case.loss.state_dict()) == 2


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_shrinks_the_convolutions_and_leaves_the_variances(everything: bool):
    case = example("vid")
    config = Config(momentum=0.0, weight_decay=0.5, decay_norms_and_biases=everything)
    before = decay_alone(case.loss, config)
    for name, parameter in case.loss.named_parameters():
        kept = 1.0 if name.endswith("theta_C") else 0.95
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)


def test_a_first_variance_that_the_floor_excludes_is_refused():
    with pytest.raises(ValidationError, match="initial_variance must be above eps"):
        load_spec("vid", {**config_of("vid"), "initial_variance": 1e-6})
