"""The stages' errors: Σ_stages the mean of (connector(s) − t)², the connector a 1×1 convolution without bias."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import aligned, pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def parts(config, inputs):
    total = 0.0
    for level, pair in enumerate(pairs(inputs)):
        student, teacher = aligned(inputs, level, *pair)
        error = 0.0
        for place in np.ndindex(teacher.shape):
            error += (student[place] - teacher[place]) ** 2
        total += error / teacher.size
    return {"stage_mse": total}
