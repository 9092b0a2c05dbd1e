"""PAD in float64 loops: the mean of (t − s)²/(ε + exp v) + v, v a linear layer and a BatchNorm of s, s = connector."""

from __future__ import annotations

from math import exp

import numpy as np
from oracles._feature_maps import batch_norm

PROPERTIES = {"ignores the order of rows"}


def linear(x, parameters, name):
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return np.array([[sum(weight[o] * row) + bias[o] for o in range(len(bias))] for row in x])


def parts(config, inputs):
    assert config["per"] == "element"
    student, teacher = (np.array(x["embedding"]) for x in (inputs.student_features, inputs.teacher_features))
    student = linear(student, inputs.parameters, "connector")
    of_linear = linear(student, inputs.parameters, "variance.linear")
    norm = [inputs.parameters[f"variance.norm.{key}"] for key in ("weight", "bias")]
    log_variance = batch_norm(of_linear[:, :, None, None], *norm)[:, :, 0, 0]
    total = 0.0
    for b, d in np.ndindex(teacher.shape):
        variance = config["eps"] + exp(log_variance[b, d])
        total += (teacher[b, d] - student[b, d]) ** 2 / variance + log_variance[b, d]
    return {"pad": total / teacher.size}
