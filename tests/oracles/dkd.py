"""DKD in plain float64 loops, from probabilities as the paper writes them.

b = (p_y, 1 − p_y); p̂_j = exp(z_j/T) / Σ_{k≠y} exp(z_k/T); α·TCKD + β·NCKD with T²·(1/B)·Σ_i KL(teacher ‖ student).
"""

from __future__ import annotations

from oracles.kd import divergence, softmax

PROPERTIES = {
    *("vanishes at the teacher", "never negative"),
    *("ignores a shift of the logits", "ignores the order of rows", "reads the logits"),
}


def split(scores, label):
    p = softmax(scores)
    others = [score for j, score in enumerate(scores) if j != label]
    return [p[label], sum(p[:label]) + sum(p[label + 1 :])], softmax(others)


def dkd(student, teacher, labels, alpha, beta, temperature):
    target = other = 0.0
    for z_student, z_teacher, label in zip(student, teacher, labels, strict=True):
        b_student, rest_student = split([z / temperature for z in z_student], label)
        b_teacher, rest_teacher = split([z / temperature for z in z_teacher], label)
        target += divergence(b_teacher, b_student)
        other += divergence(rest_teacher, rest_student)
    return temperature**2 * (alpha * target + beta * other) / len(labels)


def parts(config, inputs):
    constants = config["alpha"], config["beta"], config["temperature"]
    return {"dkd": dkd(inputs.student_logits, inputs.teacher_logits, inputs.labels, *constants)}
