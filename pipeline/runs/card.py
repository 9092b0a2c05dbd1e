"""The card of a student's weights file: what is needed to use the file alone.

It is one JSON text under one key of the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open

from pipeline.frozen_model import FrozenModel
from pipeline.runs.files import STUDENT
from pipeline.tasks._registry import TaskName
from shards.documents import DamagedFile, parse_document

CARD = "card"
"""Key of a file's metadata that holds the card."""


class Card(FrozenModel):
    """The network, the classes and the images of a student."""

    format: Literal[1] = 1
    """Version of the card's keys."""
    task: TaskName
    """The recipe's ``task``."""
    model: str
    """Name of the network, or ``package.module:factory``."""
    arguments: dict[str, Any]
    """More keyword arguments of the network's factory."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the classes, in the order of the logits."""
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Mean and standard deviation of red, green and blue, for pixel values in 0 … 1."""
    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    """Side of a validation image in pixels, or its height and width."""
    resize: PositiveInt | None = None
    """Short side before the centre crop; None is ``size``."""
    short: PositiveInt | None = None
    """Of boxes: the short side of a validation image in pixels, unless its long side would be longer than ``long``."""
    long: PositiveInt | None = None
    buckets: tuple[tuple[PositiveInt, PositiveInt], ...] | None = None
    """Of boxes: the sizes of padded images, height and width; an image has the first that holds it."""
    accuracy: dict[str, float] | None = None
    """Metrics of these weights on the validation images, in percent; None without validation images."""
    identity: str
    """Digest of the identity of the run that trained the weights."""
    best: dict[str, int | float] | None = None
    """Of the best weights: their main metric, and ``epoch``."""

    def metadata(self) -> dict[str, str]:
        """Return the card as metadata of a file. Equal cards are equal texts."""
        optional = ("short", "long", "buckets", "best")
        content = self.model_dump(mode="json", exclude={key for key in optional if getattr(self, key) is None})
        return {CARD: json.dumps(content, sort_keys=True, ensure_ascii=False)}


def read_card(path: Path) -> Card:
    """Return the card of a weights file.

    Raises FileNotFoundError if there is no file, and DamagedFile if it has no card or is damaged.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path}: is a folder; name the weights file, such as {path / STUDENT}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file")
    advice = f"give a run's student.safetensors, or measure it by a recipe: pipeline/evaluate.py RECIPE weights={path}"
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CARD)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: cannot be read as safetensors ({type(error).__name__}); {advice}") from None
    if text is None:
        raise DamagedFile(f"{path}: has no card, which says its network, classes and images; {advice}")
    return parse_document(text.encode(), f"{path}: card", Card, advice)
