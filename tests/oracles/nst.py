"""NST in plain float64 loops: Σ_levels mean k(t, t') + mean k(s, s') − 2·mean k(s, t) over rows and pairs of channels.

k(a, b) = (a·b)², a and b the maps of two channels scaled to length one.
"""

from __future__ import annotations

from math import sqrt

from oracles.at import levels

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    "ignores the scale of the features",
}


def scaled(channel):
    length = sqrt(sum(x * x for x in channel))
    return [x / length for x in channel]


def mean_kernel(some, others):
    values = [sum(x * y for x, y in zip(a, b, strict=True)) ** 2 for a in some for b in others]
    return sum(values) / len(values)


def parts(config, inputs):
    total = 0.0
    for students, teachers in levels(inputs):
        for student, teacher in zip(students, teachers, strict=True):
            s, t = ([scaled(channel) for channel in channels] for channels in (student, teacher))
            total += (mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)) / len(students)
    return {"nst": total}
