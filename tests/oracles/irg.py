"""IRG in plain float64 loops: mean squared errors of logits, of edges ‖f_i − f_j‖²/max and of moves ‖f'_i − f_i‖²/max.

Levels are averaged over their pixels; of two levels of a network, neighbouring channels of the wider one are averaged.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil, floor

from oracles._feature_maps import pairs
from oracles.sp import flat

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("ignores the scale of the features", "reads the logits"),
}


def pooled(features):
    return [[sum(flat(channel)) / len(flat(channel)) for channel in row] for row in features]


def squared_distance(u, v):
    return sum((a - b) ** 2 for a, b in zip(u, v, strict=True))


def over_the_largest(values):
    return [value / max(values) for value in values]


def edges(rows):
    return over_the_largest([squared_distance(u, v) for u in rows for v in rows])


def narrowed(row, width):
    spans = [(floor(i * len(row) / width), ceil((i + 1) * len(row) / width)) for i in range(width)]
    return [sum(row[start:stop]) / (stop - start) for start, stop in spans]


def moves(shallow, deep):
    width = min(len(shallow[0]), len(deep[0]))
    both = zip(shallow, deep, strict=True)
    return over_the_largest([squared_distance(narrowed(u, width), narrowed(v, width)) for u, v in both])


def mean_error(many, others):
    gaps = [(a - b) ** 2 for a, b in zip(flat(many), flat(others), strict=True)]
    return sum(gaps) / len(gaps)


def parts(config, inputs):
    names = pairs(inputs)
    student = [pooled(inputs.student_features[name]) for name, _ in names]
    teacher = [pooled(inputs.teacher_features[name]) for _, name in names]
    student_moves, teacher_moves = ([moves(*step) for step in pairwise(levels)] for levels in (student, teacher))
    return {
        "vertices": config["vertex_weight"] * mean_error(inputs.student_logits, inputs.teacher_logits),
        # Every level has as many edges as the next, so the mean over all of them is the mean of the levels' means.
        "edges": config["edge_weight"] * mean_error([*map(edges, student)], [*map(edges, teacher)]),
        "transformation": config["transformation_weight"] * mean_error(student_moves, teacher_moves),
    }
