"""KDSVD in float64 by numpy's singular value decomposition of every row's map, and plain loops over its entries.

V of the teacher has k vectors of positive sum, times their share of the values; of the student's k + 3, the most alike
in absolute cosine counts, with its sign. (1/B)·Σ_levels Σ (exp(−(v' − v)²/8) of the student − that of the teacher)².
"""

from __future__ import annotations

from itertools import pairwise, product
from math import exp, sqrt

import numpy as np
from oracles._feature_maps import pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows", "needs equal widths"}


def decomposed(row, number):
    """Return the right vectors of a map [channels][height][width], as rows, and their values."""
    matrix = np.array(row).reshape(len(row), -1).T
    _, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    return vectors[:number], values[:number]


def of_both(student_row, teacher_row, k):
    students, _ = decomposed(student_row, k + 3)
    teachers, values = decomposed(teacher_row, k)
    length = sqrt(sum(value**2 for value in values))
    found = []
    for vector, value in zip(teachers, values, strict=True):
        vector = vector if vector.sum() >= 0 else -vector
        cosines = [float(other @ vector) for other in students]
        best = max(range(len(cosines)), key=lambda index: abs(cosines[index]))
        chosen = students[best] if cosines[best] >= 0 else -students[best]
        found.append((chosen * value / length, vector * value / length))
    return found


def parts(config, inputs):
    k, names = config["k"], pairs(inputs)
    total, rows = 0.0, len(inputs.labels)
    for b in range(rows):
        levels = [of_both(inputs.student_features[s][b], inputs.teacher_features[t][b], k) for s, t in names]
        for shallow, deep in pairwise(levels):
            for (s, t), (s_deep, t_deep) in zip(shallow, deep, strict=True):
                for c, d in product(range(len(s)), range(len(s_deep))):
                    of_student = exp(-((s_deep[d] - s[c]) ** 2) / 8)
                    of_teacher = exp(-((t_deep[d] - t[c]) ** 2) / 8)
                    total += (of_student - of_teacher) ** 2
    return {"kdsvd": total / rows}
