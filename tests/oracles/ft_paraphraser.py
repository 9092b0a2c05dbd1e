"""The paraphraser in float64: mean (decoded − map)², three convolutions each way, each with a leaky ReLU of 0.1."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import convolution, transposed_convolution

PROPERTIES = {"never negative", "ignores the order of rows"}


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def encoded(x, of_level):
    for level in (0, 2, 4):
        x = leaky(convolution(x, *of_level(level), padding=1))
    return x


def parts(config, inputs):
    state, x = inputs.parameters, np.array(inputs.teacher_features[config["stage"]])

    def of_level(level, half="encoder"):
        return [state[f"paraphraser.{half}.{level}.{kind}"] for kind in ("weight", "bias")]

    found = encoded(x, of_level)
    for level in (0, 2, 4):
        found = leaky(transposed_convolution(found, *of_level(level, "decoder"), stride=1, padding=1))
    return {"ft_paraphraser": ((found - x) ** 2).sum() / x.size}
