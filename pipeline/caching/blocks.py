"""A cache's files, written block by block so that it may be interrupted at any moment, and held against their digests.

A block's rows are written and flushed, and only then its digest: what has a digest is whole. Blocks are ranges of ids,
and ranks write different ones with plain writes, which no shared file system mixes up as it may mix up shared maps.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers.cache import DIGEST, DTYPE, Cache, block_hasher

_RESERVE = 2**30
"""Bytes of the disk that are left to others."""


class Block(NamedTuple):
    """What is written and marked as done together: a range of ids at one view, of the kinds that are not there yet."""

    view: int
    number: int
    kinds: tuple[str, ...]


def create_files(cache: Cache) -> None:
    """Create the files of all views and kinds that are not there, sparse, and again those that are damaged.

    Raises ValueError for a damaged one of which blocks are marked as written.
    """
    for view in range(cache.header.views):
        for kind in cache.header.kinds:
            _create_pair(cache, view, kind)


def _create_pair(cache: Cache, view: int, kind: str) -> None:
    """Create a view's file and that of its digests, where they are not there and whole."""
    header = cache.header
    path, digests = cache.path(view, kind), cache.digests_path(view, kind)
    if not cache.written(view, kind).any():
        # In this order: what has a digest is whole at any moment.
        digests.unlink(missing_ok=True)
        if not _is_whole(cache, view, kind):
            _create(path, DTYPE, (header.id_count, *header.kinds[kind].stored))
        _create(digests, np.dtype(np.uint8), (header.blocks, DIGEST))
    cache.rows(view, kind)  # or it raises


def _is_whole(cache: Cache, view: int, kind: str) -> bool:
    try:
        cache.rows(view, kind)
    except (OSError, ValueError):
        return False
    return True


def _create(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    # Under its own name only with its header and its whole length.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    temporary.rename(path)


def missing_blocks(cache: Cache, lost: Collection[str] = ()) -> list[Block]:
    """Return what is not written yet, and all that is of the kinds ``lost``, view by view."""
    header = cache.header
    return [
        Block(view, number, kinds)
        for view in range(header.views)
        for written in [{kind: cache.written(view, kind) & (kind not in lost) for kind in header.kinds}]
        for number in range(header.blocks)
        if (kinds := tuple(kind for kind in header.kinds if not written[kind][number]))
    ]


def check_room(cache: Cache, blocks: Iterable[Block]) -> int:
    """Return the bytes that the blocks take; raise OSError if the disk has not as many free.

    Those that are written again lie on the disk already.
    """
    header = cache.header
    taken = Counter[tuple[int, str]]()
    for block in blocks:
        for kind in block.kinds:
            taken[block.view, kind] += len(header.ids(block.number)) * header.row_bytes([kind])
    needed = sum(min(size, _not_allocated(cache, *file)) for file, size in taken.items())
    there = next(folder for folder in (cache.folder, *cache.folder.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed + _RESERVE > free:
        raise OSError(
            f"{cache.folder} needs {shown_bytes(needed)} more; its disk has {shown_bytes(free)} free, of which "
            f"{shown_bytes(_RESERVE)} are left to others; write fewer views, or encode maps (encode={{last: 256}})"
        )
    return taken.total()


def _not_allocated(cache: Cache, view: int, kind: str) -> int:
    """Return how many bytes of a view's file the disk has not given it yet."""
    path, whole = cache.path(view, kind), cache.header.id_count * cache.header.row_bytes([kind])
    return max(whole - 512 * path.stat().st_blocks, 0) if path.is_file() else whole


def write_block(cache: Cache, block: Block, answers: Iterable[tuple[range, dict[str, NDArray[np.float16]]]]) -> None:
    """Write a block: for consecutive ranges of its ids the stored rows by kind, zeros for an id without a sample."""
    files = {kind: os.open(cache.path(block.view, kind), os.O_WRONLY) for kind in block.kinds}
    seals = {kind: block_hasher(block.view, kind, block.number) for kind in block.kinds}
    first = {kind: _offset(cache.path(block.view, kind)) for kind in block.kinds}
    try:
        for ids, rows in answers:
            for kind in block.kinds:
                content = np.ascontiguousarray(rows[kind]).tobytes()
                seals[kind].update(content)
                _write_at(files[kind], content, first[kind] + ids.start * cache.header.kinds[kind].row_bytes)
        for file in files.values():
            os.fsync(file)
    finally:
        for file in files.values():
            os.close(file)
    for kind in block.kinds:
        _mark(cache.digests_path(block.view, kind), block.number, seals[kind].digest())


def _mark(path: Path, block: int, digest: bytes) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        _write_at(file, digest, _offset(path) + block * DIGEST)
    finally:
        os.close(file)


def _offset(path: Path) -> int:
    """Return where an array's first row lies in its file."""
    return np.lib.format.open_memmap(path, mode="r").offset


def _write_at(file: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        try:
            written = os.pwrite(file, left, offset)
        except OSError as error:
            raise OSError(f"a block could not be written ({error}); make room, and the same command goes on") from error
        left, offset = left[written:], offset + written


def shown_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, as disks are sold."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = min(int(np.log10(max(count, 1))) // 3, len(units) - 1)
    return f"{count / 1000**power:,.1f} {units[power]}" if power else f"{count:,.0f} bytes"
