"""Images of drawn objects and detections, for tests of the metrics of boxes."""

from __future__ import annotations

import numpy as np

SCENE_CLASSES = 3
Scene = tuple[np.ndarray, np.ndarray]
"""Detections [D, 6] and objects [G, 7] of an image."""


def draw_scene(seed: int, *, most: int = 12) -> Scene:
    """Return an image of objects of all sizes, some of them crowds, and of detections near them and elsewhere.

    Scores have ten values, so that many are equal. One image in eight has no object, one in eight no detection.
    """
    random = np.random.default_rng(seed)
    objects, detections = (0 if random.random() < 1 / 8 else random.integers(1, most + 1) for _ in range(2))
    corners_G2, sides_G2 = random.integers(0, 160, (objects, 2)), random.choice([9, 32, 50, 96, 150], (objects, 2))
    classes_G = random.integers(0, SCENE_CLASSES, objects)
    areas_G = np.where(random.random(objects) < 0.5, 1, 0.7) * sides_G2.prod(1)
    crowd_G = random.random(objects) < 0.2
    objects_G7 = np.column_stack([corners_G2, corners_G2 + sides_G2, classes_G, crowd_G, areas_G]).astype(float)
    found_D6 = np.column_stack([random.integers(0, 160, (detections, 4)), np.zeros((detections, 2))]).astype(float)
    found_D6[:, 2:4] = found_D6[:, :2] + random.integers(5, 150, (detections, 2))
    found_D6[:, 5] = random.integers(0, SCENE_CLASSES, detections)
    if objects:
        near_D = random.random(detections) < 0.8
        aims_D = random.integers(0, objects, detections)
        aimed_D6 = np.column_stack([objects_G7[aims_D, :4] + random.integers(-3, 4, (detections, 4)), found_D6[:, 4:]])
        aimed_D6[:, 5] = np.where(random.random(detections) < 0.9, objects_G7[aims_D, 4], found_D6[:, 5])
        found_D6[near_D] = aimed_D6[near_D]
    found_D6[:, 4] = random.integers(1, 11, detections) / 10
    return found_D6, objects_G7
