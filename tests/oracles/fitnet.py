"""FitNets' hint: the mean of (max(0, regressor(s)) − t)² over all elements."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import maps, regressor

PROPERTIES = {"never negative", "ignores the order of rows"}


def parts(config, inputs):
    stage = config["stage"]
    pair = (stage, stage) if isinstance(stage, str) else (stage["student"], stage["teacher"])
    student, teacher = maps(inputs, *pair)
    guess = regressor(inputs.parameters, "regressor.", student, teacher)
    total = 0.0
    for place in np.ndindex(teacher.shape):
        total += (max(0.0, guess[place]) - teacher[place]) ** 2
    return {"fitnet": total / teacher.size}
