"""Which kinds of answer there are to keep, and what they take on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.build_teacher import teacher_named, teacher_places
from pipeline.caching.blocks import shown_bytes
from pipeline.check import measure, training_labels
from pipeline.composition import RecipeError
from pipeline.recipe import Recipe
from pipeline.teacher_cache import DTYPE, LOGITS, resolved

LIKELY = 8
"""Part of a map's channels that the table shows as encoded, where no other is asked for."""


class Choice(NamedTuple):
    """A kind of answer, and whether it is written."""

    kind: str
    shape: tuple[int, ...]
    """Of an answer, without the batch."""
    rank: int | None
    """Principal components that are kept of its channels; None keeps it as it is."""
    written: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's answer on disk."""
        return DTYPE.itemsize * int(np.prod(self._stored))

    @property
    def title(self) -> str:
        """The kind as a table shows it."""
        return f"{self.kind} {' × '.join(map(str, self._stored))}"

    @property
    def _stored(self) -> tuple[int, ...]:
        return (self.rank or self.shape[0], *self.shape[1:])


def choices(recipe: Recipe, kinds: Iterable[str], encode: Mapping[str, int]) -> tuple[list[Choice], list[str]]:
    """Return what there is to keep, small before large, and the names of the network's stages.

    Written are the logits, what the recipe's losses read, ``kinds`` and the stages of ``encode``. Raises RecipeError
    for a stage that the network does not have, and for an encoding that cannot be.
    """
    num_classes = training_labels(recipe)[0]
    named = teacher_named(recipe, next(iter(teacher_places(recipe))))
    stages = list(measure(named._replace(taps=frozenset()), num_classes, recipe.data.size)[1].stages)
    ranks = dict(zip(resolved(stages, encode).values(), encode.values(), strict=True))
    wanted = {LOGITS, *resolved(stages, [*recipe.taps.teacher, *kinds]).values(), *ranks}
    offered = {kind for kind in resolved(stages, ["embedding", "last"]).values() if kind in stages}
    taps = frozenset(wanted | offered) - {LOGITS}
    shapes = measure(named._replace(taps=taps), num_classes, recipe.data.size)[0].shapes
    found: list[Choice] = []
    for kind in sorted(shapes, key=lambda kind: int(np.prod(shapes[kind]))):
        found += _choices_of(kind, shapes[kind], kind in wanted, ranks.get(kind))
    return found, stages


def _choices_of(kind: str, shape: tuple[int, ...], wanted: bool, rank: int | None) -> list[Choice]:
    """Return the kind as it is, and as it is or could be encoded."""
    if rank is not None and (kind == LOGITS or not rank <= shape[0]):
        raise RecipeError(f"command line: encode: {kind} has {shape[0]} channels, and logits are kept whole")
    whole = Choice(kind, shape, None, wanted and rank is None)
    if rank is None and len(shape) == 1:
        return [whole]
    return [whole, Choice(kind, shape, rank or max(shape[0] // LIKELY, 1), rank is not None)]


def table(recipe: Recipe, found: list[Choice], views: int) -> str:
    """Return what the kinds of answer take on disk, for that many views."""
    _, labels_by_id, note = training_labels(recipe)
    images = len(labels_by_id)
    lines = [f"  {'':<28}{'bytes an image':>16}{'a view':>12}{f'{views} views':>12}"]
    for choice in found:
        mark = "*" if choice.written else " "
        lines.append(f"{mark} {choice.title:<28}{choice.row_bytes:>16,}{_sizes(choice.row_bytes * images, views)}")
    total = sum(choice.row_bytes for choice in found if choice.written)
    lines.append(f"* {'is written, together':<28}{total:>16,}{_sizes(total * images, views)}")
    return "\n".join([f"answers to {images:,} images, in float16", *lines, *([note] if note else [])])


def _sizes(view: int, views: int) -> str:
    return f"{shown_bytes(view):>12}{shown_bytes(views * view):>12}"
