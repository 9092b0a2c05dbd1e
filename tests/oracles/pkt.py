"""PKT in plain float64 loops: (1/B²)·Σ_ij p_ij·log((p_ij + ε)/(q_ij + ε)), p of the teacher, q of the student.

p_ij = K_ij / Σ_k K_ik, K_ij = (1 + u_i·u_j)/2, u_i = f_i/(‖f_i‖ + ε).
"""

from __future__ import annotations

from math import log, sqrt

PROPERTIES = {"ignores the order of rows", "ignores a rotation of the channels"}


def neighbourhoods(rows, eps):
    directions = []
    for row in rows:
        length = sqrt(sum(x * x for x in row))
        directions.append([x / (length + eps) for x in row])
    found = []
    for u in directions:
        kernels = [(1 + sum(a * b for a, b in zip(u, v, strict=True))) / 2 for v in directions]
        found.append([kernel / sum(kernels) for kernel in kernels])
    return found


def parts(config, inputs):
    stage, eps = config["stage"], config["eps"]
    q = neighbourhoods(inputs.student_features[stage], eps)
    p = neighbourhoods(inputs.teacher_features[stage], eps)
    rows = range(len(p))
    return {"pkt": sum(p[i][j] * log((p[i][j] + eps) / (q[i][j] + eps)) for i in rows for j in rows) / len(p) ** 2}
