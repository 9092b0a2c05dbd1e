"""The absolute difference of two images in plain float64 loops: the mean of |s − t| over colours and pixels."""

from __future__ import annotations

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows", "reads the logits"}


def parts(config, inputs):
    pairs = zip(inputs.student_logits, inputs.teacher_logits, strict=True)
    costs = [abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True)]
    return {"image_l1": sum(costs) / len(costs)}
