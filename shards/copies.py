"""Images and their smaller copies, the pairs of super-resolution: cutting, encoding and checking them.

An image is cut at its right and lower edge to sides that are multiples of the scale. Its copy is made once, from the
whole image, and rounded. A part of an image and the same part of the copy are cut out afterwards.

H and W are the height and width of an image.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from shards.imresize import reduced_to_bytes
from shards.jpeg import decode_jpeg, to_rgb
from shards.plan import EncodedImage, Unusable
from shards.upright import PNG_COMPRESSION

PAIRED_CLASSES = ("image",)
"""The one class of images with copies, which have no class of their own."""
_REACH = 2
"""Pixels of a copy beyond a part's edge whose image the reduction reads."""

ImagePart = tuple[int, int, int, int]
"""Left, top, width and height in pixels of the image."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Return the pixels of a JPEG or PNG, uint8 [H, W, 3]. Raises Unusable if it cannot be decoded."""
    return np.array(to_rgb(decode_jpeg(data)).convert("RGB"))


def encode_pair(image_HWC: np.ndarray, scale: int, part: ImagePart | None = None) -> EncodedImage:
    """Return an image, or a part of it, and the smaller copy, as PNGs.

    The edges of ``part`` are multiples of ``scale``. Raises Unusable for an image without a single pixel of the copy.
    """
    height, width = (side // scale * scale for side in image_HWC.shape[:2])
    if not height or not width:
        raise Unusable(f"it has {image_HWC.shape[1]}×{image_HWC.shape[0]} pixels, and its copy has none")
    image_HWC = image_HWC[:height, :width]
    left, top, across, down = part or (0, 0, width, height)
    # The copy of the surroundings has the same pixels as that of the whole image, and takes less time.
    border = _REACH * scale
    first = max(top - border, 0), max(left - border, 0)
    around = image_HWC[first[0] : top + down + border, first[1] : left + across + border]
    low = reduced_to_bytes(around, scale)
    low_top, low_left = (top - first[0]) // scale, (left - first[1]) // scale
    low = low[low_top : low_top + down // scale, low_left : low_left + across // scale]
    stored = image_HWC[top : top + down, left : left + across]
    return EncodedImage(_encode(stored), across, down, low=_encode(low))


def check_copy(image_HWC: np.ndarray, low_HWC: np.ndarray, scale: int) -> None:
    """Raise Unusable unless the copy has the size and the pixels of the image, ``scale`` times smaller.

    Pixels near its edges are not compared, because an image may be a part of a larger one.
    """
    expected = tuple(side // scale for side in image_HWC.shape[:2])
    if low_HWC.shape[:2] != expected or any(side % scale for side in image_HWC.shape[:2]):
        sizes = f"{low_HWC.shape[1]}×{low_HWC.shape[0]}, the image {image_HWC.shape[1]}×{image_HWC.shape[0]}"
        raise Unusable(f"its copy is {sizes}: it must be {scale} times smaller")
    inside = (slice(_REACH, -_REACH),) * 2
    if not np.array_equal(reduced_to_bytes(image_HWC, scale)[inside], low_HWC[inside]):
        raise Unusable("its copy has other pixels than the image, made smaller")


def _encode(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()
