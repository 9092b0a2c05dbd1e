"""Masks as images: the colour of each class, and PNG files whose values are the classes."""

from __future__ import annotations

import colorsys
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.tasks._masks import IGNORED

_GREY = (128, 128, 128)
"""Of pixels without a class; no class is grey."""
_LIGHTNESS = (0.36, 0.55, 0.74)
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of the golden ratio lie far from one another on the circle of hues, however many there are."""


def palette() -> NDArray[np.uint8]:
    """Return the colours of all values of a mask, uint8 [256, 3], the same for any number of classes."""
    colours = [
        colorsys.hls_to_rgb((0.6 + number * _GOLDEN) % 1, _LIGHTNESS[number % len(_LIGHTNESS)], 0.65)
        for number in range(IGNORED)
    ]
    levels = np.array(colours) * 255
    return np.concatenate([levels.round(), [_GREY]]).astype(np.uint8)


def class_color(number: int) -> str:
    """Return the colour of a class for HTML, such as ``#2f6ca8``."""
    return f"#{palette()[number].tobytes().hex()}"


def palette_png(mask_HW: NDArray[np.uint8]) -> bytes:
    """Return a mask as a PNG of one byte for each pixel, the class, which is shown in the colours of the palette."""
    image = Image.fromarray(np.ascontiguousarray(mask_HW, dtype=np.uint8), mode="P")
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
