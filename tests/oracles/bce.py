"""Binary cross-entropy in plain float64 loops: −(1/B)·Σ_i Σ_j [y log σ(z) + (1 − y) log(1 − σ(z))], ÷ K if a mean."""

from __future__ import annotations

from math import exp, log

PROPERTIES = {"never negative", "ignores the order of rows", "reads the logits"}


def sigmoid(z):
    return 1 / (1 + exp(-z))


def bce(logits, targets, smoothing):
    total = 0.0
    for z_row, y_row in zip(logits, targets, strict=True):
        for z, y in zip(z_row, y_row, strict=True):
            smooth = y * (1 - smoothing) + smoothing / 2
            total -= smooth * log(sigmoid(z)) + (1 - smooth) * log(sigmoid(-z))
    return total / len(logits)


def parts(config, inputs):
    total = bce(inputs.student_logits, inputs.targets["labels_BK"], config["label_smoothing"])
    return {"bce": total if config["sum_classes"] else total / len(inputs.student_logits[0])}
