"""Losses of networks that enlarge images, where their formulas alone do not show it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._registry import load_spec
from pipeline.losses.fakd import affinity, fakd_loss
from pipeline.losses.srkd import Statistic, channel_statistic


def maps(rows: int = 2, channels: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, height, width, generator=draws, dtype=torch.float64)


def test_affinities_are_cosines_and_do_not_depend_on_the_size_of_the_features():
    map_CHW = maps()[0]
    found = affinity(map_CHW)
    pixels = map_CHW.flatten(1).T
    expected = torch.nn.functional.cosine_similarity(pixels[:, None], pixels[None], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(affinity(100 * map_CHW), found, rtol=1e-6, atol=1e-6)


def test_a_pixel_without_features_has_no_gradient_that_is_no_number():
    student = maps()
    student[0, :, 1, 2] = 0
    teacher = maps(channels=5, seed=1)
    fakd_loss(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[0, :, 1, 2] == 0).all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_distance_of_a_batch_is_the_mean_over_its_images():
    ours, theirs = maps(3), maps(3, seed=1)
    alone = [fakd_loss(ours[row : row + 1], theirs[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(fakd_loss(ours, theirs), torch.stack(alone).mean())


def test_pooling_takes_the_largest_feature_of_each_square():
    shapes = {"stage1": (3, 4, 6)}
    plain, pooled = (
        load_spec("fakd", {"stages": ["stage1"], "pool": pool}).build(Facts(1, shapes, shapes)) for pool in (1, 2)
    )
    ours, theirs = maps(), maps(seed=1)

    def value(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        blank = torch.zeros(2)
        outputs = (Outputs(blank, {"stage1": each}) for each in (student, teacher))
        return loss(*outputs, Batch(blank, blank, blank, {}))["fakd"]

    largest = [each.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)) for each in (ours, theirs)]
    torch.testing.assert_close(value(pooled, ours, theirs), value(plain, *largest))


def test_statistics_are_of_the_channels_of_every_pixel():
    map_BCHW = torch.tensor([1.0, -4.0, 0.0]).view(1, 3, 1, 1)
    found = {name: channel_statistic(map_BCHW, name).item() for name in get_args(Statistic)}
    assert found == pytest.approx({"mean": -1, "mean_square": 17 / 3, "max": 1, "min": -4})
