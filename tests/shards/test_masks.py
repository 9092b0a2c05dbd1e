"""Masks as files: what is read as classes, and what is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pictures import decode, encode, jpeg
from PIL import Image

from shards.manifest import IGNORED_VALUE
from shards.masks import changes_of, check_size, decode_mask, encode_mask, meaning_of_values, resized_mask, to_classes
from shards.plan import Unusable

SQUARE = np.arange(64, dtype=np.uint8).reshape(8, 8)


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 255)))
def test_a_mask_comes_back_as_it_was_from_the_same_bytes(mask_HW):
    data = encode_mask(mask_HW)
    assert data == encode_mask(np.asfortranarray(mask_HW))
    assert np.array_equal(decode_mask(data), mask_HW)
    assert Image.fromarray(decode(data)).mode == "L"


@pytest.mark.parametrize("mask", [SQUARE.astype(np.int64), SQUARE[None]])
def test_only_bytes_of_two_dimensions_are_a_mask(mask):
    with pytest.raises(ValueError, match=r"expected a mask of uint8 \[H, W\]"):
        encode_mask(mask)


def with_palette(values: np.ndarray) -> bytes:
    image = Image.fromarray(values)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return encode(image, "PNG")


def test_of_a_palette_the_indices_are_read_and_not_the_colours():
    assert np.array_equal(decode_mask(with_palette(SQUARE), palette=True), SQUARE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_palette(SQUARE), "its mask has a palette: expected a grey PNG of 8 bits, whose values are classes"),
        (encode(np.stack([SQUARE] * 3, axis=-1), "PNG"), "its mask has 3 channels: expected a grey PNG of 8 bits"),
        (encode(np.stack([SQUARE] * 4, axis=-1), "PNG"), "its mask has 4 channels: expected a grey PNG"),
        (encode(SQUARE.astype(np.uint16), "PNG"), "its mask has 16 bits a pixel: expected a grey PNG of 8 bits"),
        (encode(Image.fromarray(SQUARE > 3), "PNG"), "its mask has 1 bits a pixel: expected a grey PNG of 8 bits"),
        (jpeg(0), "its mask is a JPEG, which changes values: store masks as PNG"),
        (encode(SQUARE, "BMP"), "its mask is neither a JPEG nor a PNG"),
        (encode_mask(SQUARE)[:50], "its mask cannot be decoded: "),
        (b"", "its mask is neither a JPEG nor a PNG"),
    ],
)
def test_what_is_no_grey_png_of_bytes_is_refused_in_one_line(data, message):
    with pytest.raises(Unusable, match=message) as refused:
        decode_mask(data)
    assert "\n" not in str(refused.value)


def test_a_value_that_is_no_class_is_refused_and_the_classes_are_named():
    mask = np.array([[0, 1, 2], [255, 2, 3], [7, 3, 3]], np.uint8)
    message = r"^its mask has the value 3 in 3 pixels: classes are 0–2, and ignored 255$"
    with pytest.raises(Unusable, match=message):
        to_classes(mask, meaning_of_values(3))
    assert np.array_equal(to_classes(mask, meaning_of_values(8)), mask)


def test_values_are_ignored_or_changed_as_their_meaning_says():
    mask = np.array([[0, 1, 2], [255, 11, 1]], np.uint8)
    meaning = meaning_of_values(2, ignored=(0, 11), changed={1: 1, 2: 0})
    assert to_classes(mask, meaning).tolist() == [[255, 1, 0], [255, 255, 1]]
    assert changes_of(meaning) == {"0": 255, "2": 0, "11": 255}
    assert changes_of(meaning_of_values(5)) == {}


def test_a_mask_of_another_size_than_its_image_is_refused():
    check_size(SQUARE[:, :5], 5, 8)
    with pytest.raises(Unusable, match=r"^its mask is 8×8, the image 5×8: they must be equal$"):
        check_size(SQUARE, 5, 8)


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (17, 11)])
def test_a_resized_mask_has_values_of_the_mask_and_each_from_the_nearest_pixel(size):
    width, height = size
    values = np.where(SQUARE % 2, SQUARE, IGNORED_VALUE).astype(np.uint8)
    rows, columns = ((np.arange(new) + 0.5) * 8 / new // 1 for new in (height, width))
    expected = values[rows.astype(int)][:, columns.astype(int)]
    assert np.array_equal(resized_mask(values, width, height), expected)
