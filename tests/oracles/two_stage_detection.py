"""Faster R-CNN's losses in plain float64 loops over anchors and regions (Ren et al., NeurIPS 2015, eq. 1).

Given are what was chosen, and the box and label of each. Smooth L1 has β = 1/9. A box's numbers count ten times in the
second stage, and the growth of its sides five times.
"""

from __future__ import annotations

from math import exp, log, log1p

from oracles.detection import code


def smooth_l1(x):
    return abs(x) - 1 / 18 if abs(x) >= 1 / 9 else 4.5 * x * x


def binary_cross_entropy(logit, label):
    z = logit if label else -logit
    return log1p(exp(-z))


def cross_entropy(logits, label):
    return log(sum(exp(z) for z in logits)) - logits[label]


def distance(said, box, place, factors):
    return sum(smooth_l1(a - f * b) for a, b, f in zip(said, code(box, place), factors, strict=True))


def of_anchors(anchors, targets, objectness, deltas):
    """Return the sums of both losses of an image, and the number of chosen anchors."""
    of_classes = of_boxes = count = 0
    for anchor, (*box, label), logit, said in zip(anchors, targets, objectness, deltas, strict=True):
        if label >= 0:
            count += 1
            of_classes += binary_cross_entropy(logit, label == 1)
        if label == 1:
            of_boxes += distance(said, box, anchor, (1, 1, 1, 1))
    return of_classes, of_boxes, count


def of_regions(regions, targets, logits, deltas):
    """Return the same of regions; of each, ``deltas`` has four numbers for every class."""
    of_classes = of_boxes = count = 0
    for region, (*box, label), row, said in zip(regions, targets, logits, deltas, strict=True):
        if label >= 0:
            count += 1
            of_classes += cross_entropy(row, int(label))
        if label > 0:
            of_boxes += distance(said[4 * int(label) : 4 * int(label) + 4], box, region, (10, 10, 5, 5))
    return of_classes, of_boxes, count


def of_map_cells(maps, numbers):
    """Return the rows of an image's anchors, level by level, cell by cell, with ``numbers`` of each anchor."""
    rows = []
    for map_chw in maps:
        for y in range(len(map_chw[0])):
            for x in range(len(map_chw[0][0])):
                cell = [channel[y][x] for channel in map_chw]
                rows += [cell[start : start + numbers] for start in range(0, len(cell), numbers)]
    return rows


def parts(normalizer, images):
    """Return the parts of a batch; each image has its features by the names of their taps."""
    found = {}
    for names, of in ((("rpn_class", "rpn_box"), anchors_of), (("class", "box"), regions_of)):
        sums = [of(image) for image in images]
        total = sum(count for *_, count in sums)
        for index, name in enumerate(names):
            if normalizer == "batch":
                found[name] = sum(each[index] for each in sums) / total
            else:
                found[name] = sum(each[index] / each[2] for each in sums) / len(images)
    return found


def anchors_of(image):
    objectness, deltas = (
        [image[name] for name in sorted(image) if name.startswith(f"rpn.{kind}.")] for kind in ("class", "box")
    )
    logits = [row[0] for row in of_map_cells(objectness, 1)]
    return of_anchors(image["anchors"], image["rpn.targets"], logits, of_map_cells(deltas, 4))


def regions_of(image):
    return of_regions(*(image[f"roi.{kind}"] for kind in ("boxes", "targets", "class", "box")))
