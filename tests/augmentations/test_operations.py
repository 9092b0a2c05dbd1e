from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from pipeline.augmentations import _operations
from pipeline.augmentations._operations import OPERATIONS, operation_table

thorough = settings(derandomize=True, deadline=None, max_examples=60)
FILL = (9, 120, 250)
Reference = Callable[[Image.Image, float], Image.Image]


def moved(image: Image.Image, **keys: object) -> Image.Image:
    defaults = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return reference.affine(image, **{**defaults, **keys}, interpolation=InterpolationMode.NEAREST, fill=list(FILL))


def brightened_below_128(image: Image.Image, amount: float) -> Image.Image:
    """timm's ``solarize_add``."""
    return image.point([min(255, k + int(amount)) if k < 128 else k for k in range(256)] * 3)


def degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


REFERENCES: dict[str, tuple[Reference, st.SearchStrategy[float]]] = {
    "identity": (lambda image, _: image, st.just(0.0)),
    "shear_x": (lambda image, v: moved(image, shear=[degrees(v), 0.0], center=[0, 0]), st.floats(-1, 1)),
    "shear_y": (lambda image, v: moved(image, shear=[0.0, degrees(v)], center=[0, 0]), st.floats(-1, 1)),
    "translate_x": (lambda image, v: moved(image, translate=[int(v), 0]), st.integers(-60, 60).map(float)),
    "translate_y": (lambda image, v: moved(image, translate=[0, int(v)]), st.integers(-60, 60).map(float)),
    "rotate": (
        lambda image, v: reference.rotate(image, v, InterpolationMode.NEAREST, fill=list(FILL)),
        st.one_of(st.floats(-180, 180), st.sampled_from([-135.0, -90.0, 0.0, 4.5, 90.0, 180.0])),
    ),
    "brightness": (lambda image, v: reference.adjust_brightness(image, 1 + v), st.floats(-1, 2)),
    "color": (lambda image, v: reference.adjust_saturation(image, 1 + v), st.floats(-1, 2)),
    "contrast": (lambda image, v: reference.adjust_contrast(image, 1 + v), st.floats(-1, 2)),
    "sharpness": (lambda image, v: reference.adjust_sharpness(image, 1 + v), st.floats(-1, 2)),
    "posterize": (lambda image, v: reference.posterize(image, int(v)), st.integers(1, 8).map(float)),
    "solarize": (reference.solarize, st.floats(0, 256)),
    "solarize_add": (brightened_below_128, st.integers(0, 128).map(float)),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), st.just(0.0)),
    "equalize": (lambda image, _: ImageOps.equalize(image), st.just(0.0)),
    "invert": (lambda image, _: ImageOps.invert(image), st.just(0.0)),
    "hue": (reference.adjust_hue, st.floats(-0.5, 0.5)),
}


def drawn_images(seed: int, count: int, side: int) -> np.ndarray:
    """Return noise, smooth images, a few colours, one colour, and narrow ranges of brightness."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, side, side, 3))
    smooth = np.linspace(rng.integers(0, 99, (count, 1, 3)), rng.integers(99, 256, (count, 1, 3)), side, axis=1)
    smooth = (smooth + 20 * rng.random((count, 1, side, 1))).clip(0, 255)
    kinds = [noise, smooth, noise // 100 * 90, np.broadcast_to(noise[:, :1, :1], noise.shape), 90 + noise // 30]
    return np.stack([kinds[(seed + k) % 5][k] for k in range(count)]).astype(np.uint8)


def ours(name: str, images: np.ndarray, values: list[float]) -> np.ndarray:
    table = operation_table(name, np.array(values), images.shape[1], FILL)
    return OPERATIONS[name].kernel(torch.from_numpy(images.copy()), torch.from_numpy(table)).numpy()


def test_every_operation_has_a_reference() -> None:
    assert REFERENCES.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("name", REFERENCES)
def test_pixels_are_those_of_pillow(name: str) -> None:
    """To the last bit, for images of any side with any value."""
    theirs, strategy = REFERENCES[name]

    @thorough
    @given(seed=st.integers(0, 10**6), side=st.integers(3, 70), values=st.lists(strategy, min_size=1, max_size=4))
    def check(seed: int, side: int, values: list[float]) -> None:
        images = drawn_images(seed, len(values), side)
        expected = [
            np.asarray(theirs(Image.fromarray(image), value)) for image, value in zip(images, values, strict=True)
        ]
        np.testing.assert_array_equal(ours(name, images, values), np.stack(expected))

    check()


def test_every_colour_is_turned_and_mixed_as_pillow_does() -> None:
    """Of the sixteen million colours each seventh of every channel, at the edges of all sectors of the circle."""
    levels = np.array([*range(0, 256, 7), 1, 127, 128, 254, 255], np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, len(levels), 3)
    for name, value in [("hue", 0.1), ("hue", -0.5), ("hue", 0.0), ("color", 0.37), ("color", -0.9)]:
        table = operation_table(name, np.array([value]), colours.shape[1], FILL)
        found = OPERATIONS[name].kernel(torch.from_numpy(colours), torch.from_numpy(table))
        expected = REFERENCES[name][0](Image.fromarray(colours[0]), value)
        np.testing.assert_array_equal(found[0].numpy(), np.asarray(expected))


@pytest.mark.parametrize("name", ["shear_x", "rotate", "translate_y"])
def test_large_images_are_moved_in_64_bits_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = drawn_images(0, 5, 61)
    values = [-0.7, 0.0, 0.3, 0.99, 13.0]
    expected = ours(name, images, values)
    monkeypatch.setattr(_operations, "_LARGEST_IN_32_BITS", 60)
    np.testing.assert_array_equal(ours(name, images, values), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REFERENCES)
def test_a_gpu_gives_the_bits_of_the_cpu(name: str) -> None:
    low, high = {"posterize": (1, 8), "solarize": (0, 256), "solarize_add": (0, 128), "hue": (-0.5, 0.5)}.get(
        name, (-1, 1)
    )
    images = drawn_images(1, 40, 57)
    table = operation_table(name, np.linspace(low, high, 40).round(2 if high <= 1 else 0), 57, FILL)
    on_cpu, on_gpu = (
        OPERATIONS[name].kernel(torch.from_numpy(images).to(device), torch.from_numpy(table).to(device)).cpu()
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu, on_gpu)
