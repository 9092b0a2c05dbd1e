"""The size of images: one number for square ones, or their height and width, in pixels."""

from __future__ import annotations

Resolution = int | tuple[int, int]


def height_width(size: Resolution) -> tuple[int, int]:
    """Return the height and the width of images of a size."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Resolution) -> str:
    """Return a size as text: ``224``, or ``512 × 1024``."""
    return " × ".join(map(str, size)) if isinstance(size, tuple) else str(size)
