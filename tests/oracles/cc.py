"""CC in plain float64 loops: mean of Σ_d δ_id·δ_jd over pairs i ≠ j, or over neighbours; δ = |W_s f_s − W_t f_t|."""

from __future__ import annotations

from itertools import pairwise, permutations

PROPERTIES = {"never negative", "ignores the order of rows"}


def linear(weight, bias, features):
    return [
        [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]
        for row in features
    ]


def parts(config, inputs):
    state, stage = inputs.parameters, config["stage"]
    embedded = [
        linear(state[f"{network}_head.weight"], state[f"{network}_head.bias"], features[stage])
        for network, features in (("student", inputs.student_features), ("teacher", inputs.teacher_features))
    ]
    gaps = [[abs(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(*embedded, strict=True)]
    chosen = list(permutations(gaps, 2) if config["pairs"] == "all" else pairwise(gaps))
    return {"cc": sum(a * b for u, v in chosen for a, b in zip(u, v, strict=True)) / len(chosen)}
