"""DeiT in plain float64 loops: share·CE(class token, label) + (1 − share)·CE(other token, teacher's first class)."""

from __future__ import annotations

from math import log

from oracles.kd import softmax

PROPERTIES = {"never negative", "ignores the order of rows"}


def cross_entropy(logits, classes):
    return -sum(log(softmax(z)[y]) for z, y in zip(logits, classes, strict=True)) / len(classes)


def parts(config, inputs):
    assert config["temperature"] is None
    decisions = [max(range(len(z)), key=z.__getitem__) for z in inputs.teacher_logits]
    share = config["label_share"]
    return {
        "labels": share * cross_entropy(inputs.student_features["class_head"], inputs.labels),
        "teacher": (1 - share) * cross_entropy(inputs.student_features["token_head"], decisions),
    }
