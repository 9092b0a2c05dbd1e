"""What becomes of an image file: kept, written anew, shrunk or refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import decode, encode, jpeg, pixels
from PIL import Image

from shards.jpeg import Transform
from shards.plan import EncodedImage, Unusable


def picture(mode: str) -> Image.Image:
    return Image.fromarray(pixels(0)).convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture("RGB"), exif=exif)


def several_pictures_in_one() -> bytes:
    return encode(picture("RGB"), "MPO", save_all=True, append_images=[picture("RGB")])


def is_baseline(data: bytes) -> bool:
    """Walk the markers up to the frame header: SOF0 is baseline, SOF2 progressive."""
    at = 2
    while data[at + 1] not in (0xC0, 0xC1, 0xC2):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at + 1] == 0xC0


@pytest.mark.parametrize(
    "data",
    [
        jpeg(0),
        encode(picture("L")),
        encode(picture("RGB"), progressive=True),
        encode(picture("RGB"), comment=b"a camera's own words"),
        jpeg(0) + b"rubbish behind the end",
        rotated(),
        several_pictures_in_one(),
    ],
    ids=["colour", "grey", "progressive", "with comment", "rubbish behind", "rotated by EXIF", "MPO"],
)
def test_a_usable_jpeg_keeps_its_bytes_and_its_stored_size(data):
    assert Transform().apply(data) == EncodedImage(data, 20, 16)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_a_png_under_any_name_becomes_a_baseline_rgb_jpeg(mode):
    original = picture("L" if mode == "I;16" else mode)
    data = encode(original.convert(mode) if mode == "I;16" else original, "PNG")
    encoded = Transform(quality=100).apply(data)
    assert (encoded.width, encoded.height) == (20, 16)
    assert is_baseline(encoded.data)
    assert Image.open(io.BytesIO(encoded.data)).mode == "RGB"
    if mode != "I;16":
        wanted = np.asarray(original.convert("RGB")).astype(int)
        assert abs(decode(encoded.data) - wanted).mean() < 12


def test_a_cmyk_jpeg_becomes_a_baseline_rgb_jpeg():
    encoded = Transform().apply(encode(picture("CMYK"), quality=95))
    assert is_baseline(encoded.data)
    assert abs(decode(encoded.data) - pixels(0).astype(int)).mean() < 12


def test_what_is_written_anew_carries_no_metadata():
    data = encode(picture("RGB"), comment=b"words", exif=rotated()[6:200], icc_profile=b"profile" * 9, dpi=(72, 72))
    encoded = Transform(max_side=10).apply(data)
    info = Image.open(io.BytesIO(encoded.data)).info
    assert set(info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_shrinking_a_progressive_jpeg_gives_a_baseline_one():
    assert is_baseline(Transform(resize_short=8).apply(encode(picture("RGB"), progressive=True)).data)


def test_a_grey_jpeg_stays_grey_when_it_shrinks():
    assert decode(Transform(resize_short=8).apply(encode(picture("L"))).data).shape == (8, 10)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither a JPEG nor a PNG"),
        (b"some text", "neither a JPEG nor a PNG"),
        (encode(picture("P"), "GIF"), "neither a JPEG nor a PNG"),
        (encode(picture("RGB"), "BMP"), "neither a JPEG nor a PNG"),
        (jpeg(0)[:-40], "cannot be decoded: image file is truncated"),
        (jpeg(0)[:100], "cannot be decoded"),
        (encode(picture("RGB"), "PNG")[:-60], "cannot be decoded"),
    ],
    ids=["empty", "text", "GIF", "BMP", "cut", "cut in its header", "cut PNG"],
)
def test_what_cannot_be_decoded_is_refused_in_the_same_words_each_time(data, reason):
    with pytest.raises(Unusable, match=reason) as first:
        Transform().apply(data)
    with pytest.raises(Unusable) as second:
        Transform().apply(data)
    assert str(first.value) == str(second.value)


def test_broken_metadata_does_no_harm():
    data = encode(picture("RGB"), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    assert Transform().apply(data).data == data


sides = st.integers(1, 5000)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(width=sides, height=sides, limit=st.integers(1, 600))
def test_the_short_side_shrinks_to_the_limit_and_nothing_grows(width, height, limit):
    new = Transform(resize_short=limit).target(width, height)
    if min(width, height) <= limit:
        assert new == (width, height)
    else:
        assert min(new) == limit
        assert max(new) == int(limit * max(width, height) / min(width, height))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(width=sides, height=sides, limit=st.integers(1, 600))
def test_the_long_side_shrinks_to_the_limit_and_no_side_vanishes(width, height, limit):
    new = Transform(max_side=limit).target(width, height)
    if max(width, height) <= limit:
        assert new == (width, height)
    else:
        assert max(new) == limit
        assert min(new) == max(1, int(limit * min(width, height) / max(width, height)))


def test_bytes_stay_when_an_image_is_small_enough_already():
    assert Transform(resize_short=16, quality=10).apply(jpeg(0)).data == jpeg(0)
    assert Transform(max_side=20, quality=10).apply(jpeg(0)).data == jpeg(0)


def test_quality_is_that_of_the_jpegs_written_anew():
    data = jpeg(0, 200, 160)
    small, large = (len(Transform(resize_short=100, quality=quality).apply(data).data) for quality in (50, 95))
    assert small < large < len(encode(pixels(0, 125, 100), quality=100))


def png_of_16_bits(samples_HWC: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a sample in grey, grey and alpha, RGB or RGBA; Pillow writes the first alone."""
    height, width, channels = samples_HWC.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_of_samples_of_16_bits_the_upper_8_are_taken(channels):
    ramp_HW = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    samples_HWC = np.repeat(ramp_HW[..., None], channels, axis=2)
    if channels in (2, 4):
        samples_HWC[..., -1] = 65535
    encoded = Transform(quality=100).apply(png_of_16_bits(samples_HWC))
    wanted = np.repeat((ramp_HW >> 8)[..., None], 3, axis=2).astype(int)
    assert abs(decode(encoded.data).astype(int) - wanted).max() <= 2
