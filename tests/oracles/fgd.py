"""FGD in plain float64 loops over boxes and pixels.

A pixel (i, j) is in a box if ⌊top⌋ ≤ i ≤ ⌈bottom⌉ and ⌊left⌋ ≤ j ≤ ⌈right⌉, with the box divided by the stride. The
stride is the power of two nearest to the images' height over the map's.
"""

from __future__ import annotations

from math import ceil, exp, floor, sqrt

import numpy as np
from oracles._feature_maps import aligned, named_pairs

PROPERTIES = {"never negative", "ignores the order of rows"}


def softmax(scores):
    largest = max(scores)
    total = sum(exp(score - largest) for score in scores)
    return [exp(score - largest) / total for score in scores]


def pixel_attention(image, temperature):
    _, height, width = image.shape
    scores = [sum(abs(x) for x in image[:, i, j]) / len(image) for i, j in np.ndindex(height, width)]
    weights = softmax([score / temperature for score in scores])
    return np.array([height * width * weight for weight in weights]).reshape(height, width)


def channel_attention(image, temperature):
    scores = [sum(abs(x) for x in channel.flat) / channel.size for channel in image]
    return [len(image) * weight for weight in softmax([score / temperature for score in scores])]


def masks(boxes, height, width):
    """Return the weights of foreground and background of one image."""
    foreground = np.zeros((height, width))
    for left, top, right, bottom in boxes:
        rows, columns = range(floor(top), ceil(bottom) + 1), range(floor(left), ceil(right) + 1)
        for i, j in np.ndindex(height, width):
            if i in rows and j in columns:
                foreground[i, j] = max(foreground[i, j], 1 / (len(rows) * len(columns)))
    outside = sum(1 for value in foreground.flat if value == 0)
    return foreground, np.where(foreground == 0, 1 / max(outside, 1), 0.0)


def context(image, parameters, prefix):
    """Return what is added to each channel of one image."""
    places = list(np.ndindex(image.shape[1:]))
    scores = parameters[f"{prefix}.scores.weight"][0, :, 0, 0]
    weights = softmax([sum(scores * image[:, i, j]) for i, j in places])
    pooled = sum(weight * image[:, i, j] for weight, (i, j) in zip(weights, places, strict=True))
    first, norm, last = (
        [parameters[f"{prefix}.transform.{layer}.{kind}"] for kind in ("weight", "bias")] for layer in (0, 1, 3)
    )
    inner = first[0][:, :, 0, 0] @ pooled + first[1]
    mean = sum(inner) / len(inner)
    deviation = sqrt(sum((x - mean) ** 2 for x in inner) / len(inner) + 1e-5)
    inner = (inner - mean) / deviation * norm[0][:, 0, 0] + norm[1][:, 0, 0]
    return last[0][:, :, 0, 0] @ np.where(inner > 0, inner, 0.0) + last[1]


def boxes_of(inputs, row, stride):
    """Return an image's boxes in pixels of the map, without crowds and without what only fills the batch."""
    columns = (inputs.targets[name][row] for name in ("boxes_BN4", "classes_BN", "crowd_BN"))
    return [[x / stride for x in box] for box, kind, crowd in zip(*columns, strict=True) if kind >= 0 and not crowd]


def image_parts(config, inputs, level, row, student, teacher):
    temperature = config["temperature"]
    _, height, width = teacher.shape
    stride = min((2**n for n in range(9)), key=lambda s: abs(np.log2(inputs.image_size[0] / height) - np.log2(s)))
    foreground, background = masks(boxes_of(inputs, row, stride), height, width)
    pixels, channels = pixel_attention(teacher, temperature), channel_attention(teacher, temperature)
    found = dict.fromkeys(("foreground", "background", "attention", "relation"), 0.0)
    added = [
        context(image, inputs.parameters, f"contexts.{level}.{name}")
        for name, image in (("student", student), ("teacher", teacher))
    ]
    for c, i, j in np.ndindex(teacher.shape):
        square = pixels[i, j] * channels[c] * (student[c, i, j] - teacher[c, i, j]) ** 2
        found["foreground"] += foreground[i, j] * square
        found["background"] += background[i, j] * square
        found["relation"] += (student[c, i, j] + added[0][c] - teacher[c, i, j] - added[1][c]) ** 2
    found["attention"] += np.abs(pixels - pixel_attention(student, temperature)).sum()
    of_student = channel_attention(student, temperature)
    found["attention"] += sum(abs(a - b) for a, b in zip(channels, of_student, strict=True))
    return found


def parts(config, inputs):
    total = dict.fromkeys(("foreground", "background", "attention", "relation"), 0.0)
    for level, pair in enumerate(named_pairs(config, inputs)):
        students, teachers = aligned(inputs, level, *pair)
        for row, images in enumerate(zip(students, teachers, strict=True)):
            for name, value in image_parts(config, inputs, level, row, *images).items():
                total[name] += config[name] * value / len(students)
    return total
