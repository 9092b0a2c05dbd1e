"""Image files for the tests, small, and different for every number."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(number: int, width: int = 20, height: int = 16) -> np.ndarray:
    """Return a smooth uint8 image: a JPEG of it stays close to it."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """Return the pixels of an image file."""
    return np.asarray(Image.open(io.BytesIO(bytes(data))))


def jpeg(number: int, width: int = 20, height: int = 16) -> bytes:
    """Return a small JPEG file."""
    return encode(pixels(number, width, height))


def write_folders(root: Path, split: str, classes: list[str], images: int) -> dict[str, bytes]:
    """Write a split in ImageNet's folder layout; return its files by ``<wnid>/<file>``."""
    files = {}
    for label, wnid in enumerate(classes):
        for number in range(images):
            name = f"{wnid}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{1 + label + 7 * number:08d}.JPEG"
            files[f"{wnid}/{name}"] = jpeg(1000 * label + number + 500 * (split == "val"), 20 + number, 16 + label)
    for path, data in files.items():
        (root / split / path).parent.mkdir(parents=True, exist_ok=True)
        (root / split / path).write_bytes(data)
    return files


def write_splits(root: Path, classes: list[str], train: int, val: int) -> Path:
    """Write both splits so, with as many images of every class; return the folder."""
    write_folders(root, "train", classes, train)
    write_folders(root, "val", classes, val)
    return root


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a tar of some files, as GNU tar would write it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
