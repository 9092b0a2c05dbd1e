"""Sigmoid KD in plain float64 loops: T²·(1/B)·Σ_i Σ_j [p log(p/q) + (1 − p) log((1 − p)/(1 − q))].

p = σ(t/T) is the teacher's probability of a class, and q = σ(s/T) the student's.
"""

from __future__ import annotations

from math import log

from oracles.bce import sigmoid

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows", "reads the logits"}


def parts(config, inputs):
    temperature, total = config["temperature"], 0.0
    for s_row, t_row in zip(inputs.student_logits, inputs.teacher_logits, strict=True):
        for s, t in zip(s_row, t_row, strict=True):
            for sign in (1, -1):
                p, q = sigmoid(sign * t / temperature), sigmoid(sign * s / temperature)
                total += p * log(p / q)
    return {"sigmoid_kd": temperature**2 * total / len(inputs.student_logits)}
