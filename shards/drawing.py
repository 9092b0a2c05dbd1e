"""Draw the demo's images: a textured figure on a cluttered ground. Its class is its shape and its texture.

All else is drawn at random and says nothing about the class: place, size, tilt, colours, light, clutter, noise, a bar
across it. Some shapes (a square and a pentagon) and textures (stripes and waves) are easily confused, so that what a
teacher finds likely besides the class tells something. S: the image's side in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

Field = np.ndarray
"""A float64 value for each pixel, [S, S]. In float32 the last bits of a sine, which differ between CPUs, would show."""


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
"""Signed distance to an outline of radius about 1: negative inside."""

TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "stripes": lambda u, v: np.sin(u),
    "waves": lambda u, v: np.sin(u + 1.3 * np.sin(0.8 * v)),
    "checks": lambda u, v: 1.5 * np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.7,
}
"""A periodic pattern: positive where the second colour lies."""

DRAWN_CLASSES = tuple(f"{shape}-{texture}" for shape, texture in itertools.product(SHAPES, TEXTURES))


def draw_image(class_name: str, side: int, random: np.random.Generator) -> np.ndarray:
    """Draw an image of a class, uint8 [S, S, 3]."""
    shape, texture = class_name.split("-")
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    canvas = _ground(x, y, random)
    radius = random.uniform(0.5, 0.8)
    place = random.uniform(-0.7, 0.7, 2) * (1 - radius)
    tilt = random.uniform(-0.4, 0.4)
    outline = SHAPES[shape](*_turn((x - place[0]) / radius, (y - place[1]) / radius, tilt)) * radius
    canvas = _cover(canvas, outline, _textured(TEXTURES[texture], x, y, random))
    canvas = _cover(canvas, _bar(x, y, random), random.uniform(0, 1, 3))
    light = 1 + random.uniform(0, 0.3) * _turn_any(x, y, random)[0]
    noise = random.normal(0, random.uniform(0.01, 0.05), canvas.shape)
    return np.clip(255 * (canvas * light[..., None] + noise), 0, 255).round().astype(np.uint8)


def _turn(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _turn_any(x: Field, y: Field, random: np.random.Generator) -> tuple[Field, Field]:
    return _turn(x, y, random.uniform(0, 2 * np.pi))


def _cover(canvas: np.ndarray, distance: Field, colour: np.ndarray) -> np.ndarray:
    # A pixel on the outline is covered in part.
    share = np.clip(0.5 - distance * len(distance) / 2, 0, 1)[..., None]
    return canvas * (1 - share) + colour * share


def _ground(x: Field, y: Field, random: np.random.Generator) -> np.ndarray:
    one, other = random.uniform(0, 0.45, (2, 3))
    share = 0.5 + 0.35 * _turn_any(x, y, random)[0][..., None]
    canvas = one * share + other * (1 - share)
    for _ in range(random.integers(1, 6)):
        place = random.uniform(-1, 1, 2)
        long, broad = _turn_any(x - place[0], y - place[1], random)
        blot = np.hypot(long / random.uniform(0.1, 0.6), broad / random.uniform(0.05, 0.2)) - 1
        canvas = _cover(canvas, 0.1 * blot, random.uniform(0, 0.6, 3))
    return canvas


def _textured(texture: Callable[[Field, Field], Field], x: Field, y: Field, random: np.random.Generator) -> np.ndarray:
    waves = random.uniform(4, 7) * np.pi  # on the image's width of 2: a period of 9 to 16 pixels of 64
    u, v = _turn_any(waves * x, waves * y, random)
    share = np.clip(0.5 + 2 * texture(u + random.uniform(0, 7), v + random.uniform(0, 7)), 0, 1)[..., None]
    one = random.uniform(0.6, 1, 3)
    other = one - random.uniform(0.15, 0.5, 3)
    return one * (1 - share) + other * share


def _bar(x: Field, y: Field, random: np.random.Generator) -> Field:
    return np.abs(_turn_any(x, y, random)[0] - random.uniform(-0.7, 0.7)) - random.uniform(0, 0.1)
