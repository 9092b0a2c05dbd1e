"""CRCD in plain float64 loops, in the published form: directions, exponentials, their logarithms, and ε.

r_ij = u(e_i − M[y_j] + 1e-6), w_ijk = u(M[n_ik] − M[y_j] + 1e-6), P = exp(r·w/τ)/Z, averaged over the pairs of rows i
and anchors j; and γ·(1 − mean cos(g_s, g_t)), g = (softmax(z) − y)·W.
"""

from __future__ import annotations

from math import exp, sqrt

import torch
from oracles.crd import candidates, embed, noise_contrast
from oracles.kd import softmax

PROPERTIES = {"reads the logits", "needs equal widths"}
OFFSET = 1e-6


def direction(to, start):
    gap = [a - b + OFFSET for a, b in zip(to, start, strict=True)]
    length = sqrt(sum(x * x for x in gap))
    return [x / length for x in gap]


def relation(embeddings, bank, ids, chosen, config, samples):
    pairs = [(i, j) for i in range(len(ids)) for j in ids if config["own_anchor"] or j != ids[i]]
    scores = []
    for i, j in pairs:
        own = direction(embeddings[i], bank[j])
        of_bank = {
            n: exp(sum(a * b for a, b in zip(own, direction(bank[n], bank[j]), strict=True)) / config["temperature"])
            for n in set(chosen[i])
        }
        scores.append([of_bank[n] for n in chosen[i]])
    normalizer = samples * sum(map(sum, scores)) / sum(map(len, scores))
    return noise_contrast(scores, normalizer, config["negatives"] / samples)


def gradient(logits, label, head):
    p = softmax(logits)
    gaps = [share - (k == label) for k, share in enumerate(p)]
    return [sum(gap * weights[d] for gap, weights in zip(gaps, head, strict=True)) for d in range(len(head[0]))]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def parts(config, inputs):
    torch.manual_seed(inputs.seed)
    state, stage = inputs.parameters, config["stage"]
    chosen = candidates(inputs.labels, inputs.ids, inputs.labels_by_id, config["negatives"])
    samples = sum(label >= 0 for label in inputs.labels_by_id)
    features = {"student": inputs.student_features, "teacher": inputs.teacher_features}
    answer = {}
    for own, other in (("student", "teacher"), ("teacher", "student")):
        embeddings = embed(state[f"{own}_head.weight"], state[f"{own}_head.bias"], features[own][stage])
        answer[own] = relation(embeddings, state[f"{other}_bank"], inputs.ids, chosen, config, samples)
    if config["gradient_weight"]:
        moves = [
            [gradient(row, label, head) for row, label in zip(logits, inputs.labels, strict=True)]
            for logits, head in zip((inputs.student_logits, inputs.teacher_logits), inputs.heads, strict=True)
        ]
        cosines = [cosine(a, b) for a, b in zip(*moves, strict=True)]
        answer["gradient"] = config["gradient_weight"] * (1 - sum(cosines) / len(cosines))
    return answer
