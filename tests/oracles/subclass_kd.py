"""Subclass distillation in plain float64 loops: KD of the logits of subclasses."""

from __future__ import annotations

from oracles.kd import kd

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def parts(config, inputs):
    both = (features["subclasses"] for features in (inputs.student_features, inputs.teacher_features))
    return {"subclass_kd": kd(*both, config["temperature"])}
