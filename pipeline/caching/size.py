"""Which kinds of answer there are to keep, and what they take on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.builders.meta import probe, training_labels
from pipeline.builders.teacher import teacher_specs
from pipeline.caching.blocks import shown_bytes
from pipeline.config.recipe import Recipe
from pipeline.errors import RecipeError
from pipeline.teachers.cache import LOGITS, NAME, CacheEntry, Encoding, resolved

LIKELY = 8
"""Part of a map's channels that the table shows as encoded, where no other is asked for."""


class Choice(NamedTuple):
    """A kind of answer, and whether it is written."""

    name: str
    kind: CacheEntry
    """As a header has it, but for what only the teacher's answers tell."""
    written: bool

    @property
    def title(self) -> str:
        """The kind as a table shows it."""
        return f"{self.name} {' × '.join(map(str, self.kind.stored))}"


def choices(
    recipe: Recipe, sources: Sequence[Recipe], kinds: Iterable[str], encode: Mapping[str, int]
) -> tuple[list[Choice], list[str]]:
    """Return what there is to keep, small before large, and the names of the network's stages.

    ``sources`` are the recipes of ``teacher.recipes``. Written are the logits, what the recipe's losses read, ``kinds``
    and the stages of ``encode``. Raises RecipeError for a stage that the network does not have, and for an encoding
    that cannot be.
    """
    num_classes = training_labels(recipe.data)[0]
    named = teacher_specs(recipe, sources)[0]
    stages = list(probe(named._replace(taps=frozenset()), num_classes, recipe.data.size)[1].stages)
    ranks = _ranks(stages, encode)
    wanted = {LOGITS, *resolved(stages, [*recipe.taps.teacher, *kinds]).values(), *ranks}
    offered = {kind for kind in resolved(stages, ["embedding", "last"]).values() if kind in stages}
    taps = frozenset(wanted | offered) - {LOGITS}
    if odd := [kind for kind in sorted(taps) if not re.fullmatch(NAME, kind)]:
        raise RecipeError(f"teacher.stages: {odd[0]!r} becomes a file's name: small letters, digits and _, please")
    shapes = probe(named._replace(taps=taps), num_classes, recipe.data.size)[0].shapes
    found: list[Choice] = []
    for name in sorted(shapes, key=lambda name: int(np.prod(shapes[name]))):
        found += _choices_of(name, shapes[name], name in wanted, ranks.get(name))
    return found, stages


def _ranks(stages: Iterable[str], encode: Mapping[str, int]) -> dict[str, int]:
    """Return the components to keep by stage; raise RecipeError for one that is named twice, or is none."""
    ranks: dict[str, int] = {}
    for tap, rank in encode.items():
        for kind in resolved(stages, [tap]).values():
            if ranks.setdefault(kind, rank) != rank:
                raise RecipeError(f"encode: {kind} is to keep {ranks[kind]} components, and {rank}; say one of them")
    return ranks


def _choices_of(name: str, shape: tuple[int, ...], wanted: bool, rank: int | None) -> list[Choice]:
    """Return the kind as it is, and as it is or could be encoded."""
    if rank is not None and (name == LOGITS or not rank <= shape[0]):
        raise RecipeError(f"encode: {name} has {shape[0]} channels, and logits are kept whole; got {rank}")
    whole = Choice(name, CacheEntry(shape=shape), wanted and rank is None)
    if rank is None and len(shape) == 1:
        return [whole]
    encoded = Encoding(rank=rank or max(shape[0] // LIKELY, 1), sha256="", unexplained=0.0)
    return [whole, Choice(name, CacheEntry(shape=shape, encoded=encoded), rank is not None)]


def size_table(recipe: Recipe, found: list[Choice], views: int) -> str:
    """Return what the kinds of answer take on disk, for that many views."""
    _, labels_by_id, note = training_labels(recipe.data)
    images = len(labels_by_id)
    lines = [f"  {'':<28}{'bytes an image':>16}{'a view':>12}{f'{views} views':>12}"]
    for choice in found:
        mark = "*" if choice.written else " "
        row = choice.kind.row_bytes
        lines.append(f"{mark} {choice.title:<28}{row:>16,}{_sizes(row * images, views)}")
    total = sum(choice.kind.row_bytes for choice in found if choice.written)
    lines.append(f"* {'is written, together':<28}{total:>16,}{_sizes(total * images, views)}")
    return "\n".join([f"answers to {images:,} images, in float16", *lines, *([note] if note else [])])


def _sizes(view: int, views: int) -> str:
    return f"{shown_bytes(view):>12}{shown_bytes(views * view):>12}"
