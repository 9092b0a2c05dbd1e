"""Logit standardization in plain float64 loops: (z_ij − mean_i)/(std_i + 1e-7), std unbiased, then another oracle."""

from __future__ import annotations

from importlib import import_module
from math import sqrt

PROPERTIES = {
    *("vanishes at the teacher", "never negative"),
    *("ignores a shift of the logits", "ignores the order of rows", "reads the logits"),
}


def standardize(row):
    mean = sum(row) / len(row)
    std = sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
    return [(z - mean) / (std + 1e-7) for z in row]


def parts(config, inputs):
    ((name, inner),) = config["inner"].items()
    seen = inputs._replace(
        student_logits=[standardize(row) for row in inputs.student_logits],
        teacher_logits=[standardize(row) for row in inputs.teacher_logits],
    )
    found = import_module(f"oracles.{name}").parts(inner, seen)
    return {part: inner["weight"] * value for part, value in found.items()}
