"""CS-KD in plain float64 loops: the mean of T²·KL(p' ‖ p) over rows with a partner, the next of the class by id."""

from __future__ import annotations

from oracles.kd import divergence, softmax

PROPERTIES = {"never negative", "ignores the order of rows", "reads the logits", "ignores a shift of the logits"}


def partner(row, labels, ids):
    same = sorted((i for i, label in enumerate(labels) if label == labels[row]), key=lambda i: ids[i])
    return same[(same.index(row) + 1) % len(same)]


def parts(config, inputs):
    found = []
    for row, logits in enumerate(inputs.student_logits):
        other = partner(row, inputs.labels, inputs.ids)
        if other != row:
            p = softmax([z / config["temperature"] for z in inputs.student_logits[other]])
            found.append(divergence(p, softmax([z / config["temperature"] for z in logits])))
    return {"cs_kd": config["temperature"] ** 2 * sum(found) / max(len(found), 1)}
