"""Single images from files, decoded by Pillow and then resized, cropped and normalised as validation images are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.data.buckets import bucket_numbers
from pipeline.data.config import BUCKET_MULTIPLE, Config
from pipeline.data.requests import validation_geometry
from pipeline.errors import one_line


def read_image(path: Path, *, upright: bool = False) -> NDArray[np.uint8]:
    """Return an image as uint8 [H, W, 3]. Raises ValueError if it is none.

    It is not rotated by EXIF, as in training on classes. ``upright`` rotates it, as shards with masks store it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual metadata, which nothing here reads
            with Image.open(path) as image:
                image.load()
                if upright:
                    ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I"):  # grey of 16 bits: Pillow would clip values at 255
                    return _grey(np.asarray(image).astype(np.int64))
                if image.mode == "F":
                    raise ValueError("its values are no whole numbers; store 8 bits")
                return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:  # its text contains a memory address
        raise ValueError(f"{path}: is not an image that Pillow knows") from None
    except MemoryError:  # the machine is at fault, not the file
        raise
    except Exception as error:  # Pillow raises exceptions of many types
        raise ValueError(f"{path}: cannot be decoded ({one_line(error, 120)})") from None


def _grey(values_HW: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return grey values of 16 bits as uint8 [H, W, 3]. Raises ValueError for larger ones."""
    if values_HW.min() < 0 or values_HW.max() >= 2**16:
        raise ValueError("its grey values have more than 16 bits; store 8 bits")
    return np.repeat((values_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)


def validation_image(pixels_HWC: NDArray[np.uint8], config: Config) -> Tensor:
    """Return the image as validation shows it to the network, float32 [3, size, size]."""
    geometry = validation_geometry(config, _as_samples(pixels_HWC))
    (top, left, height, width), resized, crop = geometry.boxes_B4[0], geometry.resized_B2[0], geometry.crops_B2[0]
    box_HWC = pixels_HWC[top : top + height, left : left + width].astype(np.float32)
    x_CHW = torch.from_numpy(box_HWC).permute(2, 0, 1)
    x_CHW = _resized(x_CHW, resized)
    return _standardized(_crop(x_CHW, int(crop[0]), int(crop[1]), config.for_validation.side), config)


def whole_image(pixels_HWC: NDArray[np.uint8], config: Config) -> Tensor:
    """Return the image at its own size, float32 [3, H, W], as validation with ``crop: scaled`` shows it."""
    return _standardized(torch.from_numpy(pixels_HWC.astype(np.float32)).permute(2, 0, 1), config)


def image_on_canvas(pixels_HWC: NDArray[np.uint8], config: Config) -> tuple[Tensor, tuple[int, int]]:
    """Return the image as validation with ``crop: keep_ratio`` shows it, and its (height, width) without padding.

    It is float32 [3, H, W], of the size of a bucket. Where no bucket holds it, its sides are the next multiples of
    ``BUCKET_MULTIPLE``.
    """
    samples = _as_samples(pixels_HWC)
    height, width = (int(side) for side in validation_geometry(config, samples).resized_B2[0])
    bucket = int(bucket_numbers(config, samples)[0])
    sides = [-(-side // BUCKET_MULTIPLE) * BUCKET_MULTIPLE for side in (height, width)]
    below, right = sides if bucket < 0 else config.bucket_sizes[bucket]
    x_CHW = _resized(torch.from_numpy(pixels_HWC.astype(np.float32)).permute(2, 0, 1), (height, width))
    return F.pad(_standardized(x_CHW, config), (0, right - width, 0, below - height)), (height, width)


def _as_samples(pixels_HWC: NDArray[np.uint8]) -> NDArray:
    """Return an image's size as the row of a sample table."""
    return np.array([pixels_HWC.shape[:2]], dtype=np.int64).view([("height", np.int64), ("width", np.int64)])[:, 0]


def _resized(x_CHW: Tensor, size: Iterable[int]) -> Tensor:
    if x_CHW.shape[1:] == (height_width := tuple(int(side) for side in size)):
        return x_CHW
    x_CHW = F.interpolate(x_CHW[None], size=height_width, mode="bilinear", antialias=True)[0]
    return x_CHW.round().clamp(0, 255)  # the loader's resized images are of 8 bits, too


def _standardized(x_CHW: Tensor, config: Config) -> Tensor:
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (x_CHW / 255 - mean_C11) / std_C11


def _crop(x_CHW: Tensor, top: int, left: int, size: int) -> Tensor:
    """Return ``size`` × ``size`` pixels from there on; those outside of the image are zero."""
    _, height, width = x_CHW.shape
    padded = F.pad(x_CHW, (max(-left, 0), max(left + size - width, 0), max(-top, 0), max(top + size - height, 0)))
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + size, left : left + size]
