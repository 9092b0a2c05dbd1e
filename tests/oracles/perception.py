"""The perception matrix in plain float64 loops: h_ij = (z_ij − μ_j)/√(v_j + ε), then another oracle on it."""

from __future__ import annotations

from importlib import import_module
from math import sqrt

PROPERTIES = {
    *("vanishes at the teacher", "never negative"),
    *("ignores a shift of a class", "ignores the order of rows", "reads the logits"),
}


def perceive(logits, eps):
    rows, columns = len(logits), len(logits[0])
    h = [[0.0] * columns for _ in range(rows)]
    for j in range(columns):
        mean = sum(logits[i][j] for i in range(rows)) / rows
        variance = sum((logits[i][j] - mean) ** 2 for i in range(rows)) / rows
        for i in range(rows):
            h[i][j] = (logits[i][j] - mean) / sqrt(variance + eps)
    return h


def parts(config, inputs):
    ((name, inner),) = config["inner"].items()
    seen = inputs._replace(
        student_logits=perceive(inputs.student_logits, config["eps"]),
        teacher_logits=perceive(inputs.teacher_logits, config["eps"]),
    )
    return import_module(f"oracles.{name}").parts(inner, seen)
