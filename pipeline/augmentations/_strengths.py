"""How strong each operation is at each magnitude: the tables of torchvision's and timm's policies.

A strength is the operation's value (``_operations.py``). Shape suffix: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from pipeline.augmentations._operations import CODES, FloatArray


class Strength(NamedTuple):
    """The strength of an operation."""

    at: Callable[[FloatArray], FloatArray]
    """Function of the magnitudes [R]."""
    signed: bool = False
    """Whether half of the images get the opposite value."""


Table = Mapping[str, Strength]
"""Strengths by operation; an augmentation draws from all of them with equal probability."""


class Limits(NamedTuple):
    """The largest strengths of a table of torchvision."""

    shear: float
    translate: float
    """In pixels."""
    rotate: float
    """In degrees."""
    enhance: float
    bits: int
    """Bits that ``posterize`` takes off."""


def binned_table(limits: Limits, bins: int) -> dict[str, Strength]:
    """Return the strengths of torchvision's policies, for magnitudes of 0 … bins − 1, without ``invert``."""

    def rising(low: float, high: float) -> Callable[[FloatArray], FloatArray]:
        nodes = torch.linspace(low, high, bins).numpy().astype(np.float64)
        return lambda magnitudes_R: np.interp(magnitudes_R, np.arange(bins), nodes)

    def pixels(magnitudes_R: FloatArray) -> FloatArray:
        return np.trunc(rising(0.0, limits.translate)(magnitudes_R))

    def bits(magnitudes_R: FloatArray) -> FloatArray:
        return 8 - np.rint(magnitudes_R / ((bins - 1) / limits.bits))

    shear, enhance = Strength(rising(0.0, limits.shear), True), Strength(rising(0.0, limits.enhance), True)
    return {
        "identity": Strength(np.zeros_like),
        "shear_x": shear,
        "shear_y": shear,
        "translate_x": Strength(pixels, True),
        "translate_y": Strength(pixels, True),
        "rotate": Strength(rising(0.0, limits.rotate), True),
        "brightness": enhance,
        "color": enhance,
        "contrast": enhance,
        "sharpness": enhance,
        "posterize": Strength(bits),
        "solarize": Strength(rising(255.0, 0.0)),
        "autocontrast": Strength(np.zeros_like),
        "equalize": Strength(np.zeros_like),
    }


def increasing_table(size: int) -> dict[str, Strength]:
    """Return the strengths of timm's RandAugment, ``inc1``, for magnitudes of 0 … 10; ``size`` is the image's side."""

    def share(largest: float) -> Callable[[FloatArray], FloatArray]:
        return lambda magnitudes_R: magnitudes_R / 10 * largest

    def whole(largest: float) -> Callable[[FloatArray], FloatArray]:
        return lambda magnitudes_R: np.trunc(magnitudes_R / 10 * largest)

    enhance, shear = Strength(share(0.9), True), Strength(share(0.3), True)
    translate = Strength(share(0.45 * size), True)
    return {
        "autocontrast": Strength(np.zeros_like),
        "equalize": Strength(np.zeros_like),
        "invert": Strength(np.zeros_like),
        "rotate": Strength(share(30.0), True),
        "posterize": Strength(lambda magnitudes_R: 4 - whole(4)(magnitudes_R)),
        "solarize": Strength(lambda magnitudes_R: 256 - whole(256)(magnitudes_R)),
        "solarize_add": Strength(whole(110)),
        "color": enhance,
        "contrast": enhance,
        "brightness": enhance,
        "sharpness": enhance,
        "shear_x": shear,
        "shear_y": shear,
        "translate_x": translate,
        "translate_y": translate,
    }


def choose_operations(table: Table, choices_R: FloatArray, magnitudes_R: FloatArray, signs_R: FloatArray) -> FloatArray:
    """Return an operation of the table and its value for each image, [R, 2].

    ``choices`` and ``signs`` are uniform in [0, 1).
    """
    numbers_R = np.floor(choices_R * len(table))
    chosen_R2 = np.zeros((len(choices_R), 2))
    for number, (name, strength) in enumerate(table.items()):
        rows_N = np.flatnonzero(numbers_R == number)
        values_N = strength.at(magnitudes_R[rows_N])
        signs_N = np.where(signs_R[rows_N] < 0.5, -1.0, 1.0) if strength.signed else 1.0
        chosen_R2[rows_N] = np.stack([np.full(len(rows_N), float(CODES[name])), signs_N * values_N], axis=1)
    return chosen_R2
