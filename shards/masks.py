"""Masks: the class of every pixel of an image, as files.

A stored mask is a grey PNG of 8 bits and of its image's size. Its values are classes, and 255 marks pixels of no class.
Data sets have other numbers for the same, and some have palettes, whose colours are for people: their indices are read.

H and W are the height and width of a mask.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from shards.jpeg import decode_jpeg
from shards.manifest import IGNORED_VALUE
from shards.plan import Unusable

REFUSED = -1
"""In the meaning of values: a value that a mask must not have."""
COMPRESSION_LEVEL = 6
"""Of the PNGs. The highest level takes several times as long, and saves little."""

Meaning = tuple[int, ...]
"""The class of each of the 256 values of a file, ``IGNORED_VALUE`` or ``REFUSED``."""

_BIT_DEPTH = 24
"""Position of the bits of a value in a PNG file."""


def encode_mask(mask_HW: np.ndarray) -> bytes:
    """Return a mask, uint8 [H, W], as the bytes of a grey PNG, which are the same for the same mask."""
    if mask_HW.dtype != np.uint8 or mask_HW.ndim != 2:
        raise ValueError(f"expected a mask of uint8 [H, W], got {mask_HW.dtype} {list(mask_HW.shape)}")
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG", compress_level=COMPRESSION_LEVEL)
    return buffer.getvalue()


def decode_mask(data: bytes, *, palette: bool = False) -> np.ndarray:
    """Return the values of a mask's file, uint8 [H, W]; with ``palette`` also the indices of a PNG with a palette.

    Raises Unusable if it is no PNG with one byte for each pixel.
    """
    try:
        image = decode_jpeg(data)
    except Unusable as reason:
        raise Unusable(f"its mask is {reason}" if "neither" in str(reason) else f"its mask {reason}") from None
    if image.format != "PNG":
        raise Unusable("its mask is a JPEG, which changes values: store masks as PNG")
    bits = data[_BIT_DEPTH]
    if (image.mode == "P" and palette) or (image.mode == "L" and bits == 8):
        return np.array(image)
    channels = len(image.getbands())
    kind = "a palette" if image.mode == "P" else f"{channels} channels" if channels > 1 else f"{bits} bits a pixel"
    raise Unusable(f"its mask has {kind}: expected a grey PNG of 8 bits, whose values are classes")


def meaning_of_values(
    num_classes: int, ignored: Iterable[int] = (), changed: Mapping[int, int] | None = None
) -> Meaning:
    """Return the class of each value of a file: the value itself below ``num_classes``, or what ``changed`` says.

    With ``changed`` only its keys are classes. The values ``ignored`` have none, nor has 255 unless it is changed.
    """
    of_value = {IGNORED_VALUE: IGNORED_VALUE}
    of_value |= {value: value for value in range(num_classes)} if changed is None else changed
    of_value |= dict.fromkeys(ignored, IGNORED_VALUE)
    return tuple(of_value.get(value, REFUSED) for value in range(256))


def to_classes(values_HW: np.ndarray, meaning: Meaning) -> np.ndarray:
    """Return a mask of classes, uint8 [H, W], from the values of a file. Raises Unusable for one without meaning."""
    classes_HW = np.array(meaning, np.int16)[values_HW]
    if (wrong := values_HW[classes_HW == REFUSED]).size:
        known = sorted(value for value, each in enumerate(meaning) if each not in (REFUSED, IGNORED_VALUE))
        raise Unusable(
            f"its mask has the value {wrong.min()} in {(wrong == wrong.min()).sum():,} pixels: "
            f"classes are {_ranges(known)}, and ignored {_ranges(_ignored_values(meaning))}"
        )
    return classes_HW.astype(np.uint8)


def check_size(mask_HW: np.ndarray, width: int, height: int) -> None:
    """Raise Unusable unless a mask has the size of its image."""
    if mask_HW.shape != (height, width):
        raise Unusable(
            f"its mask is {mask_HW.shape[1]}×{mask_HW.shape[0]}, the image {width}×{height}: they must be equal"
        )


def resized_mask(mask_HW: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a mask at another size, each pixel from the nearest one."""
    if mask_HW.shape == (height, width):
        return mask_HW
    return np.array(Image.fromarray(mask_HW).resize((width, height), Image.Resampling.NEAREST))


def changes_of(meaning: Meaning) -> dict[str, int]:
    """Return the values that a meaning changes, as JSON has them, for the manifest."""
    return {str(value): each for value, each in enumerate(meaning) if each not in (REFUSED, value)}


def _ignored_values(meaning: Meaning) -> list[int]:
    return [value for value, each in enumerate(meaning) if each == IGNORED_VALUE]


def _ranges(values: list[int]) -> str:
    """Return numbers as text, such as ``0–18, 255``."""
    starts = [value for value in values if value - 1 not in values]
    ends = [value for value in values if value + 1 not in values]
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in zip(starts, ends, strict=True))
