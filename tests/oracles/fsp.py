"""FSP in plain float64 loops: Σ_levels mean (G^s − G^t)², G = F·F'ᵀ/hw of neighbouring maps at the smaller size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from oracles._feature_maps import at_the_smaller, pairs

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("needs equal widths", "of the fourth degree"),
}


def flows(levels):
    found = []
    for shallow, deep in pairwise(levels):
        shallow, deep = at_the_smaller(shallow, deep)
        rows, channels, height, width = shallow.shape
        flow = np.zeros((rows, channels, deep.shape[1]))
        for b, c, d in np.ndindex(flow.shape):
            for i, j in np.ndindex(height, width):
                flow[b, c, d] += shallow[b, c, i, j] * deep[b, d, i, j] / (height * width)
        found.append(flow)
    return found


def parts(config, inputs):
    names = [("stem", "stem"), *pairs(inputs)]
    student = flows([np.array(inputs.student_features[name]) for name, _ in names])
    teacher = flows([np.array(inputs.teacher_features[name]) for _, name in names])
    return {"fsp": sum(((s - t) ** 2).sum() / s.size for s, t in zip(student, teacher, strict=True))}
