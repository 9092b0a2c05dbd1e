"""Statistics of channels in plain float64 loops: Σ_stages the mean over images and pixels of (g(s) − g(t))²."""

from __future__ import annotations

from oracles._feature_maps import at_the_smaller, maps, pairs

PROPERTIES = {"vanishes at the teacher", "never negative", "ignores the order of rows"}
STATISTICS = {
    "mean": lambda values: sum(values) / len(values),
    "mean_square": lambda values: sum(value * value for value in values) / len(values),
    "max": max,
    "min": min,
}


def parts(config, inputs):
    statistic, total = STATISTICS[config["statistic"]], 0.0
    for pair in pairs(inputs):
        costs = []
        for image_s, image_t in zip(*at_the_smaller(*maps(inputs, *pair)), strict=True):
            for y in range(image_s.shape[1]):
                for x in range(image_s.shape[2]):
                    ours, theirs = (statistic([channel[y][x] for channel in image]) for image in (image_s, image_t))
                    costs.append((ours - theirs) ** 2)
        total += sum(costs) / len(costs)
    return {"srkd": total}
