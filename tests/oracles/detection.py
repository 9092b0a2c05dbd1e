"""RetinaNet's losses in plain float64 loops over images, anchors and classes (Lin et al., ICCV 2017, section 4.1).

An anchor is matched with the box of its largest IoU from 0.5 on, and is nobody's from 0.4 to 0.5. The anchors that a
box overlaps most are matched in any case, each with its own best box. Focal loss has α = 0.25 and γ = 2.
"""

from __future__ import annotations

from math import exp, log, log1p

PROPERTIES = {"never negative", "ignores the order of rows", "reads the logits"}
NO_GRADIENT = {"anchors"}


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / (area(a) + area(b) - width * height)


def match(anchors, boxes):
    """Return the box's number for each anchor; −1 for none, −2 for an anchor that does not count."""
    if not boxes:
        return [-1] * len(anchors)
    table = [[iou(box, anchor) for box in boxes] for anchor in anchors]
    found = []
    for row in table:
        largest = max(row)
        best = row.index(largest)
        anyway = any(row[n] == max(other[n] for other in table) for n in range(len(boxes)))
        found.append(best if largest >= 0.5 or anyway else -2 if largest >= 0.4 else -1)
    return found


def focal(logit, positive):
    """Return −α·(1 − p)^γ·log p, with p the probability of what is right."""
    z = logit if positive else -logit
    log_p = -log1p(exp(-z)) if z > 0 else z - log1p(exp(z))
    return -(0.25 if positive else 0.75) * (1 - exp(log_p)) ** 2 * log_p


def code(box, anchor):
    """Return what the network should say of an anchor: the move of its middle, and the growth of its sides."""
    sides = [anchor[2] - anchor[0], anchor[3] - anchor[1]]
    moves = [((box[n] + box[n + 2]) - (anchor[n] + anchor[n + 2])) / 2 / sides[n] for n in (0, 1)]
    return [*moves, *(log((box[n + 2] - box[n]) / sides[n]) for n in (0, 1))]


def of_image(logits, regression, anchors, boxes, labels):
    matched = match(anchors, boxes)
    of_classes = of_boxes = 0.0
    for row, said, anchor, number in zip(logits, regression, anchors, matched, strict=True):
        if number != -2:
            of_classes += sum(focal(z, number >= 0 and labels[number] == k) for k, z in enumerate(row))
        if number >= 0:
            of_boxes += sum(abs(a - b) for a, b in zip(said, code(boxes[number], anchor), strict=True))
    positives = max(1, sum(number >= 0 for number in matched))
    return of_classes / positives, of_boxes / positives


def parts(config, inputs):
    assert config["normalizer"] == "image"
    found = []
    for row, logits in enumerate(inputs.student_logits):
        columns = [inputs.targets[name][row] for name in ("boxes_BN4", "classes_BN", "crowd_BN")]
        wanted = [(box, label) for box, label, crowd in zip(*columns, strict=True) if label >= 0 and not crowd]
        features = [inputs.student_features[name][row] for name in ("regression", "anchors")]
        found.append(of_image(logits, *features, [box for box, _ in wanted], [label for _, label in wanted]))
    return {name: sum(each) / len(found) for name, each in zip(("class", "box"), zip(*found, strict=True), strict=True)}
