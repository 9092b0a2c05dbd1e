"""CSD in plain float64 loops: λ_t times the whole network's mean absolute error, and λ_c times the contrast.

The contrast is Σ_levels w · near / (far + 1e-7). near is the mean over images and features of |φ(S) − φ(T)|, and far
that of Σ_k |φ(N_k) − φ(S)|. An image's negatives are the K next of the batch; here all images are as large as their
copies, so that the enlarged copy is the copy.
"""

from __future__ import annotations

from extractors import BIASES, WEIGHTS

PROPERTIES = {"reads the logits", "never negative", "stops a gradient"}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def layer(pixel, name):
    return [
        max(sum(w * x for w, x in zip(row, pixel, strict=True)) + bias, 0.0)
        for row, bias in zip(WEIGHTS[name], BIASES[name], strict=True)
    ]


def features(image, *, normalize):
    """Return the features of every pixel as one list, for each level."""
    one, two = [], []
    for y in range(len(image[0])):
        for x in range(len(image[0][0])):
            pixel = [image[colour][y][x] for colour in range(3)]
            if normalize:
                pixel = [(value - mean) / std for value, mean, std in zip(pixel, MEAN, STD, strict=True)]
            else:
                pixel = [value * 255 for value in pixel]
            first = layer(pixel, "one")
            one += first
            two += layer(first, "two")
    return one, two


def mean_difference(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def images_of(rows, size):
    """Return images [B][3][H][W] of the rows of pixels that logits are given as."""
    height, width = size
    pixels = [rows[start : start + height * width] for start in range(0, len(rows), height * width)]
    return [
        [[[image[y * width + x][colour] for x in range(width)] for y in range(height)] for colour in range(3)]
        for image in pixels
    ]


def flat(image):
    return [value for colour in image for row in colour for value in row]


def parts(config, inputs):
    students, wholes = images_of(inputs.student_logits, inputs.map_size), inputs.student_features["full"]
    count = len(students)
    truths = [[value / 255 for value in flat(image)] for image in inputs.targets["high_BCHW"]]
    error = sum(mean_difference(flat(whole), truth) for whole, truth in zip(wholes, truths, strict=True)) / count
    ours, theirs, negatives = (
        [features(image, normalize=config["normalize"]) for image in images]
        for images in (students, wholes, inputs.images)
    )
    contrast = 0.0
    for level, weight in enumerate(config["level_weights"]):
        near = sum(mean_difference(ours[i][level], theirs[i][level]) for i in range(count)) / count
        far = 0.0
        for i in range(count):
            for k in range(1, config["negatives"] + 1):
                far += mean_difference(ours[i][level], negatives[(i + k) % count][level]) / count
        contrast += weight * near / (far + 1e-7)
    return {"full": config["full_weight"] * error, "contrast": config["contrast_weight"] * contrast}
