"""Average precision of boxes, as COCO defines it.   N images, D detections and G objects of an image, K classes.

The detections of an image are matched to its objects by themselves (``match_boxes``), so that ranks share the work.
What is left of an image has a fixed size, and is enough for the averages (``average_precision_of_boxes``). A case is
a range of areas with a threshold of the intersection over union (IoU).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IOUS = np.linspace(0.5, 0.95, 10)
"""Thresholds of the IoU, over which AP is averaged."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is read."""
AREA_RANGES = {"": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Range of an object's area, in pixels of the stored image, by the name of the size; both ends belong to it."""
MOST = (1, 10, 100)
"""Detections of an image and class that count."""
_CASES = len(AREA_RANGES) * len(IOUS)
_BITS = 1 << np.arange(_CASES, dtype=np.int64)
_COLUMNS = 4
"""Numbers that are left of a detection: score, class, and two sets of cases as bits."""


class BoxAverages(NamedTuple):
    """The figures of all images, in percent; None where there is no object."""

    metrics: dict[str, float | None]
    """``ap``, ``ap50``, ``ap75``, ``ap_small`` …, ``ar1`` …, ``ar_small`` …."""
    samples: list[int]
    """Objects of each class; those of crowds do not count."""
    per_class: list[float | None]
    """AP of each class."""


def match_boxes(found_D6: Array, objects_G7: Array, num_classes: int) -> tuple[Array, Array]:
    """Return four numbers of each detection of an image, [D, 4], and how many objects each size and class has, [S, K].

    A detection is a box (left, top, right, bottom), score and class; class −1 is none. An object is a box, class,
    whether it is a crowd, and area. The best detections choose first, each the free object of the largest IoU. What is
    left over may match a crowd or an object of another size, and then counts nowhere.
    """
    detections_D4 = np.zeros((len(found_D6), _COLUMNS))
    detections_D4[:, 1] = -1
    order = np.argsort(-found_D6[:, 4], kind="stable")
    counts_SK = np.zeros((len(AREA_RANGES), num_classes))
    present = np.unique(np.concatenate([found_D6[:, 5], objects_G7[:, 4]])).astype(int)
    for number in present[present >= 0]:
        objects = objects_G7[objects_G7[:, 4] == number]
        chosen = order[found_D6[order, 5] == number][: MOST[-1]]
        ignored_SG = _ignored_objects(objects)
        counts_SK[:, number] = (~ignored_SG).sum(1)
        if len(chosen):
            hit_DC, ignored_DC = _match_class(found_D6[chosen, :4], objects, ignored_SG)
            bits = [hit_DC @ _BITS, ignored_DC @ _BITS]
            detections_D4[chosen] = np.stack([found_D6[chosen, 4], found_D6[chosen, 5], *bits], axis=1)
    return detections_D4[order], counts_SK


def _ignored_objects(objects_G7: Array) -> NDArray[np.bool_]:
    """Return which objects do not count for each size, [S, G]: crowds, and those of other sizes."""
    crowd_G, areas_G = objects_G7[:, 5] > 0, objects_G7[:, 6]
    return np.stack([crowd_G | (areas_G < least) | (areas_G > most) for least, most in AREA_RANGES.values()])


def _match_class(
    boxes_D4: Array, objects_G7: Array, ignored_SG: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each detection and case, [D, C], whether it matches an object, and whether it counts nowhere."""
    sizes_D = np.prod(boxes_D4[:, 2:] - boxes_D4[:, :2], axis=1)
    outside_DS = np.stack([(sizes_D < least) | (sizes_D > most) for least, most in AREA_RANGES.values()], axis=1)
    hit_DC = np.zeros((len(boxes_D4), _CASES), dtype=np.int64)
    ignored_DC = np.repeat(outside_DS, len(IOUS), axis=1).astype(np.int64)
    ious_DG = intersections_over_unions(boxes_D4, objects_G7[:, :4], objects_G7[:, 5] > 0)
    ignored_CG = np.repeat(ignored_SG, len(IOUS), axis=0)
    least_C1 = np.tile(np.minimum(IOUS, 1 - 1e-10), len(AREA_RANGES))[:, None]
    crowd_G, taken_CG = objects_G7[:, 5] > 0, np.zeros_like(ignored_CG)
    for detection in np.flatnonzero((ious_DG >= IOUS[0]).any(1)):
        iou_G = ious_DG[detection]
        free_CG = (iou_G >= least_C1) & (crowd_G | ~taken_CG)
        counted_CG = free_CG & ~ignored_CG
        allowed_CG = np.where(counted_CG.any(1, keepdims=True), counted_CG, free_CG)
        # The last of equals, as in COCO's own code.
        best_C = ious_DG.shape[1] - 1 - np.where(allowed_CG, iou_G, -1.0)[:, ::-1].argmax(1)
        cases = np.flatnonzero(allowed_CG.any(1))
        taken_CG[cases, best_C[cases]] = True
        hit_DC[detection, cases] = 1
        ignored_DC[detection, cases] = ignored_CG[cases, best_C[cases]]
    return hit_DC, ignored_DC


def intersections_over_unions(boxes_D4: Array, others_G4: Array, crowd_G: NDArray[np.bool_]) -> Array:
    """Return the IoU of each box with each other one, [D, G]. With a crowd it is the share of the box's own area."""
    corners = np.minimum(boxes_D4[:, None, 2:], others_G4[:, 2:]) - np.maximum(boxes_D4[:, None, :2], others_G4[:, :2])
    both_DG = np.prod(corners.clip(min=0), axis=2)
    own_D1, other_G = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (boxes_D4, others_G4))
    own_D1 = own_D1[:, None]
    union_DG = np.where(crowd_G, own_D1, own_D1 + other_G - both_DG)
    return np.divide(both_DG, union_DG, out=np.zeros_like(both_DG), where=both_DG > 0)


def average_precision_of_boxes(detections_ND4: Array, counts_NSK: Array) -> BoxAverages:
    """Return the figures of all images; detections of equal score count in the order of the images."""
    counts_SK, num_classes = counts_NSK.sum(0), counts_NSK.shape[2]
    precisions_KSI = np.full((num_classes, len(AREA_RANGES), len(IOUS)), np.nan)
    recalls_KSMI = np.full((num_classes, len(AREA_RANGES), len(MOST), len(IOUS)), np.nan)
    for number in np.flatnonzero(counts_SK.any(0)):
        for size, hit_MI, ignored_MI, places_M in _of_class(detections_ND4, int(number)):
            if objects_of_size := counts_SK[size, number]:
                right_MI, wrong_MI = hit_MI & ~ignored_MI, ~hit_MI & ~ignored_MI
                precisions_KSI[number, size] = _precisions(right_MI, wrong_MI, objects_of_size)
                recalls = [right_MI[places_M < most].sum(0) / objects_of_size for most in MOST]
                recalls_KSMI[number, size] = recalls
    metrics = _metrics(precisions_KSI, recalls_KSMI)
    per_class = [_percent(precisions_I) for precisions_I in precisions_KSI[:, 0]]
    return BoxAverages(metrics, counts_SK[0].astype(int).tolist(), per_class)


def _of_class(
    detections_ND4: Array, number: int
) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]]:
    """Yield each size with the class's detections, the best first: hits, those that count nowhere, place in image."""
    chosen_ND = detections_ND4[..., 1] == number
    places_M = (chosen_ND.cumsum(1) - 1)[chosen_ND]
    detections_M4 = detections_ND4[chosen_ND]
    order = np.argsort(-detections_M4[:, 0], kind="stable")
    hit_MC, ignored_MC = ((detections_M4[order, column, None].astype(np.int64) & _BITS) > 0 for column in (2, 3))
    for size in range(len(AREA_RANGES)):
        cases = slice(size * len(IOUS), (size + 1) * len(IOUS))
        yield size, hit_MC[:, cases], ignored_MC[:, cases], places_M[order]


