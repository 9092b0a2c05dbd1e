"""Images of the demo data set: a textured shape on a cluttered background.

The class is the pair of shape and texture. Everything else is random and independent of the class: position, size,
rotation, colours, light, clutter, noise, and a bar across the image. Some shapes (square and pentagon) and textures
(stripes and waves) are easily confused. So a teacher's probabilities of the wrong classes carry information.

S is the image's side in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

Field = np.ndarray
"""A float64 value per pixel, [S, S]. The last bits of a sine differ between CPUs; in float32 they would be visible."""


def _polygon(corners: int, x: Field, y: Field) -> Field:
    sector = 2 * np.pi / corners
    angle = np.mod(np.arctan2(y, x), sector) - sector / 2
    return np.hypot(x, y) * np.cos(angle) - np.cos(sector / 2)


def _star(x: Field, y: Field) -> Field:
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(y, x), sector) - sector / 2) / (sector / 2)
    return 0.9 * (np.hypot(x, y) - (0.5 + 0.6 * angle))


def _cross(x: Field, y: Field) -> Field:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.95, short - 0.36)


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.68) - 0.27


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "square": lambda x, y: _polygon(4, x, y),
    "pentagon": lambda x, y: _polygon(5, x, y),
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
"""Signed distance to an outline of radius about 1, by shape: negative inside."""

TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "stripes": lambda u, v: np.sin(u),
    "waves": lambda u, v: np.sin(u + 1.3 * np.sin(0.8 * v)),
    "checks": lambda u, v: 1.5 * np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.7,
}
"""A periodic pattern, by texture: the second colour is used where it is positive."""

DRAWN_CLASSES = tuple(f"{shape}-{texture}" for shape, texture in itertools.product(SHAPES, TEXTURES))


def draw_image(class_name: str, side: int, random: np.random.Generator) -> np.ndarray:
    """Return a random image of a class, uint8 [S, S, 3]."""
    shape, texture = class_name.split("-")
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    # The order of the random calls is part of the format: it decides the demo's pixels.
    canvas = draw_background(x, y, random)
    radius = random.uniform(0.5, 0.8)
    center = random.uniform(-0.7, 0.7, 2) * (1 - radius)
    tilt = random.uniform(-0.4, 0.4)
    outline = SHAPES[shape](*rotate((x - center[0]) / radius, (y - center[1]) / radius, tilt)) * radius
    canvas = paint(canvas, outline, texture_colours(TEXTURES[texture], x, y, random))
    canvas = paint(canvas, _bar(x, y, random), random.uniform(0, 1, 3))
    return light_and_noise(canvas, x, y, random)


def light_and_noise(canvas: np.ndarray, x: Field, y: Field, random: np.random.Generator) -> np.ndarray:
    """Return the canvas, uint8 [S, S, 3], lit from one side and with noise."""
    light = 1 + random.uniform(0, 0.3) * rotate_randomly(x, y, random)[0]
    noise = random.normal(0, random.uniform(0.01, 0.05), canvas.shape)
    return np.clip(255 * (canvas * light[..., None] + noise), 0, 255).round().astype(np.uint8)


def rotate(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """Return the coordinates in a frame that is rotated by an angle, in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def rotate_randomly(x: Field, y: Field, random: np.random.Generator) -> tuple[Field, Field]:
    """Return the coordinates in a frame of a random direction."""
    return rotate(x, y, random.uniform(0, 2 * np.pi))


def paint(canvas: np.ndarray, distance: Field, colour: np.ndarray) -> np.ndarray:
    """Return the canvas with ``colour`` inside of an outline, by the signed distance to it."""
    # Anti-aliasing: a pixel on the outline is a mixture of both colours.
    share = np.clip(0.5 - distance * len(distance) / 2, 0, 1)[..., None]
    return canvas * (1 - share) + colour * share


def draw_background(x: Field, y: Field, random: np.random.Generator) -> np.ndarray:
    """Return a dark background of two colours with a few blobs, float64 [S, S, 3]."""
    one, other = random.uniform(0, 0.45, (2, 3))
    share = 0.5 + 0.35 * rotate_randomly(x, y, random)[0][..., None]
    canvas = one * share + other * (1 - share)
    for _ in range(random.integers(1, 6)):
        center = random.uniform(-1, 1, 2)
        long, broad = rotate_randomly(x - center[0], y - center[1], random)
        blob = np.hypot(long / random.uniform(0.1, 0.6), broad / random.uniform(0.05, 0.2)) - 1
        canvas = paint(canvas, 0.1 * blob, random.uniform(0, 0.6, 3))
    return canvas


def texture_colours(
    texture: Callable[[Field, Field], Field], x: Field, y: Field, random: np.random.Generator
) -> np.ndarray:
    """Return two bright colours in a pattern of random direction and phase, float64 [S, S, 3]."""
    waves = random.uniform(4, 7) * np.pi  # per unit, and the image is 2 units wide: a period of 9 to 16 pixels of 64
    u, v = rotate_randomly(waves * x, waves * y, random)
    share = np.clip(0.5 + 2 * texture(u + random.uniform(0, 7), v + random.uniform(0, 7)), 0, 1)[..., None]
    one = random.uniform(0.6, 1, 3)
    other = one - random.uniform(0.15, 0.5, 3)
    return one * (1 - share) + other * share


def _bar(x: Field, y: Field, random: np.random.Generator) -> Field:
    return np.abs(rotate_randomly(x, y, random)[0] - random.uniform(-0.7, 0.7)) - random.uniform(0, 0.1)
