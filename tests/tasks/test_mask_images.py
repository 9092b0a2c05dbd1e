"""The colours of masks in pictures, and masks as PNG files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.tasks._mask_images import class_color, palette, palette_png


@pytest.mark.parametrize(("classes", "apart"), [(12, 60), (21, 35), (150, 10), (255, 8)])
def test_classes_have_colours_of_their_own_and_none_is_the_grey_of_ignored_pixels(classes: int, apart: int):
    colours = palette()[[*range(classes), 255]].astype(int)
    distances = np.abs(colours[:, None] - colours[None]).max(2)
    assert distances[~np.eye(len(colours), dtype=bool)].min() >= apart
    assert palette()[255].tolist() == [128, 128, 128]
    assert class_color(1) == "#{:02x}{:02x}{:02x}".format(*palette()[1])


def test_a_mask_is_read_back_as_its_classes_and_shown_in_their_colours():
    mask = np.random.default_rng(0).integers(256, size=(7, 9), dtype=np.uint8)
    with Image.open(io.BytesIO(palette_png(mask))) as image:
        assert (image.mode, image.size) == ("P", (9, 7))
        assert np.array_equal(np.asarray(image), mask)
        assert np.array_equal(np.asarray(image.convert("RGB")), palette()[mask])
