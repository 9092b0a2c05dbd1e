"""IFVD in plain float64 loops: Σ_stages mean over rows and pixels of (s_s − s_t)², s the cosine of pixel and centre.

A centre is the mean of the pixels of one class in one image. A pixel whose class is not one of the data set's has a
difference of zero. The class of a map's pixel is that of the mask's pixel in which its centre lies.
"""

from __future__ import annotations

from oracles._feature_maps import at_the_smaller, maps, named_pairs
from oracles.skd import cosine

PROPERTIES = {
    *("vanishes at the teacher", "never negative", "ignores the order of rows"),
    *("ignores the scale of the features", "ignores a rotation of the channels"),
}


def similarities(channels, mask, classes):
    """Return the cosine of each pixel with a class, from a map [channel][height][width]."""
    height, width = len(channels[0]), len(channels[0][0])
    members = {}
    for i in range(height):
        for j in range(width):
            label = mask[int((i + 0.5) * len(mask) / height)][int((j + 0.5) * len(mask[0]) / width)]
            if label < classes:
                members.setdefault(label, []).append([channel[i][j] for channel in channels])
    found = []
    for label in sorted(members):
        pixels = members[label]
        centre = [sum(values) / len(pixels) for values in zip(*pixels, strict=True)]
        found += [cosine(pixel, centre) for pixel in pixels]
    return found


def parts(config, inputs):
    total, classes = 0.0, len(inputs.student_logits[0])
    for pair in named_pairs(config, inputs):
        student_maps, teacher_maps = at_the_smaller(*maps(inputs, *pair))
        squares = 0.0
        for student, teacher, mask in zip(student_maps, teacher_maps, inputs.targets["mask_BHW"], strict=True):
            of_student, of_teacher = (similarities(x.tolist(), mask, classes) for x in (student, teacher))
            squares += sum((s - t) ** 2 for s, t in zip(of_student, of_teacher, strict=True))
        total += squares / student_maps[:, 0].size
    return {"ifvd": total}
