"""Finding the damaged blocks of a cache, and marking them as not written, so that they are written again."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.runs.folder import lock_folder
from pipeline.teachers.cache import DIGEST, MEND_HINT, Cache
from shards.manifest import write_atomically


class Damage(NamedTuple):
    """The damage of the outputs of one kind at one view."""

    description: str
    """One line for the user."""
    view: int
    kind: str
    blocks: tuple[int, ...]
    """Numbers of the blocks to write again; empty if they are marked as not written already."""


def find_damage(cache: Cache) -> Iterator[Damage]:
    """Read the whole cache and yield all damaged or missing parts."""
    every = tuple(range(cache.header.blocks))
    for kind in cache.header.kinds:
        # Without its encoder, no row of a kind can be decoded: all of them are written again, with a new encoder.
        encoder_error = _check_encoder(cache, kind)
        for view in range(cache.header.views):
            if encoder_error:
                yield Damage(encoder_error, view, kind, every)
                continue
            try:
                yield from _check_file(cache, view, kind)
            except (OSError, ValueError) as error:
                yield Damage(_message(error), view, kind, every)


def _check_file(cache: Cache, view: int, kind: str) -> Iterator[Damage]:
    """Yield the damaged and the missing blocks of one file. Raises OSError or ValueError if it cannot be read."""
    path, written = cache.path(view, kind), cache.written(view, kind)
    blocks = tuple(cache.damaged(view, kind, np.flatnonzero(written).tolist()))
    if blocks:
        rows = cache.header.ids(blocks[0])
        more = f" and {len(blocks) - 1} more blocks" if len(blocks) > 1 else ""
        text = f"{path}: rows {rows.start} to {rows.stop - 1}{more} do not match their digest"
        yield Damage(text, view, kind, blocks)
    if not written.all():
        text = f"{cache.folder}: view {view} of {kind} is written to {written.mean():.0%}"
        yield Damage(text, view, kind, ())


def _check_encoder(cache: Cache, kind: str) -> str | None:
    """Return a message on the encoder of a kind if it is missing or damaged, otherwise None."""
    try:
        cache.encoder(kind)
    except (OSError, ValueError) as error:
        return _message(error)
    return None


def _message(error: Exception) -> str:
    """Return an error's text without the hint to run ``--verify``, as that is the command that calls this."""
    return str(error).removesuffix(f"; {MEND_HINT}")


def lost_encoders(cache: Cache) -> list[str]:
    """Return the encoded kinds whose encoder is missing or damaged."""
    kinds = cache.header.kinds.items()
    # In a new header, the encoders are still to be fitted and have no sha256: these are not lost.
    return [name for name, kind in kinds if kind.encoded and kind.encoded.sha256 and _check_encoder(cache, name)]


def mark_damaged(cache: Cache, found: Iterable[Damage]) -> None:
    """Mark the damaged blocks as not written.

    Raises RecipeError while another process writes to the folder, and OSError if it cannot be written.
    """
    lock_folder(cache.folder)
    for damage in found:
        if damage.blocks:
            mark_blocks(cache, damage.view, damage.kind, damage.blocks)


def mark_blocks(cache: Cache, view: int, kind: str, blocks: Iterable[int]) -> None:
    """Mark some blocks as not written, or all blocks if the file of digests is damaged itself."""
    try:
        digests = cache.digests(view, kind)
    except ValueError:
        digests = np.zeros((cache.header.blocks, DIGEST), np.uint8)
    digests[list(blocks)] = 0
    content = io.BytesIO()
    np.save(content, digests, allow_pickle=False)
    write_atomically(cache.digests_path(view, kind), content.getvalue())
