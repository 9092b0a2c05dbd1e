"""The peers' ensemble in float64 loops: CE of W·[all embeddings] + b, and T²·KL(ensemble ‖ p_m) × the ramp."""

from __future__ import annotations

from math import log

from oracles.kd import kd, softmax


def parts(config, inputs):
    weight, bias = inputs.parameters["fc.weight"], inputs.parameters["fc.bias"]
    rows = [[x for embedding in row for x in embedding] for row in zip(*inputs.embeddings, strict=True)]
    layer = list(zip(weight, bias, strict=True))
    ensemble = [[b + sum(w * x for w, x in zip(ws, row, strict=True)) for ws, b in layer] for row in rows]
    ce = -sum(log(softmax(z)[label]) for z, label in zip(ensemble, inputs.labels, strict=True)) / len(rows)
    kl = {f"peer{m}": inputs.ramp * kd(own, ensemble, config["temperature"]) for m, own in enumerate(inputs.peers)}
    return {"ce": ce, **kl}
