"""Torchvision's published weights of detectors, in the form that this project's networks take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision.models
from torch import Tensor

from pipeline.models.detector import Detector
from pipeline.models.faster_rcnn import FasterRCNNDetector

NAMES = {
    "retinanet_resnet50": "retinanet_resnet50_fpn",
    "retinanet_resnet50_v2": "retinanet_resnet50_fpn_v2",
    "fcos_resnet50": "fcos_resnet50_fpn",
    "fasterrcnn_resnet50": "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_v2": "fasterrcnn_resnet50_fpn_v2",
}
"""Torchvision's names of the networks that it has weights for."""
WITHOUT_EPS = ("retinanet_resnet50", "fasterrcnn_resnet50")
"""Networks whose BatchNorms were published without the ``EPS`` that BatchNorms add to the variance."""
EPS = 1e-5
BACKGROUND = "__background__"
"""Torchvision's name of the category 0, which a class of Faster R-CNN stands for, and no other network's."""
NO_CLASSES = (BACKGROUND, "N/A")
"""Torchvision's names of categories that no object has."""


def torchvision_name(name: str) -> str:
    """Return torchvision's name of a network."""
    return NAMES.get(name, name)


def without_eps(state: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    """Return the weights with which a BatchNorm that adds ``EPS`` computes what the published one does."""
    if name not in WITHOUT_EPS:
        return state
    found = dict(state)
    for key, variance_C in state.items():
        if key.endswith(".running_var"):
            weight = f"{key.removesuffix('running_var')}weight"
            found[weight] = state[weight] * ((variance_C + EPS) / variance_C).sqrt()
    return found


def fitted_classes(state: Mapping[str, Tensor], model: Detector, name: str, weights: str) -> Mapping[str, Tensor]:
    """Return the published weights with the rows of COCO's 80 classes alone, if the model has 80 classes.

    The weights have a row for each number of a category, 0 to 90, of which some have no objects. Classes are numbered
    in the order of the categories.
    """
    published: Any = torchvision.models.get_model_weights(torchvision_name(name)).__members__[weights].value
    categories = published.meta["categories"]
    kept = [number for number, category in enumerate(categories) if category not in NO_CLASSES]
    if not model.has_head or model.num_classes != len(kept):
        return state
    if isinstance(model, FasterRCNNDetector):
        kept = [categories.index(BACKGROUND), *kept]

    def rows_of_classes(key: str, value: Tensor) -> Tensor:
        if key.startswith("head.classification_head.cls_logits."):  # every anchor has a row for each
            return value.unflatten(0, (-1, len(categories)))[:, kept].flatten(0, 1)
        if key.startswith("roi_heads.box_predictor."):  # each has one row, or four
            return value.unflatten(0, (len(categories), -1))[kept].flatten(0, 1)
        return value

    return {key: rows_of_classes(key, value) for key, value in state.items()}
