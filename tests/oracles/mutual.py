"""Mutual learning in float64 loops: of each peer m the mean over the others of T²·KL(p_j ‖ p_m)."""

from __future__ import annotations

from oracles.kd import kd


def parts(config, inputs):
    found = {}
    for m, own in enumerate(inputs.peers):
        others = [kd(own, other, config["temperature"]) for j, other in enumerate(inputs.peers) if j != m]
        found[f"peer{m}"] = sum(others) / len(others)
    return found
