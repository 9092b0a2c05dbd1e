"""Average precision of boxes is that of COCO's own code."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.tasks._average_precision import BoxAverages, average_precision_of_boxes, match_boxes

CLASSES = 3
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
NAMES += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
Scene = tuple[np.ndarray, np.ndarray]
"""Detections [D, 6] and objects [G, 7] of an image."""


def draw_scene(seed: int, *, most: int = 12) -> Scene:
    """Return an image of objects of all sizes, some of them crowds, and of detections near them and elsewhere.

    Scores have ten values, so that many are equal. One image in eight has no object, one in eight no detection.
    """
    random = np.random.default_rng(seed)
    objects, detections = (0 if random.random() < 1 / 8 else random.integers(1, most + 1) for _ in range(2))
    corners_G2, sides_G2 = random.integers(0, 160, (objects, 2)), random.choice([9, 32, 50, 96, 150], (objects, 2))
    classes_G = random.integers(0, CLASSES, objects)
    areas_G = np.where(random.random(objects) < 0.5, 1, 0.7) * sides_G2.prod(1)
    crowd_G = random.random(objects) < 0.2
    objects_G7 = np.column_stack([corners_G2, corners_G2 + sides_G2, classes_G, crowd_G, areas_G]).astype(float)
    found_D6 = np.column_stack([random.integers(0, 160, (detections, 4)), np.zeros((detections, 2))]).astype(float)
    found_D6[:, 2:4] = found_D6[:, :2] + random.integers(5, 150, (detections, 2))
    found_D6[:, 5] = random.integers(0, CLASSES, detections)
    if objects:
        near_D = random.random(detections) < 0.8
        aims_D = random.integers(0, objects, detections)
        aimed_D6 = np.column_stack([objects_G7[aims_D, :4] + random.integers(-3, 4, (detections, 4)), found_D6[:, 4:]])
        aimed_D6[:, 5] = np.where(random.random(detections) < 0.9, objects_G7[aims_D, 4], found_D6[:, 5])
        found_D6[near_D] = aimed_D6[near_D]
    found_D6[:, 4] = random.integers(1, 11, detections) / 10
    return found_D6, objects_G7


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
            "categories": [{"id": number} for number in range(CLASSES)],
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
    matched = [match_boxes(found, objects, CLASSES) for found, objects in padded]
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
