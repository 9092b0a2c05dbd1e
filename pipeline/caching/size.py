"""The kinds of output that a cache can store, and their size on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.builders.meta import probe, training_labels
from pipeline.builders.teacher import teacher_specs
from pipeline.config.recipe import Recipe
from pipeline.errors import RecipeError
from pipeline.image_size import size_text
from pipeline.teachers.cache import LOGITS, NAME, CacheEntry, Encoding, format_bytes, kinds_by_tap

CHANNEL_DIVISOR = 8
"""Channels of a map per principal component in the encoding that the table proposes, if the user gives no number."""


class Choice(NamedTuple):
    """One kind of output with one way to store it, as a row of the table."""

    name: str
    kind: CacheEntry
    """The entry of the header, without the facts that only the teacher's outputs determine."""
    written: bool
    """Whether the command writes it."""

    @property
    def title(self) -> str:
        """Return the name and the stored shape, for a table."""
        return f"{self.name} {' × '.join(map(str, self.kind.stored))}"


def choices(
    recipe: Recipe, sources: Sequence[Recipe], kinds: Iterable[str], encode: Mapping[str, int]
) -> tuple[list[Choice], list[str]]:
    """Return the kinds of output that can be stored, in order of size, and the names of the network's stages.

    ``sources`` are the recipes of ``teacher.runs``. The command writes the logits, the taps of the recipe's losses,
    ``kinds`` and the stages of ``encode``. Raises RecipeError for an unknown stage and for an impossible encoding.
    """
    num_classes = training_labels(recipe.data)[0]
    spec = teacher_specs(recipe, sources)[0]
    stages = list(probe(spec._replace(taps=frozenset()), num_classes, recipe.data.size)[1].stages)
    ranks = _ranks(stages, encode)
    wanted = {LOGITS, *kinds_by_tap(stages, [*recipe.taps.teacher, *kinds]).values(), *ranks}
    # The table also shows these two, so that a user can see their size before choosing them.
    offered = {kind for kind in kinds_by_tap(stages, ["embedding", "last"]).values() if kind in stages}
    taps = frozenset(wanted | offered) - {LOGITS}
    if invalid := [kind for kind in sorted(taps) if not re.fullmatch(NAME, kind)]:
        raise RecipeError(
            f"teacher.stages: {invalid[0]!r} becomes a file name: it must be lower-case letters, digits or _"
        )
    probed = probe(spec._replace(taps=taps), num_classes, recipe.data.size)[0].shapes
    shapes = {name: shape for name, shape in probed.items() if 0 not in shape}  # no logits without a head
    if not shapes.keys() & wanted:
        raise RecipeError("teacher.head: none leaves out the logits, and no loss reads features: nothing to write")
    found: list[Choice] = []
    for name in sorted(shapes, key=lambda name: int(np.prod(shapes[name]))):
        found += _storage_choices(name, shapes[name], name in wanted, ranks.get(name))
    return found, stages


def _ranks(stages: Iterable[str], encode: Mapping[str, int]) -> dict[str, int]:
    """Return the number of components by stage.

    Raises RecipeError for a stage with two different numbers, and for an unknown stage.
    """
    ranks: dict[str, int] = {}
    for tap, rank in encode.items():
        for kind in kinds_by_tap(stages, [tap]).values():
            if ranks.setdefault(kind, rank) != rank:
                raise RecipeError(f"encode: {kind} has both {ranks[kind]} and {rank} components; give one number")
    return ranks


def _storage_choices(name: str, shape: tuple[int, ...], wanted: bool, rank: int | None) -> list[Choice]:
    """Return the choices for one kind: stored as it is, and encoded with ``rank`` components or a default number."""
    if rank is not None and name == LOGITS:
        raise RecipeError(f"encode: {name} cannot be encoded; remove this entry")
    if rank is not None and rank > shape[0]:
        raise RecipeError(f"encode: {name} has {shape[0]} channels; give at most {shape[0]} components, got {rank}")
    plain = Choice(name, CacheEntry(shape=shape), wanted and rank is None)
    if rank is None and (len(shape) == 1 or name == LOGITS):
        return [plain]
    encoded = Encoding(rank=rank or max(shape[0] // CHANNEL_DIVISOR, 1), sha256="", unexplained=0.0)
    return [plain, Choice(name, CacheEntry(shape=shape, encoded=encoded), rank is not None)]


def check_one_size(recipe: Recipe, found: list[Choice]) -> None:
    """Raise RecipeError if images have several sizes, which says how large a view of the largest size would be."""
    if recipe.data.has_several_sizes:
        view = format_bytes(_written_bytes(found) * len(training_labels(recipe.data)[1]))
        raise RecipeError(
            f"data.buckets: a cache holds maps of one size; with all of {size_text(recipe.data.size)} a view would "
            f"have {view}; give one bucket, or train without a cache"
        )


def size_table(recipe: Recipe, found: list[Choice], views: int) -> str:
    """Return a table of the sizes on disk of the kinds of output, for that many views."""
    _, labels_by_id, note = training_labels(recipe.data)
    images = len(labels_by_id)
    lines = [f"  {'':<28}{'bytes an image':>16}{'a view':>12}{f'{views} views':>12}"]
    for choice in found:
        star = "*" if choice.written else " "
        row = choice.kind.row_bytes
        lines.append(f"{star} {choice.title:<28}{row:>16,}{_sizes(row * images, views)}")
    total = _written_bytes(found)
    lines.append(f"* {'is written, together':<28}{total:>16,}{_sizes(total * images, views)}")
    return "\n".join([f"answers to {images:,} images, in float16", *lines, *([note] if note else [])])


def _written_bytes(found: list[Choice]) -> int:
    """Return the bytes on disk of what the command writes of an image."""
    return sum(choice.kind.row_bytes for choice in found if choice.written)


def _sizes(view: int, views: int) -> str:
    return f"{format_bytes(view):>12}{format_bytes(views * view):>12}"
