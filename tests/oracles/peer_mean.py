"""Averaged peers in float64 loops: of each peer m the mean over the others' averages of T²·KL or T²·cross-entropy."""

from __future__ import annotations

from math import log

from oracles.kd import kd, softmax


def cross_entropy(student, teacher, temperature):
    total = 0.0
    for z_student, z_teacher in zip(student, teacher, strict=True):
        p, q = (softmax([z / temperature for z in row]) for row in (z_teacher, z_student))
        total -= sum(a * log(b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def parts(config, inputs):
    distance = {"kl": kd, "ce": cross_entropy}[config["form"]]
    found = {}
    for m, own in enumerate(inputs.peers):
        others = [distance(own, mean, config["temperature"]) for j, mean in enumerate(inputs.averages) if j != m]
        found[f"peer{m}"] = sum(others) / len(others)
    return found
