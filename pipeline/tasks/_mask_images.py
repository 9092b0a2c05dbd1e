"""Masks as images: the colour of each class, and PNG files whose values are the classes; and PNGs of colours."""

from __future__ import annotations

import colorsys
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.manifest import IGNORED_VALUE

_GREY = (128, 128, 128)
"""Of pixels without a class; no class is grey."""
_LEAST, _MOST = 0.25, 0.8
"""Range of the colours' lightness."""
_SATURATION = 0.75
_RATIO = 1.324717957244746
"""The plastic number: multiples of 1/ratio and 1/ratio² lie far from one another in a plane, however many there are."""


def palette() -> NDArray[np.uint8]:
    """Return the colours of all values of a mask, uint8 [256, 3], the same for any number of classes."""
    colours = [_color(number) for number in range(IGNORED_VALUE)]
    return np.concatenate([(np.array(colours) * 255).round(), [_GREY]]).astype(np.uint8)


def _color(number: int) -> tuple[float, float, float]:
    lightness = _LEAST + (_MOST - _LEAST) * ((0.5 + number / _RATIO**2) % 1)
    return colorsys.hls_to_rgb((0.6 + number / _RATIO) % 1, lightness, _SATURATION)


def class_color(number: int) -> str:
    """Return the colour of a class for HTML, such as ``#2f6ca8``."""
    return f"#{palette()[number % IGNORED_VALUE].tobytes().hex()}"


def palette_png(mask_HW: NDArray[np.uint8]) -> bytes:
    """Return a mask as a PNG of one byte for each pixel, the class, which is shown in the colours of the palette."""
    image = Image.fromarray(np.ascontiguousarray(mask_HW, dtype=np.uint8), mode="P")
    image.putpalette(palette().tobytes())
    return _as_png(image)


def rgb_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Return an image of red, green and blue as a PNG."""
    return _as_png(Image.fromarray(np.ascontiguousarray(image_HWC)))


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
