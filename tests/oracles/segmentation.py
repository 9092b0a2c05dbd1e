"""Cross-entropy of pixels in plain float64 loops, over those with a class, of the main and of the auxiliary head.

Logits are interpolated between the corners of their map: the pixel at y of a mask of height M lies at y·(m − 1)/(M − 1)
of a map of height m.
"""

from __future__ import annotations

from math import exp, log

PROPERTIES = {"never negative", "ignores the order of rows", "reads the logits"}


def at(values, y, x):
    """Return the value at a place of a map [height][width] between its pixels."""
    top, left = min(int(y), len(values) - 1), min(int(x), len(values[0]) - 1)
    below, right = min(top + 1, len(values) - 1), min(left + 1, len(values[0]) - 1)
    down, along = y - top, x - left
    upper = values[top][left] * (1 - along) + values[top][right] * along
    lower = values[below][left] * (1 - along) + values[below][right] * along
    return upper * (1 - down) + lower * down


def cross_entropies(maps, mask):
    """Return the cross-entropy of each pixel with a class, from the maps [class][height][width] of an image."""
    found = []
    for i, row in enumerate(mask):
        for j, label in enumerate(row):
            if label >= len(maps):
                continue
            y = i * (len(maps[0]) - 1) / (len(mask) - 1)
            x = j * (len(maps[0][0]) - 1) / (len(row) - 1)
            logits = [at(values, y, x) for values in maps]
            most = max(logits)
            found.append(most + log(sum(exp(z - most) for z in logits)) - logits[label])
    return found


def mean(images, masks):
    found = [value for maps, mask in zip(images, masks, strict=True) for value in cross_entropies(maps, mask)]
    return sum(found) / len(found)


def images_of(rows, height, width):
    """Return maps [image][class][height][width] from rows of logits, one for each pixel."""
    images = []
    for start in range(0, len(rows), height * width):
        pixels = rows[start : start + height * width]
        images.append(
            [[[pixels[y * width + x][k] for x in range(width)] for y in range(height)] for k in range(len(pixels[0]))]
        )
    return images


def parts(config, inputs):
    masks = inputs.targets["mask_BHW"]
    found = {"segmentation": mean(images_of(inputs.student_logits, *inputs.map_size), masks)}
    if config["aux_weight"]:
        found["aux"] = config["aux_weight"] * mean(inputs.student_features["aux"], masks)
    return found
