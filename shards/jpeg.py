"""Conversion of image files for shards: a file is kept, encoded again as a baseline JPEG, or refused.

The content of a file decides, not its name. A grey or RGB JPEG keeps its bytes, also if it is progressive or has an
EXIF rotation. Training reads the pixels as they are stored, like torchvision, and ``wh`` is their stored size. A PNG or
a CMYK JPEG becomes an RGB JPEG. Every file is decoded completely, so that training never finds a broken one.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.plan import EncodedImage, Unusable

_JPEG = ("JPEG", "MPO")  # MPO: a JPEG file with more than one picture, from some cameras

_BLOCK, _FILL_GREY = 8, 128
"""Rows of a JPEG's smallest block, and the value with which decoders fill missing blocks."""


@dataclass(frozen=True)
class Transform:
    """The conversion of images.

    ``resize_short`` limits the shorter side, ``max_side`` the longer one, in pixels (None: no limit). ``quality`` is
    that of JPEGs that are encoded again.
    """

    resize_short: int | None = None
    max_side: int | None = None
    quality: int = 95

    def apply(self, data: bytes) -> EncodedImage:
        """Return the image as it is stored in a shard. Raises Unusable if it cannot be decoded."""
        image = decode_jpeg(data)
        size = self.target(*image.size)
        if image.format in _JPEG and image.mode in ("L", "RGB") and size == image.size:
            return EncodedImage(data, *size)
        image = to_rgb(image)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return EncodedImage(encode_jpeg(image, self.quality), *size)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the new width and height: the ratio is kept, sides are rounded down, and no image is enlarged."""
        short, long = sorted((width, height))
        # Integers only: the same size on every machine.
        base, limit = (short, self.resize_short) if self.resize_short else (long, self.max_side)
        if limit is None or base <= limit:
            return width, height
        return max(1, width * limit // base), max(1, height * limit // base)


def decode_jpeg(data: bytes, *, webp: bool = False) -> Image.Image:
    """Return a JPEG or PNG, or with ``webp`` a WebP, decoded completely. Raises Unusable if that fails."""
    image = open_image(data, webp=webp)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except MemoryError:  # the machine is at fault, not the file
        raise
    except Exception as error:  # Pillow raises exceptions of many types
        raise _undecodable(error) from None
    return image


def open_image(data: bytes, *, webp: bool = False) -> Image.Image:
    """Return an image whose header alone was read. Raises Unusable if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual metadata, which nothing here reads
            return Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP") if webp else ("JPEG", "PNG"))
    except UnidentifiedImageError:  # its text contains a memory address, which differs between runs
        raise Unusable("neither a JPEG, a PNG nor a WebP" if webp else "neither a JPEG nor a PNG") from None
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error) from None


def _undecodable(error: Exception) -> Unusable:
    return Unusable(f"cannot be decoded: {' '.join(str(error).split())}")


def ends_in_grey(image: Image.Image) -> bool:
    """Return whether a JPEG's last rows are plain grey. Decoders fill missing data so, without a warning."""
    return image.format in _JPEG and bool((np.asarray(image)[-_BLOCK:] == _FILL_GREY).all())


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return the image as a baseline JPEG without metadata, which every hardware decoder can read."""
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB of 8 bits; a grey JPEG stays grey. Raises Unusable if it cannot be converted."""
    if image.mode == "L" and image.format in _JPEG:
        return image
    if image.mode.startswith("I"):  # grey of 16 bits: Pillow would clip values at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.convert("RGB")
    except ValueError as error:
        raise Unusable(f"cannot be converted to RGB: {error}") from None
