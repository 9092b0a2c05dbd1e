"""Detection: an image has objects, each with a box and a class.   B batch, N objects, D detections, K classes.

The metrics are the twelve of COCO. AP is the mean over the classes, and over ten thresholds of the intersection over
union (IoU). AR is the recall of the best detections, averaged likewise. Boxes are compared in pixels of the stored
image. An object is small below 32² pixels, and large above 96².
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import gather_rows
from pipeline.features.names import OPTIONAL
from pipeline.tasks._average_precision import AREA_RANGES, average_precision_of_boxes, match_boxes
from pipeline.tasks._base import Details, Evaluation, Seen, Task
from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, DETECTIONS, DRAWS, LIKELY, SCALES, SIZES

CLASS_MAPS = "head.class"
"""Tap of the class logits as maps [B, anchors·K, h, w], one for each level, of detectors of one stage."""
REGION_TARGETS = "roi.targets"
"""Tap of what the regions of a detector of two stages should become, [B, R, 5]; the label, from 1 on, is the last."""


class Detection(Task):
    """Average precision and recall of the boxes that a network finds."""

    titles: ClassVar[dict[str, str]] = {
        **{"ap": "AP", "ap50": "AP50", "ap75": "AP75"},
        **{"ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large"},
        **{"ar1": "AR1", "ar10": "AR10", "ar100": "AR100"},
        **{"ar_small": "AR small", "ar_medium": "AR medium", "ar_large": "AR large"},
    }
    training_metric = "class_accuracy"
    images_have = "have boxes"
    script = "shards/prepare_coco.py"
    targets = frozenset({BOXES, CLASSES, CROWD, AREAS, SIZES, SCALES, DRAWS})
    taps = frozenset({DETECTIONS, f"{CLASS_MAPS}{OPTIONAL}", f"{REGION_TARGETS}{OPTIONAL}"})
    of_boxes = True

    def blank_targets(self, rows: int, num_classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return targets of images without any object."""
        return {
            BOXES: torch.zeros(rows, 1, 4),
            CLASSES: torch.full((rows, 1), -1),
            CROWD: torch.zeros(rows, 1, dtype=torch.bool),
            AREAS: torch.zeros(rows, 1),
            SIZES: torch.tensor(size).repeat(rows, 1),
            SCALES: torch.ones(rows, 2),
            DRAWS: torch.zeros(rows, 2, dtype=torch.int64),
        }

    def measure_batch(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the share of objects whose class has the largest logit at the middle of the box, on any level.

        Of a detector of two stages it is the share of the regions on an object whose class has the largest logit.
        """
        if REGION_TARGETS in outputs.features:
            labels_BR = outputs.features[REGION_TARGETS][..., 4]
            right_BR = (outputs.logits.argmax(-1) + 1 == labels_BR) & (labels_BR > 0)
            return 100 * right_BR.sum().float() / (labels_BR > 0).sum().clamp(min=1)
        classes_BN, boxes_BN4 = batch.targets[CLASSES], batch.targets[BOXES]
        middles_BN2 = (boxes_BN4[..., :2] + boxes_BN4[..., 2:]) / 2
        shares_BN2 = middles_BN2 / middles_BN2.new_tensor(batch.images_BCHW.shape[:1:-1])
        maps = [map_BCHW for name, map_BCHW in outputs.features.items() if name.startswith(f"{CLASS_MAPS}.")]
        classes = outputs.logits.shape[-1]
        logits_LBNK = torch.stack([_logits_at(map_BCHW, shares_BN2, classes) for map_BCHW in maps])
        counted_BN = (classes_BN >= 0) & ~batch.targets[CROWD]
        right_BN = (logits_LBNK.amax(0).argmax(-1) == classes_BN) & counted_BN
        return 100 * right_BN.sum().float() / counted_BN.sum().clamp(min=1)

    def see(self, outputs: Outputs, batch: Batch) -> Seen:
        """Return the ids, and what ``match_boxes`` makes of each image."""
        return batch.ids_B, *_match(outputs, batch)

    def summarize(self, seen: Iterable[Seen]) -> Evaluation:
        """Return COCO's figures. Without an object of a size, those of the size are left out; without any, AP is 0."""
        ids_N, *matched = (gather_rows(torch.cat(columns)) for columns in zip(*seen, strict=True))
        # In the order of the ids, which decides between equal scores. Padding has id −1.
        order = ids_N.argsort()[int((ids_N < 0).sum()) :]
        found = average_precision_of_boxes(*(each[order].cpu().numpy() for each in matched))
        known = {name: value for name, value in found.metrics.items() if value is not None}
        return Evaluation({self.metric: 0.0} | known, len(order))

    def agreement(self, a: Outputs, b: Outputs, batch: Batch) -> Tensor:
        """Return the number of likely boxes that both find, and that of all likely boxes, of either network.

        A box is likely by its score, ``LIKELY``. Two boxes are one if they have the same class and an IoU of one half;
        they are two of all boxes.
        """
        counts = np.zeros(2, dtype=np.int64)
        ours_BD6, theirs_BD6 = (stored_detections(outputs, batch) for outputs in (a, b))
        for number in np.flatnonzero(batch.labels_B.cpu().numpy() >= 0):
            counts += _count_same(*(found[number][found[number][:, 4] >= LIKELY] for found in (ours_BD6, theirs_BD6)))
        return torch.from_numpy(counts).to(batch.labels_B.device)

    def detail_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return what ``match_boxes`` makes of each image, in one row."""
        return torch.cat([each.flatten(1) for each in _match(outputs, batch)], dim=1)

    def detail(self, rows_NC: Tensor, num_classes: int, accepted_NK: Tensor | None = None) -> Details:
        """Return COCO's figures, and AP of each class with the number of its objects."""
        counts = len(AREA_RANGES) * num_classes
        detections_NC, counts_NC = (part.cpu().numpy() for part in rows_NC.tensor_split([-counts], dim=1))
        found = average_precision_of_boxes(
            detections_NC.reshape(len(rows_NC), -1, 4), counts_NC.reshape(len(rows_NC), -1, num_classes)
        )
        per_class: dict[str, list[Any]] = {"samples": found.samples, "average_precision": found.per_class}
        return Details({**found.metrics, "nll": None, "ece": None}, per_class)

    def divergence(self, teacher: Outputs, student: Outputs) -> Tensor | None:
        """Return None: an image has many boxes, and no distribution of its own."""
        return None


def _match(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what ``match_boxes`` makes of each image, float64 [B, D, 4] and [B, S, K], on the batch's device."""
    pairs = zip(stored_detections(outputs, batch), stored_objects(batch), strict=True)
    matched = [match_boxes(found_D6, objects_N7, outputs.logits.shape[-1]) for found_D6, objects_N7 in pairs]
    detections, counts = (torch.from_numpy(np.stack(parts)) for parts in zip(*matched, strict=True))
    return detections.to(batch.labels_B.device), counts.to(batch.labels_B.device)


def stored_detections(outputs: Outputs, batch: Batch) -> NDArray[np.float64]:
    """Return the detections, float64 [B, D, 6], in pixels of the stored images, inside of which they are cut off."""
    found_BD6 = outputs.features[DETECTIONS].double()
    height_B, width_B = batch.targets[SIZES].double().unbind(1)
    edges_B14 = torch.stack([width_B, height_B, width_B, height_B], dim=1)[:, None]
    boxes_BD4 = found_BD6[..., :4].clamp(min=0).minimum(edges_B14)
    return torch.cat([_in_stored_pixels(boxes_BD4, batch), found_BD6[..., 4:]], dim=2).cpu().numpy()


def stored_objects(batch: Batch) -> NDArray[np.float64]:
    """Return the objects, float64 [B, N, 7]: box in pixels of the stored image, class, whether a crowd, and area."""
    targets = batch.targets
    columns = [targets[name].double()[..., None] for name in (CLASSES, CROWD, AREAS)]
    return torch.cat([_in_stored_pixels(targets[BOXES].double(), batch), *columns], dim=2).cpu().numpy()


def _in_stored_pixels(boxes_BN4: Tensor, batch: Batch) -> Tensor:
    # Scales are along height and width; boxes begin with the place along the width.
    return boxes_BN4 / batch.targets[SCALES].double()[:, [1, 0, 1, 0]][:, None]


def _count_same(ours_D6: NDArray[np.float64], theirs_D6: NDArray[np.float64]) -> tuple[int, int]:
    """Return the number of boxes that both have, counted in both, and of all boxes."""
    no_crowd_D2 = np.zeros((len(theirs_D6), 2))
    objects_D7 = np.column_stack([theirs_D6[:, :4], theirs_D6[:, 5], no_crowd_D2])
    classes = int(max(ours_D6[:, 5].max(initial=0), theirs_D6[:, 5].max(initial=0))) + 1
    detections_D4, _ = match_boxes(ours_D6, objects_D7, classes)
    same = int((detections_D4[:, 2].astype(int) & 1).sum())  # the first case: any area, and an IoU of one half
    return 2 * same, len(ours_D6) + len(theirs_D6)


def _logits_at(map_BCHW: Tensor, shares_BN2: Tensor, classes: int) -> Tensor:
    """Return the largest logit of each class over the anchors of a cell, [B, N, K].

    A cell is given by its place along width and height, as shares of the image's sides.
    """
    height, width = map_BCHW.shape[2:]
    columns_BN, rows_BN = (
        (shares_BN2[..., axis] * cells).long().clamp(0, cells - 1) for axis, cells in enumerate((width, height))
    )
    cells_B1N = (rows_BN * width + columns_BN)[:, None].expand(-1, map_BCHW.shape[1], -1)
    return map_BCHW.flatten(2).gather(2, cells_B1N).unflatten(1, (-1, classes)).amax(1).movedim(1, 2)
