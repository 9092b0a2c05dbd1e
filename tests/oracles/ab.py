"""AB: Σ_l 2^(l−L+1)/B·Σ [(s+m)²·1(s>−m, t≤0) + (s−m)²·1(s≤m, t>0)], s after the connector, l counted from 0."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import maps, pairs, regressor

PROPERTIES = {"never negative", "ignores the order of rows"}


def parts(config, inputs):
    levels, m, total = pairs(inputs, ".preact", ".preact"), config["margin"], 0.0
    for level, pair in enumerate(levels):
        student, teacher = maps(inputs, *pair)
        if student.shape != teacher.shape:
            student = regressor(inputs.parameters, f"connectors.{level}.", student, teacher)
        loss = 0.0
        for place in np.ndindex(teacher.shape):
            s, t = student[place], teacher[place]
            if s > -m and t <= 0:
                loss += (s + m) ** 2
            if s <= m and t > 0:
                loss += (s - m) ** 2
        total += 2.0 ** (level - len(levels) + 1) * loss / len(teacher)
    return {"ab": total}
