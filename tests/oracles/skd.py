"""SKD in plain float64 loops: Σ_stages mean over rows and pairs of regions of (cos_s − cos_t)².

A region is a window of pool × pool pixels, cut at the edges, and its vector each channel's maximum.
"""

from __future__ import annotations

from math import sqrt

from oracles._feature_maps import at_the_smaller, maps, named_pairs

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    "ignores the scale of the features",
}


def regions(channels, side):
    """Return the vectors of a row's regions, from its map [channel][height][width]."""
    height, width = len(channels[0]), len(channels[0][0])
    found = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            below, right = min(top + side, height), min(left + side, width)
            found.append([max(c[i][j] for i in range(top, below) for j in range(left, right)) for c in channels])
    return found


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def similarities(channels, side):
    vectors = regions(channels, side)
    return [cosine(a, b) for a in vectors for b in vectors]


def parts(config, inputs):
    total = 0.0
    for pair in named_pairs(config, inputs):
        gaps = []
        for student, teacher in zip(*(x.tolist() for x in at_the_smaller(*maps(inputs, *pair))), strict=True):
            both = similarities(student, config["pool"]), similarities(teacher, config["pool"])
            gaps += [(s - t) ** 2 for s, t in zip(*both, strict=True)]
        total += sum(gaps) / len(gaps)
    return {"skd": total}
