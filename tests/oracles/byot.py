"""BYOT in float64: Σ_exits (1 − α)·CE(z_l), α·T²·(−Σ p log q_l) and β·‖f_l − f‖² per row; exits are layers on maps."""

from __future__ import annotations

from math import log

import numpy as np
from oracles._feature_maps import batch_norm, convolution
from oracles.kd import softmax
from oracles.pad import linear
from oracles.soft_ce import soft_cross_entropy

PROPERTIES = {"never negative", "ignores the order of rows", "three norms in a row", "stops a gradient"}
NO_GRADIENT = {"embedding", "stage2"}


def bottleneck(x, parameters, name, kernel):
    for layer in (0, 3, 6):
        weight, bias = (parameters[f"{name}.{layer}.{key}"] for key in ("weight", "bias"))
        x = convolution(x, weight, bias, stride=kernel if layer == 3 else 1)
        norm = [parameters[f"{name}.{layer + 1}.{key}"] for key in ("weight", "bias")]
        x = np.maximum(batch_norm(x, *norm), 0)
    return x.mean((2, 3))


def parts(config, inputs):
    stages = sorted(name for name in inputs.student_features if name.startswith("stage"))
    temperature, end = config["temperature"], np.array(inputs.student_features["embedding"])
    last = np.array(inputs.student_features[stages[-1]])
    ce = kd = feature = 0.0
    for number, stage in enumerate(stages[:-1]):
        x = np.array(inputs.student_features[stage])
        own = bottleneck(x, inputs.parameters, f"exits.{number}.bottleneck", x.shape[2] // last.shape[2])
        logits = linear(own, inputs.parameters, f"exits.{number}.fc")
        for row, label in enumerate(inputs.labels):
            ce -= log(softmax(logits[row])[label]) / len(logits)
            p = softmax([z / temperature for z in inputs.student_logits[row]])
            q = softmax([z / temperature for z in logits[row]])
            kd += temperature**2 * soft_cross_entropy(p, q) / len(logits)
            feature += sum((a - b) ** 2 for a, b in zip(own[row], end[row], strict=True)) / len(logits)
    return {"ce": (1 - config["alpha"]) * ce, "kd": config["alpha"] * kd, "feature": config["beta"] * feature}
