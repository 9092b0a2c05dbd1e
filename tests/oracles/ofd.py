"""OFD: Σ_l 2^(l−L+1)/B·Σ (s − t')² where s > t' or t' > 0, t' = max(t, m_c), m_c the mean of N(β, γ²) below zero."""

from __future__ import annotations

from math import erf, exp, pi, sqrt

import numpy as np
from oracles._feature_maps import at_the_smaller, batch_norm, convolution, maps, pairs

PROPERTIES = {"never negative", "ignores the order of rows"}


def margin(gamma, beta):
    s = abs(gamma)
    below = 0.5 * (1 + erf(-beta / s / sqrt(2)))
    if below <= 1e-3:
        return -3 * s
    return beta - s * exp(-((beta / s) ** 2) / 2) / sqrt(2 * pi) / below


def parts(config, inputs):
    levels, total = pairs(inputs, ".preact", ".preact"), 0.0
    for level, pair in enumerate(levels):
        # Margins are kept in single precision.
        margins = [float(np.float32(margin(*norm))) for norm in zip(*inputs.teacher_norms[pair[1]], strict=True)]
        own = {key.removeprefix(f"connectors.{level}."): value for key, value in inputs.parameters.items()}
        student, teacher = maps(inputs, *pair)
        student = batch_norm(convolution(student, own["0.weight"]), own["1.weight"], own["1.bias"])
        student, teacher = at_the_smaller(student, teacher)
        loss = 0.0
        for b, c, i, j in np.ndindex(teacher.shape):
            s, t = student[b, c, i, j], max(teacher[b, c, i, j], margins[c])
            if s > t or t > 0:
                loss += (s - t) ** 2
        total += 2.0 ** (level - len(levels) + 1) * loss / len(teacher)
    return {"ofd": total}
