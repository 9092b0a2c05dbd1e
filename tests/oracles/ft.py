"""FT in float64: mean |u(mean_c T²) − u(mean_c P²)|, with T the translator's factor and P the paraphraser's."""

from __future__ import annotations

import numpy as np
from oracles._feature_maps import at_the_smaller, batch_norm, convolution
from oracles.ft_paraphraser import encoded, leaky

PROPERTIES = {"never negative", "ignores the order of rows", "three norms in a row"}


def directions(factor):
    energies = [(row**2).mean(0).ravel() for row in factor]
    return [energy / np.sqrt((energy**2).sum()) for energy in energies]


def parts(config, inputs):
    state, stage = inputs.parameters, config["stage"]
    student, teacher = (np.array(x[stage]) for x in (inputs.student_features, inputs.teacher_features))
    for level in (0, 3, 6):
        convolved, norm = ([state[f"translator.{n}.{kind}"] for kind in ("weight", "bias")] for n in (level, level + 1))
        student = leaky(batch_norm(convolution(student, *convolved, padding=1), *norm))
    teacher = encoded(teacher, lambda level: [state[f"encoder{level}_{kind}"] for kind in ("weight", "bias")])
    pairs = zip(*map(directions, at_the_smaller(student, teacher)), strict=True)
    gaps = [abs(a - b) for s, t in pairs for a, b in zip(s, t, strict=True)]
    return {"ft": sum(gaps) / len(gaps)}
