"""RKD in plain float64 loops over pairs and triplets: Huber losses of distances over their mean, and of cosines.

Both are averaged over all index tuples, B² and B³; those in which an index repeats are no pair or angle and add zero.
"""

from __future__ import annotations

from math import dist

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("ignores the scale of the features", "ignores a rotation of the channels"),
}


def huber(x, y):
    gap = abs(x - y)
    return gap**2 / 2 if gap < 1 else gap - 0.5


def relative_distances(rows):
    pairs = {(i, j): dist(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j}
    mean = sum(pairs.values()) / len(pairs)
    return {pair: distance / mean for pair, distance in pairs.items()}


def cosine(at, one, other):
    u, v = ([x - y for x, y in zip(end, at, strict=True)] for end in (one, other))
    return sum(a * b for a, b in zip(u, v, strict=True)) / (dist(at, one) * dist(at, other))


def angles(rows):
    places = range(len(rows))
    triplets = [(i, j, k) for i in places for j in places for k in places if i not in (j, k)]
    return {(i, j, k): cosine(rows[i], rows[j], rows[k]) for i, j, k in triplets}


def parts(config, inputs):
    student, teacher = inputs.student_features[config["stage"]], inputs.teacher_features[config["stage"]]
    found = {}
    for name, relation, order in (("distance", relative_distances, 2), ("angle", angles, 3)):
        of_student, of_teacher = relation(student), relation(teacher)
        total = sum(huber(of_student[key], of_teacher[key]) for key in of_student)
        found[name] = config[f"{name}_weight"] * total / len(student) ** order
    return found
