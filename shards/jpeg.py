"""What becomes of an image file on its way into a shard: kept as it is, written anew as a baseline JPEG, or refused.

The file's content decides, not its name. A JPEG in grey or RGB keeps its bytes, progressive ones and those with an EXIF
rotation included: training reads the pixels as they are stored, like torchvision, and ``wh`` is their stored size.
A PNG or a CMYK JPEG becomes an RGB JPEG. Everything is decoded once, whole, so that training never meets a broken file.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.plan import EncodedImage, Unusable

_JPEG = ("JPEG", "MPO")  # MPO: a camera's JPEG with further pictures behind the first

_BLOCK, _UNREAD = 8, 128
"""Rows of a JPEG's smallest block, and the grey of one that was not read."""


@dataclass(frozen=True)
class Transform:
    """How images shrink (pixels; None: not), and the quality of every JPEG that is written anew."""

    resize_short: int | None = None
    max_side: int | None = None
    quality: int = 95

    def apply(self, data: bytes) -> EncodedImage:
        """Return the image as it goes into a shard; raise Unusable where it cannot be decoded."""
        image = decode_jpeg(data)
        size = self.target(*image.size)
        if image.format in _JPEG and image.mode in ("L", "RGB") and size == image.size:
            return EncodedImage(data, *size)
        image = _convert(image)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return EncodedImage(encode_jpeg(image, self.quality), *size)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the size an image of this size gets: sides in proportion, rounded down, never larger."""
        short, long = sorted((width, height))
        base, limit = (short, self.resize_short) if self.resize_short else (long, self.max_side)
        if limit is None or base <= limit:
            return width, height
        return max(1, width * limit // base), max(1, height * limit // base)


def decode_jpeg(data: bytes) -> Image.Image:
    """Decode a JPEG or a PNG completely. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which nothing here reads
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            image.load()
    except UnidentifiedImageError:  # its text holds an address in memory
        raise Unusable("neither a JPEG nor a PNG") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise Unusable(f"cannot be decoded: {' '.join(str(error).split())}") from None
    return image


def ends_in_grey(image: Image.Image) -> bool:
    """Return whether a JPEG's last rows are plain grey: so decoders fill up what cannot be read, and say nothing."""
    return image.format in _JPEG and bool((np.asarray(image)[-_BLOCK:] == _UNREAD).all())


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode as a baseline JPEG, which every hardware decoder takes, without metadata."""
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "L" and image.format in _JPEG:
        return image
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.convert("RGB")
    except ValueError as error:
        raise Unusable(f"cannot be converted to RGB: {error}") from None
