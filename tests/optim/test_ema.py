"""The moving average is a function of the weights and of the step's number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.optim.ema import EMA, Config


def followed(config: Config, steps: int, as_tensor: bool = False) -> tuple[list[float], list[float]]:
    """Return what a number was at the beginning and after each step, and the averages of it."""
    torch.manual_seed(0)
    module = nn.ParameterList([nn.Parameter(torch.randn(1, dtype=torch.float64))])
    ema, weights, averages = EMA(config, module), [module[0].item()], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            module[0].add_(torch.randn(1))
        ema.update(torch.tensor(step) if as_tensor else step)
        weights.append(module[0].item())
        averages.append(ema.averages["0"].item())
    return weights, averages


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.3, True), (0.999, True)])
def test_the_average_is_that_of_plain_arithmetic(decay: float, warmup: bool):
    weights, averages = followed(Config(decay=decay, warmup=warmup), 100)
    expected = weights[0]
    for step, weight in enumerate(weights[1:], 1):
        kept = min(decay, (1 + step) / (10 + step)) if warmup else decay
        expected = kept * expected + (1 - kept) * weight
        assert averages[step - 1] == pytest.approx(expected, rel=1e-12)


def test_a_step_in_a_tensor_is_the_same_to_the_last_bit():
    config = Config(decay=0.9, warmup=True)
    assert followed(config, 30) == followed(config, 30, as_tensor=True)


def test_with_a_warm_up_it_follows_the_weights_sooner():
    gaps = []
    for warmup in (True, False):
        weights, averages = followed(Config(decay=0.999, warmup=warmup), 20)
        gaps.append(abs(averages[-1] - weights[0]))
    assert gaps[0] > 10 * gaps[1]