def _precisions(right_MI: NDArray[np.bool_], wrong_MI: NDArray[np.bool_], objects: float) -> Array:
    """Return for each threshold the mean over ``RECALLS`` of the largest precision at that recall or a larger one."""
    right_MI, wrong_MI = (each.cumsum(0, dtype=np.float64) for each in (right_MI, wrong_MI))
    precision_MI = right_MI / (right_MI + wrong_MI + np.spacing(1))
    precision_MI = np.maximum.accumulate(precision_MI[::-1])[::-1]
    recall_MI = right_MI / objects
    found = np.zeros(len(IOUS))
    for number in range(len(IOUS)):
        places = np.searchsorted(recall_MI[:, number], RECALLS)
        found[number] = precision_MI[places[places < len(precision_MI)], number].sum() / len(RECALLS)
    return found


def _metrics(precisions_KSI: Array, recalls_KSMI: Array) -> dict[str, float | None]:
    at_50, at_75 = (int(np.flatnonzero(np.isclose(IOUS, iou))[0]) for iou in (0.5, 0.75))
    found = {
        "ap": precisions_KSI[:, 0],
        "ap50": precisions_KSI[:, 0, at_50],
        "ap75": precisions_KSI[:, 0, at_75],
    }
    sizes = list(enumerate(AREA_RANGES))[1:]
    found |= {f"ap_{size}": precisions_KSI[:, number] for number, size in sizes}
    found |= {f"ar{most}": recalls_KSMI[:, 0, number] for number, most in enumerate(MOST)}
    found |= {f"ar_{size}": recalls_KSMI[:, number, -1] for number, size in sizes}
    return {name: _percent(values) for name, values in found.items()}


def _percent(values: Array) -> float | None:
    """Return the mean of the numbers in percent, without those of classes that have no object."""
    known = values[~np.isnan(values)]
    return 100 * float(known.mean()) if len(known) else None
