"""Operations on the pixels of uint8 images [N, H, W, C], each with the numbers of Pillow.

They have the same result on every device. They are integer arithmetic, or single float32 and float64 operations, which
IEEE 754 defines to the last bit. Source: Pillow's ``ImageEnhance``, ``ImageOps`` and ``Image.transform``, which
torchvision's and timm's augmentations of PIL images use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
Kernel = Callable[[Tensor, Tensor], Tensor]
"""A function of images [N, H, W, C] and parameters [N, P], on a device."""
Fill = tuple[int, int, int]
"""Red, green and blue of what comes from outside an image."""

_LARGEST_IN_32_BITS = 4096
"""Side in pixels of an image whose coordinates, in fixed point with 16 bits, surely fit into 32 bits."""


def adjust_brightness(images_NHWC: Tensor, factors_NP: Tensor) -> Tensor:
    """Return the images between black (factor 0) and themselves (1), or beyond."""
    images = images_NHWC.float()
    return _blended(images.new_zeros(()), images, factors_NP)


def adjust_saturation(images_NHWC: Tensor, factors_NP: Tensor) -> Tensor:
    """Return the images between grey (factor 0) and themselves (1), or beyond."""
    images = images_NHWC.float()
    # Expanded once, because arithmetic on a single channel beside three is slow.
    grey_NHWC = _luminance(images)[..., None].expand_as(images).contiguous()
    return _blended(grey_NHWC, images, factors_NP)


def adjust_contrast(images_NHWC: Tensor, factors_NP: Tensor) -> Tensor:
    """Return the images between their mean grey (factor 0) and themselves (1), or beyond."""
    images = images_NHWC.float()
    grey_NHW = _luminance(images)
    count = grey_NHW[0].numel()
    # Rounded to the nearest, in integers.
    mean_N = (2 * grey_NHW.int().sum((1, 2)) + count) // (2 * count)
    return _blended(mean_N[:, None, None, None].float(), images, factors_NP)


def adjust_sharpness(images_NHWC: Tensor, factors_NP: Tensor) -> Tensor:
    """Return the images between a smoothed copy (factor 0) and themselves (1), or beyond; their border stays."""
    wide_NHWC = images_NHWC.short()
    rows = wide_NHWC[:, :-2] + wide_NHWC[:, 1:-1] + wide_NHWC[:, 2:]
    inner = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide_NHWC[:, 1:-1, 1:-1]
    images = images_NHWC.float()
    smooth = images.clone()
    # A thirteenth of the sum, to the nearest. No quotient is within 1 / 26 of a whole number, so it may be rounded.
    smooth[:, 1:-1, 1:-1] = ((2 * inner + 13).float() / 26).floor_()
    return _blended(smooth, images, factors_NP)


def posterize(images_NHWC: Tensor, masks_NP: Tensor) -> Tensor:
    """Return the images with only those bits of every pixel that a mask has."""
    return images_NHWC & _per_image(masks_NP, torch.uint8)


def solarize(images_NHWC: Tensor, thresholds_NP: Tensor) -> Tensor:
    """Return the images with pixels of at least the threshold, a whole number, inverted."""
    inverted_NHWC = images_NHWC >= _per_image(thresholds_NP, torch.int16)
    return images_NHWC ^ inverted_NHWC.to(torch.uint8).mul_(255)


def solarize_add(images_NHWC: Tensor, amounts_NP: Tensor) -> Tensor:
    """Return the images with an amount, a whole number of 0 … 128, added to pixels below 128."""
    return images_NHWC + _per_image(amounts_NP, torch.uint8) * (images_NHWC < 128)


def invert(images_NHWC: Tensor, _: Tensor) -> Tensor:
    """Return the images as negatives."""
    return 255 - images_NHWC


def autocontrast(images_NHWC: Tensor, _: Tensor) -> Tensor:
    """Return the images with each channel stretched to 0 … 255; a channel of one value stays."""
    low, high = (x.double().view(-1, 1) for x in (images_NHWC.amin(1).amin(1), images_NHWC.amax(1).amax(1)))
    # A number divided by a tensor would be its product with the rounded reciprocal.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    levels = torch.arange(256, device=images_NHWC.device)
    stretched = (levels * scale + -low * scale).clamp_(0, 255).long()
    return _looked_up(torch.where(high > low, stretched, levels), _channel_numbers(images_NHWC), images_NHWC)


def equalize(images_NHWC: Tensor, _: Tensor) -> Tensor:
    """Return the images with the histogram of each channel equalised."""
    count, height, width, channels = images_NHWC.shape
    device, numbers = images_NHWC.device, _channel_numbers(images_NHWC)
    ones = torch.ones((), dtype=torch.int64, device=device).expand(len(numbers))
    histogram = torch.zeros(256 * count * channels, dtype=torch.int64, device=device)
    counts = histogram.scatter_add_(0, numbers.long(), ones).view(count * channels, 256)
    brightest = images_NHWC.amax(1).amax(1).long().view(-1, 1)
    steps = (height * width - counts.gather(1, brightest)) // 255
    below = counts.cumsum(1) - counts
    equalized = ((steps // 2 + below) // steps.clamp(min=1)).clamp_(max=255)
    return _looked_up(torch.where(steps > 0, equalized, torch.arange(256, device=device)), numbers, images_NHWC)


def adjust_hue(images_NHWC: Tensor, steps_NP: Tensor) -> Tensor:
    """Return the images with their hue turned by a whole number of the circle's 256 steps, in Pillow's 8-bit HSV."""
    hue_NHW, saturation_NHW, value_NHW = _to_hsv(images_NHWC)
    return _to_rgb((hue_NHW + steps_NP[:, :1, None].int()) & 255, saturation_NHW, value_NHW)


def affine(images_NHWC: Tensor, parameters_NP: Tensor) -> Tensor:
    """Return the images moved, the nearest pixel taken.

    Parameters are a matrix, from a pixel to where it comes from, in fixed point with 16 bits. The last are the colour
    of pixels that come from outside.
    """
    count, height, width, channels = images_NHWC.shape
    device = images_NHWC.device
    # Numbers of 32 bits take a fraction of the time of 64; sums of larger images do not fit.
    fits = max(height, width) <= _LARGEST_IN_32_BITS and count * (height * width + 1) < 2**31
    dtype = torch.int32 if fits else torch.int64
    xx, xy, x0, yx, yy, y0 = parameters_NP[:, :_MATRIX].to(dtype).T[:, :, None, None]
    rows, columns = (
        torch.arange(height, dtype=dtype, device=device)[:, None],
        torch.arange(width, dtype=dtype, device=device),
    )
    x_NHW = (xx * columns + (xy * rows + x0)) >> 16
    y_NHW = (yx * columns + (yy * rows + y0)) >> 16
    inside_NHW = (x_NHW >= 0) & (x_NHW < width) & (y_NHW >= 0) & (y_NHW < height)
    # Behind the pixels of all images stand their colours of outside, one for each image.
    fill_NC = parameters_NP[:, _MATRIX:].to(torch.uint8)
    pixels_PC = torch.cat([images_NHWC.reshape(-1, channels), fill_NC])
    image_N11 = torch.arange(count, dtype=dtype, device=device)[:, None, None]
    number_NHW = y_NHW.mul_(width).add_(x_NHW).add_(height * width * image_N11)
    number_NHW = torch.where(inside_NHW, number_NHW, count * height * width + image_N11)
    return pixels_PC.index_select(0, number_NHW.flatten()).view_as(images_NHWC)


def _per_image(parameters_NP: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the first parameter of each image, to be used with images [N, H, W, C]."""
    return parameters_NP[:, :1, None, None].to(dtype)


