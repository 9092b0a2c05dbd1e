"""The absolute error of an image in plain float64 loops: the mean of |s − h / 255| over colours and pixels."""

from __future__ import annotations

PROPERTIES = {"never negative", "ignores the order of rows", "reads the logits"}


def parts(config, inputs):
    rows = iter(inputs.student_logits)  # of a pixel each
    total, count = 0.0, 0
    for image in inputs.targets["high_BCHW"]:
        for y in range(len(image[0])):
            for x in range(len(image[0][0])):
                for value, colour in zip(next(rows), image, strict=True):
                    total += abs(value - colour[y][x] / 255)
                    count += 1
    return {"l1": total / count}
