"""Spherical KD in plain float64 loops: (1 − α)·CE + α·T²·KL of z·σ(z_t)/σ(z), σ² = Σ(z − mean)²/(K − 1) of the row."""

from __future__ import annotations

from math import log, sqrt

from oracles.kd import kd, softmax

PROPERTIES = {"never negative", "ignores a shift of the logits", "ignores the order of rows", "reads the logits"}


def deviation(row):
    mean = sum(row) / len(row)
    return sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))


def parts(config, inputs):
    assert config["scale"] == "teacher"
    rescaled = []
    for z_student, z_teacher in zip(inputs.student_logits, inputs.teacher_logits, strict=True):
        factor = deviation(z_teacher) / deviation(z_student)
        rescaled.append([z * factor for z in z_student])
    labelled = zip(rescaled, inputs.labels, strict=True)
    ce = sum(-log(softmax(z)[label]) for z, label in labelled) / len(rescaled)
    kl = kd(rescaled, inputs.teacher_logits, config["temperature"])
    return {"ce": (1 - config["alpha"]) * ce, "kd": config["alpha"] * kl}
