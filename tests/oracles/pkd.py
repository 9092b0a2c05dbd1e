"""PKD in plain float64 loops: Σ_stages ½·mean (h_s − h_t)², h = (x − mean)/(std + 1e-6).

Mean and std are those of a channel over rows and pixels. The variance is divided by one less than the number of pixels.
"""

from __future__ import annotations

from math import sqrt

from oracles._feature_maps import aligned, named_pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def standardized(values):
    mean = sum(values) / len(values)
    deviation = sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean) / (deviation + 1e-6) for x in values]


def parts(config, inputs):
    total = 0.0
    for level, pair in enumerate(named_pairs(config, inputs)):
        student, teacher = aligned(inputs, level, *pair)
        gaps = []
        for channel in range(student.shape[1]):
            h_s, h_t = (standardized(x[:, channel].flatten().tolist()) for x in (student, teacher))
            gaps += [(s - t) ** 2 for s, t in zip(h_s, h_t, strict=True)]
        total += sum(gaps) / len(gaps) / 2
    return {"pkd": total}
