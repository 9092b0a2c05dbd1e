"""Affinities in plain float64 loops: Σ_stages the mean over images i and pixels p, q of |a_s(i, p, q) − a_t(i, p, q)|.

The affinity a of two pixels is the inner product of their features, each divided by its length + 1e-8.
"""

from __future__ import annotations

from math import sqrt

from oracles._feature_maps import at_the_smaller, maps, pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}


def unit(image, y, x):
    values = [channel[y][x] for channel in image]
    length = sqrt(sum(value * value for value in values)) + 1e-8
    return [value / length for value in values]


def parts(config, inputs):
    total = 0.0
    for pair in pairs(inputs):
        found = []
        for image_s, image_t in zip(*at_the_smaller(*maps(inputs, *pair)), strict=True):
            places = [(y, x) for y in range(image_s.shape[1]) for x in range(image_s.shape[2])]
            pixels = [[unit(image, *place) for place in places] for image in (image_s, image_t)]
            for p in range(len(places)):
                for q in range(len(places)):
                    ours, theirs = (sum(a * b for a, b in zip(of[p], of[q], strict=True)) for of in pixels)
                    found.append(abs(ours - theirs))
        total += sum(found) / len(found)
    return {"fakd": total}
