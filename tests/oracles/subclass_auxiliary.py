"""The auxiliary loss in loops: mean_i log Σ_j exp(v_i·v_j/(τS)) − 1/τ − log B, v = (z − mean)/√(variance + ε)."""

from __future__ import annotations

from math import exp, log, sqrt

PROPERTIES = {"ignores the order of rows"}


def standardized(row, eps):
    mean = sum(row) / len(row)
    variance = sum((z - mean) ** 2 for z in row) / len(row)
    return [(z - mean) / sqrt(variance + eps) for z in row]


def parts(config, inputs):
    rows = [standardized(row, config["eps"]) for row in inputs.student_features["subclasses"]]
    tau, total = config["temperature"], 0.0
    for u in rows:
        scores = [sum(a * b for a, b in zip(u, v, strict=True)) / (tau * len(u)) for v in rows]
        total += log(sum(exp(score) for score in scores)) - 1 / tau - log(len(rows))
    return {"subclass_auxiliary": total / len(rows)}
