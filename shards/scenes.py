"""Scenes of the demo of dense tasks: some textured shapes on a cluttered background, and the class of every pixel.

The class of a figure is its shape; its texture, place, size, rotation and colours say nothing about it. Later figures
cover earlier ones.

S is the scene's side in pixels, and N the number of its boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shards.boxes import BOX_DTYPE, no_boxes
from shards.drawing import SHAPES, TEXTURES, draw_background, light_and_noise, paint, rotate, texture_colours

SCENE_CLASSES = ("background", *SHAPES)
"""Classes of pixels; a figure's class is the position of its shape."""
MOST_FIGURES = 4
_LEAST_PIXELS, _LEAST_SHARE = 20, 0.3
"""Visible pixels of a figure that has a box, and their share of the figure."""
_RADII = (0.16, 0.42)
"""Smallest and largest radius of a figure, in halves of the side."""


class SceneFigure(NamedTuple):
    """A figure of a scene: its class, the number of its pixels, and which of them no later figure covers.

    ``visible`` is bool [S, S]. ``pixels`` are those inside of the image, covered or not.
    """

    label: int
    pixels: int
    visible: np.ndarray


class Scene(NamedTuple):
    """A scene: its image, uint8 [S, S, 3], its mask of classes, uint8 [S, S], and its figures, the lowest first."""

    image: np.ndarray
    mask: np.ndarray
    figures: list[SceneFigure]


def draw_scene(side: int, random: np.random.Generator) -> Scene:
    """Return a random scene of one to four figures."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    # The order of the random calls is part of the format: it decides the pixels.
    canvas = draw_background(x, y, random)
    mask = np.zeros((side, side), np.uint8)
    inside: list[np.ndarray] = []
    labels = random.integers(1, len(SCENE_CLASSES), random.integers(1, MOST_FIGURES + 1)).tolist()
    for label in labels:
        texture = TEXTURES[list(TEXTURES)[random.integers(len(TEXTURES))]]
        radius = random.uniform(*_RADII)
        center = random.uniform(-1, 1, 2) * (1 - radius / 2)
        moved = rotate((x - center[0]) / radius, (y - center[1]) / radius, random.uniform(0, 2 * np.pi))
        distance = SHAPES[SCENE_CLASSES[label]](*moved) * radius
        canvas = paint(canvas, distance, texture_colours(texture, x, y, random))
        inside.append(distance < 0)
        mask[inside[-1]] = label
    covered = np.zeros((side, side), np.bool_)
    figures = []
    for label, pixels in zip(reversed(labels), reversed(inside), strict=True):
        figures.append(SceneFigure(label, int(pixels.sum()), pixels & ~covered))
        covered |= pixels
    return Scene(light_and_noise(canvas, x, y, random), mask, figures[::-1])


def boxes_of(scene: Scene) -> np.ndarray:
    """Return the boxes of a scene's figures, float32 [N, 7] as in ``shards/boxes.py``, the lowest figure first.

    A box is tight around the visible part of a figure, whose pixels are its area. Classes count from 0, without the
    background. Figures that are nearly hidden have no box.
    """
    rows = [no_boxes()]
    for figure in scene.figures:
        y, x = np.nonzero(figure.visible)
        if len(y) >= _LEAST_PIXELS and len(y) >= _LEAST_SHARE * figure.pixels:
            edges = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            rows.append(np.array([(*edges, figure.label - 1, 0, len(y))], BOX_DTYPE))
    return np.concatenate(rows)
