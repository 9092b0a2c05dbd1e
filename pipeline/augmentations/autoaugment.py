"""Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019: the policies of its appendix.

Strengths are those of torchvision's ``AutoAugment``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._operations import CODES
from pipeline.augmentations._pixels import Level, PixelAugmentation
from pipeline.augmentations._strengths import Limits, Strength, binned_table

_BINS = 10

_POLICIES = {
    "imagenet": [
        "posterize 0.4 8, rotate 0.6 9",
        "solarize 0.6 5, autocontrast 0.6",
        "equalize 0.8, equalize 0.6",
        "posterize 0.6 7, posterize 0.6 6",
        "equalize 0.4, solarize 0.2 4",
        "equalize 0.4, rotate 0.8 8",
        "solarize 0.6 3, equalize 0.6",
        "posterize 0.8 5, equalize 1",
        "rotate 0.2 3, solarize 0.6 8",
        "equalize 0.6, posterize 0.4 6",
        "rotate 0.8 8, color 0.4 0",
        "rotate 0.4 9, equalize 0.6",
        "equalize 0, equalize 0.8",
        "invert 0.6, equalize 1",
        "color 0.6 4, contrast 1 8",
        "rotate 0.8 8, color 1 2",
        "color 0.8 8, solarize 0.8 7",
        "sharpness 0.4 7, invert 0.6",
        "shear_x 0.6 5, equalize 1",
        "color 0.4 0, equalize 0.6",
        "equalize 0.4, solarize 0.2 4",
        "solarize 0.6 5, autocontrast 0.6",
        "invert 0.6, equalize 1",
        "color 0.6 4, contrast 1 8",
        "equalize 0.8, equalize 0.6",
    ],
    "cifar10": [
        "invert 0.1, contrast 0.2 6",
        "rotate 0.7 2, translate_x 0.3 9",
        "sharpness 0.8 1, sharpness 0.9 3",
        "shear_y 0.5 8, translate_y 0.7 9",
        "autocontrast 0.5, equalize 0.9",
        "shear_y 0.2 7, posterize 0.3 7",
        "color 0.4 3, brightness 0.6 7",
        "sharpness 0.3 9, brightness 0.7 9",
        "equalize 0.6, equalize 0.5",
        "contrast 0.6 7, sharpness 0.6 5",
        "color 0.7 7, translate_x 0.5 8",
        "equalize 0.3, autocontrast 0.4",
        "translate_y 0.4 3, sharpness 0.2 6",
        "brightness 0.9 6, color 0.2 8",
        "solarize 0.5 2, invert 0",
        "equalize 0.2, autocontrast 0.6",
        "equalize 0.2, equalize 0.6",
        "color 0.9 9, equalize 0.6",
        "autocontrast 0.8, solarize 0.2 8",
        "brightness 0.1 3, color 0.7 0",
        "solarize 0.4 5, autocontrast 0.9",
        "translate_y 0.9 9, translate_y 0.7 9",
        "autocontrast 0.9, solarize 0.8 3",
        "equalize 0.8, invert 0.1",
        "translate_y 0.7 9, autocontrast 0.9",
    ],
    "svhn": [
        "shear_x 0.9 4, invert 0.2",
        "shear_y 0.9 8, invert 0.7",
        "equalize 0.6, solarize 0.6 6",
        "invert 0.9, equalize 0.6",
        "equalize 0.6, rotate 0.9 3",
        "shear_x 0.9 4, autocontrast 0.8",
        "shear_y 0.9 8, invert 0.4",
        "shear_y 0.9 5, solarize 0.2 6",
        "invert 0.9, autocontrast 0.8",
        "equalize 0.6, rotate 0.9 3",
        "shear_x 0.9 4, solarize 0.3 3",
        "shear_y 0.8 8, invert 0.7",
        "equalize 0.9, translate_y 0.6 6",
        "invert 0.9, equalize 0.6",
        "contrast 0.3 3, rotate 0.8 4",
        "invert 0.8, translate_y 0 2",
        "shear_y 0.7 6, solarize 0.4 8",
        "invert 0.6, rotate 0.8 4",
        "shear_y 0.3 7, translate_x 0.9 3",
        "shear_x 0.1 6, invert 0.6",
        "solarize 0.7 2, translate_y 0.6 7",
        "shear_y 0.8 4, invert 0.8",
        "shear_x 0.7 9, translate_y 0.8 3",
        "shear_y 0.8 5, autocontrast 0.7",
        "shear_x 0.7 2, invert 0.1",
    ],
}
"""The pairs of operations of each policy, one string each: name, probability, and magnitude of 0 … 9 if it has one."""


class PolicyStep(NamedTuple):
    """An operation of a policy."""

    operation: str
    probability: float
    magnitude: int


def read_policy(name: str) -> list[list[PolicyStep]]:
    """Return the pairs of operations of a policy."""
    pairs = [[step.split() for step in line.split(",")] for line in _POLICIES[name]]
    return [[PolicyStep(word, float(share), int(*level)) for word, share, *level in pair] for pair in pairs]


class AutoAugment(PixelAugmentation):
    """Applies one of a policy's pairs of operations, each operation with its own probability and magnitude."""

    class Config(PixelAugmentation.Config):
        """AutoAugment: one of a learned policy's pairs of operations."""

        policy: Literal["imagenet", "cifar10", "svhn"]
        """Data set on which the policy was learned."""
        fill: tuple[Level, Level, Level] = (0, 0, 0)
        """Red, green and blue, of 0 … 255, of pixels from outside the image."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        limits = Limits(shear=0.3, translate=150 / 331 * size, rotate=30.0, enhance=0.9, bits=4)
        table = binned_table(limits, _BINS) | {"invert": Strength(np.zeros_like)}
        steps = [step for pair in read_policy(config.policy) for step in pair]
        strengths = [table[step.operation] for step in steps]
        values = [
            strength.at(np.array([float(step.magnitude)]))[0] for step, strength in zip(steps, strengths, strict=True)
        ]
        columns = zip(
            [float(CODES[step.operation]) for step in steps],
            values,
            [step.probability for step in steps],
            [strength.signed for strength in strengths],
            strict=True,
        )
        self._steps = np.array(list(columns)).reshape(-1, 2, 4)
        """Number of the operation, value, probability, and 1 if the value has a random sign, [pairs, 2, 4]."""

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the operations and values of each image, [R, 2, 2]."""
        pairs_R = np.floor(draws.uniforms(0)[0] * len(self._steps)).astype(np.int64)
        codes_R2, values_R2, probabilities_R2, signed_R2 = np.moveaxis(self._steps[pairs_R], -1, 0)
        first, second, sign_first, sign_second = draws.uniforms(1)
        applied_R2 = np.stack([first, second], axis=1) < probabilities_R2
        negative_R2 = (np.stack([sign_first, sign_second], axis=1) < 0.5) & (signed_R2 > 0)
        chosen = np.where(applied_R2, codes_R2, CODES["identity"]), np.where(negative_R2, -values_R2, values_R2)
        return np.stack(chosen, axis=2)
