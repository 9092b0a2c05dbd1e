"""AT in plain float64 loops: Σ_levels mean over rows and pixels of (a_s − a_t)², a = Q/‖Q‖, Q = mean_c |F_c|^p."""

from __future__ import annotations

from math import sqrt

from oracles._feature_maps import at_the_smaller, maps, pairs

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("ignores the scale of the features", "ignores a rotation of the channels"),
}


def levels(inputs):
    """Return the maps [row][channel][pixel] of student and teacher, at the smaller size."""
    both = [at_the_smaller(*maps(inputs, *pair)) for pair in pairs(inputs)]
    return [tuple(x.reshape(*x.shape[:2], -1).tolist() for x in level) for level in both]


def attention(channels, p):
    means = [sum(abs(x) ** p for x in pixel) / len(pixel) for pixel in zip(*channels, strict=True)]
    length = sqrt(sum(mean**2 for mean in means))
    return [mean / length for mean in means]


def parts(config, inputs):
    total = 0.0
    for students, teachers in levels(inputs):
        gaps = []
        for student, teacher in zip(students, teachers, strict=True):
            a, b = attention(student, config["p"]), attention(teacher, config["p"])
            gaps += [(x - y) ** 2 for x, y in zip(a, b, strict=True)]
        total += sum(gaps) / len(gaps)
    return {"at": total}
