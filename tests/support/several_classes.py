"""Images of several classes each: a coloured square for each class that the image has."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "yellow": (220, 210, 50)}
CLASSES = tuple(COLOURS)


def has_classes(count: int, seed: int) -> np.ndarray:
    """Return which classes each image has, bool [count, 4]; some images have none."""
    return np.random.default_rng(seed).random((count, len(CLASSES))) < 0.4


def draw(has: np.ndarray, rng: np.random.Generator, side: int = 24) -> Image.Image:
    """Return an image of those classes; each one's square is somewhere in a quarter of its own."""
    pixels = rng.integers(90, 140, (side, side, 3))
    for place, colour in enumerate(COLOURS.values()):
        if has[place]:
            top, left = rng.integers(0, side // 4, 2) + np.array(divmod(place, 2)) * (side // 2)
            pixels[top : top + side // 4, left : left + side // 4] = colour
    return Image.fromarray(pixels.astype(np.uint8))


def write_images(folder: Path, name: str, count: int, seed: int) -> Path:
    """Write ``count`` images into ``folder/images/name``, and return their list of labels, a column for each class."""
    of_all, rng = has_classes(count, seed), np.random.default_rng(seed)
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *CLASSES])
        for number, has in enumerate(of_all):
            draw(has, rng).save(folder / "images" / name / f"{number}.png")
            writer.writerow([f"{name}/{number}.png", *has.astype(int)])
    return folder / f"{name}.csv"