def _channel_numbers(images_NHWC: Tensor) -> Tensor:
    """Return the place of each pixel's value in tables of 256 values for each channel of each image, int32 and flat."""
    count, height, width, channels = images_NHWC.shape
    firsts = 256 * torch.arange(count * channels, dtype=torch.int32, device=images_NHWC.device)
    # Whole rows are added to whole rows: channels alone are too short for vector instructions.
    firsts = firsts.view(count, 1, 1, channels).expand(count, 1, width, channels).reshape(count, 1, width * channels)
    return (images_NHWC.reshape(count, height, width * channels) + firsts).flatten()


def _looked_up(levels: Tensor, numbers: Tensor, like_NHWC: Tensor) -> Tensor:
    """Return the value of each pixel in the tables ``levels`` [N · C, 256], as uint8 images."""
    return levels.to(torch.uint8).flatten().index_select(0, numbers).view_as(like_NHWC)


def _luminance(images: Tensor) -> Tensor:
    """Return the grey of ITU-R 601 as Pillow rounds it, [N, H, W]. Input and result are whole numbers in float32."""
    red, green, blue = images.unbind(-1)
    # Sums stay below 2**24, so they are exact however they are rounded or fused.
    return (19595 * red).add_(38470 * green).add_(7471 * blue).add_(0x8000).mul_(2.0**-16).floor_()


