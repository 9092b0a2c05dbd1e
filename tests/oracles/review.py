"""ReviewKD: from the embedding up, fuse with what is left of the deeper levels, and sum the levels' HCL."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import average, batch_norm, convolution, nearest, pairs

PROPERTIES = {"never negative", "ignores the order of rows"}


def squares(a, b):
    total = 0.0
    for place in np.ndindex(a.shape):
        total += (a[place] - b[place]) ** 2
    return total / a.size


def context_loss(student, teacher):
    loss, weight, weights = squares(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            weights += weight
            loss += weight * squares(average(student, side, side), average(teacher, side, side))
    return loss / weights


def block(own, name, x, padding):
    weight, scale, shift = (own[f"{name}.{key}"] for key in ("0.weight", "1.weight", "1.bias"))
    return batch_norm(convolution(x, weight, padding=padding), scale, shift)


def fused(own, x, left):
    x = block(own, "input", x, 0)
    if left is None:
        return x
    left = nearest(left, *x.shape[2:])
    scores = convolution(np.concatenate([x, left], 1), own["attention.0.weight"], own["attention.0.bias"])
    shares = 1 / (1 + np.exp(-scores))
    return shares[:, :1] * x + shares[:, 1:] * left


def as_map(feature):
    x = np.array(feature)
    return x[:, :, None, None] if x.ndim == 2 else x


def parts(config, inputs):
    student_kind = ".preact" if config["student_preact"] else ""
    levels = [*pairs(inputs, student_kind, ".preact"), ("embedding", "embedding")]
    left, total = None, 0.0
    for level in reversed(range(len(levels))):
        own = {key.removeprefix(f"fusions.{level}."): value for key, value in inputs.parameters.items()}
        student, teacher = levels[level]
        target = as_map(inputs.teacher_features[teacher])
        left = nearest(fused(own, as_map(inputs.student_features[student]), left), *target.shape[2:])
        total += context_loss(block(own, "output", left, 1), target)
    return {"review": total}
