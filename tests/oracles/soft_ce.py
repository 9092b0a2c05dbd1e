"""Soft cross-entropy in plain float64 loops: −(1/B)·Σ_i Σ_k p_k log q_k, p = softmax(z_t/T_t), q = softmax(z_s/T_s)."""

from __future__ import annotations

from math import log

from oracles.kd import softmax

PROPERTIES = {
    *("never negative", "ignores a shift of the logits"),
    *("ignores the order of rows", "reads the logits"),
}


def soft_cross_entropy(p, q):
    return -sum(a * log(b) for a, b in zip(p, q, strict=True))


def parts(config, inputs):
    total = 0.0
    for z_student, z_teacher in zip(inputs.student_logits, inputs.teacher_logits, strict=True):
        p = softmax([z / config["teacher_temperature"] for z in z_teacher])
        q = softmax([z / config["temperature"] for z in z_student])
        total += soft_cross_entropy(p, q)
    return {"soft_ce": total / len(inputs.student_logits)}
