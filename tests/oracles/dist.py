"""DIST in plain float64 loops: T²·β·(1 − mean_i ρ(p_i·, q_i·)) and T²·γ·(1 − mean_j ρ(p_·j, q_·j)), p = softmax(z/T).

ρ(u, v) = Σ (u − ū)(v − v̄) / (‖u − ū‖·‖v − v̄‖ + 1e-8).
"""

from __future__ import annotations

from math import sqrt

from oracles.kd import softmax

PROPERTIES = {"never negative", "ignores a shift of the logits", "ignores the order of rows", "reads the logits"}


def correlation(u, v):
    u_mean, v_mean = sum(u) / len(u), sum(v) / len(v)
    product = sum((a - u_mean) * (b - v_mean) for a, b in zip(u, v, strict=True))
    u_length = sqrt(sum((a - u_mean) ** 2 for a in u))
    v_length = sqrt(sum((b - v_mean) ** 2 for b in v))
    return product / (u_length * v_length + 1e-8)


def mean_gap(many, others):
    return 1 - sum(correlation(u, v) for u, v in zip(many, others, strict=True)) / len(many)


def parts(config, inputs):
    temperature = config["temperature"]
    p = [softmax([z / temperature for z in row]) for row in inputs.student_logits]
    q = [softmax([z / temperature for z in row]) for row in inputs.teacher_logits]
    p_columns, q_columns = ([list(column) for column in zip(*rows, strict=True)] for rows in (p, q))
    return {
        "inter": temperature**2 * config["beta"] * mean_gap(p, q),
        "intra": temperature**2 * config["gamma"] * mean_gap(p_columns, q_columns),
    }
