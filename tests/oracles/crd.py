"""CRD in plain float64 loops, in the published form: probabilities, their logarithms, and ε.

P = exp(e·m/τ)/Z, Z = N·mean(exp(e·m/τ)); −(1/B)·Σ_i [log P₀/(P₀ + κ + ε) + Σ_k log κ/(P_k + κ + ε)], κ = K/N, for the
student's embeddings against the teacher's bank and the other way round.
"""

from __future__ import annotations

from math import exp, log, sqrt

import torch

PROPERTIES = {"never negative"}
EPS = 1e-7


def embed(weight, bias, features):
    rows = [
        [sum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]
        for row in features
    ]
    return [[x / sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def candidates(labels, ids, labels_by_id, number):
    """Return each row's own id and its draws: those of all samples of other classes, sorted by label and id."""
    # The draws are torch's, and only they: what they choose is found by hand.
    draws = torch.randint(2**62, (len(labels), number)).tolist()
    found = []
    for label, own, row in zip(labels, ids, draws, strict=True):
        others = sorted((y, i) for i, y in enumerate(labels_by_id) if y >= 0 and y != label)
        found.append([own, *(others[draw % len(others)][1] for draw in row)])
    return found


def contrast(anchors, bank, chosen, temperature, samples):
    scores = []
    for anchor, row in zip(anchors, chosen, strict=True):
        of_bank = {i: exp(sum(a * m for a, m in zip(anchor, bank[i], strict=True)) / temperature) for i in set(row)}
        scores.append([of_bank[i] for i in row])
    normalizer = samples * sum(map(sum, scores)) / sum(map(len, scores))
    return noise_contrast(scores, normalizer, (len(chosen[0]) - 1) / samples)


def noise_contrast(scores, normalizer, kappa):
    """Return the loss of rows of scores, each row's own sample first, averaged over the rows."""
    total = 0.0
    for row in scores:
        own, *noise = (score / normalizer for score in row)
        total += log(own / (own + kappa + EPS)) + sum(log(kappa / (p + kappa + EPS)) for p in noise)
    return -total / len(scores)


def parts(config, inputs):
    torch.manual_seed(inputs.seed)
    state, stage = inputs.parameters, config["stage"]
    chosen = candidates(inputs.labels, inputs.ids, inputs.labels_by_id, config["negatives"])
    samples = sum(label >= 0 for label in inputs.labels_by_id)
    features = {"student": inputs.student_features, "teacher": inputs.teacher_features}
    answer = {}
    for own, other in (("student", "teacher"), ("teacher", "student")):
        anchors = embed(state[f"{own}_head.weight"], state[f"{own}_head.bias"], features[own][stage])
        answer[own] = contrast(anchors, state[f"{other}_bank"], chosen, config["temperature"], samples)
    return answer
