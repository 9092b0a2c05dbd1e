"""Images whose targets are places: stored upright, and a PNG without a loss."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import decode, encode, jpeg, pixels
from PIL import Image, ImageOps

from shards.jpeg import Transform
from shards.plan import Unusable
from shards.upright import read_upright

KEPT = Transform()


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels(3), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize(
    "data", [jpeg(0), encode(pixels(0), "PNG"), encode(pixels(0)[..., 0], "PNG"), turned(1, "JPEG")]
)
def test_an_upright_image_keeps_its_bytes(data):
    stored = read_upright(data).stored(KEPT)
    assert (stored.data, stored.width, stored.height) == (data, 20, 16)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_png_is_stored_upright_with_every_pixel(orientation):
    data = turned(orientation, "PNG")
    stored = read_upright(data).stored(KEPT)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    assert np.array_equal(decode(stored.data), np.asarray(upright))
    assert (stored.width, stored.height) == upright.size
    assert read_upright(stored.data).stored(KEPT) == stored


def test_a_turned_jpeg_is_stored_upright_as_a_jpeg_without_its_rotation():
    stored = read_upright(turned(6, "JPEG")).stored(KEPT)
    assert (stored.width, stored.height) == (16, 20)
    difference = decode(stored.data).astype(int) - np.rot90(decode(turned(6, "JPEG")), -1)
    assert abs(difference).mean() < 4
    assert read_upright(stored.data).stored(KEPT) == stored


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(pixels(1)).convert("RGBA"),
        Image.fromarray(pixels(1)).convert("P"),
        Image.fromarray(pixels(1)[..., 0].astype(np.uint16) * 257),
        Image.fromarray(pixels(1)[..., 0] > 100),
    ],
)
def test_a_png_of_another_kind_becomes_one_of_rgb(image):
    stored = read_upright(encode(image, "PNG")).stored(KEPT)
    assert decode(stored.data).shape == (16, 20, 3)
    assert stored.data[24:26] == b"\x08\x02"
    expected = pixels(1)[..., 0] if image.mode.startswith("I") else np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(stored.data)[..., 0], expected.reshape(16, 20, -1)[..., 0])


def test_a_png_of_sixteen_bits_a_channel_becomes_one_of_eight():
    values = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(each)) + name + each + struct.pack(">I", zlib.crc32(name + each))
        for name, each in chunks.items()
    )
    stored = read_upright(data).stored(KEPT)
    assert stored.data[24] == 8
    assert np.array_equal(decode(stored.data), values >> 8)


def test_a_shrunk_png_stays_a_png():
    stored = read_upright(encode(pixels(2, 40, 32), "PNG")).stored(Transform(resize_short=16))
    assert (stored.width, stored.height) == (20, 16)
    assert stored.data.startswith(b"\x89PNG")


def test_a_damaged_image_is_unusable():
    with pytest.raises(Unusable, match="cannot be decoded"):
        read_upright(jpeg(0)[:200])