def _blended(other: Tensor, images: Tensor, factors_NP: Tensor) -> Tensor:
    """Return ``other + factor · (images − other)``, of float32, cut to uint8."""
    # One operation at a time: a fused multiply-add would round differently.
    moved = (images - other).mul_(_per_image(factors_NP, torch.float32)).add_(other)
    return moved.clamp_(0, 255).to(torch.uint8)


def _to_hsv(images_NHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value as int32 of 0 … 255, [N, H, W] each."""
    value, least = images_NHWC.amax(-1).int(), images_NHWC.amin(-1).int()
    span = value - least
    divisor = span.clamp(min=1).float()
    red, green, blue = ((value - channel).float() / divisor for channel in images_NHWC.int().unbind(-1))
    red_is_most, green_is_most = images_NHWC[..., 0] == value, images_NHWC[..., 1] == value
    beside = torch.where(green_is_most, 2.0 + red.double() - blue, 4.0 + green.double() - red).float()
    sixths = torch.where(red_is_most, blue - green, beside)
    circle = (sixths.double() / 6.0 + 1.0).fmod_(1.0).float()
    hue = (circle.double() * 255.0).int().clamp_(0, 255)
    saturation = ((span.float() / value.clamp(min=1).float()).double() * 255.0).int().clamp_(0, 255)
    return torch.where(span > 0, hue, 0), torch.where(span > 0, saturation, 0), value


def _to_rgb(hue_NHW: Tensor, saturation_NHW: Tensor, value_NHW: Tensor) -> Tensor:
    """Return uint8 images [N, H, W, C] of hues, saturations and values of 0 … 255."""
    sixths = torch.arange(256, device=hue_NHW.device).double() * 6.0 / 255.0
    sectors = sixths.floor()
    rests = (sixths - sectors).float().double()
    # Red, green and blue run through the same circle of six sectors, each two behind the one before.
    turns = 4 * torch.arange(3, device=hue_NHW.device)
    places = (sectors.long()[:, None] + turns) % 6
    hues = hue_NHW.flatten()
    rest, share = rests.index_select(0, hues).view(hue_NHW.shape), (saturation_NHW.float() / 255.0).double()
    low, falling, rising = (
        (value_NHW * (1.0 - part)).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
        for part in (share, share * rest, share * (1.0 - rest))
    )
    value = value_NHW.to(torch.uint8)
    choices = torch.stack([value, falling, low, low, rising, value], dim=-1)
    return choices.gather(-1, places.index_select(0, hues).view(*hue_NHW.shape, 3))


def _plain(values_N: FloatArray, _: int) -> FloatArray:
    return values_N[:, None]


def _factors(values_N: FloatArray, _: int) -> FloatArray:
    return 1 + values_N[:, None]


def _masks(bits_N: FloatArray, _: int) -> FloatArray:
    """Return the masks of the upper bits."""
    return 256 - 2 ** (8 - bits_N[:, None])


def _thresholds(values_N: FloatArray, _: int) -> FloatArray:
    # A whole pixel is below a threshold if it is below the next whole number.
    return np.ceil(values_N[:, None])


def _hue_steps(turns_N: FloatArray, _: int) -> FloatArray:
    # As torchvision: the turn, −0.5 … 0.5 of the circle, is cut to steps of 1 / 255, while hues wrap at 256.
    return np.trunc(turns_N[:, None] * 255)


def _shear_x(values_N: FloatArray, _: int) -> FloatArray:
    return _fixed_point(1, values_N, 0, 0, 1, 0)


def _shear_y(values_N: FloatArray, _: int) -> FloatArray:
    return _fixed_point(1, 0, 0, values_N, 1, 0)


def _translate_x(values_N: FloatArray, _: int) -> FloatArray:
    return _fixed_point(1, 0, -values_N, 0, 1, 0)


def _translate_y(values_N: FloatArray, _: int) -> FloatArray:
    return _fixed_point(1, 0, 0, 0, 1, -values_N)


def _rotate(degrees_N: FloatArray, size: int) -> FloatArray:
    """Return the matrices of rotations about the centre, counter-clockwise."""
    angles_N = np.radians(-(degrees_N % 360.0))
    cos, sin = (np.round(turn(angles_N), 15).astype(np.float64) for turn in (np.cos, np.sin))
    centre = size / 2
    x0 = cos * -centre + sin * -centre + centre
    y0 = -sin * -centre + cos * -centre + centre
    return _fixed_point(cos, sin, x0, -sin, cos, y0)


def _fixed_point(*matrix: FloatArray | float) -> FloatArray:
    """Return a matrix [N, 6] as multiples of 1 / 65536, for pixels that are named by their corner, not their centre."""
    xx, xy, x0, yx, yy, y0 = np.broadcast_arrays(*(np.asarray(column, np.float64) for column in matrix))
    centred = np.stack([xx, xy, x0 + xx * 0.5 + xy * 0.5, yx, yy, y0 + yx * 0.5 + yy * 0.5], axis=1)
    return np.floor(centred * 65536 + 0.5)


class Operation(NamedTuple):
    """An operation on pixels."""

    kernel: Kernel
    prepare: Callable[[FloatArray, int], FloatArray] = _plain
    """Function of values [N] and the side of the images that returns parameters [N, …], on the host."""


OPERATIONS = {
    "identity": Operation(lambda images, _: images),
    "shear_x": Operation(affine, _shear_x),
    "shear_y": Operation(affine, _shear_y),
    "translate_x": Operation(affine, _translate_x),
    "translate_y": Operation(affine, _translate_y),
    "rotate": Operation(affine, _rotate),
    "brightness": Operation(adjust_brightness, _factors),
    "color": Operation(adjust_saturation, _factors),
    "contrast": Operation(adjust_contrast, _factors),
    "sharpness": Operation(adjust_sharpness, _factors),
    "posterize": Operation(posterize, _masks),
    "solarize": Operation(solarize, _thresholds),
    "solarize_add": Operation(solarize_add),
    "autocontrast": Operation(autocontrast),
    "equalize": Operation(equalize),
    "invert": Operation(invert),
    "hue": Operation(adjust_hue, _hue_steps),
}
"""The operations by name. A value v of ``brightness``, ``color``, ``contrast`` and ``sharpness`` is a factor 1 + v."""
CODES = {name: code for code, name in enumerate(OPERATIONS)}
"""Numbers of the operations, as draws name them."""
_MATRIX = 6


def operation_table(name: str, values_N: FloatArray, size: int, fill: Fill) -> FloatArray:
    """Return the parameters [N, P] of an operation with those values, for images of side ``size``.

    Every operation has equally many. The last three are the colour of what comes from outside an image.
    """
    found = OPERATIONS[name].prepare(values_N, size)
    table = np.zeros((len(values_N), _MATRIX + len(fill)))
    table[:, : found.shape[1]] = found
    table[:, _MATRIX:] = fill
    return table
