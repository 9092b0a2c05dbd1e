"""PISR's losses, where their formulas alone do not show it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._registry import load_spec
from pipeline.losses.pisr import laplace_loss


def maps(seed: int, channels: int = 3) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 4, 6, generator=draws, dtype=torch.float64)


def test_the_likelihood_is_that_of_torchs_laplace_distribution():
    location, scale, teacher = maps(0), maps(1).exp(), maps(2)
    expected = -torch.distributions.Laplace(location, scale).log_prob(teacher).mean()
    torch.testing.assert_close(laplace_loss(location, scale, teacher), expected)


def test_the_best_scale_is_the_mean_error():
    errors = maps(0).abs()
    scale = errors.mean().clone().requires_grad_()
    laplace_loss(torch.zeros_like(errors), scale.expand_as(errors), errors).backward()
    assert scale.grad is not None
    assert scale.grad.abs() < 1e-12


@pytest.mark.parametrize("raw", [-1e4, 0.0, 1e4])
def test_the_scale_has_a_lower_bound_and_both_ends_are_finite(raw: float):
    shapes = {"expanding": (3, 4, 6)}
    loss = load_spec("pisr", {"scale": 0.1, "eps": 1e-8}).build(Facts(1, shapes, shapes))
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.zero_()
        loss.get_parameter("scale.2.bias").fill_(raw)
    student, teacher = maps(0).float().requires_grad_(), maps(1).float().requires_grad_()
    blank = torch.zeros(2)
    outputs = (Outputs(blank, {"expanding": each}) for each in (student, teacher))
    (value,) = loss(*outputs, Batch(blank, blank, blank, {})).values()
    value.backward()
    scale = 0.1 * (math.log1p(math.exp(raw)) if raw < 100 else raw) + 1e-8
    expected = math.log(2 * scale) + teacher.detach().abs().mean().item() / scale
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in loss.parameters())
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("name", "config", "shape", "message"),
    [
        ("imitation", {}, (4, 6, 6), "imitation: the tap 'code' has 4 channels, and an image has 3; name a map"),
        ("imitation", {}, (3,), r"the tap 'code' is shaped \[3\], but a map \[C, H, W\] is needed"),
        ("pisr", {"scale": 0.1, "eps": 1e-8}, (56,), r"the tap 'expanding' is shaped \[56\], but a map"),
    ],
)
def test_a_tap_that_does_not_fit_is_refused_in_one_line(
    name: str, config: dict[str, float], shape: tuple[int, ...], message: str
):
    shapes = {"code": shape, "expanding": shape}
    with pytest.raises(ValueError, match=message) as refused:
        load_spec(name, config).build(Facts(1, shapes, shapes))
    assert "\n" not in str(refused.value)
