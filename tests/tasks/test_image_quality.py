"""PSNR and SSIM, and the bicubic baseline, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.bicubic import bicubic_upscaled
from pipeline.tasks._image_quality import MOST_PSNR, luma, psnr, quality, to_pixels
from shards.imresize import reduced, reduced_to_bytes

DRAWS = np.random.default_rng(0)


def picture(height: int = 48, width: int = 60) -> np.ndarray:
    """Return a smooth image with some noise, uint8 [H, W, 3]."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    waves = 128 + 80 * np.sin(x / 5 + c) * np.cos(y / 7 - c)
    return (waves + DRAWS.normal(0, 6, waves.shape)).round().clip(0, 255).astype(np.uint8)


def as_map(image_HWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1))).double()


def test_the_luma_of_black_and_white_is_that_of_studio_range():
    grey = torch.tensor([0.0, 255.0])[:, None].expand(2, 3)[..., None, None]
    assert [luma(each).item() for each in grey] == pytest.approx([16, 16 + 219.859 * 255 / 256], abs=1e-3)


def test_psnr_is_that_of_the_mean_error_and_of_equal_images_a_hundred():
    truth = as_map(picture())
    assert psnr(truth + 5, truth).item() == pytest.approx(20 * math.log10(255 / 5), rel=1e-12)
    assert psnr(truth, truth).item() == MOST_PSNR
    assert quality(truth, truth, 2) == (MOST_PSNR, 1.0)


def test_pixels_near_the_edge_do_not_count():
    truth = as_map(picture())
    spoiled = truth.clone()
    spoiled[:, :3] = spoiled[:, :, -3:] = 0
    assert quality(spoiled, truth, 3).psnr == MOST_PSNR
    assert quality(spoiled, truth, 2).psnr < 40


def test_ssim_is_the_mean_over_windows_inside_the_image():
    ours, theirs = as_map(picture(14, 16)), as_map(picture(14, 16))
    a_HW, b_HW = (luma(each).numpy() for each in (ours, theirs))
    along = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(along, along) / along.sum() ** 2
    values = []
    for top in range(4):
        for left in range(6):
            a, b = (x[top : top + 11, left : left + 11] for x in (a_HW, b_HW))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            of_both = (window * a * b).sum() - mean_a * mean_b
            spread = (window * a * a).sum() - mean_a**2 + (window * b * b).sum() - mean_b**2
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * of_both + c2) / (mean_a**2 + mean_b**2 + c1) / (spread + c2)
            )
    assert quality(ours, theirs, 0).ssim.item() == pytest.approx(np.mean(values), rel=1e-10)


def test_restored_images_are_rounded_and_clipped_to_bytes():
    assert to_pixels(torch.tensor([-0.1, 0.0, 1.4 / 255, 1.6 / 255, 1.2])).tolist() == [0, 0, 1, 2, 255]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_reduced_image_is_its_enlargement_in_place_and_no_pixel_beside(scale: int):
    image_HWC = picture()
    up = bicubic_upscaled(as_map(reduced_to_bytes(image_HWC, scale))[None], scale)[0]
    truth = as_map(image_HWC)
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    errors = {shift: (up.roll(shift, (1, 2)) - truth)[:, 2:-2, 2:-2].square().mean().item() for shift in shifts}
    assert min(errors, key=lambda shift: errors[shift]) == (0, 0)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_even_image_stays_so_when_it_is_reduced_or_enlarged(scale: int):
    even = np.full((4 * scale, 3 * scale, 3), 77, np.uint8)
    assert np.allclose(reduced(even, scale), 77, atol=1e-12)
    assert torch.allclose(bicubic_upscaled(as_map(even)[None], scale), torch.tensor(77.0).double(), atol=1e-12)


def test_an_image_of_another_size_is_not_reduced():
    with pytest.raises(ValueError, match="60×47 pixels is not 2 times smaller in whole pixels"):
        reduced(picture(47, 60), 2)
