"""CWD in float64, a channel at a time: Σ_stages w·τ²/(B·C)·Σ_channels Σ_pixels p_t log(p_t/p_s).

p is the softmax of F/τ over the pixels of a channel.
"""

from __future__ import annotations

from oracles._feature_maps import aligned, named_pairs
from oracles.kd import divergence, softmax

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def parts(config, inputs):
    total, tau = 0.0, config["temperature"]
    for level, pair in enumerate(named_pairs(config, inputs)):
        student, teacher = aligned(inputs, level, *pair)
        divergences = []
        for of_student, of_teacher in zip(student, teacher, strict=True):
            for channel, target in zip(of_student.tolist(), of_teacher.tolist(), strict=True):
                q, p = (softmax([x / tau for row in pixels for x in row]) for pixels in (channel, target))
                divergences.append(divergence(p, q))
        total += config["weights"][level] * tau**2 * sum(divergences) / len(divergences)
    return {"cwd": total}
