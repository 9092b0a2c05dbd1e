"""Reduction of images as by MATLAB's ``imresize``, which makes the small images of super-resolution's data sets.

It is bicubic with a = −0.5 (Keys, "Cubic convolution interpolation for digital image processing", 1981), widened by the
scale. The border of an image is continued by its mirror image. All of it is in float64, so that a pixel is rounded the
same way on every machine.

H and W are the height and width of the large image.
"""

from __future__ import annotations

import numpy as np


def reduced(image_HWC: np.ndarray, scale: int) -> np.ndarray:
    """Return an image ``scale`` times smaller along both sides, in float64 and not rounded.

    Raises ValueError if a side is no multiple of ``scale``.
    """
    height, width, _ = image_HWC.shape
    if height % scale or width % scale:
        raise ValueError(f"an image of {width}×{height} pixels is not {scale} times smaller in whole pixels")
    rows_HWC = _reduced_rows(image_HWC.astype(np.float64), scale)
    return _reduced_rows(rows_HWC.swapaxes(0, 1), scale).swapaxes(0, 1)


def reduced_to_bytes(image_HWC: np.ndarray, scale: int) -> np.ndarray:
    """Return ``reduced``, rounded to uint8 as MATLAB rounds: halves up."""
    return np.floor(reduced(image_HWC, scale) + 0.5).clip(0, 255).astype(np.uint8)


def _reduced_rows(rows: np.ndarray, scale: int) -> np.ndarray:
    """Return every group of ``scale`` rows as one."""
    # A new row's centre lies on an old row, or halfway between two if the scale is even.
    distances = np.arange(-2 * scale, 2 * scale) + (0.5 if scale % 2 == 0 else 0.0)
    weights = _cubic(distances / scale)
    before = 2 * scale - scale // 2
    padded = np.pad(rows, [(before, 2 * scale), *[(0, 0)] * (rows.ndim - 1)], mode="symmetric")
    parts = (weight * padded[first : first + len(rows) : scale] for first, weight in enumerate(weights / weights.sum()))
    return np.sum(list(parts), axis=0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Return the cubic of Keys' equation 15 with a = −0.5."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
