"""What of a cache is not as it was written: found, and marked as not written, so that the writer writes it again."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.runs.folder import lock_folder
from pipeline.teachers.cache import DIGEST, MEND_HINT, Cache
from shards.manifest import write_atomically


class Damage(NamedTuple):
    """What is wrong with the answers of one kind at one view."""

    description: str
    """A line for the user."""
    view: int
    kind: str
    blocks: tuple[int, ...]
    """To be written again; none where that is marked already."""


def find_damage(cache: Cache) -> Iterator[Damage]:
    """Read everything and yield what is not as it was written, or not written."""
    every = tuple(range(cache.header.blocks))
    for kind in cache.header.kinds:
        lost = _lost_encoder(cache, kind)
        for view in range(cache.header.views):
            if lost:
                yield Damage(lost, view, kind, every)
                continue
            try:
                yield from _of_file(cache, view, kind)
            except (OSError, ValueError) as error:
                yield Damage(_message(error), view, kind, every)


def _of_file(cache: Cache, view: int, kind: str) -> Iterator[Damage]:
    path, written = cache.path(view, kind), cache.written(view, kind)
    blocks = tuple(cache.damaged(view, kind, np.flatnonzero(written).tolist()))
    if blocks:
        rows = cache.header.ids(blocks[0])
        more = f" and {len(blocks) - 1} more blocks" if len(blocks) > 1 else ""
        told = f"{path}: rows {rows.start} to {rows.stop - 1}{more} are not what was written"
        yield Damage(told, view, kind, blocks)
    if not written.all():
        told = f"{cache.folder}: view {view} of {kind} is written to {written.mean():.0%}"
        yield Damage(told, view, kind, ())


def _lost_encoder(cache: Cache, kind: str) -> str | None:
    """Return what is wrong with a kind's encoder, without which its rows say nothing."""
    try:
        cache.encoder(kind)
    except (OSError, ValueError) as error:
        return _message(error)
    return None


def _message(error: Exception) -> str:
    return str(error).removesuffix(f"; {MEND_HINT}")


def lost_encoders(cache: Cache) -> list[str]:
    """Return the kinds that were stored encoded, and whose encoder is gone or damaged."""
    kinds = cache.header.kinds.items()
    return [name for name, kind in kinds if kind.encoded and kind.encoded.sha256 and _lost_encoder(cache, name)]


def mark_damaged(cache: Cache, found: Iterable[Damage]) -> None:
    """Mark the damaged blocks as not written. Raises RecipeError while another process writes there, and OSError."""
    lock_folder(cache.folder)
    for damage in found:
        if damage.blocks:
            mark_blocks(cache, damage.view, damage.kind, damage.blocks)


def mark_blocks(cache: Cache, view: int, kind: str, blocks: Iterable[int]) -> None:
    """Mark some blocks as not written; all of them where the file of the digests is damaged itself."""
    try:
        digests = cache.digests(view, kind)
    except ValueError:
        digests = np.zeros((cache.header.blocks, DIGEST), np.uint8)
    digests[list(blocks)] = 0
    content = io.BytesIO()
    np.save(content, digests, allow_pickle=False)
    write_atomically(cache.digests_path(view, kind), content.getvalue())
