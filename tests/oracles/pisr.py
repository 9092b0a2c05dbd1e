"""PISR in float64: the mean of log(2b) + |t − μ| / b, b = scale·log(1 + exp h_b(s)) + ε, μ = h_μ(s).

The networks h are two 1×1 convolutions with a PReLU between.
"""

from __future__ import annotations

from math import exp, log

import numpy as np
from oracles._feature_maps import at_the_smaller, convolution, maps

PROPERTIES = {"ignores the order of rows"}


def predicted(inputs, name, x):
    weights = {key: inputs.parameters[f"{name}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = convolution(x, weights["0.weight"], weights["0.bias"])
    hidden = np.where(hidden > 0, hidden, inputs.parameters[f"{name}.1.weight"][0] * hidden)
    return convolution(hidden, weights["2.weight"], weights["2.bias"])


def parts(config, inputs):
    student, teacher = at_the_smaller(*maps(inputs, config["stage"], config["stage"]))
    location, raw = (predicted(inputs, name, student) for name in ("location", "scale"))
    total = 0.0
    for place in np.ndindex(teacher.shape):
        scale = config["scale"] * log(1 + exp(raw[place])) + config["eps"]
        total += log(2 * scale) + abs(teacher[place] - location[place]) / scale
    return {"pisr": total / teacher.size}
