"""CAT-KD: the mean of (s − t)² over rows, classes and r·r places of the averaged maps, or of their directions."""

from __future__ import annotations

from math import ceil, floor, sqrt

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def average(x, side):
    """Average a map to side·side numbers, in a row."""
    height, width = len(x), len(x[0])
    out = []
    for i in range(side):
        for j in range(side):
            values = [
                x[h][w]
                for h in range(floor(i * height / side), ceil((i + 1) * height / side))
                for w in range(floor(j * width / side), ceil((j + 1) * width / side))
            ]
            out.append(sum(values) / len(values))
    return out


def seen(x, config):
    values = average(x, config["resolution"])
    length = sqrt(sum(value * value for value in values)) if config["normalize"] else 1.0
    return [value / length for value in values]


def parts(config, inputs):
    students, teachers = inputs.student_features["cam"], inputs.teacher_features["cam"]
    total = count = 0
    for row_student, row_teacher in zip(students, teachers, strict=True):
        for student, teacher in zip(row_student, row_teacher, strict=True):
            for s, t in zip(seen(student, config), seen(teacher, config), strict=True):
                total += (s - t) ** 2
                count += 1
    return {"cat_kd": total / count}
