"""SP in plain float64 loops: (1/B²)·Σ_ij (G_t,ij − G_s,ij)², G_i· = (F_i·F_1, …, F_i·F_B) scaled to length one."""

from __future__ import annotations

from math import sqrt

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("ignores the scale of the features", "ignores a rotation of the channels"),
}


def flat(x):
    return [x] if isinstance(x, float) else [value for part in x for value in flat(part)]


def similarities(features):
    rows = [flat(feature) for feature in features]
    found = []
    for u in rows:
        products = [sum(a * b for a, b in zip(u, v, strict=True)) for v in rows]
        length = sqrt(sum(product**2 for product in products))
        found.append([product / length for product in products])
    return found


def parts(config, inputs):
    stage = config["stage"]
    of_student = flat(similarities(inputs.student_features[stage]))
    of_teacher = flat(similarities(inputs.teacher_features[stage]))
    gaps = [(s - t) ** 2 for s, t in zip(of_student, of_teacher, strict=True)]
    return {"sp": sum(gaps) / len(gaps)}
