"""VID: Σ_levels mean of ½·((t − μ)²/σ_c² + log σ_c²), σ_c² = log(1 + exp θ_c) + ε, μ three 1×1 convolutions."""

from __future__ import annotations

from math import exp, log

import numpy as np
from oracles._feature_maps import at_the_smaller, convolution, maps, pairs

PROPERTIES = {"ignores the order of rows"}


def parts(config, inputs):
    total = 0.0
    for level, pair in enumerate(pairs(inputs)):
        mean, teacher = at_the_smaller(*maps(inputs, *pair))
        for position in (0, 2, 4):
            mean = convolution(mean, inputs.parameters[f"means.{level}.{position}.weight"])
            mean = np.maximum(mean, 0) if position < 4 else mean
        theta = inputs.parameters[f"variances.{level}.theta_C"]
        likelihood = 0.0
        for b, c, i, j in np.ndindex(teacher.shape):
            variance = log(1 + exp(theta[c])) + config["eps"]
            likelihood += ((teacher[b, c, i, j] - mean[b, c, i, j]) ** 2 / variance + log(variance)) / 2
        total += likelihood / teacher.size
    return {"vid": total}
