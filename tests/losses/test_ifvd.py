"""Intra-class feature variation: whose centre a pixel has, and what pixels of no class do."""

from __future__ import annotations

import pytest
import torch
from loss_cases import example
from torch import Tensor

from pipeline.losses.ifvd import class_similarities, ifvd_loss
from shards.manifest import IGNORED_VALUE


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def members(mask_BHW: Tensor, classes: int) -> Tensor:
    return torch.stack([(mask_BHW == k).flatten(1) for k in range(classes)], 1).double()


def test_a_centre_is_the_mean_of_its_class_in_the_same_image():
    map_BCHW = torch.tensor([[[[1.0, 0.0, 3.0]], [[0.0, 1.0, 4.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[0, 0, 1]]])
    found = class_similarities(map_BCHW, members(mask, 2))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5, 1.0]], dtype=torch.float64))
    two = class_similarities(torch.cat([map_BCHW, 2 - map_BCHW]), members(mask.repeat(2, 1, 1), 2))
    torch.testing.assert_close(two[:1], found)


def test_pixels_of_no_class_are_in_no_centre_and_count_with_a_difference_of_zero():
    student, teacher = maps(0, 2, 4, 3, 4), maps(1, 2, 5, 3, 4)
    mask = torch.randint(3, (2, 3, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mask[:, :, 2:] = IGNORED_VALUE
    whole = ifvd_loss(student, teacher, mask, 3)
    left = ifvd_loss(student[..., :2], teacher[..., :2], mask[..., :2], 3)
    assert whole.item() == pytest.approx(left.item() / 2, rel=1e-12)  # half of the pixels have a class
    student[..., 2:] = 100.0
    assert ifvd_loss(student, teacher, mask, 3).item() == whole.item()


def test_an_image_without_any_class_gives_zero_and_no_gradient():
    student = maps(0, 2, 4, 3, 4).requires_grad_()
    mask = torch.full((2, 6, 8), IGNORED_VALUE, dtype=torch.uint8)
    loss = ifvd_loss(student, maps(1, 2, 4, 3, 4), mask, 3)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_class_beyond_the_data_sets_counts_as_none():
    student, teacher = maps(0, 1, 4, 2, 2), maps(1, 1, 4, 2, 2)
    mask = torch.tensor([[[0, 0], [0, 7]]], dtype=torch.uint8)
    ignored = mask.where(mask != 7, IGNORED_VALUE)
    assert ifvd_loss(student, teacher, mask, 3).item() == ifvd_loss(student, teacher, ignored, 3).item()


def test_masks_are_sampled_at_the_smaller_of_both_maps():
    mask = torch.arange(3, dtype=torch.uint8).repeat(2, 8, 4)  # 12 wide
    student, teacher = maps(0, 2, 4, 4, 6), maps(1, 2, 5, 8, 12)
    small = torch.nn.functional.avg_pool2d(teacher, 2)
    sampled = mask[:, 1::2, 1::2]
    assert ifvd_loss(student, teacher, mask, 3).item() == ifvd_loss(student, small, sampled, 3).item()


def test_it_learns_from_masks_alone():
    case = example("ifvd")
    other = case.batch._replace(targets={name: x.flip(0) for name, x in case.batch.targets.items()})
    assert case._replace(batch=other).total().item() != case.total().item()
