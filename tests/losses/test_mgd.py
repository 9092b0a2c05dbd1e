"""Masked generative distillation: what is hidden, how often, and by which draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import Example, config_of, example, inputs_of, oracle
from torch import nn

from pipeline.losses._registry import load_spec
from pipeline.losses.mgd import hide, mgd_loss


def changed(**changes: Any) -> Example:
    return example("mgd", load_spec("mgd", {**config_of("mgd"), **changes}), rows=2)


def test_hidden_pixels_equal_the_oracle_too():
    case = changed(hidden="pixels", share=0.75, stages=["stage1", "last"], weight=1.0)
    config = case.loss.config.model_dump(mode="json")
    assert case.total(seed=7).item() == pytest.approx(oracle("mgd").parts(config, inputs_of(case, 7))["mgd"], rel=1e-10)


@pytest.mark.parametrize("part", ["pixels", "channels"])
@pytest.mark.parametrize("share", [0.15, 0.65])
def test_a_share_of_each_rows_pixels_or_channels_is_hidden(part: Any, share: float):
    torch.manual_seed(0)
    shown = hide(torch.ones(8, 30, 20, 20), part, share)
    whole = shown.flatten(2) if part == "channels" else shown.flatten(2).mT
    assert set(whole.mean(2).unique().tolist()) == {0.0, 1.0}  # a pixel in all channels, a channel in all pixels
    assert 1 - whole.mean().item() == pytest.approx(share, abs=0.06)
    assert not torch.equal(shown[0], shown[1])


def test_nothing_is_hidden_by_a_share_of_zero():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(hide(x, "pixels", 0.0), x)


def test_another_seed_hides_another_part():
    case = changed(hidden="pixels", share=0.5)
    assert len({case.total(seed=seed).item() for seed in range(4)}) == 4


def test_the_distance_is_summed_over_a_row_and_averaged_over_the_rows():
    generated, teacher = torch.zeros(3, 2, 4, 5), torch.full((3, 2, 4, 5), 2.0)
    assert mgd_loss(generated, teacher).item() == 4 * 2 * 4 * 5


def test_the_student_is_aligned_only_where_the_channels_differ():
    (aligned,) = changed().loss.connectors  # type: ignore[misc]
    assert isinstance(aligned, nn.Conv2d)
    assert aligned.bias is not None
    same = {"last": (8, 4, 6)}
    (equal,) = example("mgd", student=same, teacher=same).loss.connectors  # type: ignore[misc]
    assert isinstance(equal, nn.Identity)


def test_both_networks_run_under_autocast_and_the_distance_does_not():
    case = example("mgd", dtype=torch.float32, autocast=torch.bfloat16)
    seen = []
    for module in case.loss.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, y: seen.append(y.dtype))
    assert case.total().dtype == torch.float32
    assert seen == [torch.bfloat16] * 3
