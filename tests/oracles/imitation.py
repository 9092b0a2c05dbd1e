"""The error of a code in plain float64 loops: the mean of |c − x| over colours and pixels of the small image."""

from __future__ import annotations

PROPERTIES = {"never negative", "ignores the order of rows"}


def parts(config, inputs):
    gaps = [
        abs(code - pixel)
        for of_code, of_image in zip(inputs.student_features[config["stage"]], inputs.images, strict=True)
        for code_HW, image_HW in zip(of_code, of_image, strict=True)
        for code_W, image_W in zip(code_HW, image_HW, strict=True)
        for code, pixel in zip(code_W, image_W, strict=True)
    ]
    return {"imitation": sum(gaps) / len(gaps)}
