"""Conversion of images whose targets are places in the image: masks or boxes.

Such an image is stored as people see it, so a rotation in its EXIF is applied. A PNG stays a PNG, without a loss. An
upright image keeps its bytes if it is a grey or RGB JPEG, or a grey or RGB PNG of 8 bits.
"""

from __future__ import annotations

import io
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from shards.jpeg import Transform, decode_jpeg, encode_jpeg, to_rgb
from shards.plan import EncodedImage
from shards.prepare import add_arguments
from shards.prepare_imagenet import add_conversion_options

PNG_COMPRESSION = 1
"""Compression level of PNGs that are encoded again: a higher one takes several times as long."""
_ORIENTATION = 0x0112
_BIT_DEPTH = 24
"""Position of the bits of a value in a PNG file."""


def add_upright_options(parser: ArgumentParser) -> None:
    """Add the destination, and the options of every preparation of images with masks or boxes."""
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    add_conversion_options(parser, "shrunk or rotated ones")
    add_arguments(parser)


class UprightImage(NamedTuple):
    """A decoded image as people see it, whether it is a PNG, and its file if that can be stored as it is."""

    image: Image.Image
    is_png: bool
    kept: bytes | None

    def stored(self, transform: Transform) -> EncodedImage:
        """Return the image as it is stored in a shard."""
        size = transform.target(*self.image.size)
        if self.kept is not None and size == self.image.size:
            return EncodedImage(self.kept, *size)
        image = to_rgb(self.image)
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return EncodedImage(_encode_png(image) if self.is_png else encode_jpeg(image, transform.quality), *size)


def read_upright(data: bytes) -> UprightImage:
    """Return the image of a JPEG or PNG file, upright. Raises Unusable if it cannot be decoded."""
    image = decode_jpeg(data)
    is_png = image.format == "PNG"
    plain = image.mode in ("L", "RGB") and (not is_png or (data[_BIT_DEPTH] == 8 and "transparency" not in image.info))
    if _is_turned(image):
        return UprightImage(ImageOps.exif_transpose(image), is_png, None)
    return UprightImage(image, is_png, data if plain else None)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # of many types, for metadata that cannot be read; viewers ignore those, too
        return False


def _encode_png(image: Image.Image) -> bytes:
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()
