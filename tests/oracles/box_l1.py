"""The distance of boxes in plain float64 loops: Σ_levels mean of d²/(2β) if d < β, else d − β/2, d = |s − t|."""

from __future__ import annotations

from oracles._feature_maps import maps, named_pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def parts(config, inputs):
    total, beta = 0.0, config["beta"]
    for pair in named_pairs(config, inputs):
        student, teacher = maps(inputs, *pair)
        costs = []
        for s, t in zip(student.flat, teacher.flat, strict=True):
            d = abs(s - t)
            costs.append(d * d / (2 * beta) if d < beta else d - beta / 2)
        total += sum(costs) / len(costs)
    return {"box_l1": total}
