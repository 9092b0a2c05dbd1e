"""Average precision of boxes is that of COCO's own code."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from box_scenes import SCENE_CLASSES, Scene, draw_scene
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.tasks._average_precision import BoxAverages, average_precision_of_boxes, match_boxes

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NAMES += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


def as_xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]], axis=1).tolist()


def by_coco(scenes: list[Scene]) -> COCOeval:
    """Return COCO's evaluation of the scenes; it prints much."""
    objects, detections = [], []
    for image, (found_D6, objects_G7) in enumerate(scenes, 1):
        for box, (*_, label, crowd, area) in zip(as_xywh(objects_G7), objects_G7.tolist(), strict=True):
            known = {"id": len(objects) + 1, "image_id": image, "category_id": int(label)}
            objects.append({**known, "bbox": box, "iscrowd": int(crowd), "area": area})
        for box, (*_, score, label) in zip(as_xywh(found_D6), found_D6.tolist(), strict=True):
            detections.append({"image_id": image, "category_id": int(label), "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(1, len(scenes) + 1)],
            "categories": [{"id": number} for number in range(SCENE_CLASSES)],
            "annotations": objects,
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def by_us(scenes: list[Scene]) -> BoxAverages:
    most = max(len(found_D6) for found_D6, _ in scenes)
    none_16 = np.array([[0.0, 0, 0, 0, 0, -1]])
    padded = [(np.concatenate([found, none_16.repeat(most - len(found), 0)]), objects) for found, objects in scenes]
    matched = [match_boxes(found, objects, SCENE_CLASSES) for found, objects in padded]
    return average_precision_of_boxes(*(np.stack(parts) for parts in zip(*matched, strict=True)))


def assert_equal(scenes: list[Scene]) -> None:
    theirs, ours = by_coco(scenes), by_us(scenes)
    expected = {name: None if value < 0 else 100 * value for name, value in zip(NAMES, theirs.stats, strict=True)}
    assert list(ours.metrics) == list(NAMES)
    assert ours.metrics == pytest.approx(expected, abs=1e-10)  # 1e-12 as shares
    precisions_IRK = theirs.eval["precision"][:, :, :, 0, 2]
    assert ours.per_class == pytest.approx(
        [None if (of_class < 0).any() else 100 * of_class.mean() for of_class in np.moveaxis(precisions_IRK, 2, 0)],
        abs=1e-10,
    )


def test_the_twelve_figures_are_those_of_pycocotools_on_two_hundred_scenes():
    scenes = [draw_scene(seed) for seed in range(200)]
    assert any(objects[:, 5].any() for _, objects in scenes)
    for start in range(0, 200, 20):
        assert_equal(scenes[start : start + 20])
    assert_equal(scenes)


def test_only_the_hundred_best_detections_of_an_image_and_class_count():
    scenes = [draw_scene(seed, most=450) for seed in (8, 19)]
    assert min(np.bincount(found[:, 5].astype(int)).max() for found, _ in scenes) > 100
    assert_equal(scenes)


@pytest.mark.parametrize("kind", ["no object", "no detection", "crowds alone"])
def test_images_without_objects_or_detections_are_those_of_pycocotools(kind: str):
    found, objects = draw_scene(1)
    assert len(found)
    assert len(objects)
    if kind == "crowds alone":
        objects[:, 5] = 1
    elif kind == "no object":
        objects = objects[:0]
    scenes = [(found[:0] if kind == "no detection" else found, objects)]
    if kind == "no detection":  # pycocotools refuses an empty list
        scenes.append((found, objects[:0]))
    assert_equal(scenes)
