"""MGD in float64, a pixel at a time: Σ_stages (1/B)·Σ (G(mask·A(s)) − t)², G = conv 3×3, ReLU, conv 3×3.

A is a 1×1 convolution where the numbers of channels differ. A pixel, or a channel, is hidden if its draw is below λ.
"""

from __future__ import annotations

import numpy as np
import torch
from oracles._feature_maps import aligned, convolution, named_pairs

PROPERTIES = {"never negative"}


def parts(config, inputs):
    torch.manual_seed(inputs.seed)
    total = 0.0
    for level, pair in enumerate(named_pairs(config, inputs)):
        student, teacher = aligned(inputs, level, *pair)
        rows, width, height, length = student.shape
        draws = torch.rand((rows, 1, height, length) if config["hidden"] == "pixels" else (rows, width, 1, 1)).numpy()
        student = np.where(draws < config["share"], 0.0, student)
        own = {
            key: inputs.parameters[f"generators.{level}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")
        }
        inner = convolution(student, own["0.weight"], own["0.bias"], padding=1)
        inner = np.where(inner > 0, inner, 0.0)
        generated = convolution(inner, own["2.weight"], own["2.bias"], padding=1)
        total += sum((g - t) ** 2 for g, t in zip(generated.flat, teacher.flat, strict=True)) / rows
    return {"mgd": total}
